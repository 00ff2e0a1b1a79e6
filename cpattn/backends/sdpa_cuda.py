"""`sdpa` on CUDA: the kernels inside torch, with their log-sum-exp; nothing to install.

* fp16 and bf16: `aten::_flash_attention_forward/backward` (FlashAttention 2, variable length).
  Windows are bottom-right aligned; lse is [N, T] fp32; backward takes out and lse, so those of the
  whole attention go in. Head dims are multiples of 8 up to 256, values as wide as keys.
* fp32: `aten::_efficient_attention_forward/backward`, which knows full and causal masks, no grouped
  heads, and pads lse to 32 rows. One call per piece: exact, not fast.

Shape legend as in `base.py`; T, S packed rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from cpattn.solver import SliceTable
from cpattn.solver.rounds import CAUSAL_PIECE, INV_PIECE, square_pieces

from .base import (
    HALF_DTYPES,
    Attending,
    KeyRows,
    Problem,
    Returning,
    Scoring,
    Turn,
    kernel_head_dim,
    pad_head_dim,
    refuse_dtype,
)
from .rows import add_rows, first_writers, merge_rows
from .varlen import (
    PlacingVarlen,
    VarlenCall,
    VarlenWork,
    clear,
    plan_varlen,
    run_varlen_backward,
    run_varlen_forward,
    writes_once,
)

# custom_mask_type of the efficient kernels.
_NO_MASK, _CAUSAL_BOTTOM_RIGHT = 0, 2
_LSE_ALIGN = 32


@dataclass(frozen=True, slots=True)
class AtenFlashKernel:
    """torch's FlashAttention 2 as a packed kernel; see `VarlenKernel`."""

    ops: Any

    def forward(
        self, q_TND: Tensor, k_SGD: Tensor, v_SGE: Tensor, call: VarlenCall, scoring: Scoring
    ) -> tuple[Tensor, Tensor]:
        out, lse, *_ = self.ops._flash_attention_forward(
            q_TND, k_SGD, v_SGE, *_lengths(call), 0.0, False, False, scale=scoring.scale, **_window(call)
        )
        return out, lse

    def backward(
        self,
        dout_TNE: Tensor,
        q_TND: Tensor,
        k_SGD: Tensor,
        v_SGE: Tensor,
        out_TNE: Tensor,
        lse_NT: Tensor,
        call: VarlenCall,
        scoring: Scoring,
    ) -> tuple[Tensor, Tensor, Tensor]:
        seed = torch.empty(2, dtype=torch.uint64, device=q_TND.device)  # read only with dropout
        dq, dk, dv = self.ops._flash_attention_backward(
            dout_TNE.contiguous(),
            q_TND,
            k_SGD,
            v_SGE,
            out_TNE.contiguous(),
            lse_NT,
            *_lengths(call),
            0.0,
            False,
            seed,
            seed[0],
            scale=scoring.scale,
            **_window(call),
        )
        return dq, dk, dv


def _lengths(call: VarlenCall) -> tuple[Tensor, Tensor, int, int]:
    return call.cu_seqlens_q, call.cu_seqlens_k, call.max_seqlen_q, call.max_seqlen_k_for_fa2


def _window(call: VarlenCall) -> dict[str, int]:
    return {"window_size_left": call.left, "window_size_right": call.right}


class _Piece(NamedTuple):
    """A call of the efficient kernels. first: no earlier one writes these query rows."""

    kind: int
    rows: slice
    keys: slice
    first: bool


@dataclass(slots=True)
class _Work:
    """flash: the calls in fp16 and bf16. pieces: those in fp32, made at first use."""

    slices: SliceTable
    flash: VarlenWork
    cached: tuple[_Piece, ...] | None = field(default=None, repr=False)

    @property
    def pieces(self) -> tuple[_Piece, ...]:
        if self.cached is None:
            table, kinds = square_pieces(self.slices)
            first = first_writers([table.take(np.array([n])) for n in range(len(table))])
            rows = zip(table.data.tolist(), kinds.tolist(), first, strict=True)
            self.cached = tuple(_Piece(kind, slice(r[0], r[1]), slice(r[2], r[3]), f) for r, kind, f in rows)
        return self.cached


