"""Components that are interleaved, such as blocks which see every other block, laid side by side to be placed.

What places tokens takes a component for a stretch of tokens. Where tokens that see nothing of one another take turns,
they are one stretch. So the tokens are put in another order, in which each component is one; the mask is the same
but for where its rectangles lie.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..placement import Placement
from ..slices import IntArray, SliceTable, distinct, merge_neighbours

# Stretches shorter than this in the mean are left as they are: they would make as many runs and routes.
_LEAST_STRETCH = 16


class Apart(NamedTuple):
    """A mask with its tokens in the new order, in which stretch i of `lengths[i]` tokens began at starts[i] before."""

    table: SliceTable
    starts: IntArray
    lengths: IntArray

    def back(self, placement: Placement) -> Placement:
        """A placement of this mask as one of the mask as it was."""
        edges = np.cumsum(self.lengths)
        ends = distinct(np.concatenate([edges, placement.ends]))
        lengths = np.diff(ends, prepend=0)
        stretch = np.searchsorted(edges, ends, side="left")
        was = ends - edges[stretch] + self.starts[stretch] + self.lengths[stretch]
        order = np.argsort(was)
        assert (np.diff(was[order], prepend=0) == lengths[order]).all(), "stretches cover the sequence"
        return Placement.from_runs(was[order], placement.owner_of(ends - 1)[order], cp_size=placement.cp_size)


def lay_apart(table: SliceTable, total_seqlen: int) -> Apart | None:
    """The mask with components side by side; None where they are, as in nearly every mask."""
    if not ((table.q0 >= table.k1) | (table.k0 >= table.q1)).any():
        return None  # keys beside their queries only: packed documents and windows
    edges, first_q, first_k = _stretches(table, total_seqlen)
    crossing = first_q != first_k
    if not crossing.any() or len(edges) - 1 > total_seqlen // _LEAST_STRETCH:
        return None
    component = _connected(len(edges) - 1, first_q[crossing], first_k[crossing])
    order = np.argsort(component, kind="stable")
    if (np.diff(order) == 1).all():
        return None
    lengths = np.diff(edges)[order]
    shift = np.empty_like(lengths)
    shift[order] = np.cumsum(lengths) - lengths - edges[order]
    moved = table.shift(shift[first_q], shift[first_k])
    return Apart(merge_neighbours(moved), edges[order], lengths)


def _stretches(table: SliceTable, total_seqlen: int) -> tuple[IntArray, IntArray, IntArray]:
    """Edges of stretches that no slice's queries, and no slice's keys, reach across; the stretches of each slice's."""
    cuts = distinct(np.concatenate([[0, total_seqlen], table.q0, table.q1, table.k0, table.k1]))
    q0, q1, k0, k1 = (np.searchsorted(cuts, edge) for edge in (table.q0, table.q1, table.k0, table.k1))
    opened = np.bincount(np.concatenate([q0, k0]) + 1, minlength=len(cuts) + 1)
    closed = np.bincount(np.concatenate([q1, k1]), minlength=len(cuts) + 1)
    between = np.cumsum(opened - closed)[: len(cuts)] == 0
    number = np.cumsum(between) - 1
    return cuts[between], number[q0], number[k0]


def _connected(count: int, a: IntArray, b: IntArray) -> IntArray:
    """The least number of those that each of `count` is connected to by pairs of a and b."""
    label = np.arange(count)
    while True:
        low, high = np.minimum(label[a], label[b]), np.maximum(label[a], label[b])
        if (low == high).all():
            return label
        np.minimum.at(label, high, low)
        while (label[label] != label).any():
            label = label[label]
