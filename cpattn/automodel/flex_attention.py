"""`FlexAttention`: attention with causal, block-causal, windowed and blocked masks, and sinks.

Computes with this project's kernels, so it trains on CPU as well as on GPUs, and a new length or
batch size compiles nothing. torch's own flex attention is used where it is put in by hand, see
`FlexAttention.flex_attn`.

Shape legend: B batch, N query heads, G key heads, Q queries, K keys, D and E head dims of k and v.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, MutableMapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import (
    BlockMask,
    _mask_mod_signature,
    create_block_mask,
    flex_attention,
)

from cpattn.masks.reading import Sides
from cpattn.masks.spec import AttnMaskSpec

from .local_masks import (
    attend,
    batch_segments,
    causal_shift,
    document_segments,
    normal_window,
    spec_of_segments,
)

FLEX_ATTN_MASK_T = tuple[str, int | None] | tuple[int, int, int]

ATTN_MASK_TYPES = ("causal", "block_causal", "no_mask")
MAX_CACHED_MASKS = 32

_compiled: Callable[..., Any] | None = None
_masks_lock = threading.Lock()


def _torch_flex_attention(*args: Any, **kwargs: Any) -> Any:
    """torch's `flex_attention`, compiled on CUDA (at the first call); elsewhere eager and without gradient."""
    global _compiled
    if args[0].device.type != "cuda":
        return flex_attention(*args, **kwargs)
    if _compiled is None:
        _compiled = torch.compile(flex_attention, dynamic=True)
    return _compiled(*args, **kwargs)


