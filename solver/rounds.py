"""Banded rectangles grouped for fused kernels: by the masks they know, in rounds that do not collide.

A fused kernel takes many slices in one call as "sequences" of a batch, under two conditions: all
have the same kind of mask, and no two write the same rows. `corner_pieces` brings slices to the four
masks that are aligned with a corner, `square_pieces` further to three masks without any parameter,
and `colour_rounds` picks slices whose rows do not overlap.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .slices import IntArray, SliceTable

# Kinds of a canonical slice; the bits say which edges of the band cut something off.
FULL_PIECE, CAUSAL_PIECE, INV_PIECE, BI_PIECE, BAND_PIECE = 0, 1, 2, 3, 4


def window_params(table: SliceTable) -> tuple[IntArray, IntArray]:
    """Left and right extent of the bottom-right aligned window that equals each slice; -1: unbounded.

    With m queries and n keys counted from the corner, such a window shows
    i + (n - m) - left <= j <= i + (n - m) + right. In a canonical slice both extents are >= 0:
    its last row sees its last key, and its first row its first key.
    """
    q0, q1, k0, k1, lo, hi = table.data.T
    left = k1 - q1 - lo
    right = hi - (k1 - q1)
    # An edge that cuts nothing off is unbounded: the first row sees key 0 and the last row key n - 1.
    left = np.where(lo <= k0 - q1 + 1, -1, left)
    right = np.where(hi >= k1 - 1 - q0, -1, right)
    return left, right


class Pieces(NamedTuple):
    """Slices and the kind of each: FULL_PIECE, CAUSAL_PIECE (the last row sees the last key and the
    row above one key less), INV_PIECE (the first row sees the first key, the next one key less),
    BI_PIECE (both), or BAND_PIECE (a band that meets no corner)."""

    table: SliceTable
    kinds: NDArray[np.int64]


def piece_kinds(table: SliceTable) -> NDArray[np.int64]:
    """The kind of every slice of a canonical table, [n]."""
    q0, q1, k0, k1, lo, hi = table.data.T
    has_lo, has_hi = lo > k0 - q1 + 1, hi < k1 - 1 - q0
    aligned = (~has_lo | (lo == k0 - q0)) & (~has_hi | (hi == k1 - q1))
    return np.where(aligned, has_hi * CAUSAL_PIECE + has_lo * INV_PIECE, BAND_PIECE)


def corner_pieces(table: SliceTable) -> Pieces:
    """The same pairs in corner-aligned slices: at most three for one.

    Rows from k0 - lo on are cut on the left, rows up to k1 - hi on the right. Between those two rows
    lie rows cut on both sides (a bi-causal piece) or on none (a full one).
    """
    q0, q1, k0, k1, lo, hi = table.data.T
    # An edge that cuts nothing off splits nothing off.
    left_from = np.where(lo > k0 - q1 + 1, np.clip(k0 - lo, q0, q1), q1)
    right_until = np.where(hi < k1 - 1 - q0, np.clip(k1 - hi, q0, q1), q0)
    whole = piece_kinds(table) != BAND_PIECE
    first = np.where(whole, q1, np.minimum(left_from, right_until))
    second = np.where(whole, q1, np.maximum(left_from, right_until))
    starts = np.stack([q0, first, second], axis=-1).reshape(-1)
    ends = np.stack([first, second, q1], axis=-1).reshape(-1)
    k0, k1, lo, hi = (np.repeat(column, 3) for column in (k0, k1, lo, hi))
    pieces = SliceTable.from_columns(starts, ends, k0, k1, lo, hi)
    kinds = piece_kinds(pieces)
    assert (kinds != BAND_PIECE).all(), "a corner piece is not aligned"
    return Pieces(pieces, kinds)


def square_pieces(table: SliceTable, max_rows: int = 4096) -> Pieces:
    """The same pairs in full rectangles, causal rectangles and inverse-causal squares.

    None of the three has a number in its mask, so a kernel that is compiled for each mask is compiled
    three times at most. A piece cut on both sides is taken in blocks of rows no longer than its band
    is wide (and than max_rows), each an inverse-causal square, a full rectangle and a causal square.
    """
    corner, kinds = corner_pieces(table)
    parts = [corner.take((kinds == FULL_PIECE) | (kinds == CAUSAL_PIECE))]
    inverse = [corner.take(kinds == INV_PIECE)]
    for q0, q1, k0, k1, lo, hi in corner.take(kinds == BI_PIECE).data.tolist():
        block = max(1, min(hi - lo + 1, max_rows))
        starts = np.arange(q0, q1, block)
        ends = np.minimum(starts + block, q1)
        left, right = ends - 1 + lo, starts + hi + 1  # keys between these are seen by the whole block
        inverse.append(SliceTable.from_columns(starts, ends, k0, np.minimum(left, k1), lo, hi))
        parts.append(SliceTable.from_columns(starts, ends, np.maximum(left, k0), right, lo, hi))
        parts.append(SliceTable.from_columns(starts, ends, np.maximum(right, k0), k1, lo, hi))
    # An inverse-causal rectangle is a square and the keys beside it.
    q0, q1, k0, k1, lo, hi = SliceTable.concat(inverse).data.T
    edge = np.minimum(k0 + (q1 - q0), k1)
    parts.append(SliceTable.from_columns(q0, q1, k0, edge, lo, hi))
    parts.append(SliceTable.from_columns(q0, q1, edge, k1, lo, hi))
    pieces = SliceTable.concat(parts)
    return Pieces(pieces, piece_kinds(pieces))


def group_windows(table: SliceTable) -> list[tuple[int, int, SliceTable]]:
    """Slices by bottom-right aligned window, (left, right, slices) with -1 unbounded, in few groups.

    A slice has more than one window: a side that cuts nothing off may be unbounded or just wide
    enough. So a document shorter than the window of the others joins them, and a single row joins any.
    """
    left, right = window_params(table)
    q0, q1, k0, k1 = table.data.T[:4]
    rows, keys = q1 - q0, k1 - k0
    areas = table.areas()
    waiting = np.ones(len(table), dtype=bool)
    groups = []
    while waiting.any():
        found = []
        for a, b in np.unique(np.stack([left, right])[:, waiting], axis=1).T.tolist():
            # A given extent hides nothing from the last row (left) or the first one (right) from here on.
            fits_left = (left == a) | ((left == -1) & (a >= keys - 1))
            fits_right = (right == b) | ((right == -1) & (b >= rows - 1))
            mine = waiting & fits_left & fits_right
            found.append((int(areas[mine].sum()), a, b, mine))
        _, a, b, mine = max(found, key=lambda f: f[:3])
        groups.append((a, b, table.take(mine)))
        waiting &= ~mine
    return groups


def colour_rounds(table: SliceTable, *, disjoint_keys: bool) -> list[IntArray]:
    """Row numbers of the table in rounds, such that no two slices of a round share queries.

    Args:
        disjoint_keys: nor keys (kernels whose backward stores dk and dv instead of adding).
    Returns:
        The rounds, each sorted by query; as few as first fit in query order gives, which for queries
        alone is the minimum.
    """
    rounds: list[list[int]] = []
    query_ends: list[int] = []
    keys: list[tuple[list[int], list[int]]] = []  # starts and ends of each round's key ranges, sorted
    q0, q1, k0, k1 = (table.data[:, c].tolist() for c in range(4))
    for i in np.lexsort((table.k0, table.q0)).tolist():
        for number, end in enumerate(query_ends):
            if end <= q0[i] and (not disjoint_keys or _fits(keys[number], k0[i], k1[i])):
                break
        else:
            number = len(rounds)
            rounds.append([])
            query_ends.append(0)
            keys.append(([], []))
        rounds[number].append(i)
        query_ends[number] = q1[i]
        if disjoint_keys:
            at = bisect_left(keys[number][0], k0[i])
            keys[number][0].insert(at, k0[i])
            keys[number][1].insert(at, k1[i])
    return [np.array(members, dtype=np.int64) for members in rounds]


def _fits(ranges: tuple[list[int], list[int]], start: int, end: int) -> bool:
    """Whether [start, end) overlaps none of the disjoint sorted ranges."""
    starts, ends = ranges
    at = bisect_left(starts, end)  # ranges before `at` begin before our end
    return at == 0 or ends[at - 1] <= start
