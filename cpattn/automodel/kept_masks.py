"""The masks of a transformers model whose attention Automodel calls without them.

At cp > 1 Automodel registers a hook on every `self_attn` that takes the `attention_mask` away (its own sharding of
SDPA is causal and wants none; `attach_context_parallel_hooks`). This project's shard travels on that mask, and a whole
batch's says what is padding. So what a layer was called with is noted where the layer begins, and given back behind
that hook.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

from torch import nn

from cpattn.integrations.hf_model import language_model


class _Noted(threading.local):
    """The mask that a layer runs with in this thread."""

    mask: Any = None


def keep_masks(model: nn.Module) -> None:
    """Give the attention of a model's layers the mask that the layer had, where it is called without; idempotent."""
    for layer in language_model(model).modules():
        attention = layer._modules.get("self_attn")  # not by attribute: a wrapper has those of what it wraps
        if attention is None or hasattr(attention, "_cpattn_keeps_mask"):
            continue
        noted = _Noted()
        layer.register_forward_pre_hook(functools.partial(_note, noted), with_kwargs=True)
        layer.register_forward_hook(functools.partial(_forget, noted), always_call=True)
        attention.register_forward_pre_hook(functools.partial(_give_back, noted), with_kwargs=True)
        attention._cpattn_keeps_mask = True  # type: ignore[assignment]


def _note(noted: _Noted, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    noted.mask = kwargs.get("attention_mask")


def _forget(noted: _Noted, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    noted.mask = None


def _give_back(noted: _Noted, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if noted.mask is None or kwargs.get("attention_mask", noted) is not None:
        return None
    given = {name: value for name, value in kwargs.items() if name != "is_causal"}  # put there by the same hook
    return args, {**given, "attention_mask": noted.mask}
