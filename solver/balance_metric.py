"""KV rows that a placement makes travel when every rank computes its own queries."""

from __future__ import annotations

import numpy as np

from .placement import Placement
from .routes import make_routes, merge_intervals
from .slices import IntArray, SliceTable


def kv_rows_received(table: SliceTable, placement: Placement) -> IntArray:
    """Key rows that each rank needs for its own queries and does not own, [cp_size].

    Query and key tokens share the placement. A row counts once per receiving rank, however many of
    its queries see it.
    """
    tasks, _ = table.split_q(placement.ends[:-1])
    needed = merge_intervals(placement.owner_of(tasks.q0), tasks.k0, tasks.k1)
    return make_routes(needed, placement).rows_received(placement.cp_size)


def rank_areas(table: SliceTable, placement: Placement) -> IntArray:
    """Visible pairs of each rank's own queries, [cp_size]."""
    tasks, _ = table.split_q(placement.ends[:-1])
    areas = np.zeros(placement.cp_size, dtype=np.int64)
    np.add.at(areas, placement.owner_of(tasks.q0), tasks.areas())
    return areas
