"""NaN and inf reach what sees them, and nothing else.

A kernel multiplies what a mask hides by a probability of 0, and 0 * NaN is NaN: without care a token's NaN reaches
every row that shares a block of the kernel with it. What sees a token that is not finite is known from the slices, so
the rest is computed from inputs in which such tokens are 0.

Shape legend as in `base.py`; R rows of the one side, C of the other.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from cpattn.solver import SliceTable, expand_counts

from .base import Attending, KeyRows, Returning, Scoring


class Sight(NamedTuple):
    """What rows see: row rows[i] sees keys first[i] up to end[i]; int64 [n] each, on one device."""

    rows: Tensor
    first: Tensor
    end: Tensor

    @classmethod
    def of(cls, slices: SliceTable, device: torch.device) -> Sight:
        return cls(*(torch.from_numpy(x).to(device) for x in row_intervals(slices)))

    def sees_any(self, keys_CG: Tensor, num_rows: int) -> Tensor:
        """bool [R, G]: whether a row sees any of the keys that are marked."""
        before = torch.nn.functional.pad(keys_CG.cumsum(0), (0, 0, 1, 0))
        hits = before[self.end] > before[self.first]
        return _sum_at(self.rows, hits, num_rows) > 0

    def seen_by_any(self, rows_RG: Tensor, num_keys: int) -> Tensor:
        """bool [C, G]: whether any of the rows that are marked sees a key."""
        marks = rows_RG[self.rows].long()
        steps = _sum_at(self.first, marks, num_keys + 1) - _sum_at(self.end, marks, num_keys + 1)
        return steps.cumsum(0)[:num_keys] > 0


def _sum_at(index: Tensor, values: Tensor, size: int) -> Tensor:
    return values.new_zeros((size, values.shape[1]), dtype=torch.int64).index_add_(0, index, values.long())


def row_intervals(slices: SliceTable) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, first keys and ends [n] of the intervals of keys that rows see, sorted; neighbours joined.

    In a slice, row i sees keys [max(k0, i + lo), min(k1, i + hi + 1)).
    """
    owner, nth = expand_counts(slices.q1 - slices.q0)
    rows = slices.q0[owner] + nth
    first = np.maximum(slices.k0[owner], rows + slices.lo[owner])
    end = np.minimum(slices.k1[owner], rows + slices.hi[owner] + 1)
    order = np.lexsort((first, rows))
    rows, first, end = rows[order], first[order], end[order]
    begins = np.ones(len(rows), dtype=bool)
    begins[1:] = (rows[1:] != rows[:-1]) | (first[1:] != end[:-1])
    lasts = np.append(begins[1:], True)[: len(rows)]
    return rows[begins], first[begins], end[lasts]


def unfinite_rows(*tensors: Tensor) -> Tensor:
    """bool [R, H]: where a head of a row has an element that is not finite, in any of the tensors [R, H, X]."""
    found = [~torch.isfinite(t).all(-1) for t in tensors]
    return torch.stack(found).any(0)


def zeroed(x_RHX: Tensor, where_RH: Tensor) -> Tensor:
    """x with 0 in the marked heads of rows."""
    return x_RHX.masked_fill(where_RH.unsqueeze(-1), 0)


def per_key_head(rows_RN: Tensor, num_heads_kv: int) -> Tensor:
    """[R, G]: whether any of the query heads of a key head is marked."""
    return rows_RN.unflatten(1, (num_heads_kv, -1)).any(2)


def per_query_head(rows_RG: Tensor, num_heads_q: int) -> Tensor:
    """[R, N]: the marks of a query head's key head."""
    return rows_RG.repeat_interleave(num_heads_q // rows_RG.shape[1], 1)


SlicesOf = Callable[[Any], SliceTable]


def contained_forward(
    slices_of: SlicesOf, *, but_on: str | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator of a backend's `forward`: rows that see a key or value that is not finite get what the kernel makes
    of it; all others get what it makes of 0 in its place. Costs a sum over k and v where all is finite.

    but_on: device type on which `forward` is called as it is, since the host must not wait for that sum there.
    """

    def decorate(forward: Callable[..., None]) -> Callable[..., None]:
        @wraps(forward)
        def contained(
            self: Any, queries: Attending, keys: KeyRows, work: Any, scoring: Scoring, *, fresh: bool = False
        ) -> None:
            q, out, lse = queries
            if q.device.type == but_on or _surely_finite(*keys):
                forward(self, queries, keys, work, scoring, fresh=fresh)
                return
            bad = unfinite_rows(*keys)
            clean = Attending(q, out.clone(), lse.clone())
            forward(self, queries, keys, work, scoring, fresh=fresh)
            forward(self, clean, KeyRows(*(zeroed(t, bad) for t in keys)), work, scoring, fresh=fresh)
            hit = per_query_head(Sight.of(slices_of(work), q.device).sees_any(bad, len(q)), q.shape[1])
            out.copy_(torch.where(hit.unsqueeze(-1), out, clean.out))
            lse.copy_(torch.where(hit, lse, clean.lse))

        return contained

    return decorate


def contained_backward(
    slices_of: SlicesOf, *, but_on: str | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator of a backend's `backward`, likewise: a query that is not finite (or whose out, lse or gradient is
    not) reaches the keys that it sees, a key the queries that see it.
    """

    def decorate(backward: Callable[..., None]) -> Callable[..., None]:
        @wraps(backward)
        def contained(
            self: Any, queries: Returning, keys: KeyRows, work: Any, scoring: Scoring, dkeys: KeyRows
        ) -> None:
            dout, q, out, lse, dq = queries
            if q.device.type == but_on or (_surely_finite(dout, q, *keys, out) and not _has_nan(lse)):
                backward(self, queries, keys, work, scoring, dkeys)
                return
            bad, rows = unfinite_rows(*keys), unfinite_rows(q, dout, out) | lse.isnan()
            sight = Sight.of(slices_of(work), q.device)
            hit_rows = rows | per_query_head(sight.sees_any(bad, len(q)), q.shape[1])
            hit_keys = bad | sight.seen_by_any(per_key_head(rows, keys.k.shape[1]), len(keys.k))
            # A row with lse = inf has probabilities of 0.
            lse_of_none = lse.masked_fill(rows, torch.inf)
            clean = Returning(zeroed(dout, rows), zeroed(q, rows), zeroed(out, rows), lse_of_none, dq.clone())
            clean_dkeys = KeyRows(*(t.clone() for t in dkeys))
            backward(self, queries, keys, work, scoring, dkeys)
            backward(self, clean, KeyRows(*(zeroed(t, bad) for t in keys)), work, scoring, clean_dkeys)
            pairs = ((dq, clean.dq, hit_rows), *((*two, hit_keys) for two in zip(dkeys, clean_dkeys, strict=True)))
            for grad, without, hit in pairs:
                grad.copy_(torch.where(hit.unsqueeze(-1), grad, without))

        return contained

    return decorate


def _surely_finite(*tensors: Tensor) -> bool:
    """Whether no element is NaN or inf; False may also mean that a sum overflowed."""
    # Tensors without data have none to look at. A sum reads each element once and makes nothing; in the tensor's own
    # dtype, since torch would copy it for another.
    return all(isinstance(t, FakeTensor) or bool(t.sum().isfinite()) for t in tensors)


def _has_nan(lse: Tensor) -> bool:
    return not isinstance(lse, FakeTensor) and bool(lse.isnan().any())
