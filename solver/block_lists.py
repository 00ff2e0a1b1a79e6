"""Lists of key spans for blocks of query rows: what a kernel walks that computes a slice table in one launch.

Rows are cut into blocks of at most `tile_rows`, and wherever a slice begins or ends, so that a block is within a slice
or outside it. Where that would make many blocks small (branches of a few tokens behind one prefix), they are cut only
where no slice goes on, as between packed documents, and blocks are mixed.

For each block and each slice that it meets, the keys that some row sees are walked in tiles of `tile_keys`; tiles that
all rows of the block see whole are told apart from those at an edge, which carry the slice's rows and band. For dk and
dv the same lists are made of the transposed table.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .slices import IntArray, SliceTable, distinct, expand_counts

# Cutting at every edge of a slice may make this many times as many blocks.
_MOST_SMALLER = 2


@dataclass(frozen=True, slots=True, eq=False)
class BlockLists:
    """The blocks of rows of a buffer and the key spans of each, int32.

    blocks: [B, 6]: rows [row0, row1), full spans [f0, f1), edge spans [e0, e1). Most tiles first.
    full: [F, 2]: keys [k0, k1), a whole number of tiles, seen by all rows of the block.
    edges: [E, 6]: k0, k1, q0, q1, lo, hi: key j of [k0, k1) is seen by row i of [q0, q1) iff lo <= j - i <= hi.
    num_busy: blocks that have spans; the others (rows that see nothing) come last.
    mixed: whether a block may have rows inside and rows outside of one slice.
    """

    blocks: NDArray[np.int32] = field(repr=False)
    full: NDArray[np.int32] = field(repr=False)
    edges: NDArray[np.int32] = field(repr=False)
    num_busy: int
    mixed: bool

    def packed(self) -> NDArray[np.int32]:
        """All three one after the other, so that they reach a device in one copy."""
        return np.concatenate([self.blocks.ravel(), self.full.ravel(), self.edges.ravel()])


def make_block_lists(table: SliceTable, num_rows: int, *, tile_rows: int, tile_keys: int) -> BlockLists:
    """Block lists of a canonical table of disjoint slices; every row of the buffer is in one block."""
    starts, ends, mixed = _blocks(table, num_rows, tile_rows)
    slice_, nth = expand_counts(
        np.searchsorted(starts, table.q1, side="left") - np.searchsorted(ends, table.q0, side="right")
    )
    block = np.searchsorted(ends, table.q0, side="right")[slice_] + nth
    order = np.argsort(block, kind="stable")
    slice_, block = slice_[order], block[order]
    q0, q1, k0, k1, lo, hi = table.data[slice_].T
    first, last = np.maximum(q0, starts[block]), np.minimum(q1, ends[block]) - 1
    keys_from, keys_to = np.maximum(k0, first + lo), np.minimum(k1, last + hi + 1)
    whole = (first == starts[block]) & (last == ends[block] - 1)
    # In tiles from keys_from: those from `head` on, before `tail`, are seen whole by every row.
    tiles = -(-(keys_to - keys_from) // tile_keys)
    head = -(-(np.maximum(k0, last + lo) - keys_from) // tile_keys)
    tail = (np.minimum(k1, first + hi + 1) - keys_from) // tile_keys
    has_full = whole & (head < tail)
    head, tail = np.where(has_full, head, tiles), np.where(has_full, tail, tiles)
    full_from, full_to = keys_from + head * tile_keys, keys_from + tail * tile_keys
    full = np.stack([full_from, full_to], axis=-1)[has_full]
    before, after = np.minimum(full_from, keys_to), np.minimum(full_to, keys_to)
    edge_rows = [
        np.stack([a, b, q0, q1, lo, hi], axis=-1) for a, b in ((keys_from, before), (after, keys_to))
    ]
    edges = np.stack(edge_rows, axis=1).reshape(-1, 6)
    is_edge = edges[:, 0] < edges[:, 1]
    work = np.bincount(block, weights=tiles, minlength=len(starts))
    full_at = _offsets(block[has_full], len(starts))
    edges_at = _offsets(np.repeat(block, 2)[is_edge], len(starts))
    rows = np.stack([starts, ends, full_at[:-1], full_at[1:], edges_at[:-1], edges_at[1:]], axis=-1)
    heaviest = np.argsort(-work, kind="stable")
    spans = full.astype(np.int32), edges[is_edge].astype(np.int32)
    return BlockLists(rows[heaviest].astype(np.int32), *spans, num_busy=int((work > 0).sum()), mixed=mixed)


def _blocks(table: SliceTable, num_rows: int, tile_rows: int) -> tuple[IntArray, IntArray, bool]:
    """First and last row (exclusive) of every block, in order, and whether they are mixed."""
    order = np.argsort(table.q0, kind="stable")
    q0, reach = table.q0[order], np.maximum.accumulate(table.q1[order])
    opens = np.concatenate([[True], q0[1:] >= reach[:-1]])[: len(q0)]
    closes = np.concatenate([opens[1:], [True]])[: len(q0)]
    ends = np.array([0, num_rows])
    everywhere = distinct(np.concatenate([ends, table.q0, table.q1]))
    apart = distinct(np.concatenate([ends, q0[opens], reach[closes]]))
    counts = -(-np.diff(everywhere) // tile_rows)
    mixed = bool(counts.sum() > _MOST_SMALLER * (-(-np.diff(apart) // tile_rows)).sum())
    cuts, counts = (apart, -(-np.diff(apart) // tile_rows)) if mixed else (everywhere, counts)
    stretch, nth = expand_counts(counts)
    starts = cuts[stretch] + nth * tile_rows
    return starts, np.minimum(starts + tile_rows, cuts[stretch + 1]), mixed


def _offsets(owners: IntArray, num_owners: int) -> IntArray:
    """Where the items of each owner begin among items sorted by owner, and where the last end, [num_owners + 1]."""
    return np.concatenate([[0], np.cumsum(np.bincount(owners, minlength=num_owners))]).astype(np.int64)