class FlexAttention(nn.Module):
    """Causal or block-causal attention over [B, heads, S, dim], with optional window and sinks.

    Args:
        attn_mask_type: "causal": a query sees the keys up to its own; with more keys than queries the
            last query stands at the last key. "block_causal": the same within documents, which
            `set_documents` gives before the forward. "no_mask": every query sees every key.
        fixed_block_size: cut each sequence into blocks of this many tokens that do not see each other,
            on top of the mask type (and of the documents: blocks count from the row's start).

    Class attributes, shared by all instances:
        flex_attn: torch's `flex_attention`. It is not called unless it is replaced: an assignment
            such as `FlexAttention.flex_attn = torch.nn.attention.flex_attention.flex_attention` makes
            the forward go through it, with a BlockMask.
        block_masks: the latest masks prepared, at most 32.

    Raises:
        ValueError: an unknown mask type, or a block size below 1.
    """

    flex_attn: ClassVar[Callable[..., Any]] = staticmethod(_torch_flex_attention)
    block_masks: ClassVar[MutableMapping[Any, AttnMaskSpec | BlockMask]] = OrderedDict()

    def __init__(self, attn_mask_type: str = "causal", fixed_block_size: int | None = None) -> None:
        super().__init__()
        if attn_mask_type not in ATTN_MASK_TYPES:
            raise ValueError(f"attn_mask_type is {attn_mask_type!r}: expected one of {', '.join(ATTN_MASK_TYPES)}")
        if fixed_block_size is not None and fixed_block_size < 1:
            raise ValueError(f"fixed_block_size is {fixed_block_size}: a block has at least 1 token")
        self.attn_mask_type = attn_mask_type
        self.fixed_block_size = fixed_block_size
        self._documents: tuple[tuple[int, ...], ...] | None = None

    @property
    def mask_key(self) -> FLEX_ATTN_MASK_T:
        """(attn_mask_type, fixed_block_size)."""
        return self.attn_mask_type, self.fixed_block_size

    def set_documents(self, batch: Tensor | None, eos_id: int | None = None) -> None:
        """Documents of the batches to come, for "block_causal"; read now (a host sync).

        Args:
            batch: [B, S] token ids; None forgets the documents.
            eos_id: the id that ends a document and belongs to it.

        Raises:
            ValueError: batch is not [B, S], or eos_id is missing.
        """
        if batch is None:
            self._documents = None
            return
        if batch.dim() != 2 or eos_id is None:
            raise ValueError(
                f"set_documents: batch has shape {tuple(batch.shape)} and eos_id is {eos_id}: expected token "
                f"ids [B, S] and the id that ends a document"
            )
        ids = _document_ids(batch, eos_id).cpu()
        self._documents = tuple(tuple(torch.bincount(row).tolist()) for row in ids)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None = None,
        sink_weights: Tensor | None = None,
        sliding_window: int = 0,
        enable_gqa: bool = False,
        *,
        mask: AttnMaskSpec | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """Attention output [B, N, Q, E] in q's dtype.

        Args:
            q: [B, N, Q, D]. k: [B, G, K, D]. v: [B, G, K, E]; fp64, fp32, bf16 or fp16.
            scale: factor on the scores; None is D ** -0.5.
            sink_weights: [N], a logit for each head that joins the softmax and has no value.
            sliding_window: W keys, the query's own included; 0 for no window.
            enable_gqa: N may be a multiple of G.
            mask: instead of the module's own: over B * Q queries and B * K keys, rows of the batch
                one after the other. A window still limits it, where Q = K.
            softcap: c makes scores c * tanh(scores / c).

        A query that sees no key gives 0.

        Raises:
            ValueError: shapes that do not fit, documents missing for "block_causal" or not of this
                batch's shape.
        """
        self._check(q, k, v, enable_gqa)
        window = normal_window(int(sliding_window or 0))
        if type(self).flex_attn is not _torch_flex_attention:
            if mask is not None or softcap is not None:
                raise ValueError("mask and softcap are not for a replaced flex_attn: it knows BlockMask only")
            return self._replaced_forward(q, k, v, scale, sink_weights, window, enable_gqa)
        limit = None
        if mask is None:
            mask = self._spec(q.shape, k.shape, window)
        elif window[0] is not None:
            limit = (window[0], None)
        out = attend(
            *(x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)),
            mask,
            window=limit,
            softmax_scale=scale,
            softcap=softcap,
            sink=sink_weights,
        )
        return out.unflatten(0, (q.shape[0], q.shape[2])).transpose(1, 2)

    @staticmethod
    def _check(q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool) -> None:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        if q.dim() != 4 or k.dim() != 4 or v.dim() != 4 or k.shape[:3] != v.shape[:3]:
            raise ValueError(f"{shapes}: expected [B, N, Q, D], [B, G, K, D] and [B, G, K, E]")
        if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
            raise ValueError(f"{shapes}: q and k need the same batch size and head dim")
        if q.shape[1] != k.shape[1] and not enable_gqa:
            raise ValueError(f"{shapes}: {q.shape[1]} query heads share {k.shape[1]} key heads: pass enable_gqa=True")

    def _spec(self, q_shape: torch.Size, k_shape: torch.Size, window: Sides) -> AttnMaskSpec:
        """The module's mask for a batch; kept in `block_masks`."""
        batch_size, num_q, num_k = q_shape[0], q_shape[2], k_shape[2]
        documents = self._documents_of(batch_size, num_q, num_k)
        key = (self.mask_key, documents, window, batch_size, num_q, num_k)

        def make() -> AttnMaskSpec:
            if documents is None:
                segments = batch_segments(batch_size, num_q, num_k, self.fixed_block_size)
            else:
                cuts = _cuts(documents, self.fixed_block_size)
                segments = document_segments(cuts, num_tokens_q=cuts[-1], num_tokens_kv=cuts[-1])
            causal = self.attn_mask_type != "no_mask"
            return spec_of_segments(segments, batch_size * num_q, batch_size * num_k, causal, window)

        return self._cached(key, make)

    def _documents_of(self, batch_size: int, num_q: int, num_k: int) -> tuple[tuple[int, ...], ...] | None:
        if self.attn_mask_type != "block_causal":
            return None
        if self._documents is None:
            raise ValueError(
                "attn_mask_type is 'block_causal' and no documents are known: call set_documents(batch, "
                "eos_id) before the forward, or pass mask="
            )
        lengths = {sum(row) for row in self._documents}
        if len(self._documents) != batch_size or lengths != {num_q} or num_q != num_k:
            raise ValueError(
                f"set_documents saw {len(self._documents)} rows of {sorted(lengths)} tokens, and q has "
                f"{batch_size} rows of {num_q}, k of {num_k}: set the documents of each batch"
            )
        return self._documents

    @classmethod
    def _cached(cls, key: Any, make: Callable[[], Any]) -> Any:
        masks = cls.block_masks
        with _masks_lock:
            if key not in masks:
                while len(masks) >= MAX_CACHED_MASKS:
                    masks.pop(next(iter(masks)))
                masks[key] = make()
            return masks[key]

    def _replaced_forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None,
        sink_weights: Tensor | None,
        window: Sides,
        enable_gqa: bool,
    ) -> Tensor:
        """Through a `flex_attn` that someone has put in, with a BlockMask that no head or row repeats."""
        options = {
            "block_mask": self._block_mask(q, k, window),
            "scale": scale,
            "enable_gqa": enable_gqa,
        }
        flex_attn = type(self).flex_attn
        if sink_weights is None:
            return flex_attn(q, k, v, **options)  # type: ignore[no-any-return]
        out, lse = flex_attn(q, k, v, **options, return_lse=True)
        # The sink's share of the softmax is exp(sink) / (exp(sink) + exp(lse)).
        kept = torch.sigmoid(lse - sink_weights.to(lse.dtype)[:, None])
        return (out * kept.unsqueeze(-1)).to(q.dtype)

    def _block_mask(self, q: Tensor, k: Tensor, window: Sides) -> BlockMask:
        num_q, num_k = q.shape[2], k.shape[2]
        documents = self._documents_of(q.shape[0], num_q, num_k)
        key = ("block_mask", self.mask_key, documents, window, num_q, num_k, q.device)

        def make() -> BlockMask:
            shift = causal_shift(num_q, num_k)
            mods = [] if self.attn_mask_type == "no_mask" else [_shifted(self._get_causal_mask_mod(), shift)]
            if window[0] is not None:
                mods.append(_shifted(self._get_sliding_window_mask_mod(window[0] + 1), shift))
            if documents is not None:
                mods.append(_same_document(documents, q.device))
            mask_mod = _all_of(mods)
            if self.fixed_block_size is not None:
                mask_mod = self._fixed_block_mask_mod(mask_mod, self.fixed_block_size)
            rows = None if documents is None else q.shape[0]
            return create_block_mask(mask_mod, rows, None, num_q, num_k, device=q.device)

        return self._cached(key, make)  # type: ignore[no-any-return]

    @staticmethod
    def _get_causal_mask_mod() -> _mask_mod_signature:
        """Mask mod: a query sees the keys up to its own index."""

        def causal_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return kv_idx <= q_idx

        return causal_mask

    @staticmethod
    def _get_sliding_window_mask_mod(window: int) -> _mask_mod_signature:
        """Mask mod: causal, and only `window` keys, the query's own included (q_idx - kv_idx < window)."""

        def sliding_window_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return (kv_idx <= q_idx) & (q_idx - kv_idx < window)

        return sliding_window_mask

    @staticmethod
    def _get_block_causal_mask_mod(batch: Tensor, eos_id: int) -> _mask_mod_signature:
        """Mask mod: causal within documents.

        Args:
            batch: [B, S] token ids; they stay as they are.
            eos_id: the id that ends a document and belongs to it.
        """
        document = _document_ids(batch, eos_id)

        def block_causal_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return (document[b, q_idx] == document[b, kv_idx]) & (kv_idx <= q_idx)

        return block_causal_mask

    @staticmethod
    def _fixed_block_mask_mod(mask_mod: _mask_mod_signature, fixed_block_size: int) -> _mask_mod_signature:
        """Mask mod: `mask_mod` within blocks of `fixed_block_size` tokens, nothing between blocks.

        `mask_mod` sees the indices as they are, not counted from the block's start: mods that look up
        documents by index stay right.
        """

        def blocked_mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            same_block = q_idx // fixed_block_size == kv_idx // fixed_block_size
            return same_block & mask_mod(b, h, q_idx, kv_idx)

        inner = getattr(mask_mod, "__name__", type(mask_mod).__name__)
        blocked_mask_mod.__name__ = f"blocked_mask_mod_{inner}_fixed_block_size_{fixed_block_size}"
        return blocked_mask_mod


