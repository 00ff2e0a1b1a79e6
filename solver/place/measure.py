"""What a placement costs when every rank computes its own queries: KV rows moved, pairs per rank."""

from __future__ import annotations

import numpy as np

from ..placement import Placement
from ..routes import Intervals, merge_intervals
from ..slices import IntArray, SliceTable


def kv_rows_received(table: SliceTable, placement: Placement) -> IntArray:
    """Key rows that each rank needs for its own queries and does not own, [cp_size].

    Query and key tokens share the placement. A row counts once per receiving rank, however many of
    its queries see it. No routes are made: rows needed minus rows needed and owned, O(runs log runs).
    """
    tasks, _ = table.split_q(placement.ends[:-1])
    needed = merge_intervals(placement.owner_of(tasks.q0), tasks.k0, tasks.k1)
    rows = np.zeros(placement.cp_size, dtype=np.int64)
    np.add.at(rows, needed.ranks, needed.ends - needed.starts)
    owned = _covered(needed, placement.owners, placement.starts, placement.ends)
    np.subtract.at(rows, placement.owners, owned)
    return rows


def _covered(needed: Intervals, ranks: IntArray, starts: IntArray, ends: IntArray) -> IntArray:
    """Length of each [starts[i], ends[i]) that lies in the intervals of ranks[i]."""
    if not len(needed.ranks):
        return np.zeros(len(ranks), dtype=np.int64)
    # One axis for all ranks: interval ends never reach the next rank's stride.
    stride = int(max(needed.ends.max(), ends.max())) + 1
    lengths = needed.ends - needed.starts
    opens = needed.starts + needed.ranks * stride
    before = np.cumsum(lengths) - lengths

    def length_below(x: IntArray) -> IntArray:
        i = np.maximum(np.searchsorted(opens, x, side="right") - 1, 0)
        result: IntArray = before[i] + np.clip(x - opens[i], 0, lengths[i])
        return result

    return length_below(ends + ranks * stride) - length_below(starts + ranks * stride)


def rank_areas(table: SliceTable, placement: Placement) -> IntArray:
    """Visible pairs of each rank's own queries, [cp_size]."""
    tasks, _ = table.split_q(placement.ends[:-1])
    areas = np.zeros(placement.cp_size, dtype=np.int64)
    np.add.at(areas, placement.owner_of(tasks.q0), tasks.areas())
    return areas
