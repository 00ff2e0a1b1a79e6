"""Linear recurrences by chunks: each chunk of tokens as one affine map of the state, and what its rows read of it.

Of one head, with state S of shape [K, V], decay a_t (one number, or one for each of K channels), write strength b_t:

    gated      S_t = diag(a_t) S_(t-1) + k_t v_t^T
    delta      S_t = (I - b_t k_t k_t^T) diag(a_t) S_(t-1) + b_t k_t v_t^T         out_t = q_t^T S_t

A chunk that begins in state S ends in A S + B, and its row t reads out0_t + read_t^T S. What the delta rule writes in a
chunk is solved for at once: the product of its rank-one updates is I minus a matrix of rank C (the WY form, Bischof and
Van Loan 1987; for linear attention arXiv:2406.06484, with a decay arXiv:2412.06464).

Shape legend: N chunks, C rows of a chunk, H heads, K state rows (head dim of q and k), V state columns (head dim of v).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class AffineMaps(NamedTuple):
    """Maps S -> A S + B, one for each of N chunks (or fragments) and head.

    a: [N, H, K or 1, 1] where A is diagonal (the same number on it: 1), else [N, H, K, K]. b: [N, H, K, V].
    """

    a: Tensor
    b: Tensor

    @property
    def is_diagonal(self) -> bool:
        """Whether A is given by its diagonal."""
        return self.a.shape[-1] == 1

    def of(self, state: Tensor) -> Tensor:
        """What the state becomes, [N, H, K, V]."""
        return torch.addcmul(self.b, self.a, state) if self.is_diagonal else self.b + self.a @ state

    def after(self, earlier: AffineMaps) -> AffineMaps:
        """The earlier maps, then these."""
        a = self.a * earlier.a if self.is_diagonal else self.a @ earlier.a
        return AffineMaps(a, self.of(earlier.b))

    def take(self, rows: Tensor) -> AffineMaps:
        """The maps of these numbers."""
        return AffineMaps(self.a.index_select(0, rows), self.b.index_select(0, rows))


class Reading(NamedTuple):
    """What the rows of chunks read. out: of a state of zero, [N, C, H, V]. read: of the state's own, [N, C, H, K]."""

    out: Tensor
    read: Tensor

    def finish(self, state: Tensor) -> Tensor:
        """Results given the state in which each chunk begins [N, H, K, V]: [N, C, H, V]."""
        return self.out + torch.einsum("nchk,nhkv->nchv", self.read, state)


class ChunkWork(NamedTuple):
    """Chunks without their states. maps: of each. The rest is what `reading` is worked out from: q and k, decays until
    a row and between two, what rows write from a state of zero [N, H, C, V], and with the delta rule what of the state
    they take back, [N, H, C, K].
    """

    maps: AffineMaps
    q: Tensor
    k: Tensor
    until: Tensor
    between: Tensor
    written: Tensor
    taken: Tensor | None

    def reading(self) -> Reading:
        """What rows read. It does not need the maps of other chunks, so it can be done while these travel."""
        scores = _decayed_products(self.q, self.k, self.between)
        out, read = (scores @ self.written).transpose(1, 2), self.q * self.until
        return Reading(out, read if self.taken is None else read - (scores @ self.taken).transpose(1, 2))


def work_chunks(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor | None) -> ChunkWork:
    """The maps of chunks, and what else of them does not depend on the state in which they begin; differentiable.

    Args:
        q, k: [N, C, H, K]. v: [N, C, H, V].
        decay: log of the decay, at most 0, [N, C, H, 1] or [N, C, H, K]; 0 in rows that stand for nothing.
        beta: write strength of the delta rule [N, C, H], 0 in rows that stand for nothing; None: no delta rule.
    """
    until, between, rest = _decays(decay)
    k_rest, v_NHCV = (k * rest).transpose(1, 2), v.transpose(1, 2)
    kept = until[:, -1].unsqueeze(-1)
    if beta is None:
        return ChunkWork(AffineMaps(kept, k_rest.mT @ v_NHCV), q, k, until, between, v_NHCV, None)
    # What row i writes, u_i = b_i (v_i - k_i^T S before it), depends on the rows before it: (I + L) u = b (v - k S).
    beta_NHC1 = beta.transpose(1, 2).unsqueeze(-1)
    lower = torch.tril(_decayed_products(k, k, between) * beta_NHC1, -1)
    right = torch.cat([v_NHCV, (k * until).transpose(1, 2)], dim=-1) * beta_NHC1
    unit = lower + torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
    solved = torch.linalg.solve_triangular(unit, right, upper=False, unitriangular=True)
    u, w = solved.split([v.shape[-1], k.shape[-1]], dim=-1)  # written: u - w S
    a = torch.diag_embed(kept.squeeze(-1).expand(-1, -1, k.shape[-1])) - k_rest.mT @ w
    return ChunkWork(AffineMaps(a, k_rest.mT @ u), q, k, until, between, u, w)


def _decays(log_decay: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Decay from before the chunk to row i [N, C, H, *]; from row j to row i >= j, else 0, [N, i, j, H, *]; from row j
    to the end [N, C, H, *].

    Sums between two rows are summed, not differences of sums from the start: after a decay of -1e4 a difference
    would keep three digits of those that follow it.
    """
    size = log_decay.shape[1]
    later = torch.ones(size, size, dtype=torch.bool, device=log_decay.device).tril(-1)[None, :, :, None, None]
    steps = torch.where(later, log_decay.unsqueeze(2), 0)  # [N, l, j, H, *]: what row l takes of row j
    between = steps.cumsum(1)
    kept = torch.ones(size, size, dtype=torch.bool, device=log_decay.device).tril()[None, :, :, None, None]
    between = torch.where(kept, between, -torch.inf).exp()
    return log_decay.cumsum(1).exp(), between, between[:, -1]


def _decayed_products(left: Tensor, right: Tensor, between: Tensor) -> Tensor:
    """sum over k of left[i, k] between[i, j, k] right[j, k], [N, H, i, j]; 0 above the diagonal."""
    if between.shape[-1] == 1:
        return torch.einsum("nihk,njhk->nhij", left, right) * between.squeeze(-1).permute(0, 3, 1, 2)
    return torch.einsum("nihk,nijhk,njhk->nhij", left, between, right)