@dataclass(frozen=True, slots=True)
class CudaSdpaBackend(PlacingVarlen):
    """torch's own fused kernels on CUDA: FlashAttention 2 for fp16 and bf16, CUTLASS for fp32."""

    device_type: str = "cuda"
    ops: Any = field(default_factory=lambda: torch.ops.aten)
    name: str = "sdpa"
    kernel: str = "torch's FlashAttention 2 (fp16, bf16) or efficient attention (fp32)"
    stores_first: bool = True

    def refusal(self, problem: Problem) -> str | None:
        if problem.device_type != self.device_type:
            return f"this kernel runs on {self.device_type}, the tensors are on {problem.device_type}"
        if problem.softcap:
            return "torch's CUDA kernels have no softcap"
        widest = max(problem.head_dim, problem.head_dim_v)
        if problem.dtype in HALF_DTYPES and widest > 256:
            return f"head_dim {widest} is more than FlashAttention 2 takes (256)"
        return refuse_dtype(problem, (*HALF_DTYPES, torch.float32))

    def prepare(
        self, slices: SliceTable, num_queries: int, num_keys: int, device: torch.device, turn: Turn | None = None
    ) -> _Work:
        return _Work(slices, plan_varlen(slices, device, num_queries, num_keys, turn))

    def writes_once(self, work: _Work) -> bool:
        # What it is for is an out in the dtype of q: in fp32 that is the accumulator's own, so only the calls of
        # fp16 and bf16 count.
        return writes_once(work.flash)

    def forward(
        self, queries: Attending, keys: KeyRows, work: _Work, scoring: Scoring, *, fresh: bool = False
    ) -> None:
        (q_QND, out_QNE, lse_QN), (k_KGD, v_KGE), scale = queries, keys, scoring.scale
        if q_QND.dtype in HALF_DTYPES:
            run_varlen_forward(self.packed_kernel(), queries, keys, work.flash, scoring, fresh=fresh)
            return
        if fresh:
            clear(queries)
        head_dim_v = v_KGE.shape[-1]
        q, k, v = _ungrouped(q_QND, k_KGD, v_KGE)
        for piece in work.pieces:
            q_, k_, v_ = (_turned(t, piece) for t in (q[piece.rows], k[piece.keys], v[piece.keys]))
            out, lse, *_ = self.ops._efficient_attention_forward(
                q_, k_, v_, None, None, None, None, None, 0.0, _mask_type(piece), True, scale=scale
            )
            lse = lse[0, :, : q_.shape[1]].T
            if piece.kind == INV_PIECE:
                out, lse = out.flip(1), lse.flip(0)
            merge_rows(
                out_QNE, lse_QN, piece.rows, out[0, ..., :head_dim_v], lse, first=fresh and piece.first
            )

    def backward(
        self,
        queries: Returning,
        keys: KeyRows,
        work: _Work,
        scoring: Scoring,
        dkeys: KeyRows,
        *,
        fresh_dq: bool = False,
        fresh_dkv: bool = False,
    ) -> None:
        (dout_QNE, q_QND, out_QNE, lse_QN, dq_QND), (k_KGD, v_KGE), (dk_KGD, dv_KGE) = queries, keys, dkeys
        if q_QND.dtype in HALF_DTYPES:
            kernel, fresh = self.packed_kernel(), (fresh_dq, fresh_dkv)
            run_varlen_backward(kernel, queries, keys, work.flash, scoring, dkeys, fresh=fresh)
            return
        for total, first in ((dq_QND, fresh_dq), (dk_KGD, fresh_dkv), (dv_KGE, fresh_dkv)):
            if first:
                total.zero_()
        d, e, groups = k_KGD.shape[-1], v_KGE.shape[-1], q_QND.shape[1] // k_KGD.shape[1]
        q, k, v = _ungrouped(q_QND, k_KGD, v_KGE)
        dout, out = (pad_head_dim(t.to(q.dtype), q.shape[-1]) for t in (dout_QNE, out_QNE))
        seed = torch.zeros((), dtype=torch.int64, device=q.device)  # read only with dropout
        for piece in work.pieces:
            dq, dk, dv = _piece_backward(self.ops, piece, (dout, q, out), (k, v), lse_QN, seed, scoring.scale)
            add_rows(dq_QND, piece.rows, dq[0, ..., :d])
            add_rows(dk_KGD, piece.keys, dk[0].unflatten(1, (-1, groups)).sum(2)[..., :d])
            add_rows(dv_KGE, piece.keys, dv[0].unflatten(1, (-1, groups)).sum(2)[..., :e])

    def packed_work(self, work: _Work) -> VarlenWork:
        return work.flash

    def packed_kernel(self) -> AtenFlashKernel:
        return AtenFlashKernel(self.ops)


