"""Attention modules with the module names that automodel-style training recipes load."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

_MAGI = {
    "nemo_automodel.components.distributed.context_parallel.magi": "cpattn.automodel.context_parallel.magi",
    "nemo_automodel.components.distributed.magi_attn_utils": "cpattn.automodel.magi_attn_utils",
}
_ATTENTION = {
    "nemo_automodel.components.attention.utils": "cpattn.automodel.attention_utils",
    "nemo_automodel.components.attention.flex_attention": "cpattn.automodel.flex_attention",
    "nemo_automodel._transformers.te_attention": "cpattn.automodel.te_attention",
}


def install(*, attention: bool = False) -> None:
    """Let NeMo Automodel find this project's modules under its own names: "magi" then is this project.

    Call it before a recipe is imported. Idempotent.

    Args:
        attention: besides the wiring of "magi", the modules of `components.attention` and TE's injection.

    Raises:
        RuntimeError: Automodel's own module of one of these names is imported already.
    """
    wanted = {**_MAGI, **(_ATTENTION if attention else {})}
    for theirs, ours in wanted.items():
        module = importlib.import_module(ours)
        if sys.modules.get(theirs, module) is not module:
            raise RuntimeError(f"{theirs} is imported already: call cpattn.automodel.install() before a recipe is")
    for theirs, ours in wanted.items():
        sys.modules[theirs] = sys.modules[ours]
    for theirs, ours in wanted.items():
        _put_into_parent(theirs, sys.modules[ours])


def _put_into_parent(name: str, module: ModuleType) -> None:
    """Make `import a.b.c as d` and `from a.b import c` find it too: they read attributes of the packages above."""
    above, _, leaf = name.rpartition(".")
    try:
        package = importlib.import_module(above)
    except ModuleNotFoundError as error:
        if error.name and f"{above}.".startswith(f"{error.name}."):
            return  # no Automodel, or one that has no such package
        raise
    setattr(package, leaf, module)
