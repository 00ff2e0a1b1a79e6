"""Fakes of the flash-attention family: torch's aten ops, flash-attn 2, 3 and 4.

Common contract: packed rows, int32 prefix sums, a bottom-right aligned window, lse [N, T] in natural
log with +inf in rows that see nothing, rows that no sequence covers within max_seqlen unwritten.
"""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .dense import ContractError, attend, attend_backward, band, bind_schema, check_lengths, check_rows, require

BREAKABLE = ("top_left", "lse_base_2", "local_lse", "ignores_window", "no_scale")


def _sequences(
    cu_q: list[int], cu_k: list[int], max_q: int, max_k: int, left: int, right: int, broken: str | None
) -> list[tuple[slice, slice, Tensor]]:
    require(len(cu_q) == len(cu_k), "as many query as key sequences")
    found = []
    for b in range(len(cu_q) - 1):
        rows, keys = cu_q[b + 1] - cu_q[b], cu_k[b + 1] - cu_k[b]
        require(rows <= max_q and keys <= max_k, "a sequence is longer than max_seqlen")
        window = (-1, -1) if broken == "ignores_window" else (left, right)
        visible = band(rows, keys, *window, bottom_right=broken != "top_left")
        found.append((slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1]), visible))
    return found


def varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    left: int,
    right: int,
    scale: float,
    softcap: float = 0.0,
    *,
    same_dims: bool = True,
    broken: str | None = None,
) -> tuple[Tensor, Tensor]:
    """(out [T, N, E] in q's dtype, lse [N, T])."""
    check_rows(q, k, v, max_head_dim=256, same_dims=same_dims)
    lengths = check_lengths(cu_q, len(q)), check_lengths(cu_k, len(k))
    out = torch.full((*q.shape[:2], v.shape[-1]), torch.nan)
    lse = torch.full(q.shape[:2], torch.nan)
    scale = 1.0 if broken == "no_scale" else scale
    for rows, keys, visible in _sequences(*lengths, max_q, max_k, left, right, broken):
        out[rows], lse[rows] = attend(q[rows], k[keys], v[keys], visible, scale, softcap)
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    if broken == "lse_base_2":
        lse = lse * 1.4426950408889634
    return out.to(q.dtype), lse.T.contiguous()


def varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    left: int,
    right: int,
    scale: float,
    softcap: float = 0.0,
    *,
    same_dims: bool = True,
    broken: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) in q's dtype, each row stored once."""
    check_rows(q, k, v, max_head_dim=256, same_dims=same_dims)
    require(dout.dtype == q.dtype and out.dtype == q.dtype, "dout and out must have the dtype of q")
    require(dout.is_contiguous() and out.is_contiguous(), "dout and out must be contiguous")
    require(out.shape == (*q.shape[:2], v.shape[-1]) and dout.shape == out.shape, "shapes of out and dout")
    require(lse.dtype == torch.float32 and lse.shape == (q.shape[1], len(q)), f"lse is {tuple(lse.shape)}")
    require(lse.is_contiguous(), "lse must be contiguous")
    lengths = check_lengths(cu_q, len(q)), check_lengths(cu_k, len(k))
    grads = [torch.full(t.shape, torch.nan) for t in (q, k, v)]
    scale = 1.0 if broken == "no_scale" else scale
    for rows, keys, visible in _sequences(*lengths, max_q, max_k, left, right, broken):
        sums = lse.T[rows]
        if broken == "local_lse":  # recomputes the softmax of the part instead of taking what it is given
            sums = attend(q[rows], k[keys], v[keys], visible, scale, softcap)[1]
        part = attend_backward(
            dout[rows], q[rows], k[keys], v[keys], out[rows], sums, visible, scale, softcap
        )
        grads[0][rows], grads[1][keys], grads[2][keys] = part
    dq, dk, dv = (g.to(q.dtype) for g in grads)
    return dq, dk, dv


def fa2_window(left: int, right: int, max_k: int) -> tuple[int, int]:
    """The window that FlashAttention 2 makes of the one that it is given.

    Source: flash-attention v2.8.3, csrc/flash_attn/flash_api.cpp: mha_varlen_fwd and mha_varlen_bwd compare with
    max_seqlen_k, then set_params_fprop fills the open side; in torch, the same lines of
    aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp.
    """
    left = -1 if left >= max_k else left
    right = -1 if right >= max_k else right
    if left < 0 <= right:
        left = max_k
    if right < 0 <= left:
        right = max_k
    return left, right


