"""Bring a placement's areas under a limit by exchanging dense tokens for sparse ones."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable
from itertools import islice

import numpy as np

from ..placement import Placement
from .density import AreaRamp, DensityProfile

# Partners considered for a rank that is too heavy: those with the least area.
_NUM_PARTNERS = 8


def even_out(placement: Placement, profile: DensityProfile, *, limit: float, max_exchanges: int) -> Placement:
    """The placement with as many tokens for each rank and areas of at most `limit`, where that works.

    A rank above the limit gives tokens from its densest run end and gets as many from the sparsest
    run end of a rank with room. Each exchange settles a rank or uses up a run, so a few per rank are
    enough. Rows moved may grow by the keys that the tokens given away see.
    """
    ramp = profile.ramp()
    ranks = [_Holding(ramp, runs) for runs in placement.runs_by_rank()]
    # Kept in order: at a thousand ranks, a look at all of them for every exchange is most of a plan's time.
    areas = [(holding.area, r) for r, holding in enumerate(ranks)]
    by_area = sorted(areas)
    for _ in range(max_exchanges):
        area = by_area[-1][0]
        heavy = by_area[bisect_left(by_area, (area, -1))][1]
        partners = list(islice((r for _, r in by_area if ranks[r].runs), _NUM_PARTNERS))
        light = _exchange(ranks, heavy, partners, int(limit)) if area > int(limit) else None
        if light is None:
            break
        for r in (heavy, light):
            del by_area[bisect_left(by_area, areas[r])]
            areas[r] = (ranks[r].area, r)
            insort(by_area, areas[r])
    ends = [(end, r) for r, holding in enumerate(ranks) for _, end in holding.runs]
    table = np.array(sorted(ends), dtype=np.int64).reshape(-1, 2)
    return Placement.from_runs(table[:, 0], table[:, 1], cp_size=placement.cp_size)


class _Holding:
    """Runs of one rank and their area; runs are cut only at their ends."""

    def __init__(self, ramp: AreaRamp, runs: list[list[int]]) -> None:
        self.ramp, self.runs = ramp, runs
        self.area = sum(ramp.below(end) - ramp.below(start) for start, end in runs)

    def edge(self, *, dense: bool) -> tuple[int, int, bool]:
        """Density, index and side (at the end?) of the densest or the sparsest run end."""
        density = self.ramp.density
        edges = [
            (density(end - 1 if at_end else start), i, at_end)
            for i, (start, end) in enumerate(self.runs)
            for at_end in (True, False)
        ]
        return max(edges) if dense else min(edges)

    def piece(self, i: int, at_end: bool, count: int) -> list[int]:
        """The `count` tokens at one end of run i."""
        start, end = self.runs[i]
        return [end - count, end] if at_end else [start, start + count]

    def areas_of_pieces(self, i: int, at_end: bool) -> Callable[[int], int]:
        """Area of such a piece, by its number of tokens."""
        start, end = self.runs[i]
        below = self.ramp.below
        fixed = below(end if at_end else start)
        return (lambda count: fixed - below(end - count)) if at_end else (lambda count: below(start + count) - fixed)

    def swap(self, i: int, at_end: bool, count: int, received: list[int]) -> None:
        """Give the piece away and take `received` instead."""
        start, end = self.runs[i]
        self.area -= self.areas_of_pieces(i, at_end)(count)
        self.area += self.ramp.below(received[1]) - self.ramp.below(received[0])
        self.runs[i] = [start, end - count] if at_end else [start + count, end]
        if end - start == count:
            del self.runs[i]
        self.runs.append(received)


def _exchange(ranks: list[_Holding], heavy: int, partners: list[int], limit: int) -> int | None:
    """Bring a rank down to `limit`, or as far as one pair of runs allows; the partner that helped, if one can."""
    giver = ranks[heavy]
    dense, i, at_end = giver.edge(dense=True)
    edges = [(*ranks[r].edge(dense=False), r) for r in partners if ranks[r].area < limit]
    if not edges:
        return None
    sparse, j, other_end, light = min(edges)
    taker = ranks[light]
    if sparse >= dense or light == heavy:
        return None
    wanted = min(giver.area - limit, limit - taker.area)
    start, end = giver.runs[i]
    other_start, other_stop = taker.runs[j]
    least, most = 0, min(end - start, other_stop - other_start)
    given_area, taken_area = giver.areas_of_pieces(i, at_end), taker.areas_of_pieces(j, other_end)
    # The fewest tokens whose exchange moves the wanted area; halved, as it may rise with them and fall again.
    while least < most:
        middle = (least + most) // 2
        if given_area(middle) - taken_area(middle) >= wanted:
            most = middle
        else:
            least = middle + 1
    moved = given_area(least) - taken_area(least)
    if moved <= 0 or taker.area + moved > limit + dense:
        return None
    given, taken = giver.piece(i, at_end, least), taker.piece(j, other_end, least)
    giver.swap(i, at_end, least, taken)
    taker.swap(j, other_end, least, given)
    return light
