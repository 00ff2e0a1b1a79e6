"""A module around a model that has the model's names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn


class PassThrough(nn.Module):
    """Holds a model whose parameters, buffers, state dict and attributes are its own, by the model's names."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        self._register_state_dict_hook(_drop_prefix)
        self.register_load_state_dict_pre_hook(_add_prefix)

    def __getattr__(self, name: str) -> Any:
        """What this module does not have, the model may: config, generate, device, ..."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def named_parameters(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Iterator[Any]:
        """The model's parameters by the model's names."""
        return self.model.named_parameters(prefix, recurse, remove_duplicate)

    def named_buffers(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Iterator[Any]:
        """The model's buffers by the model's names."""
        return self.model.named_buffers(prefix, recurse, remove_duplicate)


def _drop_prefix(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """The model's names in a state dict, whatever holds this module."""
    for name in [n for n in state if n.startswith(f"{prefix}model.")]:
        state[prefix + name[len(prefix) + len("model.") :]] = state.pop(name)


def _add_prefix(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in [n for n in state if n.startswith(prefix)]:
        state[f"{prefix}model.{name[len(prefix) :]}"] = state.pop(name)
