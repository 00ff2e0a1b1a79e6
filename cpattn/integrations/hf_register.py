"""transformers is told of "cpattn": when it is asked to be, and by itself as soon as it is imported.

`attn_implementation="cpattn"` then works in a script that forgot `register_attention()`, whatever is imported first.
Where this package is installed, the script need not import it at all: torch calls what packages name as entry points
of `torch.backends` when it is imported (TORCH_DEVICE_BACKEND_AUTOLOAD=0 turns that off), and we name
`register_when_imported`. This module imports neither torch nor transformers.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_MODELING, _TRAINER = "transformers.modeling_utils", "transformers.trainer"
_names: set[str] = set()


def register_attention(name: str = "cpattn") -> None:
    """Make `attn_implementation=name` known to transformers, for attention and for masks. Idempotent.

    The mask is registered too, because transformers makes no mask at all, not even for padding, for an
    attention that has none. From then on loading a model by this name is refused, by the model's name, where
    the model does not attend through transformers' attention interface (it would run, or fail, without cpattn).
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import PreTrainedModel

    from .hf_attention import cpattn_attention, cpattn_mask

    AttentionInterface.register(name, cpattn_attention)
    AttentionMaskInterface.register(name, cpattn_mask)
    if not _names:
        PreTrainedModel._check_and_adjust_attn_implementation = _checking(  # type: ignore[method-assign]
            PreTrainedModel._check_and_adjust_attn_implementation
        )
    _names.add(name)


def register_when_imported() -> None:
    """Register "cpattn" now if transformers has been imported, else when it is; its Trainer is watched likewise."""
    _when_imported(_MODELING, register_attention)
    _when_imported(_TRAINER, _watch_trainers)


def _watch_trainers() -> None:
    from .forgotten import watch_trainers

    watch_trainers()


def _when_imported(name: str, then: Callable[[], None]) -> None:
    if _is_ready(name):
        then()
    elif not any(isinstance(finder, _AfterImport) and finder.name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport(name, then))


def _is_ready(name: str) -> bool:
    """Whether a module has been imported; not while it is, which may be what imports torch."""
    module = sys.modules.get(name)
    return module is not None and not getattr(module.__spec__, "_initializing", False)


class _AfterImport(MetaPathFinder):
    """Finds nothing itself: calls `then` once the module has been imported."""

    def __init__(self, name: str, then: Callable[[], None]) -> None:
        self.name, self.then = name, then

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name.startswith("transformers.") and _is_ready(self.name):  # it was being imported when we came
            sys.meta_path.remove(self)
            self.then()
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_tell(module: ModuleType) -> None:
                execute(module)
                self.then()

            spec.loader.exec_module = execute_and_tell  # type: ignore[method-assign]
        return spec


def _checking(check: Any) -> Any:
    """transformers' check of an attention implementation when a model is built or changed, and ours."""

    @functools.wraps(check)
    def checked(self: Any, attn_implementation: str | None, *args: Any, **kwargs: Any) -> Any:
        applied = check(self, attn_implementation, *args, **kwargs)
        if attn_implementation in _names and not (
            _attends_by_interface(type(self), attn_implementation) or _is_served(self)
        ):
            raise ValueError(
                f"{type(self).__name__} does not attend through transformers' attention interface, so "
                f"attn_implementation={attn_implementation!r} would not be used, and cpattn cannot shard it: load it "
                f"with attn_implementation='eager'"
            )
        if attn_implementation in _names:
            _refuse_indexers(self)
        return applied

    return checked


def _refuse_indexers(model: Any) -> None:
    from .hf_model import indexers

    fields = indexers(model.config)
    if fields:
        raise ValueError(
            f"{type(model).__name__} has layers that choose keys by an indexer ({', '.join(fields)} in its config) "
            f"and use the mask themselves: load it with attn_implementation='eager'; cpattn cannot shard it"
        )


def _is_served(model: Any) -> bool:
    from .hf_model import attends_by_itself

    return attends_by_itself(model.config)


def _attends_by_interface(kind: Any, name: str | None) -> bool:
    """As transformers itself judges, by the model's source; a model that it cannot read is trusted.

    One that looks its layers up by the attention's name (GIT) would fail by a KeyError.
    """
    module = sys.modules.get(kind.__module__)
    if module is None or not getattr(module, "__file__", None):
        return True
    tables = [value for field, value in vars(module).items() if field.endswith("_ATTENTION_CLASSES")]
    if any(isinstance(table, dict) and name not in table for table in tables):
        return False
    judge = getattr(kind, "_can_set_attn_implementation", None)
    return True if judge is None else bool(judge())