def _document_ids(batch: Tensor, eos_id: int) -> Tensor:
    """For each token of [B, S] the number of documents that ended before it in its row, int64."""
    ended = (batch == eos_id).to(torch.int64).cumsum(dim=1)
    return ended - (batch == eos_id).to(torch.int64)


def _cuts(documents: tuple[tuple[int, ...], ...], block_size: int | None) -> tuple[int, ...]:
    """Prefix sums of the documents of all rows, cut at the rows' blocks too."""
    cuts, row = {0}, 0
    for lengths in documents:
        at = row
        for length in lengths:
            at += length
            cuts.add(at)
        if block_size is not None:
            cuts.update(range(row, at, block_size))
        row = at
    return tuple(sorted(cuts))


def _shifted(mask_mod: _mask_mod_signature, shift: int) -> _mask_mod_signature:
    """`mask_mod` for queries that start at key `shift`."""
    if shift == 0:
        return mask_mod

    def shifted_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return mask_mod(b, h, q_idx + shift, kv_idx)

    return shifted_mask


def _same_document(documents: tuple[tuple[int, ...], ...], device: torch.device) -> _mask_mod_signature:
    document = torch.stack(
        [torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in documents]
    ).to(device)

    def same_document(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return document[b, q_idx] == document[b, kv_idx]

    return same_document


def _all_of(mods: list[_mask_mod_signature]) -> _mask_mod_signature:
    def visible(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        result = kv_idx >= 0
        for mod in mods:
            result = result & mod(b, h, q_idx, kv_idx)
        return result

    return visible
