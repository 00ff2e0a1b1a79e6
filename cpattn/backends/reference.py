"""The oracle among the local kernels: plain matrix products, every option, any device.

Computes in the accumulators' dtype (fp32, or fp64 for fp64 inputs), a block of rows at a time.
Shape legend as in `base.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpattn.collectives import merge_partials
from cpattn.solver import MaskSlice, SliceTable

from .base import FLOAT_DTYPES, Attending, KeyRows, Problem, Returning, Scoring, refuse_dtype
from .nonfinite import contained_backward, contained_forward

# Scores of a block, over all heads, that are held in memory at a time.
_BLOCK_SCORES = 1 << 24


def _slices_of(work: tuple[MaskSlice, ...]) -> SliceTable:
    return SliceTable.from_slices(work)


class ReferenceBackend:
    """Dense attention slice by slice; slow, and right by being plain."""

    name = "reference"
    kernel = "plain matrix products in fp32"

    def refusal(self, problem: Problem) -> str | None:
        return refuse_dtype(problem, FLOAT_DTYPES)

    def prepare(
        self, slices: SliceTable, num_queries: int, num_keys: int, device: torch.device
    ) -> tuple[MaskSlice, ...]:
        return tuple(slices)

    def writes_once(self, work: tuple[MaskSlice, ...]) -> bool:
        return False

    @contained_forward(_slices_of)
    def forward(
        self, queries: Attending, keys: KeyRows, work: tuple[MaskSlice, ...], scoring: Scoring, *, fresh: bool = False
    ) -> None:
        (q_QND, out_QNE, lse_QN), (k_KGD, v_KGE) = queries, keys
        groups = q_QND.shape[1] // k_KGD.shape[1]
        for rows, keys, masked in row_blocks(work, q_QND):
            k, v = per_query_head(k_KGD[keys], groups, out_QNE), per_query_head(v_KGE[keys], groups, out_QNE)
            scores, _ = masked_scores(q_QND[rows].to(out_QNE.dtype), k, masked, *scoring)
            lse = torch.logsumexp(scores, dim=-1)
            out = torch.einsum("nqk,kne->qne", torch.exp(scores - lse[..., None]), v)
            merge_partials(out_QNE[rows], lse_QN[rows], out, lse.T)

    @contained_backward(_slices_of)
    def backward(
        self, queries: Returning, keys: KeyRows, work: tuple[MaskSlice, ...], scoring: Scoring, dkeys: KeyRows
    ) -> None:
        (dout_QNE, q_QND, out_QNE, lse_QN, dq_QND), (k_KGD, v_KGE), (dk_KGD, dv_KGE) = queries, keys, dkeys
        groups = q_QND.shape[1] // k_KGD.shape[1]
        for rows, keys, masked in row_blocks(work, q_QND):
            k, v = per_query_head(k_KGD[keys], groups, dq_QND), per_query_head(v_KGE[keys], groups, dq_QND)
            q, dout = q_QND[rows].to(dq_QND.dtype), dout_QNE[rows].to(dq_QND.dtype)
            scores, slope = masked_scores(q, k, masked, *scoring)
            p = torch.exp(scores - lse_QN[rows].T[..., None])
            delta = (dout * out_QNE[rows].to(dq_QND.dtype)).sum(-1)
            dp = torch.einsum("qne,kne->nqk", dout, v)
            ds = p * (dp - delta.T[..., None]) * scoring.scale
            if slope is not None:
                ds = ds * slope
            dq_QND[rows].add_(torch.einsum("nqk,knd->qnd", ds, k))
            dk_KGD[keys].add_(per_key_head(torch.einsum("nqk,qnd->knd", ds, q), groups))
            dv_KGE[keys].add_(per_key_head(torch.einsum("nqk,qne->kne", p, dout), groups))


def row_blocks(work: tuple[MaskSlice, ...], q_QND: Tensor):  # type: ignore[no-untyped-def]
    """(rows, keys, masked pairs) of blocks of rows small enough to hold all their scores."""
    for s in work:
        keys = slice(s.k.start, s.k.end)
        step = max(1, _BLOCK_SCORES // (len(s.k) * q_QND.shape[1]))
        j = torch.arange(s.k.start, s.k.end, device=q_QND.device)
        for start in range(s.q.start, s.q.end, step):
            rows = slice(start, min(start + step, s.q.end))
            diff = j - torch.arange(rows.start, rows.stop, device=q_QND.device)[:, None]
            yield rows, keys, (diff < s.lo) | (diff > s.hi)


def masked_scores(
    q_QND: Tensor, k_KND: Tensor, masked_QK: Tensor, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """Masked scores [N, Q, K], and the derivative of the softcap where there is one."""
    scores = torch.einsum("qnd,knd->nqk", q_QND, k_KND) * scale
    slope = None
    if softcap is not None:
        capped = torch.tanh(scores / softcap)
        scores, slope = softcap * capped, 1 - capped * capped
    return scores.masked_fill(masked_QK, -torch.inf), slope


def per_query_head(x_KGX: Tensor, groups: int, like: Tensor) -> Tensor:
    return x_KGX.to(like.dtype).repeat_interleave(groups, dim=1)


def per_key_head(x_KNX: Tensor, groups: int) -> Tensor:
    return x_KNX.unflatten(1, (-1, groups)).sum(2)
