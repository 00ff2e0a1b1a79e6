"""Masks of batches that one process holds whole, lowered to `AttnMaskSpec` and attended with it.

The modules of this package meet masks in many dresses: a flag, a window, key padding [B, S],
`cu_seqlens`, a 4-D matrix. Each is brought here to segments: runs of queries against runs of keys,
with an alignment. All rows of a batch lie one after the other in one stream of B * S tokens.

One meaning of a window everywhere in this package, as in TransformerEngine and FlashAttention:
a pair (left, right) is the number of keys before and after the query's own, -1 for no limit; an int
W is W keys, the query's own included (`sliding_window` of Hugging Face), that is (W - 1, 0).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from cpattn.keys.make import make_key
from cpattn.masks.reading import Sides, brief
from cpattn.masks.spec import AttnMaskSpec
from cpattn.ops.attention import attention

NO_WINDOW: Sides = (None, None)

# Additive masks count as "masked" below this: exp of it is 0 beside any score a model produces.
MASKED_BELOW = -1e4

# Planning is numpy and caches: nothing for a compiler to trace.
_plan_eagerly = torch.compiler.disable

# Pairs of a matrix that are compared at a time.
_BLOCK_PAIRS = 1 << 24

T = TypeVar("T")


class Segment(NamedTuple):
    """Queries [q0, q1) against keys [k0, k1); query i stands at key i + shift."""

    q0: int
    q1: int
    k0: int
    k1: int
    shift: int


class PaddingFacts(NamedTuple):
    """What the values of a 2-D mask say: are there zeros, and are there document numbers above 1."""

    has_padding: bool
    has_documents: bool


def normal_window(window: Any) -> Sides:
    """A window in any accepted form as (left, right), None for no limit.

    Args:
        window: None, an int W, or a pair (left, right) as tuple or list; see the module's docstring.
            (-1, 0) is no window: that nothing ahead is seen is for the mask type to say.

    Raises:
        ValueError: not one of these.
    """
    if window is None:
        return NO_WINDOW
    if isinstance(window, int) and not isinstance(window, bool):
        return NO_WINDOW if window <= 0 else (window - 1, 0)
    if isinstance(window, (tuple, list)) and len(window) == 2:
        left, right = (None if side is None or side < 0 else int(side) for side in window)
        return NO_WINDOW if left is None and right == 0 else (left, right)
    raise ValueError(
        f"window is {window!r}: give an int W (W keys, the query's own included) or a pair "
        f"(left, right) of keys before and after, -1 for no limit"
    )


def join_windows(window_size: Any, sliding_window: Any) -> Sides:
    """The window of a call that may say it as `window_size`, as `sliding_window`, or both alike.

    Raises:
        ValueError: they disagree. Callers of the original pass the same number as either, with two
            meanings; only one of the two can be right.
    """
    window, sliding = normal_window(window_size), normal_window(sliding_window)
    if NO_WINDOW in (window, sliding):
        return sliding if window == NO_WINDOW else window
    if window != sliding:
        raise ValueError(
            f"window_size={window_size!r} and sliding_window={sliding_window!r} disagree: a pair "
            f"(left, right) leaves out the query's own key and an int counts it, so "
            f"sliding_window=W is window_size=(W - 1, 0); pass one of them"
        )
    return window


def causal_shift(seqlen_q: int, seqlen_k: int) -> int:
    """Position of the first query among the keys: the last query stands at the last key.

    With more queries than keys, the first query stands at the first key.
    """
    return max(seqlen_k - seqlen_q, 0)


class TensorMemo:
    """Remembers what was computed from a tensor's values while it lives and is not written to.

    One host sync or one mask per batch instead of one per layer. Writes are seen through the
    tensor's version counter; what goes around it (`.data`, numpy views) is not.
    """

    def __init__(self) -> None:
        self._entries: Any = WeakTensorKeyDictionary()

    def get(self, tensor: Tensor, name: Hashable, make: Callable[[], T]) -> T:
        """The value of `make()` for this tensor and name, computed if it is not known."""
        if torch.compiler.is_compiling() or tensor.is_inference() or tensor.requires_grad:
            return make()
        stamp = (tensor._version, tensor.data_ptr(), tensor.shape)
        known = self._entries.get(tensor)
        if known is None or known[0] != stamp:
            known = (stamp, {})
            self._entries[tensor] = known
        values = known[1]
        if name not in values:
            with torch.inference_mode(False):  # what is kept may meet autograd later
                values[name] = make()
        return values[name]  # type: ignore[no-any-return]


_memo = TensorMemo()


def padding_facts(attention_mask: Tensor) -> PaddingFacts:
    """Reads a 2-D mask [B, S], once per tensor (a host sync).

    Raises:
        ValueError: negative values: an additive mask, which has a row for each query.
    """

    def read() -> PaddingFacts:
        if attention_mask.numel() == 0:
            return PaddingFacts(False, False)
        low, high = torch.stack([x.to(torch.float64) for x in attention_mask.aminmax()]).tolist()
        if low < 0:
            raise ValueError(
                f"a 2-D attention_mask with values down to {low:g}: expected 1 for tokens and 0 for "
                f"padding (or document numbers from 1); additive masks are [B, 1, S_q, S_k]"
            )
        return PaddingFacts(low == 0, high > 1)

    return _memo.get(attention_mask, "facts", read)


def host_ints(values: Any, name: str) -> tuple[int, ...]:
    """The ints of a 1-D tensor or sequence; a tensor is read once (a host sync)."""
    if not isinstance(values, Tensor):
        return tuple(int(v) for v in values)
    if values.dim() != 1 or values.is_floating_point():
        raise ValueError(
            f"{name} has shape {tuple(values.shape)} and dtype {values.dtype}: expected one dimension of ints"
        )
    return _memo.get(values, "ints", lambda: tuple(values.tolist()))


# ----------------------------------------------------------------------------------------------------
# Segments of each kind of mask.


@_plan_eagerly
@lru_cache(maxsize=64)
def batch_segments(
    batch_size: int, seqlen_q: int, seqlen_k: int, block_size: int | None = None, bottom_right: bool = True
) -> tuple[Segment, ...]:
    """Rows of a batch that do not see each other, each cut into blocks that do not either.

    Args:
        block_size: tokens of a block; None for no blocks.
        bottom_right: the last query stands at the last key (see `causal_shift`), else the first at
            the first.
    """
    if block_size is None:
        shift = causal_shift(seqlen_q, seqlen_k) if bottom_right else 0
        return tuple(
            _segment((b * seqlen_q, (b + 1) * seqlen_q), (b * seqlen_k, (b + 1) * seqlen_k), shift)
            for b in range(batch_size)
        )
    if seqlen_q != seqlen_k:
        raise ValueError(
            f"blocks of {block_size} tokens over {seqlen_q} queries and {seqlen_k} keys: blocks need "
            f"as many keys as queries"
        )
    spans = [
        (b * seqlen_q + at, b * seqlen_q + min(at + block_size, seqlen_q))
        for b in range(batch_size)
        for at in range(0, seqlen_q, block_size)
    ]
    return tuple(_segment(span, span, 0) for span in spans)


@_plan_eagerly
def document_segments(
    cu_seqlens_q: Any,
    cu_seqlens_kv: Any = None,
    cu_seqlens_q_padded: Any = None,
    cu_seqlens_kv_padded: Any = None,
    *,
    num_tokens_q: int,
    num_tokens_kv: int,
    bottom_right: bool = True,
) -> tuple[Segment, ...]:
    """Packed documents from prefix sums of their lengths.

    Args:
        cu_seqlens_q, cu_seqlens_kv: [0, n0, n0 + n1, ...]; None for kv means those of q. Negative
            entries at the end are fill and dropped.
        cu_seqlens_q_padded, cu_seqlens_kv_padded: where each document starts, if there is padding
            between documents; rows of no document see nothing and are not seen.
        num_tokens_q, num_tokens_kv: rows of q and of k, which the documents must fit into.
        bottom_right: as in `batch_segments`, for each document.

    Raises:
        ValueError: not prefix sums, or documents beyond the rows.
    """
    if cu_seqlens_kv is None:
        cu_seqlens_kv = cu_seqlens_q
        if cu_seqlens_kv_padded is None:
            cu_seqlens_kv_padded = cu_seqlens_q_padded
    sums = [
        None if values is None else host_ints(values, name)
        for name, values in (
            ("cu_seqlens_q", cu_seqlens_q),
            ("cu_seqlens_kv", cu_seqlens_kv),
            ("cu_seqlens_q_padded", cu_seqlens_q_padded),
            ("cu_seqlens_kv_padded", cu_seqlens_kv_padded),
        )
    ]
    return _document_segments(*sums, num_tokens_q, num_tokens_kv, bottom_right)


@lru_cache(maxsize=64)
def _document_segments(
    q: tuple[int, ...],
    kv: tuple[int, ...],
    q_padded: tuple[int, ...] | None,
    kv_padded: tuple[int, ...] | None,
    num_tokens_q: int,
    num_tokens_kv: int,
    bottom_right: bool,
) -> tuple[Segment, ...]:
    q_spans = _document_spans(q, q_padded, num_tokens_q, "q")
    kv_spans = _document_spans(kv, kv_padded, num_tokens_kv, "kv")
    if len(q_spans) != len(kv_spans):
        raise ValueError(
            f"cu_seqlens_q has {len(q_spans)} documents and cu_seqlens_kv {len(kv_spans)}: each needs both"
        )
    return tuple(
        _segment(a, b, causal_shift(a[1] - a[0], b[1] - b[0]) if bottom_right else 0)
        for a, b in zip(q_spans, kv_spans, strict=True)
    )


def _document_spans(
    sums: tuple[int, ...], starts: tuple[int, ...] | None, num_tokens: int, name: str
) -> list[tuple[int, int]]:
    sums = _without_fill(sums)
    starts = sums if starts is None else _without_fill(starts)
    lengths = [b - a for a, b in itertools.pairwise(sums)]
    if not sums or sums[0] != 0 or min(lengths, default=0) < 0:
        raise ValueError(f"cu_seqlens_{name} is {brief(sums)}: expected sums that start at 0 and never fall")
    if len(starts) != len(sums):
        raise ValueError(
            f"cu_seqlens_{name}_padded has {len(starts)} entries and cu_seqlens_{name} {len(sums)}: "
            f"expected a start for each document, and the end"
        )
    spans = [(start, start + length) for start, length in zip(starts, lengths, strict=False)]
    for (_, end), after in zip(spans, [*starts[1:-1], num_tokens], strict=False):
        if end > after:
            raise ValueError(
                f"cu_seqlens_{name}: a document ends at row {end}, and {after} is where the next one "
                f"starts or the tensor ends; documents must fit and not overlap"
            )
    return spans


@_plan_eagerly
def padding_segments(attention_mask: Tensor, seqlen_q: int, seqlen_k: int) -> tuple[Segment, ...]:
    """Tokens of a padded batch; padding sees nothing and is not seen.

    Args:
        attention_mask: [B, >= seqlen_k], bool or numbers: 0 for padding, 1 for tokens; or the number
            of the document, from 1, that a token belongs to. Its last columns are those of the keys.
        seqlen_q: queries of each row, the last of its tokens.
    """
    batch_size, columns = attention_mask.shape
    if columns < seqlen_k:
        raise ValueError(f"attention_mask has {columns} columns for {seqlen_k} keys: expected one for each")

    def make() -> tuple[Segment, ...]:
        ids = attention_mask[:, columns - seqlen_k :].to(torch.int64).cpu().numpy()
        return tuple(
            segment for b in range(batch_size) for segment in _padding_row(ids[b], b, seqlen_q, seqlen_k)
        )

    padding_facts(attention_mask)
    return _memo.get(attention_mask, ("segments", seqlen_q, seqlen_k), make)


def _padding_row(ids: Any, row: int, seqlen_q: int, seqlen_k: int) -> Iterable[Segment]:
    """Pairs of runs of one document; where a run of queries lies in the row is kept by the shift."""
    shift = causal_shift(seqlen_q, seqlen_k)
    query_ids = ids[shift : shift + seqlen_q]
    for q0, q1 in _runs(query_ids):
        for k0, k1 in _runs(ids):
            if query_ids[q0] == ids[k0]:
                q_at, k_at = row * seqlen_q, row * seqlen_k
                yield Segment(q_at + q0, q_at + q1, k_at + k0, k_at + k1, k_at - q_at + shift)


def _runs(ids: Any) -> list[tuple[int, int]]:
    """[start, end) of equal non-zero neighbours."""
    cuts = np.flatnonzero(np.diff(ids)) + 1
    bounds = [0, *cuts.tolist(), len(ids)]
    return [(a, b) for a, b in itertools.pairwise(bounds) if b > a and ids[a]]


def _segment(q: tuple[int, int], k: tuple[int, int], shift: int) -> Segment:
    return Segment(*q, *k, k[0] - q[0] + shift)


def _without_fill(values: tuple[int, ...]) -> tuple[int, ...]:
    end = len(values)
    while end and values[end - 1] < 0:
        end -= 1
    return values[:end]


# ----------------------------------------------------------------------------------------------------
# From segments and matrices to specs.


@_plan_eagerly
@lru_cache(maxsize=64)
def spec_of_segments(
    segments: tuple[Segment, ...], num_tokens_q: int, num_tokens_kv: int, causal: bool, window: Sides
) -> AttnMaskSpec:
    """The mask in which each query sees the keys of its segments, up to its own if causal, in the window."""
    spec = AttnMaskSpec(
        [], [], [], num_tokens_q, None if num_tokens_q == num_tokens_kv else num_tokens_kv
    )
    left, right = window
    for q0, q1, k0, k1, shift in segments:
        lo = None if left is None else shift - left
        hi = None if right is None else shift + right
        if causal:
            hi = shift if hi is None else min(hi, shift)
        for rect in _band_rects(q0, q1, k0, k1, lo, hi):
            spec.q_ranges.append([rect[0], rect[1]])
            spec.k_ranges.append([rect[2], rect[3]])
            spec.mask_types.append(rect[4])
    return spec


def _band_rects(
    q0: int, q1: int, k0: int, k1: int, lo: int | None, hi: int | None
) -> Iterable[tuple[int, int, int, int, str]]:
    """Typed rectangles of the pairs (i, j) of [q0, q1) x [k0, k1) with lo <= j - i <= hi.

    Between two cuts, each edge of a row's keys either stands still (at k0 or k1) or moves with it.
    """
    left_moves_from = q1 if lo is None else k0 - lo
    right_stops_at = q0 if hi is None else k1 - 1 - hi
    cuts = sorted({q0, q1, *(min(max(c, q0), q1) for c in (left_moves_from, right_stops_at))})
    for a, b in itertools.pairwise(cuts):
        left_moves, right_moves = a >= left_moves_from, a < right_stops_at
        first = a + lo if left_moves and lo is not None else k0
        last = b + hi if right_moves and hi is not None else k1
        if left_moves and not right_moves:
            b = min(b, a + k1 - first)  # later rows have left the keys behind
        if right_moves and not left_moves:
            a = max(a, b - (last - k0))  # earlier rows have not reached the keys yet
        if a < b and max(first, k0) < min(last, k1):
            kind = {(0, 0): "full", (0, 1): "causal", (1, 0): "inv_causal", (1, 1): "bi_causal"}
            yield a, b, first, last, kind[left_moves, right_moves]


@_plan_eagerly
def spec_of_matrix(
    attention_mask: Tensor, batch_size: int, seqlen_q: int, seqlen_k: int, window: Sides = NO_WINDOW
) -> AttnMaskSpec:
    """The mask that a 4-D matrix draws; read once per tensor, at a cost that grows with S_q * S_k.

    Args:
        attention_mask: [B or 1, 1, seqlen_q, seqlen_k]; bool, True for visible, or additive with
            only 0 and values below -1e4.
        window: a limit on top of the matrix.

    Raises:
        ValueError: a bias, a mask that differs between heads, or another shape.
    """
    if (
        attention_mask.dim() != 4
        or attention_mask.shape[0] not in (1, batch_size)
        or attention_mask.shape[2:] != (seqlen_q, seqlen_k)
    ):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}: expected [B or 1, 1, S_q, S_k] with "
            f"B = {batch_size}, S_q = {seqlen_q} and S_k = {seqlen_k}"
        )
    if attention_mask.shape[1] != 1 and attention_mask.stride(1) != 0:
        raise ValueError(
            f"attention_mask has {attention_mask.shape[1]} heads: this implementation has one mask for all "
            f"heads; use attn_impl='sdpa'"
        )

    def make() -> AttnMaskSpec:
        visible = visible_pairs(attention_mask[:, :1]).expand(batch_size, 1, seqlen_q, seqlen_k)
        near = band_matrix(seqlen_q, seqlen_k, False, window, visible.device)
        spec = AttnMaskSpec(
            [], [], [], batch_size * seqlen_q, None if seqlen_q == seqlen_k else batch_size * seqlen_k
        )
        for b in range(batch_size):
            row = AttnMaskSpec.from_dense(visible[b, 0] if near is None else visible[b, 0] & near)
            spec.q_ranges += [[b * seqlen_q + x for x in pair] for pair in row.q_ranges]
            spec.k_ranges += [[b * seqlen_k + x for x in pair] for pair in row.k_ranges]
            spec.mask_types += row.mask_types
        return spec

    return _memo.get(attention_mask, ("spec", batch_size, window), make)


def visible_pairs(attention_mask: Tensor) -> Tensor:
    """A matrix mask as bool, True for visible.

    Raises:
        ValueError: an additive mask with values that are neither 0 nor below -1e4: a bias, which is
            not a mask.
    """
    if attention_mask.dtype == torch.bool:
        return attention_mask
    if not attention_mask.is_floating_point():
        raise ValueError(
            f"attention_mask has dtype {attention_mask.dtype}: a matrix mask is bool (True for visible) or "
            f"additive floats"
        )
    visible, masked = attention_mask == 0, attention_mask < MASKED_BELOW
    if attention_mask.requires_grad or not bool((visible | masked).all()):
        raise ValueError(
            "attention_mask is a bias (values other than 0 and masked, or it requires grad): this "
            "implementation takes masks only; use attn_impl='sdpa'"
        )
    return visible


def causal_left(attention_mask: Tensor) -> int | None:
    """How many keys before its own each query sees, if a matrix is surely a causal mask; else None.

    Every element is compared, once per tensor (a host sync), a block of rows at a time. Batch items or
    heads that are one expanded row are compared once. A plain causal mask gives S - 1.

    Args:
        attention_mask: [B, H, S, S], bool (True for visible) or additive fp32, bf16 or fp16: visible
            is 0 and nothing else, masked is below -1e4.

    Returns:
        None also for what cannot be looked into: other shapes and dtypes, masks that require grad, and
        while a graph is being captured or compiled.
    """
    if (
        attention_mask.dim() != 4
        or attention_mask.shape[2] != attention_mask.shape[3]
        or attention_mask.numel() == 0
        or attention_mask.dtype not in (torch.bool, torch.float32, torch.bfloat16, torch.float16)
        or attention_mask.requires_grad
        or torch.compiler.is_compiling()
    ):
        return None
    if attention_mask.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    return _memo.get(attention_mask, "causal_left", lambda: _causal_left(attention_mask))


def _causal_left(mask: Tensor) -> int | None:
    mask = mask[:1] if mask.stride(0) == 0 else mask
    mask = mask[:, :1] if mask.stride(1) == 0 else mask
    seqlen = mask.shape[-1]

    def split(rows: Tensor) -> tuple[Tensor, Tensor]:
        return (rows, ~rows) if rows.dtype == torch.bool else (rows == 0, rows < MASKED_BELOW)

    left = int(split(mask[0, 0, -1])[0].sum()) - 1
    if left < 0:
        return None
    step = max(1, _BLOCK_PAIRS // (mask.shape[0] * mask.shape[1] * seqlen))
    keys = torch.arange(seqlen, device=mask.device)
    same = torch.ones((), dtype=torch.bool, device=mask.device)
    for start in range(0, seqlen, step):
        ahead = keys - keys[start : start + step, None]
        expected = (ahead <= 0) & (ahead >= -left)
        visible, masked = split(mask[:, :, start : start + step])
        same = same & (visible == expected).all() & (masked != expected).all()
    return left if bool(same) else None


def band_matrix(
    seqlen_q: int, seqlen_k: int, causal: bool, window: Sides, device: torch.device
) -> Tensor | None:
    """The causal and windowed pairs as bool [seqlen_q, seqlen_k], True for visible; None for all of them."""
    left, right = window
    if not causal and left is None and right is None:
        return None
    shift = causal_shift(seqlen_q, seqlen_k)
    ahead = torch.arange(seqlen_k, device=device) - torch.arange(seqlen_q, device=device)[:, None] - shift
    hi = 0 if causal else right
    visible = torch.ones_like(ahead, dtype=torch.bool) if hi is None else ahead <= hi
    return visible if left is None else visible & (ahead >= -left)


@_plan_eagerly
def attend(
    q_TND: Tensor,
    k_TGD: Tensor,
    v_TGE: Tensor,
    spec: AttnMaskSpec,
    *,
    window: Sides | None = None,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
) -> Tensor:
    """Attention of this process alone over a stream of tokens: [T, N, D], [K, G, D], [K, G, E] to [T, N, E].

    See `cpattn.make_key` and `cpattn.attention` for the arguments; planned keys are cached.
    """
    if q_TND.shape[1] % k_TGD.shape[1]:
        raise ValueError(
            f"q has {q_TND.shape[1]} heads and k has {k_TGD.shape[1]}: query heads must be a multiple of "
            f"key heads; did q and k swap places?"
        )
    key = make_key(
        spec,
        num_heads_q=q_TND.shape[1],
        num_heads_kv=k_TGD.shape[1],
        head_dim=q_TND.shape[2],
        head_dim_v=v_TGE.shape[2],
        window=window,
    )
    out = attention(q_TND, k_TGD, v_TGE, key, softmax_scale=softmax_scale, softcap=softcap, sink=sink)
    assert isinstance(out, Tensor)
    return out
