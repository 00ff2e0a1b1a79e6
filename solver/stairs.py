"""Staircases of full rectangles, cut so that few rounds of disjoint queries and keys hold them.

A mask that grows block by block (block causal) is a staircase: row i of n sees the keys up to k[i], so all rows share
their first keys, and a kernel that stores the gradients of keys instead of adding them needs n rounds. Cut by halves
it needs 1 + log2(n): the upper half of the rows sees all that the lower half may see, which is one rectangle, and what
is left are two staircases that share neither rows nor keys, so both go on in the same rounds.

           k ->                    3 . .|.         rectangle 3: the upper half of the rows
        0  #                       3 . .|#         and what the lower half may see.
     q  1  # #           ->        2 . |
        2  # # #                   1 # |           The same again left and right of it: 1, 2; then the rows alone.
        3  # # # #
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from .rounds import colour_rounds
from .slices import UNBOUNDED, SliceTable, distinct

# Cells of rows and key ranges beyond which a table is left as it is.
MAX_CELLS = 1 << 14


class _Step(NamedTuple):
    """A full rectangle."""

    q0: int
    q1: int
    k0: int
    k1: int


def cut_stairs(table: SliceTable) -> SliceTable:
    """The pairs of disjoint full rectangles in others that take fewer rounds of disjoint queries and keys.

    The table itself where none are found. Rounds as `colour_rounds(..., disjoint_keys=True)` makes them.
    """
    rounds = len(colour_rounds(table, disjoint_keys=True))
    if rounds < 3:
        return table
    steps = _rows(table)
    if steps is None:
        return table
    found: list[_Step] = []
    for left in (True, False):
        stairs, steps = _stairs(steps, left=left)
        for stair in stairs:
            found.extend(_halved(stair, left=left))
    cut = _table(found + _joined(steps))
    return cut if len(colour_rounds(cut, disjoint_keys=True)) < rounds else table


def _table(steps: list[_Step]) -> SliceTable:
    q0, q1, k0, k1 = np.array(steps, dtype=np.int64).reshape(-1, 4).T
    return SliceTable.from_columns(q0, q1, k0, k1, -UNBOUNDED, UNBOUNDED)


def _joined(steps: list[_Step]) -> list[_Step]:
    """Rows of the same keys that follow on each other as one rectangle."""
    joined: list[_Step] = []
    for step in sorted(steps, key=lambda s: (s.k0, s.k1, s.q0)):
        if joined and joined[-1][1:] == (step.q0, step.k0, step.k1):
            joined[-1] = joined[-1]._replace(q1=step.q1)
        else:
            joined.append(step)
    return joined


def _rows(table: SliceTable) -> list[_Step] | None:
    """Cut at every row where a rectangle begins or ends, with key ranges that follow on each other joined."""
    cuts = distinct(np.concatenate([table.q0, table.q1]))
    if int((np.searchsorted(cuts, table.q1) - np.searchsorted(cuts, table.q0)).sum()) > MAX_CELLS:
        return None
    pieces = sorted(tuple(row[:4]) for row in table.split_q(cuts).table.data.tolist())
    steps: list[_Step] = []
    for q0, q1, k0, k1 in pieces:
        if steps and steps[-1].q0 == q0 and steps[-1].k1 == k0:
            steps[-1] = steps[-1]._replace(k1=k1)
        else:
            steps.append(_Step(q0, q1, k0, k1))
    return steps


def _stairs(steps: list[_Step], *, left: bool) -> tuple[list[list[_Step]], list[_Step]]:
    """Runs of neighbouring rows with one edge in common whose other edge only grows, or only shrinks; and the rest.

    left: the common edge is the first key, else the last.
    """
    by_edge = sorted(steps, key=lambda s: (s.k0 if left else s.k1, s.q0))
    stairs: list[list[_Step]] = []
    rest: list[_Step] = []
    for run in _runs(by_edge, left=left):
        if len({(s.k0, s.k1) for s in run}) > 2:
            stairs.append(run)
        else:
            rest.extend(run)
    return stairs, rest


def _runs(steps: list[_Step], *, left: bool) -> Iterator[list[_Step]]:
    run: list[_Step] = []
    way = 0  # of the free edge: 1 up, -1 down, 0 not known yet
    for step in steps:
        if run:
            last = run[-1]
            move = (step.k1 - last.k1) if left else (step.k0 - last.k0)
            turn = (move > 0) - (move < 0)
            same = (step.k0 == last.k0) if left else (step.k1 == last.k1)
            if not (same and step.q0 == last.q1 and turn * way >= 0):
                yield run
                run, way, turn = [], 0, 0
            way = way or turn
        run.append(step)
    if run:
        yield run


def _halved(stair: list[_Step], *, left: bool) -> list[_Step]:
    """The rectangles of a staircase, which is turned so that its rows see keys from the left and ever more of them."""
    keys = [(s.k0, s.k1) if left else (-s.k1, -s.k0) for s in stair]
    rows = [(s.q0, s.q1) for s in stair]
    if keys[0][1] > keys[-1][1]:
        keys, rows = keys[::-1], [(-q1, -q0) for q0, q1 in rows[::-1]]
    halves = list(_halves(rows, [k1 for _, k1 in keys], 0, len(rows), keys[0][0]))
    return [_Step(*sorted(map(abs, (q0, q1))), *sorted(map(abs, (k0, k1)))) for q0, q1, k0, k1 in halves]


def _halves(rows: list[tuple[int, int]], ends: list[int], low: int, high: int, start: int) -> Iterator[_Step]:
    """Of rows [low, high), which see keys [start, ends[row])."""
    if ends[high - 1] == start:
        return
    if ends[low] == ends[high - 1]:  # no step: one rectangle
        yield _Step(rows[low][0], rows[high - 1][1], start, ends[low])
        return
    middle = (low + high) // 2
    common = ends[middle - 1]
    if common > start:
        yield _Step(rows[middle][0], rows[high - 1][1], start, common)
    yield from _halves(rows, ends, low, middle, start)
    yield from _halves(rows, ends, middle, high, max(common, start))
