"""Slices as calls of a packed variable-length kernel, the interface of the flash-attention family.

Such a kernel takes packed rows with `cu_seqlens` and a bottom-right aligned window for the whole
call; a canonical slice is such a window as it is (`window_params`), so it needs no decomposition.
Slices whose rows already follow on each other in the buffers form one call on views; short ones
of the same window are gathered into one call. Source of the window identity: solver/kernel_tiles.py.

Shape legend as in `base.py`; T packed query rows, S packed key rows, B sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from cpattn.collectives import put_on
from cpattn.solver import SliceTable, window_params
from cpattn.solver.rounds import colour_rounds, group_windows, square_pieces

from .base import Attending, KeyRows, Returning, Scoring, pad_head_dim
from .rows import Rows, add_rows, as_rows, first_writers, merge_rows, take_rows

# Runs of slices with fewer rows than this are gathered with others of their window: a launch costs
# about as much time as copying some thousand rows.
GATHER_BELOW_ROWS = 8192
# Most rows that one call gathers, which bounds the memory of the copies.
MAX_GATHERED_ROWS = 1 << 16
# With more windows than this, slices are brought to three masks first.
MAX_WINDOWS = 6
# And with more than this it is not tried whether they fit into fewer.
MAX_TRIED_WINDOWS = 64


@dataclass(frozen=True, slots=True, eq=False)
class VarlenCall:
    """One call: sequences packed from the rows of the buffers, under one window.

    left, right: extent of the bottom-right aligned window, -1 unbounded.
    cu_seqlens_q, cu_seqlens_k: int32 [B + 1] on the device.
    first: in forward, no earlier call of the work writes these query rows.
    """

    left: int
    right: int
    q_rows: Rows
    k_rows: Rows
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    first: bool

    @property
    def max_seqlen_k_for_fa2(self) -> int:
        """A max_seqlen_k with which FlashAttention 2 keeps the window as it is.

        It takes an extent of max_seqlen_k or more for an open side, and puts max_seqlen_k in the place of an open
        side beside a bounded one. A sequence with more queries than keys can have a right edge that far out
        which still cuts; none reaches max_seqlen_q. What is larger than need be costs empty blocks only.
        Source: csrc/flash_attn/flash_api.cpp (v2.8.3), mha_varlen_fwd, mha_varlen_bwd and set_params_fprop; the
        copy in torch, aten/src/ATen/native/transformers/cuda/flash_attn, does the same.
        """
        return max(self.max_seqlen_q, self.max_seqlen_k)


class VarlenWork(NamedTuple):
    """The calls of forward and those of backward."""

    forward: tuple[VarlenCall, ...]
    backward: tuple[VarlenCall, ...]


class VarlenKernel(Protocol):
    """A packed kernel. lse is [N, T], natural log, fp32; grads have the dtype of q."""

    def forward(
        self, q_TND: Tensor, k_SGD: Tensor, v_SGE: Tensor, call: VarlenCall, scoring: Scoring
    ) -> tuple[Tensor, Tensor]: ...

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
    ) -> tuple[Tensor, Tensor, Tensor]: ...


def plan_varlen(slices: SliceTable, device: torch.device) -> VarlenWork:
    """The calls that compute a canonical slice table."""
    groups = group_windows(slices) if len(_windows(slices)) <= MAX_TRIED_WINDOWS else []
    if len(slices) and not 0 < len(groups) <= MAX_WINDOWS:
        groups = group_windows(square_pieces(slices).table)
    runs = _runs(groups)
    rounds = [run._replace(slices=t) for run in runs for t in _query_rounds(run.slices)]
    flags = first_writers([r.slices for r in rounds])
    forward = tuple(_call(r, device, first) for r, first in zip(rounds, flags, strict=True))
    backward = tuple(_call(run, device, False) for run in runs)
    return VarlenWork(forward, backward)


class _Run(NamedTuple):
    """Slices that share a call: of one window, and either neighbours in the buffers or short."""

    left: int
    right: int
    slices: SliceTable


def _windows(slices: SliceTable) -> np.ndarray:
    return np.unique(np.stack(window_params(slices)), axis=1).T


def _runs(groups: list[tuple[int, int, SliceTable]]) -> list[_Run]:
    runs: list[_Run] = []
    for left, right, group in groups:
        group = group.take(np.lexsort((group.k0, group.q0)))
        joins = (group.q0[1:] == group.q1[:-1]) & (group.k0[1:] == group.k1[:-1])
        chain = np.concatenate([[0], np.cumsum(~joins)])
        lengths = (group.q1 - group.q0) + (group.k1 - group.k0)
        short = np.bincount(chain, lengths)[chain] < GATHER_BELOW_ROWS
        runs.extend(_Run(left, right, group.take(chain == c)) for c in np.unique(chain[~short]))
        batch = np.cumsum(np.where(short, lengths, 0)) // MAX_GATHERED_ROWS
        runs.extend(_Run(left, right, group.take(short & (batch == b))) for b in np.unique(batch[short]))
    return runs


def _query_rounds(slices: SliceTable) -> list[SliceTable]:
    return [slices.take(members) for members in colour_rounds(slices, disjoint_keys=False)]


def _call(run: _Run, device: torch.device, first: bool) -> VarlenCall:
    slices = run.slices
    return VarlenCall(
        run.left,
        run.right,
        as_rows(slices.q0, slices.q1, device),
        as_rows(slices.k0, slices.k1, device),
        _cu_seqlens(slices.q1 - slices.q0, device),
        _cu_seqlens(slices.k1 - slices.k0, device),
        int((slices.q1 - slices.q0).max()),
        int((slices.k1 - slices.k0).max()),
        first,
    )


def _cu_seqlens(lengths: np.ndarray, device: torch.device) -> Tensor:
    return put_on(device, torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)))


def run_varlen_forward(
    kernel: VarlenKernel,
    queries: Attending,
    keys: KeyRows,
    calls: tuple[VarlenCall, ...],
    scoring: Scoring,
    *,
    fresh: bool,
    head_dim: int,
) -> None:
    """All forward calls, merged into the accumulators. head_dim: what the kernel's rows are padded to."""
    head_dim_v = keys.v.shape[-1]
    q, k, v = (pad_head_dim(t, head_dim) for t in (queries.q, *keys))
    for call in calls:
        rows = (take_rows(q, call.q_rows), take_rows(k, call.k_rows), take_rows(v, call.k_rows))
        out, lse = kernel.forward(*rows, call, scoring)
        part = out[..., :head_dim_v], lse.T
        merge_rows(queries.out, queries.lse, call.q_rows, *part, first=fresh and call.first)


