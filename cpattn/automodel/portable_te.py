"""A module with the face of TransformerEngine's `DotProductAttention`, on this project's kernels.

For machines without TransformerEngine: CPUs, other GPUs, fp32. It is used where it is asked for by
name (`portable=True`), never in place of a missing package.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cpattn import te_ops
from cpattn.masks.spec import AttnMaskSpec

from .local_masks import (
    TensorMemo,
    attend,
    batch_segments,
    document_segments,
    normal_window,
    padding_segments,
    spec_of_matrix,
    spec_of_segments,
)

MASK_TYPES = (*te_ops.MASK_TYPES, "arbitrary")
SOFTMAX_TYPES = te_ops.SOFTMAX_TYPES

_inverted = TensorMemo()


class PortableDotProductAttention(nn.Module):
    """Attention with the constructor and call arguments of `DotProductAttention` that matter.

    Args:
        num_attention_heads: query heads, before tensor parallelism.
        kv_channels: head dim, or (head dim of q and k, head dim of v).
        num_gqa_groups: key heads; None means as many as query heads.
        attention_dropout: must be 0 in training: the kernels have none.
        qkv_format: "sbhd", "bshd" or "thd".
        attn_mask_type: one of MASK_TYPES. causal is aligned top-left, causal_bottom_right bottom-right.
        window_size: (left, right), keys before and after the query's own; -1 or None for no limit.
        tp_size: ranks that share the heads.
        softmax_scale: None is head dim ** -0.5.
        softmax_type: "learnable" has a parameter `softmax_offset` [num_attention_heads / tp_size], a
            logit per head without a value, zero at first; "off-by-one" is that with zeros for good.

    Raises:
        ValueError: an unknown name, or heads that do not divide.
    """

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int | tuple[int, int],
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
        window_size: tuple[int, int] | None = None,
        tp_size: int = 1,
        softmax_scale: float | None = None,
        softmax_type: str = "vanilla",
    ) -> None:
        super().__init__()
        num_gqa_groups = num_attention_heads if num_gqa_groups is None else num_gqa_groups
        for name, heads in (("num_attention_heads", num_attention_heads), ("num_gqa_groups", num_gqa_groups)):
            if heads < 1 or heads % tp_size:
                raise ValueError(f"{name} is {heads} and tp_size is {tp_size}: heads must divide by it")
        if num_attention_heads % num_gqa_groups:
            raise ValueError(
                f"num_attention_heads is {num_attention_heads} and num_gqa_groups is {num_gqa_groups}: the "
                f"first must be a multiple of the second"
            )
        _one_of("softmax_type", softmax_type, SOFTMAX_TYPES)
        _one_of("qkv_format", qkv_format, ("sbhd", "bshd", "thd"))
        _one_of("attn_mask_type", attn_mask_type, MASK_TYPES)
        self.num_heads_q = num_attention_heads // tp_size
        self.num_heads_kv = num_gqa_groups // tp_size
        self.head_dims = kv_channels if isinstance(kv_channels, tuple) else (kv_channels, kv_channels)
        self.attention_dropout = attention_dropout
        self.qkv_format = qkv_format
        self.attn_mask_type = attn_mask_type
        self.window_size = window_size
        self.softmax_scale = softmax_scale
        self.softmax_type = softmax_type
        self.softmax_offset: Tensor | None
        offset = torch.zeros(self.num_heads_q, dtype=torch.float32)
        if softmax_type == "learnable":
            self.softmax_offset = nn.Parameter(offset)
        else:
            self.register_buffer("softmax_offset", None if softmax_type == "vanilla" else offset, persistent=False)

    def forward(
        self,
        query_layer: Tensor,
        key_layer: Tensor,
        value_layer: Tensor,
        attention_mask: Tensor | None = None,
        qkv_format: str | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_kv: Tensor | None = None,
        cu_seqlens_q_padded: Tensor | None = None,
        cu_seqlens_kv_padded: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        attn_mask_type: str | None = None,
        window_size: tuple[int, int] | None = None,
        pad_between_seqs: bool | None = None,
    ) -> Tensor:
        """Attention output with heads and head dim joined, as TransformerEngine returns it.

        Args:
            query_layer, key_layer, value_layer: [B, S, heads, dim], [S, B, heads, dim] or
                [T, heads, dim], as `qkv_format` says.
            attention_mask: bool, True for masked. padding types: [B, 1, 1, S]; arbitrary:
                [B or 1, 1, S_q, S_k].
            cu_seqlens_*: prefix sums of the documents' lengths (thd), and where they start if padded.
            max_seqlen_*, pad_between_seqs: accepted and not needed.
            qkv_format, attn_mask_type, window_size: for this call; None is what the constructor got.

        Returns:
            [B, S, heads * dim of v], [S, B, ...] or [T, ...], in q's dtype. Padding rows are 0.

        Raises:
            ValueError: a mask that the type leaves unused or needs and has not, dropout in training.
        """
        if self.attention_dropout and self.training:
            raise ValueError(
                f"attention_dropout is {self.attention_dropout}: this module has no dropout; train with 0, "
                f"or use TransformerEngine or attn_impl='sdpa'"
            )
        qkv_format = _one_of("qkv_format", qkv_format or self.qkv_format, ("sbhd", "bshd", "thd"))
        mask_type = _one_of("attn_mask_type", attn_mask_type or self.attn_mask_type, MASK_TYPES)
        window = self.window_size if window_size is None else window_size
        self._check_shapes(query_layer, key_layer, value_layer)
        q, k, v = (
            x.transpose(0, 1) if qkv_format == "sbhd" else x for x in (query_layer, key_layer, value_layer)
        )
        if qkv_format == "thd":
            if cu_seqlens_q is None:
                raise ValueError("qkv_format is 'thd' and cu_seqlens_q is None: packed tokens need both cu_seqlens")
            if attention_mask is not None:
                raise ValueError("attention_mask with qkv_format 'thd': cu_seqlens_q and _kv say what is padding")
            segments = document_segments(
                cu_seqlens_q,
                cu_seqlens_kv,
                cu_seqlens_q_padded,
                cu_seqlens_kv_padded,
                num_tokens_q=len(q),
                num_tokens_kv=len(k),
                bottom_right="bottom_right" in mask_type,
            )
            spec = spec_of_segments(segments, len(q), len(k), "causal" in mask_type, normal_window(window))
            return self._attend(q, k, v, spec).flatten(1)
        spec = _batch_spec(mask_type, attention_mask, cu_seqlens_q, q.shape[0], q.shape[1], k.shape[1], window)
        out = self._attend(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), spec)
        out = out.flatten(1).unflatten(0, q.shape[:2])
        return out.transpose(0, 1).contiguous() if qkv_format == "sbhd" else out

    def _attend(self, q_TND: Tensor, k_TGD: Tensor, v_TGE: Tensor, spec: AttnMaskSpec) -> Tensor:
        return attend(
            q_TND, k_TGD, v_TGE, spec, softmax_scale=self.softmax_scale, sink=self.softmax_offset
        )

    def _check_shapes(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        got = (*q.shape[-2:], *k.shape[-2:], *v.shape[-2:])
        dim, dim_v = self.head_dims
        expected = (self.num_heads_q, dim, self.num_heads_kv, dim, self.num_heads_kv, dim_v)
        if got != expected:
            raise ValueError(
                f"q, k and v have (heads, head dim) {got[:2]}, {got[2:4]} and {got[4:]}: this module was made "
                f"for {expected[:2]}, {expected[2:4]} and {expected[4:]}"
            )


def _batch_spec(
    mask_type: str,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    batch_size: int,
    seqlen_q: int,
    seqlen_k: int,
    window_size: Any,
) -> AttnMaskSpec:
    """The mask of a batch [B, S] under a mask type of TransformerEngine."""
    window, causal = normal_window(window_size), "causal" in mask_type
    needs_mask = "padding" in mask_type or mask_type == "arbitrary"
    if (attention_mask is not None) != needs_mask:
        raise ValueError(
            f"attn_mask_type is {mask_type!r} and attention_mask is "
            f"{'given' if attention_mask is not None else 'None'}: padding types and 'arbitrary' take a mask, "
            f"the others do not look at one"
        )
    if cu_seqlens is not None:
        raise ValueError("cu_seqlens_q with a batch [B, S]: give packed tokens with qkv_format='thd'")
    if attention_mask is None:
        segments = batch_segments(
            batch_size, seqlen_q, seqlen_k, bottom_right="bottom_right" in mask_type
        )
        return spec_of_segments(segments, batch_size * seqlen_q, batch_size * seqlen_k, causal, window)
    if attention_mask.dtype != torch.bool:
        raise ValueError(f"attention_mask has dtype {attention_mask.dtype}: expected bool, True for masked")
    visible = _inverted.get(attention_mask, "inverted", attention_mask.logical_not)
    if mask_type == "arbitrary":
        return spec_of_matrix(visible, batch_size, seqlen_q, seqlen_k, window)
    if tuple(attention_mask.shape) != (batch_size, 1, 1, seqlen_k):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}: {mask_type!r} expects "
            f"{(batch_size, 1, 1, seqlen_k)}, True for padding"
        )
    tokens = _inverted.get(attention_mask, "tokens", lambda: visible[:, 0, 0])
    segments = padding_segments(tokens, seqlen_q, seqlen_k)
    return spec_of_segments(segments, batch_size * seqlen_q, batch_size * seqlen_k, causal, window)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}: expected one of {', '.join(allowed)}")
    return value
