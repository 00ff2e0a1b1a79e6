"""Bring a placement's areas under a limit by exchanging dense tokens for sparse ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ..placement import Placement
from .density import AreaRamp, DensityProfile

# Partners considered for a rank that is too heavy: those with the least area.
NUM_PARTNERS = 8


def even_out(placement: Placement, profile: DensityProfile, *, limit: float, max_exchanges: int) -> Placement:
    """The placement with as many tokens for each rank and areas of at most `limit`, where that works.

    A rank above the limit gives tokens from its densest run end and gets as many from the sparsest
    run end of a rank with room. Each exchange settles a rank or uses up a run, so a few per rank are
    enough. Rows moved may grow by the keys that the tokens given away see.
    """
    ramp = profile.ramp
    holdings = placement.runs_by_rank()
    areas = np.array([sum(ramp.below(end) - ramp.below(start) for start, end in runs) for runs in holdings])
    stuck = np.zeros(len(areas), dtype=np.bool_)  # ranks that nobody can help
    for _ in range(max_exchanges):
        heavy = int(np.where(stuck, -1, areas).argmax())
        if areas[heavy] <= limit:
            break
        giving = max(_ends(ramp, holdings[heavy], heavy))
        light = [r for r in np.argsort(areas, kind="stable")[:NUM_PARTNERS].tolist() if areas[r] < limit]
        taking = min((end for r in light for end in _ends(ramp, holdings[r], r)), default=None)
        moved = 0
        if taking is not None and taking.density < giving.density:
            wanted = int(min(areas[heavy] - limit, limit - areas[taking.rank]))
            moved = _exchange(ramp, holdings, giving, taking, wanted, int(limit - areas[taking.rank]) + giving.density)
        stuck[heavy] = not moved
        areas[heavy] -= moved
        if taking is not None:
            areas[taking.rank] += moved
    table = np.array(sorted((end, r) for r, runs in enumerate(holdings) for _, end in runs), dtype=np.int64)
    return Placement.from_runs(*table.reshape(-1, 2).T, cp_size=placement.cp_size)


class _End(NamedTuple):
    """One end of a run of a rank: how many keys its token sees, and which end it is."""

    density: int
    run: int
    is_last: bool
    rank: int


def _ends(ramp: AreaRamp, runs: list[list[int]], rank: int) -> list[_End]:
    return [
        _End(ramp.density(end - 1 if is_last else start), i, is_last, rank)
        for i, (start, end) in enumerate(runs)
        for is_last in (True, False)
    ]


def _piece(run: list[int], is_last: bool, count: int) -> list[int]:
    """The `count` tokens at one end of a run."""
    return [run[1] - count, run[1]] if is_last else [run[0], run[0] + count]


def _exchange(
    ramp: AreaRamp, holdings: list[list[list[int]]], giving: _End, taking: _End, wanted: int, most: int
) -> int:
    """Exchange as many tokens as move the wanted area, or all of one run; the area moved, 0 if it is over most."""
    run, other = holdings[giving.rank][giving.run], holdings[taking.rank][taking.run]

    def area_of(run: list[int], is_last: bool) -> Callable[[int], int]:
        return lambda count: ramp.below(_piece(run, is_last, count)[1]) - ramp.below(_piece(run, is_last, count)[0])

    given, taken = area_of(run, giving.is_last), area_of(other, taking.is_last)
    low, high = 0, min(run[1] - run[0], other[1] - other[0])
    # The fewest tokens whose exchange moves the wanted area; halved, as it may rise with them and fall again.
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if given(middle) - taken(middle) >= wanted else (middle + 1, high)
    moved = given(low) - taken(low)
    if not 0 < moved <= most:
        return 0
    pieces = _piece(run, giving.is_last, low), _piece(other, taking.is_last, low)
    for end, mine, theirs in ((giving, *pieces), (taking, *pieces[::-1])):
        runs = holdings[end.rank]
        start, stop = runs.pop(end.run)
        rest = [start, mine[0]] if end.is_last else [mine[1], stop]
        runs += [theirs, *([rest] if rest[0] < rest[1] else [])]
    return moved
