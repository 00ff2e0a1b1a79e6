"""The layer that runs now, and what it was given of a shard: for functions that models call without saying for whom."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

from torch import nn

from .shard import LayerMask


class _Current(threading.local):
    """The masks of the layers that this thread is in, innermost last; None for one that has no shard."""

    def __init__(self) -> None:
        self.masks: list[LayerMask | None] = []


_current = _Current()


def watch_layer(layer: nn.Module, *, hands_on_mask: bool) -> None:
    """Make the mask of a layer the current one while it runs; idempotent.

    hands_on_mask: whether the layer's own forward gets the mask too, as one of attention does; else None.
    """
    if not hasattr(layer, "_cpattn_watched"):
        layer.register_forward_pre_hook(functools.partial(_enter, hands_on_mask=hands_on_mask), with_kwargs=True)
        layer.register_forward_hook(_leave, always_call=True)
        layer._cpattn_watched = True  # type: ignore[assignment]


def answering(original: Callable[..., Any], sharded: Callable[..., Any]) -> Callable[..., Any]:
    """The original, or in a layer with a shard `sharded`, which takes the layer's mask before its arguments.

    Its attribute `_cpattn_original` is the original; what has one already is returned as it is.
    """
    if hasattr(original, "_cpattn_original"):
        return original

    @functools.wraps(original)
    def answer(*args: Any, **kwargs: Any) -> Any:
        mask = _current.masks[-1] if _current.masks else None
        return original(*args, **kwargs) if mask is None else sharded(mask, *args, **kwargs)

    answer._cpattn_original = original  # type: ignore[attr-defined]
    return answer


def _enter(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, hands_on_mask: bool) -> Any:
    mask = kwargs.get("attention_mask")
    sharded = mask if isinstance(mask, LayerMask) else None
    _current.masks.append(sharded)
    if sharded is None:
        return None
    if kwargs.get("cache") is not None or kwargs.get("past_key_values") is not None:
        raise ValueError(f"{type(layer).__name__}: a cache is not supported under context parallelism")
    if hands_on_mask:
        return None
    sharded.shard.num_layers_run += 1
    return args, {**kwargs, "attention_mask": None}


def _leave(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    _current.masks.pop()
