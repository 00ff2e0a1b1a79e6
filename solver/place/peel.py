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

import numpy as np

from ..placement import Placement
from .components import TokenPool
from .density import last_within

# Components looked at for one choice. More find better fits and cost time; results hardly change past that.
_LOOKAHEAD = 64
# Gaps longer than this many next fillers are filled without choosing.
_RUN_AHEAD = 1.6


@dataclass(slots=True)
class _Budget:
    """What one rank may still take: tokens in [least, most], area at most `area`, at least `floor`."""

    least: int
    most: int
    area: float
    floor: float


def place_peeled(pool: TokenPool, *, cp_size: int, chunk_size: int, area_slack: float, lean: float) -> Placement:
    """Owner of every token; token counts lie within one chunk of each other.

    Empties `pool`.

    Args:
        area_slack: largest area of a rank over the mean, less one; kept where the fillers allow it.
        lean: 0 to 1, how far the token counts of early ranks are kept low (they hold dense pieces). Different ones
            suit different masks.
    """
    return _Peeler(pool, cp_size, chunk_size, area_slack, lean).place()


class _Peeler:
    """Working state of one run of `place_peeled`."""

    def __init__(self, pool: TokenPool, cp_size: int, chunk_size: int, area_slack: float, lean: float) -> None:
        self.pool, self.cp_size = pool, cp_size
        self.tokens_left, self.area_left = pool.hi[-1], sum(pool.areas)
        self.mean_area, self.mean_tokens = self.area_left / cp_size, self.tokens_left / cp_size
        self.area_limit = self.mean_area * (1 + area_slack)
        self.least = max(0, self.tokens_left // cp_size - chunk_size // 2)
        self.most = self.least + chunk_size
        self.lean_mean = self.mean_tokens + lean * (self.most - self.mean_tokens)
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
        floor = max(0.0, self.area_left - rest * self.area_limit)
        return _Budget(min(least, most), most, self.area_limit, floor)

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
            fillers = self._choose_fillers(top, gap, need) if gap > 0 else []
            if not fillers:
                break
            for i in fillers:
                self._give(*pool.take_all(i))
        count = pool.top_tokens(top, budget.area)
        if count >= budget.least:
            self._take_top(top, min(count, budget.most))
        else:
            self._close(top, budget.least - count)

    def _choose_fillers(self, top: int, gap: int, need: int) -> list[int]:
        """Components to take whole into the gap; none when a closing piece is better."""
        pool, budget = self.pool, self.budget
        others = [entry for entry in pool.by_density[: _LOOKAHEAD + 1] if entry[2] != top]
        if not others:
            return []
        density, size, i = others[0]
        if gap >= _RUN_AHEAD * size and density < need and pool.areas[i] <= budget.area:
            return self._run_ahead([i for _, _, i in others], gap)
        items = [
            # A filler also takes area from the top, so it closes less of the gap than its size.
            (size * (1 - density / need), i)
            for density, size, i in others
            if density < need and pool.areas[i] <= budget.area and size <= budget.most
        ]
        return self._best_filler(top, gap, sorted(items))

    def _run_ahead(self, others: list[int], gap: int) -> list[int]:
        """The next fillers in order: one, or as many small ones as a quarter of the gap holds."""
        count, size, area = 0, 0, 0
        for i in others:
            size, area = size + self.pool.size(i), area + self.pool.areas[i]
            if 4 * size > gap or area > self.budget.area:
                break
            count += 1
        return others[: max(count, 1)]

    def _best_filler(self, top: int, gap: int, items: list[tuple[float, int]]) -> list[int]:
        """One of `items` (gap closed, component), or none, so that the least area is lost to the top.

        Fillers that close more than the gap leave area unused; that counts as lost, and is allowed
        as long as the later ranks can take what this one leaves.
        """
        pool, budget = self.pool, self.budget
        room = gap + budget.most - budget.least
        # What may stay unused: the ranks after this one should be left with 2% less than the mean.
        rest = self.cp_size - self.rank - 1
        spare = budget.area - max(0.0, self.area_left - rest * 0.98 * self.mean_area)
        best, choice = self._closing_loss(top, gap), []
        for closed, i in items:
            area = pool.areas[i]
            if area >= best:
                continue
            if closed <= room:
                lost = area + self._closing_loss(top, math.ceil(gap - closed))
            elif (count := budget.most - pool.size(i)) <= pool.size(top):
                lost = max(area, budget.area - pool.top_area(top, count))
                if lost - area > spare:
                    continue
            else:
                continue
            if lost < best:
                best, choice = lost, [i]
        return choice

    def _closing_loss(self, top: int, gap: int) -> float:
        """Area that closing a gap costs: own bottom or that of another component, whose rows count as area."""
        if gap <= 0:
            return 0.0
        at = bisect_left(self.pool.by_size, (gap, -1))
        return min(self._loss(top, gap, i) for i in (top, *(i for _, i in self.pool.by_size[at : at + 3])))

    def _loss(self, top: int, gap: int, i: int) -> float:
        """Area that is lost to the top if the bottom of component i fills the gap; infinite if it cannot."""
        pool = self.pool
        if pool.size(i) < gap:
            return math.inf
        area = pool.bottom_area(i, gap)
        share = area / max(pool.top_need(top) * gap, 1)  # of what the top would have
        rows = 0 if i == top else pool.bottom_need(i, gap)
        # What the bottom takes from the top must be filled as well, and so on.
        return (rows / self.area_price + area) / (1 - share) if share < 0.9 else math.inf

    def _closers(self, top: int, gap: int) -> list[int]:
        """Components whose bottom could fill the gap, cheapest first; the component itself among them."""
        pool, look = self.pool, _LOOKAHEAD // 4
        at = bisect_left(pool.by_size, (gap, -1))
        # Masks differ in what makes a bottom cheap: a small component, or a sparse one.
        small = [i for _, i in pool.by_size[at : at + look]]
        sparse = [i for _, size, i in pool.by_density[: look * look] if size >= gap][:look]
        return [i for _, i in sorted((self._loss(top, gap, i), i) for i in {top, *small, *sparse})]

    def _close(self, top: int, gap: int) -> None:
        """Reach the token count with the top and one bottom, its own or another; two if it must be."""
        pool, budget = self.pool, self.budget
        for _ in range(4):
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
            if gap <= 0:
                self._take_top(top, budget.least)
                return

    def _top_beside(self, top: int, bottom: int) -> int | None:
        """Most tokens from `top` that leave room, in area, for the rest from the bottom of `bottom`."""
        pool, tokens, limit = self.pool, self.budget.least, self.budget.area
        if top == bottom:
            least, most = 0, tokens
            if tokens > pool.size(top):
                return None
        else:
            least, most = max(0, tokens - pool.size(bottom)), min(tokens, pool.size(top))
        if least > most:
            return None

        def excess(count: int) -> float:
            return pool.top_area(top, count) + pool.bottom_area(bottom, tokens - count) - limit

        count = last_within(excess, least, most, close=1e-5 * limit)
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
        near = pool.by_density[max(at - _LOOKAHEAD // 4, 0) : at + _LOOKAHEAD // 4]
        fits = [(size, i) for _, size, i in near if size <= budget.most and pool.areas[i] <= budget.area]
        return max(fits)[1] if fits else None

    def _close_pack(self) -> None:
        """The cheapest single piece that reaches the token count within the area."""
        pool, budget, tokens = self.pool, self.budget, self.budget.least
        self.area_price = 2 / max(self.mean_tokens, 1.0)
        at = bisect_left(pool.by_size, (tokens, -1))
        pieces = []
        for size, i in pool.by_size[at : at + _LOOKAHEAD]:
            bottom, top = pool.bottom_area(i, tokens), pool.top_area(i, tokens)
            pieces.append((pool.bottom_need(i, tokens), bottom, i, self._take_bottom))
            pieces.append((pool.bottom_need(i, size - tokens + 1), top, i, self._take_top))
        costs = [
            (need + max(0.0, budget.floor - area) * self.area_price, n)
            for n, (need, area, *_) in enumerate(pieces)
            if area <= budget.area
        ]
        if costs:
            _, _, i, take = pieces[min(costs)[1]]
            take(i, tokens)
        else:
            dense = bisect_left(pool.by_need, (budget.floor / tokens, 0))
            i = pool.by_need[min(dense, len(pool.by_need) - 1)][1]
            self._close(i, max(tokens - pool.top_tokens(i, budget.area), 1))
