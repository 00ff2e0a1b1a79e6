"""What tests of distributed attention need: ranks on one machine, an exact oracle, random masks.

`run_on_ranks` and pytest's mark `ranks` run a function on several processes; `oracle` and `dense_attention` compute
attention by the definition in fp64, under a mask that comes straight from the spec. See docs/testing.md.

The names load on first use: pytest loads the plugin beside them in runs that need no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .dense import (
        Inputs,
        Results,
        assert_as_exact_as_sdpa,
        assert_exact,
        dense_attention,
        make_inputs,
        oracle,
        torch_sdpa,
    )
    from .harness import RankError, fresh_group, run_on_ranks, shutdown_pools
    from .masks import MASKS
    from .plans import require_exact_plan
    from .random_cases import random_spec
    from .rank_cases import run_attention, run_with_key

__all__ = [
    "MASKS",
    "Inputs",
    "RankError",
    "Results",
    "assert_as_exact_as_sdpa",
    "assert_exact",
    "dense_attention",
    "fresh_group",
    "make_inputs",
    "oracle",
    "random_spec",
    "require_exact_plan",
    "run_attention",
    "run_on_ranks",
    "run_with_key",
    "shutdown_pools",
    "torch_sdpa",
]

_MODULE_OF = {
    **dict.fromkeys(("RankError", "fresh_group", "run_on_ranks", "shutdown_pools"), "harness"),
    **dict.fromkeys(("Inputs", "Results", "make_inputs", "dense_attention", "oracle", "torch_sdpa"), "dense"),
    **dict.fromkeys(("assert_exact", "assert_as_exact_as_sdpa"), "dense"),
    **dict.fromkeys(("run_attention", "run_with_key"), "rank_cases"),
    "MASKS": "masks",
    "random_spec": "random_cases",
    "require_exact_plan": "plans",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
