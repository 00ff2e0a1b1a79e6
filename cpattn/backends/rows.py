"""Rows of accumulators: stored, merged and added to, whether they lie side by side or not.

Shape legend as in `base.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from cpattn.collectives import merge_partials, put_on, row_kernels
from cpattn.solver import IntArray, SliceTable

# Rows of a buffer: a slice, or an int64 index on the buffer's device.
Rows: TypeAlias = slice | Tensor


def as_rows(starts: IntArray, ends: IntArray, device: torch.device) -> Rows:
    """The rows of [start, end) ranges one after the other; a slice where they follow on each other."""
    if np.array_equal(starts[1:], ends[:-1]):
        return slice(int(starts[0]), int(ends[-1]))
    index = np.concatenate([np.arange(a, b) for a, b in zip(starts.tolist(), ends.tolist(), strict=True)])
    return put_on(device, torch.from_numpy(index))


def take_rows(x: Tensor, rows: Rows) -> Tensor:
    """Those rows of x; a view where they lie side by side."""
    return x[rows] if isinstance(rows, slice) else x.index_select(0, rows)


def take_together(tensors: Sequence[Tensor], rows: Rows) -> list[Tensor]:
    """Those rows of several tensors, in one launch where row kernels serve: views, or contiguous copies."""
    if isinstance(rows, slice) or not row_kernels.can_pack(tensors):
        return [take_rows(t, rows) for t in tensors]
    return row_kernels.gather_rows(tensors, rows)


def take_queries(dout: Tensor, q: Tensor, out: Tensor, lse_QN: Tensor, rows: Rows) -> tuple[Tensor, ...]:
    """Those rows of dout, q and out, and of lse as contiguous [N, rows]."""
    if isinstance(rows, slice) or not row_kernels.can_pack((dout, q, out, lse_QN)):
        dout, q, out, lse_QN = (take_rows(t, rows) for t in (dout, q, out, lse_QN))
    else:
        dout, q, out, lse_QN = row_kernels.gather_rows((dout, q, out, lse_QN), rows, turned=1)
    return dout, q, out, lse_QN.T.contiguous()


def merge_rows(
    out_QNE: Tensor, lse_QN: Tensor, rows: Rows, part_out: Tensor, part_lse: Tensor, *, first: bool
) -> None:
    """Merge a part into those rows of the accumulators; store it where it is the first."""
    if first:
        put_rows(out_QNE, rows, part_out)
        put_rows(lse_QN, rows, part_lse)
    elif row_kernels.fused(out_QNE, lse_QN, part_out, part_lse):
        at = (slice(None), rows) if isinstance(rows, Tensor) else (rows, None)
        row_kernels.merge_rows(out_QNE[at[0]], lse_QN[at[0]], part_out, part_lse, index=at[1])
    elif isinstance(rows, slice):
        merge_partials(out_QNE[rows], lse_QN[rows], part_out, part_lse)
    else:
        out, lse = out_QNE.index_select(0, rows), lse_QN.index_select(0, rows)
        merge_partials(out, lse, part_out, part_lse)
        put_rows(out_QNE, rows, out)
        put_rows(lse_QN, rows, lse)


def put_rows(x: Tensor, rows: Rows, values: Tensor) -> None:
    """Store values in those rows (which are distinct)."""
    if isinstance(rows, slice):
        x[rows] = values
    else:
        x.index_copy_(0, rows, values.to(x.dtype))


def add_rows(x: Tensor, rows: Rows, values: Tensor) -> None:
    """Add values to those rows; a row may occur more than once.

    On CUDA the order in which repeated rows are added is torch's: fixed under
    `torch.use_deterministic_algorithms(True)`.
    """
    if isinstance(rows, slice):
        x[rows].add_(values)  # += would store the view into itself once more
    else:
        x.index_add_(0, rows, values.to(x.dtype))


def first_writers(rounds: list[SliceTable]) -> list[bool]:
    """For rounds run in order, whether no earlier round writes any query row of each."""
    spans: list[tuple[int, int]] = []
    flags = []
    for table in rounds:
        mine = list(zip(table.q0.tolist(), table.q1.tolist(), strict=True))
        flags.append(not _overlaps(spans, mine))
        spans = _union(spans + mine)
    return flags


def _union(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _overlaps(sorted_spans: list[tuple[int, int]], others: list[tuple[int, int]]) -> bool:
    starts = np.array([s for s, _ in sorted_spans] or [0])
    ends = np.array([e for _, e in sorted_spans] or [0])
    for start, end in others:
        at = int(np.searchsorted(starts, end, side="left"))
        if at and ends[at - 1] > start:
            return True
    return False
