"""Dense attention of a few query rows over the whole sequence, and its gradients, by definition and in fp64.

Each rank scores the rows against its own keys, so that a million tokens cost no more than those rows; visibility comes
from the mask, not from the plan.

Shape legend: M sampled rows, K own keys that any of them sees, N query and G key heads, R = N / G, D and E head dims.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from cpattn.solver import SliceTable


class Rows(NamedTuple):
    """Inputs: rows that are sampled, [M, N, D] and [M, N, E] on every rank, and own keys, [K, G, D] and [K, G, E].

    visible: bool [M, K].
    """

    q: Tensor
    dout: Tensor
    k: Tensor
    v: Tensor
    visible: Tensor


class Sampled(NamedTuple):
    """Results: out [M, N, E] and dq [M, N, D] of the rows, on every rank; dk [K, G, D], dv [K, G, E] of own keys."""

    out: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


def visible_keys(table: SliceTable, tokens: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """bool [M, K]: whether query tokens see key tokens, under disjoint banded rectangles."""
    seen = np.zeros((len(tokens), len(keys)), dtype=bool)
    for row, token in enumerate(tokens.tolist()):
        mine = table.take((table.q0 <= token) & (token < table.q1))
        first, end = np.maximum(mine.k0, token + mine.lo), np.minimum(mine.k1, token + mine.hi + 1)
        some = end > first
        order = np.argsort(first[some])
        first, end = first[some][order], end[some][order]
        if len(first):
            at = np.searchsorted(first, keys, side="right") - 1
            seen[row] = (at >= 0) & (keys < end[np.maximum(at, 0)])
    return seen


def dense_rows(
    rows: Rows, *, scale: float, softcap: float | None, sink: Tensor | None, group: dist.ProcessGroup | None
) -> Sampled:
    """Attention of the rows over all ranks' keys, and the gradients where theirs are the only ones."""
    groups = rows.k.shape[1]
    q, dout = (t.double().unflatten(1, (groups, -1)) for t in (rows.q, rows.dout))
    k, v = rows.k.double(), rows.v.double()
    scores = torch.einsum("mgrd,kgd->mgrk", q, k) * scale
    slope = torch.ones_like(scores)
    if softcap is not None:
        capped = torch.tanh(scores / softcap)
        scores, slope = softcap * capped, 1 - capped * capped
    scores = scores.masked_fill(~rows.visible[:, None, None, :], -torch.inf)
    largest = _over_ranks(_max_of_rows(scores), dist.ReduceOp.MAX, group)
    if sink is not None:
        largest = torch.maximum(largest, sink.double().view(groups, -1))
    shift = largest.masked_fill(largest == -torch.inf, 0)
    weights = torch.exp(scores - shift.unsqueeze(-1))
    total = _over_ranks(weights.sum(-1), dist.ReduceOp.SUM, group)
    if sink is not None:
        total = total + torch.exp(sink.double().view(groups, -1) - shift)
    p = weights / total.clamp_min(torch.finfo(torch.float64).tiny).unsqueeze(-1)
    out = _over_ranks(torch.einsum("mgrk,kge->mgre", p, v), dist.ReduceOp.SUM, group)
    delta = (dout * out).sum(-1, keepdim=True)
    ds = p * (torch.einsum("mgre,kge->mgrk", dout, v) - delta) * slope * scale
    dq = _over_ranks(torch.einsum("mgrk,kgd->mgrd", ds, k), dist.ReduceOp.SUM, group)
    dk, dv = torch.einsum("mgrk,mgrd->kgd", ds, q), torch.einsum("mgrk,mgre->kge", p, dout)
    return Sampled(out.flatten(1, 2), dq.flatten(1, 2), dk, dv)


def _max_of_rows(scores: Tensor) -> Tensor:
    if scores.shape[-1] == 0:
        return scores.new_full(scores.shape[:-1], -torch.inf)
    return scores.amax(-1)


def _over_ranks(x: Tensor, op: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None) -> Tensor:
    if group is not None:
        x = x.contiguous()
        dist.all_reduce(x, op, group=group)
    return x
