"""cpattn: exact context-parallel attention for PyTorch.

The public names load on first use (PEP 562): `import cpattn.solver` in a planning process loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cpattn.attention_op import attention
    from cpattn.checkpointing import attention_checkpoint_contexts, attention_checkpoint_policy
    from cpattn.generation import ModelShape, generate
    from cpattn.key import AttnKey, make_key
    from cpattn.kv_cache import PagedKVCache
    from cpattn.layout import dispatch, position_ids, roll, undispatch
    from cpattn.mask_spec import AttnMaskSpec
    from cpattn.planning import LayerKind, ReadyPlan, make_plan, plan_ahead
    from cpattn.profiling import profile

__version__ = "0.1.0"

__all__ = [
    "AttnKey",
    "AttnMaskSpec",
    "LayerKind",
    "ModelShape",
    "PagedKVCache",
    "ReadyPlan",
    "__version__",
    "attention",
    "attention_checkpoint_contexts",
    "attention_checkpoint_policy",
    "dispatch",
    "generate",
    "make_key",
    "make_plan",
    "plan_ahead",
    "position_ids",
    "profile",
    "roll",
    "undispatch",
]

_MODULE_OF = {
    "AttnKey": "key",
    "AttnMaskSpec": "mask_spec",
    "LayerKind": "planning",
    "ReadyPlan": "planning",
    "ModelShape": "generation",
    "PagedKVCache": "kv_cache",
    "attention": "attention_op",
    "attention_checkpoint_contexts": "checkpointing",
    "attention_checkpoint_policy": "checkpointing",
    "dispatch": "layout",
    "generate": "generation",
    "make_key": "key",
    "make_plan": "planning",
    "plan_ahead": "planning",
    "position_ids": "layout",
    "profile": "profiling",
    "roll": "layout",
    "undispatch": "layout",
}


def __getattr__(name: str) -> Any:
    """Import the module that defines the public name `name`; later look-ups find it here."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
