"""The union of overlapping banded rectangles as disjoint ones.

Every row loses what rows before it in one order cover: larger ones come first, so most rows that overlap many are soon
gone. All rows lose one neighbour at a time, and the pieces that are left go on with the neighbours that they meet: as
in quicksort, a row that has n holes or is cut into n pieces takes about log n rounds, not n.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from .slices import HI, K0, K1, LO, Q0, Q1, IntArray, SliceTable, expand_counts

# Pairs of rectangles that may overlap up to which a union is taken: it is a matter of seconds, and of 200 MB.
_MOST_PAIRS = 1 << 21
# Pairs looked at together.
_AT_ONCE = 1 << 17
# The largest rectangles: where there are many pairs, most rectangles lie inside one of these.
_LARGEST = 64

_LOW, _HIGH = [Q0, K0, LO], [Q1, K1, HI]
# The parts of a row outside another: rows above and below, keys left and right, the band below and above. Each is
# within some limits of the other, given as (column, the other's column, plus).
_WITHIN_Q = ((Q0, Q0, 0), (Q1, Q1, 0))
_WITHIN = (*_WITHIN_Q, (K0, K0, 0), (K1, K1, 0))
_PARTS = (
    ((Q1, Q0, 0),),
    ((Q0, Q1, 0),),
    (*_WITHIN_Q, (K1, K0, 0)),
    (*_WITHIN_Q, (K0, K1, 0)),
    (*_WITHIN, (HI, LO, -1)),
    (*_WITHIN, (LO, HI, 1)),
)


def disjoint_union(table: SliceTable) -> SliceTable:
    """The union of overlapping banded rectangles as disjoint ones, in the order of the rows that they are left of.

    Raises:
        ValueError: more than 2**21 pairs of rows may overlap.
    """
    table = table.canonical().table
    if _reach(table).overlaps.sum() > _LARGEST * len(table):
        table = _uncovered(table)
    meetings = _meetings(table)
    if not len(meetings.row):
        return table
    pieces, parent = table.data, np.arange(len(table))
    done = []
    while len(meetings.row):
        settled = np.ones(len(pieces), dtype=np.bool_)
        settled[meetings.row] = False
        done.append((pieces[settled], parent[settled]))
        first = np.flatnonzero(np.append(True, np.diff(meetings.row) > 0))
        row, by = meetings.row[first], meetings.by[first]
        left, nth = _differences(pieces[row], table.data[by])
        # What each piece that is left still meets is among what its row has still to lose.
        rest = np.diff(np.append(first, len(meetings.row))) - 1
        piece, after = expand_counts(rest[nth])
        by = meetings.by[first[nth[piece]] + 1 + after]
        meet = _meet(left, piece, table.data, by)
        pieces, parent, meetings = left, parent[row[nth]], _Meetings(piece[meet], by[meet])
    done.append((pieces, parent))
    pieces, parent = (np.concatenate(column) for column in zip(*done, strict=True))
    return SliceTable(pieces[np.argsort(parent, kind="stable")])


class _Meetings(NamedTuple):
    """Row or piece `row[i]` loses what row `by[i]` covers; sorted by row, then in the order in which rows win."""

    row: IntArray
    by: IntArray


def _meetings(table: SliceTable) -> _Meetings:
    """The pairs of rows that overlap, in about linear memory."""
    order, count = _reach(table)
    if count.sum() > _MOST_PAIRS:
        raise ValueError(
            f"{len(table)} rectangles of which {count.sum()} pairs may overlap: at most {_MOST_PAIRS} pairs are taken "
            f"apart; give rectangles that do not overlap, or fewer and larger ones"
        )
    at, nth = expand_counts(count)
    a, b = order[at], order[at + 1 + nth]
    meet = _meet(table.data, a, table.data, b)
    a, b = a[meet], b[meet]
    # Rows of about one size in random order: one after the other, they would cut a row they cross from one end on.
    rank = np.empty(len(table), dtype=np.int64)
    size = np.floor(np.log2(table.areas()))
    rank[np.lexsort((np.random.default_rng(0).random(len(table)), -size))] = np.arange(len(table))
    a_wins = rank[a] < rank[b]
    row, by = np.where(a_wins, b, a), np.where(a_wins, a, b)
    in_order = np.lexsort((rank[by], row))
    return _Meetings(row[in_order], by[in_order])


class _Reach(NamedTuple):
    """Rows in the order in which they begin along an axis, and how many after each begin before it ends."""

    order: IntArray
    overlaps: IntArray


def _reach(table: SliceTable) -> _Reach:
    """Along queries, keys or diagonals, whichever tells most rows apart."""
    found = []
    for low, high, plus in ((Q0, Q1, 0), (K0, K1, 0), (LO, HI, 1)):
        order = np.argsort(table.data[:, low], kind="stable")
        begins, ends = table.data[order, low], table.data[order, high] + plus
        found.append(_Reach(order, np.searchsorted(begins, ends, side="left") - np.arange(1, len(table) + 1)))
    return min(found, key=lambda reach: int(reach.overlaps.sum()))


def _uncovered(table: SliceTable) -> SliceTable:
    """The rows that do not lie inside another one of the largest; the first of equal rows stays."""
    for row in table.data[np.argsort(-table.areas(), kind="stable")[:_LARGEST]]:
        inside = (table.data[:, _LOW] >= row[_LOW]).all(axis=1) & (table.data[:, _HIGH] <= row[_HIGH]).all(axis=1)
        inside[np.flatnonzero((table.data == row).all(axis=1))[:1]] = False
        table = table.take(~inside)
    return table


def _meet(rows: IntArray, i: IntArray, others: IntArray, j: IntArray) -> IntArray:
    """Which n have a pair in common of rows[i[n]] and others[j[n]]."""

    def found() -> Iterator[IntArray]:
        for at in range(0, len(i), _AT_ONCE):
            some = slice(at, at + _AT_ONCE)
            a, b = rows[i[some]], others[j[some]]
            both = np.minimum(a, b)
            both[:, _LOW] = np.maximum(a[:, _LOW], b[:, _LOW])
            yield at + SliceTable(both).canonical().parent

    return np.concatenate([np.zeros(0, dtype=np.int64), *found()])


def _differences(rows: IntArray, cutters: IntArray) -> tuple[IntArray, IntArray]:
    """What is left of each row outside its cutter, at most six pieces sorted by row, and the row of each."""
    parts = np.repeat(rows[:, None], len(_PARTS), axis=1)
    for i, limits in enumerate(_PARTS):
        for column, other, plus in limits:
            bound = np.maximum if column in _LOW else np.minimum
            parts[:, i, column] = bound(parts[:, i, column], cutters[:, other] + plus)
    pieces, kept = SliceTable(parts.reshape(-1, 6)).canonical()
    return pieces.data, kept // len(_PARTS)
