"""Slices as calls of a ragged kernel that takes lengths and start offsets: cuDNN, and TE above it.

Such a kernel needs no packing: sequence n of a call is slice n, its length in `cu_seqlens`, its first
row in `starts`. In exchange a call has one mask, stores what it computes (so no two of its sequences
may share query rows, nor key rows in backward), and is compiled for its mask: the masks are full,
causal from the bottom right (with or without a window on the left), and inverse causal from the top
left, and the windows are few.

Shape legend as in `base.py`; B sequences.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cpattn.collectives import put_on
from cpattn.solver import SliceTable, window_params
from cpattn.solver.rounds import (
    CAUSAL_PIECE,
    FULL_PIECE,
    INV_PIECE,
    colour_rounds,
    corner_pieces,
    square_pieces,
)
from cpattn.solver.stairs import cut_stairs

from .base import HALF_DTYPES, Problem, refuse_dtype
from .installed import device_capability
from .rows import Rows, as_rows, first_writers

# Windows of different width that are kept; slices of further ones are cut into squares.
MAX_WINDOWS = 4


class Mask(NamedTuple):
    """The mask of a call: `kind` is FULL_PIECE, CAUSAL_PIECE or INV_PIECE.

    left: with CAUSAL_PIECE, keys back from the diagonal that a row sees besides its own; -1 all.
    """

    kind: int
    left: int = -1


@dataclass(frozen=True, slots=True, eq=False)
class OffsetCall:
    """One call over views of the buffers, [q_span] and [k_span].

    rows, keys: the rows of the buffers that the call's sequences cover; others are not written. Keys
        only in backward.
    lengths_q, lengths_k, starts_q, starts_k: int64 [B], starts counted from the spans.
    first: in forward, no earlier call of the work writes these query rows.
    cached: what an adapter makes of the lengths and starts, to make it once.
    """

    mask: Mask
    q_span: slice
    k_span: slice
    rows: Rows
    keys: Rows
    lengths_q: Tensor
    lengths_k: Tensor
    starts_q: Tensor
    starts_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    first: bool
    cached: dict[Any, Any] = field(default_factory=dict, repr=False)


class OffsetWork(NamedTuple):
    """The calls of forward (disjoint queries each) and backward (disjoint queries and keys each)."""

    forward: tuple[OffsetCall, ...]
    backward: tuple[OffsetCall, ...]


def plan_offsets(slices: SliceTable, device: torch.device) -> OffsetWork:
    """The calls that compute a canonical slice table."""
    groups = _by_mask(slices)
    forward = [(m, t.take(r)) for m, t in groups for r in colour_rounds(t, disjoint_keys=False)]
    stored = [(m, cut_stairs(t) if m.kind == FULL_PIECE else t) for m, t in groups]
    backward = [(m, t.take(r)) for m, t in stored for r in colour_rounds(t, disjoint_keys=True)]
    flags = first_writers([table for _, table in forward])
    return OffsetWork(
        tuple(_call(m, t, device, first=first) for (m, t), first in zip(forward, flags, strict=True)),
        tuple(_call(m, t, device, first=None) for m, t in backward),
    )


def writes_once(work: OffsetWork) -> bool:
    """Whether forward writes each query row once at most."""
    return all(call.first for call in work.forward)


def _by_mask(slices: SliceTable) -> list[tuple[Mask, SliceTable]]:
    """Slices grouped by the masks above; those of none are cut at the rows where an edge begins."""
    left, right = window_params(slices)
    windows = right == 0  # causal from the bottom right, whatever the left edge does
    pieces = SliceTable.concat([slices.take(windows), corner_pieces(slices.take(~windows)).table])
    left, right = window_params(pieces)
    full = (left == -1) & (right == -1)
    causal = right == 0
    inverse = ~full & ~causal
    assert (pieces.lo == pieces.k0 - pieces.q0)[inverse].all(), "a piece is not corner-aligned"
    # A single row sees the same under any mask, and so does a document shorter than a window.
    causal |= full & (pieces.q1 - pieces.q0 == 1) & bool(causal.any())
    full &= ~causal
    areas = pieces.areas()
    widths = np.unique(left[causal & (left >= 0)])
    by_area = sorted(widths.tolist(), key=lambda w: -int(areas[causal & (left == w)].sum()))
    if by_area:
        left = np.where(causal & (left == -1) & (pieces.k1 - pieces.k0 <= by_area[0] + 1), by_area[0], left)
    rare = causal & np.isin(left, by_area[MAX_WINDOWS:])
    if rare.any():
        squares, kinds = square_pieces(pieces.take(rare))
    else:
        squares, kinds = SliceTable.empty(), np.zeros(0, dtype=np.int64)
    found = []
    for mask, chosen in [
        (Mask(FULL_PIECE), full),
        (Mask(CAUSAL_PIECE), causal & (left == -1)),
        (Mask(INV_PIECE), inverse),
        *((Mask(CAUSAL_PIECE, w), causal & (left == w)) for w in by_area[:MAX_WINDOWS]),
    ]:
        more = squares.take(kinds == mask.kind) if mask.left == -1 else SliceTable.empty()
        table = SliceTable.concat([pieces.take(chosen), more])
        if len(table):
            found.append((mask, table))
    return found


def _call(mask: Mask, table: SliceTable, device: torch.device, *, first: bool | None) -> OffsetCall:
    """first: None in backward, which alone writes to keys (and has them disjoint)."""
    q0, q1, k0, k1 = table.data.T[:4]
    by_key = np.argsort(k0, kind="stable")

    def on_device(x: np.ndarray) -> Tensor:
        return put_on(device, torch.from_numpy(np.ascontiguousarray(x)))

    return OffsetCall(
        mask,
        slice(int(q0.min()), int(q1.max())),
        slice(int(k0.min()), int(k1.max())),
        as_rows(q0, q1, device),
        as_rows(k0[by_key], k1[by_key], device) if first is None else slice(0, 0),
        on_device(q1 - q0),
        on_device(k1 - k0),
        on_device(q0 - q0.min()),
        on_device(k0 - k0.min()),
        int((q1 - q0).max()),
        int((k1 - k0).max()),
        bool(first),
    )


def within(rows: Rows, span: slice) -> Rows:
    """Rows of a buffer as rows of the view [span] of it."""
    if isinstance(rows, slice):
        return slice(rows.start - span.start, rows.stop - span.start)
    return rows - span.start


def refuse_cudnn(problem: Problem, device_type: str) -> str | None:
    """What cuDNN's packed attention does not serve."""
    capability = device_capability(device_type)
    if capability is not None and capability[0] not in (9, 10):
        return f"the GPU is sm{capability[0]}{capability[1]}: backward of packed sequences needs sm90 or sm100"
    if problem.softcap:
        return "cuDNN's packed kernels have no softcap"
    widest = max(problem.head_dim, problem.head_dim_v)
    if widest > 256:
        return f"head_dim {widest} is more than cuDNN takes (256)"
    return refuse_dtype(problem, HALF_DTYPES)
