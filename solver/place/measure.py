"""What a placement costs when every rank computes its own queries: KV rows moved, pairs per rank."""

from __future__ import annotations

import numpy as np

from ..placement import Placement
from ..routes import merge_intervals, rows_missing
from ..slices import IntArray, SliceTable


def kv_rows_received(table: SliceTable, placement: Placement) -> IntArray:
    """Key rows that each rank needs for its own queries and does not own, [cp_size].

    Query and key tokens share the placement. A row counts once per receiving rank, however many of
    its queries see it. No routes are made: O(runs log runs).
    """
    tasks, _ = table.split_q(placement.ends[:-1])
    return rows_missing(merge_intervals(placement.owner_of(tasks.q0), tasks.k0, tasks.k1), placement)


def rank_areas(table: SliceTable, placement: Placement) -> IntArray:
    """Visible pairs of each rank's own queries, [cp_size]."""
    tasks, _ = table.split_q(placement.ends[:-1])
    areas = np.zeros(placement.cp_size, dtype=np.int64)
    np.add.at(areas, placement.owner_of(tasks.q0), tasks.areas())
    return areas