def run_varlen_backward(
    kernel: VarlenKernel,
    queries: Returning,
    keys: KeyRows,
    calls: tuple[VarlenCall, ...],
    scoring: Scoring,
    dkeys: KeyRows,
    *,
    head_dim: int,
) -> None:
    """All backward calls, added to the accumulators."""
    dtype, d, e = queries.q.dtype, keys.k.shape[-1], keys.v.shape[-1]
    q, k, v = (pad_head_dim(t, head_dim) for t in (queries.q, *keys))
    dout, out = (pad_head_dim(t.to(dtype), head_dim) for t in (queries.dout, queries.out))
    for call in calls:
        dout_, q_, out_, lse_ = (take_rows(t, call.q_rows) for t in (dout, q, out, queries.lse))
        k_, v_ = take_rows(k, call.k_rows), take_rows(v, call.k_rows)
        dq, dk, dv = kernel.backward(dout_, q_, k_, v_, out_, lse_.T.contiguous(), call, scoring)
        add_rows(queries.dq, call.q_rows, dq[..., :d])
        add_rows(dkeys.k, call.k_rows, dk[..., :d])
        add_rows(dkeys.v, call.k_rows, dv[..., :e])


def writes_once(work: VarlenWork) -> bool:
    """Whether forward writes each query row once at most."""
    return all(call.first for call in work.forward)
