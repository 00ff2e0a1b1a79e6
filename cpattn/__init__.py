"""cpattn: exact context-parallel attention for PyTorch.

The public names load on first use (PEP 562): `import cpattn.solver` in a planning process loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .integrations.hf_register import register_when_imported
from .runtime.at_exit import rest_at_exit as _rest_at_exit

if TYPE_CHECKING:
    from cpattn.checks.report import Verification
    from cpattn.checks.verify import verify
    from cpattn.decoding.generation import ModelShape, generate
    from cpattn.decoding.kv_cache import PagedKVCache
    from cpattn.keys.ahead import keys_ahead
    from cpattn.keys.cache import clear_key_cache
    from cpattn.keys.key import AttnKey
    from cpattn.keys.make import make_key
    from cpattn.masks.spec import AttnMaskSpec
    from cpattn.ops.attention import attention
    from cpattn.ops.checkpointing import attention_checkpoint_contexts, attention_checkpoint_policy
    from cpattn.ops.fetch import fetch, local_attention
    from cpattn.ops.layout import dispatch, position_ids, roll, undispatch
    from cpattn.planning.ahead import plan_ahead
    from cpattn.planning.options import LayerKind
    from cpattn.planning.ready import ReadyPlan, make_plan
    from cpattn.runtime.recording import profile
    from cpattn.runtime.replicas import require_replicated

__version__ = "0.1.0"

__all__ = [
    "AttnKey",
    "AttnMaskSpec",
    "LayerKind",
    "ModelShape",
    "PagedKVCache",
    "ReadyPlan",
    "Verification",
    "__version__",
    "attention",
    "attention_checkpoint_contexts",
    "attention_checkpoint_policy",
    "clear_key_cache",
    "dispatch",
    "fetch",
    "generate",
    "keys_ahead",
    "local_attention",
    "make_key",
    "make_plan",
    "plan_ahead",
    "position_ids",
    "profile",
    "require_replicated",
    "roll",
    "undispatch",
    "verify",
]

_MODULE_OF = {
    "AttnKey": "keys.key",
    "AttnMaskSpec": "masks.spec",
    "LayerKind": "planning.options",
    "ReadyPlan": "planning.ready",
    "ModelShape": "decoding.generation",
    "PagedKVCache": "decoding.kv_cache",
    "attention": "ops.attention",
    "attention_checkpoint_contexts": "ops.checkpointing",
    "attention_checkpoint_policy": "ops.checkpointing",
    "clear_key_cache": "keys.cache",
    "dispatch": "ops.layout",
    "fetch": "ops.fetch",
    "keys_ahead": "keys.ahead",
    "local_attention": "ops.fetch",
    "generate": "decoding.generation",
    "make_key": "keys.make",
    "make_plan": "planning.ready",
    "plan_ahead": "planning.ahead",
    "position_ids": "ops.layout",
    "profile": "runtime.recording",
    "require_replicated": "runtime.replicas",
    "roll": "ops.layout",
    "undispatch": "ops.layout",
    "Verification": "checks.report",
    "verify": "checks.verify",
}


# Loads nothing: transformers may come later, or never.
register_when_imported()


def __getattr__(name: str) -> Any:
    """Import the module that defines the public name `name`; later look-ups find it here."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})


_rest_at_exit()  # now, as handlers run last in, first out: whatever a script registers after this comes before
