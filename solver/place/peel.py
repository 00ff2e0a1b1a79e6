"""Peel and fill: the placement for masks made of many components, such as packed documents.

A component with more area than one rank's share must be split, and every rank that holds a piece of
it needs all keys before the piece's end. The fewest rows travel when each rank takes the largest
piece that its share of area allows, from the top down. Such a piece has few tokens, so the rank's
token count is filled up with tokens that see little: whole small components, which cost no traffic,
or the bottom of the component itself, whose keys the rank fetches anyway.

Ranks are filled one after the other, those of the costliest tops first, with the sparsest fillers that
are left: then for every z the fewest ranks need more than z keys. What is left over in the end suits
nobody; pairs of ranks dividing anew what they hold mend that (`improve.py`).
How close that comes to the best: `kv_rows_bound`. For one causal sequence this is the well-known zigzag.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from itertools import islice

import numpy as np

from ..placement import Placement
from .components import TokenPool
from .density import last_within

# Components looked at for a filler, and for a closing piece or one more whole component.
_FILLERS, _CLOSERS = 64, 16


@dataclass(slots=True)
class _Budget:
    """What one rank may still take: tokens in [least, most], area at most `area`, at least `floor`."""

    least: int
    most: int
    area: float
    floor: float


def place_peeled(pool: TokenPool, *, cp_size: int, chunk_size: int, most_area: float, lean: float) -> Placement:
    """Owner of every token; token counts lie within one chunk of each other.

    Empties `pool`.

    Args:
        most_area: largest area of a rank; kept where the fillers allow it.
        lean: 0 to 1, how far the token counts of early ranks are kept low (they hold dense pieces). Different ones
            suit different masks.
    """
    return _Peeler(pool, cp_size, chunk_size, most_area, lean).place()


class _Peeler:
    """Working state of one run of `place_peeled`."""

    def __init__(self, pool: TokenPool, cp_size: int, chunk_size: int, most_area: float, lean: float) -> None:
        self.pool, self.cp_size = pool, cp_size
        self.tokens_left, self.area_left = pool.hi[-1], sum(pool.areas)
        self.most_area = most_area
        self.least = max(0, self.tokens_left // cp_size - chunk_size // 2)
        self.most = self.least + chunk_size
        self.lean_mean = self.tokens_left / cp_size * (1 - lean) + lean * self.most
        self.rank = 0
        self.budget = _Budget(0, 0, 0.0, 0.0)
        self.area_price = 0.0  # rows that one pair of area is worth on this rank
        self.runs: list[tuple[int, int]] = []

    def place(self) -> Placement:
        for rank in range(self.cp_size):
            self.rank = rank
            self.budget = self._next_budget(self.cp_size - self.rank - 1)
            if self.pool.by_need and self.budget.most > 0:
                self._fill_rank()
        while self.pool.by_need:
            self._give(*self.pool.take_all(self.pool.by_need[-1][1]))
        ends, owners = np.array(sorted(self.runs), dtype=np.int64).reshape(-1, 2).T
        return Placement.from_runs(ends, owners, cp_size=self.cp_size)

    def _next_budget(self, rest: int) -> _Budget:
        """Bounds that leave the `rest` ranks after this one inside theirs."""
        if rest == 0:
            return _Budget(self.tokens_left, self.tokens_left, self.area_left, self.area_left)
        least = max(self.least, self.tokens_left - rest * self.most, int(self.tokens_left - rest * self.lean_mean))
        most = min(self.most, self.tokens_left - rest * self.least)
        floor = max(0.0, self.area_left - rest * self.most_area)
        return _Budget(min(least, most), most, self.most_area, floor)

    def _give(self, start: int, end: int, area: int) -> None:
        self.runs.append((end, self.rank))
        self.tokens_left -= end - start
        self.area_left -= area
        self.budget.least -= end - start
        self.budget.most -= end - start
        self.budget.area -= area
        self.budget.floor -= area

    def _take_top(self, i: int, count: int) -> None:
        if count > 0:
            self._give(*self.pool.take_top(i, count))

    def _take_bottom(self, i: int, count: int) -> None:
        if count > 0:
            self._give(*self.pool.take_bottom(i, count))

    def _fill_rank(self) -> None:
        dearest = self.pool.by_need[-1][1]
        if self.pool.size(dearest) <= self.budget.most and self.pool.areas[dearest] <= self.budget.area:
            self._pack(dearest)
        else:
            self._peel(dearest)
        while self.budget.least > 0 and self.pool.by_density:
            # No way was found to stay within the area: at least take what sees least.
            _, size, i = self.pool.by_density[0]
            self._take_bottom(i, min(size, self.budget.least))

    # A component too large for one rank.

    def _peel(self, top: int) -> None:
        """The top of one component, sparse fillers, and a closing piece."""
        pool, budget = self.pool, self.budget
        need = max(pool.top_need(top), 1)
        self.area_price = need / max(budget.area, 1.0)
        while True:
            gap = budget.least - pool.top_tokens(top, budget.area)
            filler = self._filler(top, gap, need) if gap > 0 else None
            if filler is None:
                break
            self._give(*pool.take_all(filler))
        count = pool.top_tokens(top, budget.area)
        if count >= budget.least:
            self._take_top(top, min(count, budget.most))
        else:
            self._close(top, budget.least - count)

    def _filler(self, top: int, gap: int, need: int) -> int | None:
        """A component to take whole into the gap: the sparsest where it fits, else that which costs the top least area.

        None where a closing piece costs less.
        """
        pool, budget = self.pool, self.budget
        room = gap + budget.most - budget.least
        least_lost, best = self._loss(top, gap, top), None
        others = [entry for entry in pool.by_density[: _FILLERS + 1] if entry[2] != top and entry[0] < need]
        for density, size, i in others:
            area = pool.areas[i]
            # A filler also takes area from the top, so it closes less of the gap than its size.
            closed = size * (1 - density / need)
            if closed > room or size > budget.most or area > budget.area:
                continue
            if size <= gap and i == others[0][2]:
                return i
            lost = area + self._loss(top, math.ceil(gap - closed), top)
            if lost < least_lost:
                least_lost, best = lost, i
        return best

    def _loss(self, top: int, gap: int, i: int) -> float:
        """Area that is lost to the top if the bottom of component i fills the gap; infinite if it cannot."""
        pool = self.pool
        if gap <= 0:
            return 0.0
        if pool.size(i) < gap:
            return math.inf
        area = pool.bottom_area(i, gap)
        share = area / max(pool.top_need(top) * gap, 1)  # of what the top would have
        rows = 0 if i == top else pool.bottom_need(i, gap)
        # What the bottom takes from the top must be filled as well, and so on.
        return (rows / self.area_price + area) / (1 - share) if share < 1 else math.inf

    def _closers(self, top: int, gap: int) -> list[int]:
        """Components whose bottom could fill the gap, cheapest first; the component itself among them."""
        sparse = islice((i for _, size, i in self.pool.by_density if size >= gap), _CLOSERS)
        return [i for _, i in sorted((self._loss(top, gap, i), i) for i in {top, *sparse})]

    def _close(self, top: int, gap: int) -> None:
        """Reach the token count with the top and one bottom, its own or another; two if it must be."""
        pool, budget = self.pool, self.budget
        while gap > 0:
            for i in self._closers(top, gap):
                count = self._top_beside(top, i)
                if count is not None:
                    rest = budget.least - count
                    self._take_top(top, count)
                    self._take_bottom(i, rest)
                    return
            # No single bottom is sparse enough: half of the gap from the cheapest, then again.
            half = max(1, gap // 2)
            others = [i for i in self._closers(top, half) if i != top]
            if not others:
                return
            self._take_bottom(others[0], min(half, pool.size(others[0])))
            gap = budget.least - pool.top_tokens(top, budget.area)
        self._take_top(top, budget.least)

    def _top_beside(self, top: int, bottom: int) -> int | None:
        """Most tokens from `top` that leave room, in area, for the rest from the bottom of `bottom`."""
        pool, tokens = self.pool, self.budget.least
        least, most = max(0, tokens - pool.size(bottom)), min(tokens, pool.size(top))
        if least > most or (top == bottom and least > 0):
            return None

        def excess(count: int) -> float:
            return pool.top_area(top, count) + pool.bottom_area(bottom, tokens - count) - self.budget.area

        count = last_within(excess, least, most)
        return None if count < least else count

    # Components that fit.

    def _pack(self, first: int) -> None:
        """Whole components until the tokens are reached, then a closing piece."""
        budget = self.budget
        self._give(*self.pool.take_all(first))
        while budget.least > 0 and self.pool.by_density:
            i = self._best_whole()
            if i is None:
                self._close_pack()
                break
            self._give(*self.pool.take_all(i))

    def _best_whole(self) -> int | None:
        """The largest component that fits, of those whose density brings the rank to its share of area."""
        pool, budget = self.pool, self.budget
        at = bisect_left(pool.by_density, (max(budget.floor, 0.0) / budget.least, 0, 0))
        near = pool.by_density[max(at - _CLOSERS, 0) : at + _CLOSERS]
        fits = [(size, i) for _, size, i in near if size <= budget.most and pool.areas[i] <= budget.area]
        return max(fits)[1] if fits else None

    def _close_pack(self) -> None:
        """The bottom that reaches the token count for the fewest keys; none where all have too much area."""
        pool, tokens = self.pool, self.budget.least
        at = bisect_left(pool.by_size, (tokens, -1))
        pieces = [i for _, i in pool.by_size[at : at + _FILLERS] if pool.bottom_area(i, tokens) <= self.budget.area]
        if pieces:
            self._take_bottom(min(pieces, key=lambda i: (pool.bottom_need(i, tokens), i)), tokens)