def fa3_window(left: int, right: int, max_q: int, max_k: int) -> tuple[int, int]:
    """FlashAttention 3's: an extent that hides nothing is dropped, and an open side is as wide as can be.

    Source: flash-attention v2.8.3, hopper/flash_api.cpp: mha_fwd and mha_bwd, then set_params_fprop.
    """
    left = -1 if left >= max_k - 1 else left
    right = -1 if right >= max_q - 1 else right
    if left < 0 and right < 0:
        return left, right
    return max_k - 1 if left < 0 else left, max_q - 1 if right < 0 else right


class FakeAten:
    """The four CUDA attention ops of torch, bound by their own schemas."""

    def __init__(self, broken: str | None = None) -> None:
        self.broken = broken

    def _flash_attention_forward(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        a = SimpleNamespace(**bind_schema(torch.ops.aten._flash_attention_forward.default, args, kwargs))
        require(a.dropout_p == 0 and not a.return_debug_mask, "dropout")
        left, right = _aten_window(a)
        out, lse = varlen_forward(
            a.query,
            a.key,
            a.value,
            a.cum_seq_q,
            a.cum_seq_k,
            a.max_q,
            a.max_k,
            left,
            right,
            a.scale,
            broken=self.broken,
        )
        return out, lse, torch.zeros(2, dtype=torch.uint64), torch.zeros(()), torch.zeros(0)

    def _flash_attention_backward(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        a = SimpleNamespace(**bind_schema(torch.ops.aten._flash_attention_backward.default, args, kwargs))
        require(a.rng_state.dtype == torch.uint64, "rng_state must be uint64")
        left, right = _aten_window(a)
        return varlen_backward(
            a.grad_out,
            a.query,
            a.key,
            a.value,
            a.out,
            a.logsumexp,
            a.cum_seq_q,
            a.cum_seq_k,
            a.max_q,
            a.max_k,
            left,
            right,
            a.scale,
            broken=self.broken,
        )

    def _efficient_attention_forward(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        a = SimpleNamespace(**bind_schema(torch.ops.aten._efficient_attention_forward.default, args, kwargs))
        _check_efficient(a)
        require(a.compute_log_sumexp, "lse was not asked for")
        visible = self._visible(a)
        out, lse = attend(a.query[0], a.key[0], a.value[0], visible, a.scale)
        rows = a.query.shape[1]
        padded = torch.full((1, a.query.shape[2], -(-rows // 32) * 32), torch.nan)
        padded[0, :, :rows] = lse.T
        if self.broken == "lse_base_2":
            padded *= 1.4426950408889634
        return out[None], padded, torch.zeros(()), torch.zeros(()), rows, a.key.shape[1]

    def _efficient_attention_backward(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        a = SimpleNamespace(**bind_schema(torch.ops.aten._efficient_attention_backward.default, args, kwargs))
        a.query, a.grad_out = a.query, a.grad_out_
        _check_efficient(a)
        rows = a.query.shape[1]
        require(
            a.logsumexp.shape == (1, a.query.shape[2], -(-rows // 32) * 32) and a.logsumexp.is_contiguous(),
            f"lse has shape {tuple(a.logsumexp.shape)}",
        )
        require(not torch.isnan(a.logsumexp).any(), "the padding of lse takes part in the products")
        visible = self._visible(a)
        lse = a.logsumexp[0, :, :rows].T
        if self.broken == "local_lse":
            lse = attend(a.query[0], a.key[0], a.value[0], visible, a.scale)[1]
        grads = attend_backward(
            a.grad_out[0], a.query[0], a.key[0], a.value[0], a.out[0], lse, visible, a.scale
        )
        return (*(g[None] for g in grads), torch.zeros(()))

    def _visible(self, a: SimpleNamespace) -> Tensor:
        right = 0 if a.custom_mask_type and self.broken != "ignores_window" else -1
        bottom_right = a.custom_mask_type == 2 and self.broken != "top_left"
        return band(a.query.shape[1], a.key.shape[1], -1, right, bottom_right=bottom_right)


def _aten_window(a: SimpleNamespace) -> tuple[int, int]:
    left = -1 if a.window_size_left is None else a.window_size_left
    right = -1 if a.window_size_right is None else a.window_size_right
    return fa2_window(left, 0 if a.is_causal else right, a.max_k)


def _check_efficient(a: SimpleNamespace) -> None:
    for x in (a.query, a.key, a.value):
        require(x.dim() == 4 and x.dtype == torch.float32 and x.stride(-1) == 1, "shape, dtype or stride")
        require(x.shape[0] == 1 and x.shape[1] > 0, "an empty or batched input")
        require(x.shape[2] == a.query.shape[2], "grouped heads are not served")
        require(x.shape[-1] % 4 == 0, "rows must be aligned to 16 bytes")
    require(a.bias is None and a.cu_seqlens_q is None and a.dropout_p == 0, "bias, lengths or dropout")
    require(a.custom_mask_type in (0, 1, 2), "mask type")


def flash_attn_2(broken: str | None = None) -> ModuleType:
    """`flash_attn.flash_attn_interface` of 2.7 and 2.8."""
    module = ModuleType("flash_attn.flash_attn_interface")

    def _flash_attn_varlen_forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size_left: int = -1,
        window_size_right: int = -1,
        softcap: float = 0.0,
        alibi_slopes: Any = None,
        return_softmax: bool = False,
        block_table: Any = None,
        leftpad_k: Any = None,
        seqused_k: Any = None,
        zero_tensors: bool = False,
    ) -> tuple[Any, ...]:
        require(dropout_p == 0.0 and alibi_slopes is None and not return_softmax, "options")
        out, lse = varlen_forward(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            *fa2_window(window_size_left, 0 if causal else window_size_right, max_seqlen_k),
            softmax_scale,
            softcap,
            broken=broken,
        )
        return out, lse, torch.zeros(0), torch.zeros(2)

    def _flash_attn_varlen_backward(
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        softmax_lse: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size_left: int,
        window_size_right: int,
        softcap: float,
        alibi_slopes: Any,
        deterministic: bool,
        rng_state: Any = None,
        zero_tensors: bool = False,
    ) -> Tensor:
        grads = varlen_backward(
            dout,
            q,
            k,
            v,
            out,
            softmax_lse,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            *fa2_window(window_size_left, 0 if causal else window_size_right, max_seqlen_k),
            softmax_scale,
            softcap,
            broken=broken,
        )
        _store(grads, (dq, dk, dv))
        return torch.zeros(0)

    module._flash_attn_varlen_forward = _flash_attn_varlen_forward  # type: ignore[attr-defined]
    module._flash_attn_varlen_backward = _flash_attn_varlen_backward  # type: ignore[attr-defined]
    return module


def flash_attn_3(broken: str | None = None) -> ModuleType:
    """`flash_attn_interface` (hopper/), with the argument names of late 2025."""
    module = ModuleType("flash_attn_interface")

    def _flash_attn_forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_new: Any = None,
        v_new: Any = None,
        qv: Any = None,
        out_: Any = None,
        cu_seqlens_q: Any = None,
        cu_seqlens_k: Any = None,
        cu_seqlens_k_new: Any = None,
        seqused_q: Any = None,
        seqused_k: Any = None,
        max_seqlen_q: Any = None,
        max_seqlen_k: Any = None,
        page_table: Any = None,
        kv_batch_idx: Any = None,
        leftpad_k: Any = None,
        rotary_cos: Any = None,
        rotary_sin: Any = None,
        seqlens_rotary: Any = None,
        q_descale: Any = None,
        k_descale: Any = None,
        v_descale: Any = None,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size_left: int = -1,
        window_size_right: int = -1,
        attention_chunk: int = 0,
        softcap: float = 0.0,
        rotary_interleaved: bool = True,
        scheduler_metadata: Any = None,
        num_splits: int = 1,
        pack_gqa: Any = None,
        sm_margin: int = 0,
    ) -> tuple[Any, ...]:
        require(softmax_scale is not None and max_seqlen_q is not None, "an argument is missing")
        assert softmax_scale is not None
        out, lse = varlen_forward(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            *fa3_window(window_size_left, 0 if causal else window_size_right, max_seqlen_q, max_seqlen_k),
            softmax_scale,
            softcap,
            broken=broken,
        )
        return out, lse, torch.zeros(0), torch.zeros(0)

    def _flash_attn_backward(
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        softmax_lse: Tensor,
        cu_seqlens_q: Any = None,
        cu_seqlens_k: Any = None,
        sequed_q: Any = None,
        sequed_k: Any = None,
        max_seqlen_q: Any = None,
        max_seqlen_k: Any = None,
        dq: Any = None,
        dk: Any = None,
        dv: Any = None,
        softmax_scale: float | None = None,
        is_causal: bool = False,
        window_size_left: int = -1,
        window_size_right: int = -1,
        softcap: float = 0.0,
        deterministic: bool = False,
        sm_margin: int = 0,
    ) -> Tensor:
        require(None not in (softmax_scale, max_seqlen_q, max_seqlen_k), "an argument is missing")
        require(dq is not None and dk is not None and dv is not None, "gradients are allocated by the caller")
        assert softmax_scale is not None
        grads = varlen_backward(
            dout,
            q,
            k,
            v,
            out,
            softmax_lse,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            *fa3_window(window_size_left, 0 if is_causal else window_size_right, max_seqlen_q, max_seqlen_k),
            softmax_scale,
            softcap,
            broken=broken,
        )
        _store(grads, (dq, dk, dv))
        return torch.zeros(0)

    module._flash_attn_forward = _flash_attn_forward  # type: ignore[attr-defined]
    module._flash_attn_backward = _flash_attn_backward  # type: ignore[attr-defined]
    return module


def flash_attn_4(broken: str | None = None) -> ModuleType:
    """`flash_attn.cute.interface` of 4.0: None, not -1, leaves a window open; -1 is a window."""
    module = ModuleType("flash_attn.cute.interface")

    def _flash_attn_fwd(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        qv: Any = None,
        cu_seqlens_q: Any = None,
        cu_seqlens_k: Any = None,
        seqused_q: Any = None,
        seqused_k: Any = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        softmax_scale: float | None = None,
        causal: bool = False,
        softcap: float | None = None,
        window_size_left: int | None = None,
        window_size_right: int | None = None,
        return_lse: bool = False,
    ) -> tuple[Any, ...]:
        require(return_lse, "lse is None unless it is asked for")
        require(softcap is None, "softcap")
        assert softmax_scale is not None
        out, lse = varlen_forward(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            1 << 30,
            1 << 30,
            *_cute_window(window_size_left, 0 if causal else window_size_right),
            softmax_scale,
            broken=broken,
        )
        return out, lse, None, None, None

    def _flash_attn_bwd(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        dout: Tensor,
        lse: Tensor,
        softmax_scale: float | None = None,
        causal: bool = False,
        softcap: float = 0.0,
        window_size_left: int | None = None,
        window_size_right: int | None = None,
        cu_seqlens_q: Any = None,
        cu_seqlens_k: Any = None,
        seqused_q: Any = None,
        seqused_k: Any = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        deterministic: bool = False,
        dq: Any = None,
        dk: Any = None,
        dv: Any = None,
    ) -> tuple[Any, ...]:
        assert softmax_scale is not None
        return varlen_backward(
            dout,
            q,
            k,
            v,
            out,
            lse,
            cu_seqlens_q,
            cu_seqlens_k,
            1 << 30,
            1 << 30,
            *_cute_window(window_size_left, 0 if causal else window_size_right),
            softmax_scale,
            broken=broken,
        )

    module._flash_attn_fwd = _flash_attn_fwd  # type: ignore[attr-defined]
    module._flash_attn_bwd = _flash_attn_bwd  # type: ignore[attr-defined]
    return module


def _cute_window(left: int | None, right: int | None) -> tuple[int, int]:
    for side in (left, right):
        if side is not None and side < 0:
            raise ContractError("a negative window on one side hides everything")
    return -1 if left is None else left, -1 if right is None else right


def _store(grads: tuple[Tensor, ...], into: tuple[Tensor, ...]) -> None:
    for grad, target in zip(grads, into, strict=True):
        require(target.shape == grad.shape and target.dtype == grad.dtype, "gradients' shape or dtype")
        target.copy_(grad)