def _piece_backward(
    ops: Any,
    piece: _Piece,
    queries: tuple[Tensor, Tensor, Tensor],
    keys: tuple[Tensor, Tensor],
    lse_QN: Tensor,
    seed: Tensor,
    scale: float,
) -> tuple[Tensor, ...]:
    """Gradients of the rows of one call, [1, rows, heads, head dim]; queries: dout, q and out, keys: k and v."""
    dout, q, out = (_turned(t[piece.rows], piece) for t in queries)
    k, v = (_turned(t[piece.keys], piece) for t in keys)
    lse = _turned(lse_QN[piece.rows], piece).transpose(1, 2)
    lse = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % _LSE_ALIGN), value=torch.inf).contiguous()
    lengths, no_dropout = (q.shape[1], k.shape[1]), (0.0, seed, seed)
    *gradients, _ = _efficient_backward(
        ops, dout, q, k, v, None, out, None, None, *lengths, lse, *no_dropout, _mask_type(piece), False, scale=scale
    )
    return tuple(t.flip(1) if piece.kind == INV_PIECE else t for t in gradients)


def _ungrouped(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As many key heads as query heads, and one head dim."""
    groups, head_dim = q.shape[1] // k.shape[1], kernel_head_dim(k, v)
    q, k, v = (pad_head_dim(t, head_dim) for t in (q, k, v))
    return q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)


def _turned(x: Tensor, piece: _Piece) -> Tensor:
    """[1, rows, ...]; upside down where that makes an inverse-causal square a causal one."""
    return (x.flip(0) if piece.kind == INV_PIECE else x)[None]


def _mask_type(piece: _Piece) -> int:
    return _CAUSAL_BOTTOM_RIGHT if piece.kind in (CAUSAL_PIECE, INV_PIECE) else _NO_MASK


def _efficient_backward(ops: Any, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any, scale: float) -> Any:
    """`_efficient_attention_backward`, also on tensors without data.

    torch's meta kernel of it (2.11 to 2.13, torch/_meta_registrations.py) lacks the argument `out` and fails, so
    there the results are made here, beside the operator's own buffer, one number for each row and head.
    Source: aten/src/ATen/native/transformers/cuda/attention_backward.cu (`delta`).
    """
    if not isinstance(q, FakeTensor):
        return ops._efficient_attention_backward(dout, q, k, v, *rest, scale=scale)
    delta = q.new_empty(q.shape[:3], dtype=torch.float32)
    return *(torch.empty_like(t) for t in (q, k, v)), delta


def _flash_backward_scratch(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens_q: Tensor, *_: Any
) -> int:
    """Bytes that FlashAttention 2's backward takes beyond its results.

    dq in fp32 (one for each of its splits under torch's deterministic flag) and a number for each row and head,
    both with 128 rows more for each sequence; for grouped heads dk and dv of every query head.
    Source: csrc/flash_attn/flash_api.cpp (v2.8.3) and torch's copy of it, mha_varlen_bwd.
    """
    tokens, heads, head_dim = q.shape
    sequences = cu_seqlens_q.numel() - 1
    rows = tokens + 128 * sequences
    rounded = -(-head_dim // (32 if head_dim <= 128 else 64)) * (32 if head_dim <= 128 else 64)
    splits = 1
    if torch.are_deterministic_algorithms_enabled():
        splits = -(-_multiprocessors() // (sequences * heads))
    expanded = 2 * k.shape[0] * heads * head_dim * q.itemsize if k.shape[1] != heads else 0
    return 4 * rows * heads * (splits * rounded + 1) + expanded


def _multiprocessors() -> int:
    """Of the current GPU; without one those of an H100."""
    return torch.cuda.get_device_properties().multi_processor_count if torch.cuda.is_available() else 132


# Bytes that the kernels allocate inside, from the arguments of the operator.
SCRATCH: dict[Any, Callable[..., int]] = {torch.ops.aten._flash_attention_backward.default: _flash_backward_scratch}
