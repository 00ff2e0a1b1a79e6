"""What a transformers mask function says, read from how it was put together.

transformers describes a layer's mask by a function of (batch, head, query, key) indices, composed of
a few named pieces. The indices are those of the whole batch, and evaluating the function takes S * S
steps, so the pieces are recognised instead. A piece that is not recognised is an error: nothing is
guessed and nothing dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .batch_layout import MaskTerm

_MODULE = "transformers.masking_utils"


def terms_of(mask_function: Callable[..., Any]) -> tuple[MaskTerm, ...]:
    """The terms whose union is the mask.

    Raises:
        ValueError: a piece of the function is not one that is known here.
    """
    name = getattr(mask_function, "__qualname__", type(mask_function).__qualname__)
    if getattr(mask_function, "__module__", None) == _MODULE:
        inside = _closure(mask_function)
        if name == "causal_mask_function":
            return (MaskTerm(causal=True),)
        if name == "bidirectional_mask_function":
            return (MaskTerm(),)
        if name == "and_masks.<locals>.and_mask":
            return _intersection([terms_of(f) for f in inside["mask_functions"]])
        if name == "or_masks.<locals>.or_mask":
            return tuple(dict.fromkeys(t for f in inside["mask_functions"] for t in terms_of(f)))
        if name == "sliding_window_overlay.<locals>.inner_mask":
            return (MaskTerm(left=int(inside["sliding_window"]) - 1),)
        if name == "sliding_window_bidirectional_overlay.<locals>.inner_mask":
            return (MaskTerm(left=int(inside["sliding_window"]), right=int(inside["sliding_window"])),)
        if name == "chunked_overlay.<locals>.inner_mask":
            return (MaskTerm(chunk=int(inside["chunk_size"])),)
        if name == "blockwise_overlay.<locals>.inner_mask":
            return (MaskTerm(blocks=inside["block_sequence_ids"]),)
        # Which tokens are padding and which share a document is known from the batch.
        if name in ("padding_mask_function.<locals>.inner_mask", "packed_sequence_mask_function.<locals>.inner_mask"):
            return (MaskTerm(),)
        if name == "remap_positions_for_packed_sequence.<locals>.inner_mask":
            return terms_of(inside["mask_function"])
    raise ValueError(
        f"the model's mask is made by {getattr(mask_function, '__module__', '?')}.{name}, which cpattn does not "
        f"know: pass the mask as an AttnMaskSpec (ContextParallel(...)(batch, spec=...)) or as a 4-D attention_mask"
    )


def _closure(function: Callable[..., Any]) -> dict[str, Any]:
    cells = getattr(function, "__closure__", None) or ()
    code = function.__code__  # type: ignore[attr-defined]
    return {name: cell.cell_contents for name, cell in zip(code.co_freevars, cells, strict=True)}


def _intersection(parts: list[tuple[MaskTerm, ...]]) -> tuple[MaskTerm, ...]:
    """And distributes over or."""
    terms: tuple[MaskTerm, ...] = (MaskTerm(),)
    for part in parts:
        terms = tuple(dict.fromkeys(_both(a, b) for a in terms for b in part))
    return terms


def _both(a: MaskTerm, b: MaskTerm) -> MaskTerm:
    if a.blocks is not None and b.blocks is not None and a.blocks is not b.blocks:
        raise ValueError("the model's mask limits blocks to other blocks: not supported")
    if a.chunk and b.chunk and a.chunk != b.chunk:
        raise ValueError(f"the model's mask has chunks of {a.chunk} and of {b.chunk}: not supported")
    return MaskTerm(
        causal=a.causal or b.causal,
        left=_least(a.left, b.left),
        right=_least(a.right, b.right),
        chunk=a.chunk or b.chunk,
        blocks=a.blocks if a.blocks is not None else b.blocks,
    )


def _least(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else min(a, b)
