"""Peel and fill: the placement for masks made of many components, such as packed documents.

A component with more area than one rank's share must be split, and every rank that holds a piece of
it needs all keys before the piece's end. The fewest rows travel when each rank takes the largest
piece that its share of area allows, from the top down. Such a piece has few tokens, so the rank's
token count is filled up with tokens that see little: whole small components, which cost no traffic,
or the bottom of the component itself, whose keys the rank fetches anyway.

Some ranks are filled first, with the tops of one or two middling components and no fillers: what is
cut off below is cheap and sparse. The others are filled one after the other, those of the costliest
tops first, with the sparsest fillers that are left: then for every z the fewest ranks need more than
z keys.

Bound: let N(z) be how many (rank, component) pairs need more than z keys; rows moved are the sum of
N(z) over z >= 0, minus one for each key. N(z) is at least, for causal components,
- R(z): R ranks can hold all tokens that see more than z keys only if their area plus that of the
  sparsest fillers for the remaining R * tokens - (their number) fits into R shares;
- F(z): the sum over components of how many ranks it takes to hold, by area and by tokens, those of
  its tokens that see more than z.
With D(z) components of more than z keys, N(z) - D(z) never grows with z (a component counted at z is
counted below as well), so N(z) - D(z) is at least the largest max(R, F) - D at z or above. At
imbalance 1.02 and counts within a chunk (`kv_rows_bound` with `Limits.even`) that is 0.404 of the rival's rows for
varlen causal 1M on 64 ranks, 0.456 on 256 and 0.483 on 1024. For one causal sequence it is 3/4 of the sequence per
rank, and this placement is the well-known zigzag.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..placement import Placement
from .components import TokenPool
from .density import last_within

# Fillers looked at for one gap. More find better fits and cost time; results hardly change past 64.
_LOOKAHEAD = 64
# Ranks that need this share of what the dearest one needs set the time of the exchange: they take
# their component's own bottom, which they would receive otherwise, even where it is less sparse.
_DEAREST = 0.985
# Candidates for the piece that closes a rank's token count.
_NUM_CLOSERS = 16

# Area left unused on a rank, and the components and token counts whose tops fill it.
_Tops = tuple[float, list[tuple[int, int]]]


class PeelOptions(NamedTuple):
    """What differs between peelings; different ones suit different masks, so several are tried.

    lean: 0 to 1, how far the token counts of early ranks are kept low (they hold dense pieces).
    run_ahead: gaps longer than this many next fillers are filled without choosing.
    gap_price: weight of area, against rows, when a rank's token count is closed.
    own_bias: the own bottom goes before fillers while its area is at most this many times theirs.
    tops_spend: share of all area slack that ranks without fillers may use up; 0 for no such ranks.
    """

    lean: float = 0.8
    run_ahead: float = 3.2
    gap_price: float = 1.0
    own_bias: float = 1.0
    tops_spend: float = 0.4


@dataclass(slots=True)
class _Budget:
    """What one rank may still take: tokens in [least, most], area at most `area`, at least `floor`."""

    least: int
    most: int
    area: float
    floor: float


def place_peeled(
    pool: TokenPool, *, cp_size: int, chunk_size: int, area_slack: float, options: PeelOptions
) -> Placement:
    """Owner of every token; token counts lie within one chunk of each other.

    Empties `pool`.

    Args:
        area_slack: largest area of a rank over the mean, less one; kept where the fillers allow it.
    """
    return _Peeler(pool, cp_size, chunk_size, area_slack, options).place()


class _Peeler:
    """Working state of one run of `place_peeled`."""

    def __init__(
        self, pool: TokenPool, cp_size: int, chunk_size: int, area_slack: float, options: PeelOptions
    ) -> None:
        self.pool, self.options = pool, options
        self.total_seqlen = total_seqlen = pool.hi[-1]
        self.cp_size, self.area_slack = cp_size, area_slack
        self.tokens_left, self.area_left = total_seqlen, sum(pool.areas)
        self.mean_area = self.area_left / cp_size
        self.mean_density = self.area_left / total_seqlen
        self.least = max(0, total_seqlen // cp_size - chunk_size // 2)
        self.most = self.least + chunk_size
        self.rank = 0
        self.budget = _Budget(0, 0, 0.0, 0.0)
        self.dearest_need = pool.by_need[-1][0]
        self.area_price = 0.0  # rows that one pair of area is worth on this rank
        self.ends: list[int] = []
        self.owners: list[int] = []

    def place(self) -> Placement:
        for rank in range(self._fill_with_tops(), self.cp_size):
            self.rank = rank
            self.budget = self._next_budget(self.cp_size - rank)
            if self.pool.by_need and self.budget.most > 0:
                self._fill_rank()
        while self.pool.by_need:
            self._give(*self.pool.take_all(self.pool.by_need[-1][1]))
        runs = sorted(zip(self.ends, self.owners, strict=True))
        ends, owners = np.array(runs, dtype=np.int64).reshape(-1, 2).T
        return Placement.from_runs(ends, owners, cp_size=self.cp_size)

    def _next_budget(self, ranks_left: int) -> _Budget:
        """Bounds that leave the ranks after this one inside theirs."""
        rest = ranks_left - 1
        if rest == 0:
            return _Budget(self.tokens_left, self.tokens_left, self.area_left, self.area_left)
        mean = self.total_seqlen / self.cp_size
        lean_mean = mean + self.options.lean * (self.most - mean)
        least = max(self.least, self.tokens_left - rest * self.most, int(self.tokens_left - rest * lean_mean))
        most = min(self.most, self.tokens_left - rest * self.least)
        limit = self.mean_area * (1 + self.area_slack)
        floor = max(0.0, self.area_left - rest * limit)
        return _Budget(min(least, most), most, limit, floor)

    def _give(self, start: int, end: int, area: int) -> None:
        self.ends.append(end)
        self.owners.append(self.rank)
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
        if self._fits_whole(dearest):
            self._pack(dearest)
        else:
            self._peel(dearest)
        while self.budget.least > 0 and self.pool.by_density:
            # No way was found to stay within the area: at least take what sees least.
            _, size, i = self.pool.by_density[0]
            self._take_bottom(i, min(size, self.budget.least))

    def _fits_whole(self, i: int) -> bool:
        """Whether the rank can take component i whole and still reach its tokens within its area."""
        tokens = self.budget.least - self.pool.size(i)
        area = self.budget.area - self.pool.areas[i]
        if self.pool.size(i) > self.budget.most or area < 0:
            return False
        for _, size, j in self.pool.by_density:
            if tokens <= 0 or area < 0:
                break
            if j != i:
                area -= self.pool.areas[j] if size <= tokens else self.pool.bottom_area(j, tokens)
                tokens -= size
        return area >= 0

    # Ranks that need no fillers.

    def _fill_with_tops(self) -> int:
        """Fill ranks with nothing but the tops of one or two components; how many ranks.

        A component of half a rank's tokens finds no partner that fits, one of two ranks' tokens is
        too sparse for a rank of its own; as fillers they would be cut wherever a gap ends. With the
        bottom cut off instead, they fill a rank for few rows, and the bottoms are as sparse as
        fillers can be. Such a rank may hold less than its share of area as long as the slack of all
        ranks together makes up for it; the fullest come first.
        """
        spare = self.options.tops_spend * self.cp_size * self.mean_area * self.area_slack
        limit = self.mean_area * (1 + self.area_slack)
        for short, tops in sorted(self._single_tops(limit) + self._paired_tops(limit)):
            spare -= short
            if spare < 0 or self.rank >= self.cp_size - 1:
                break
            for i, count in tops:
                self._take_top(i, count)
            self.rank += 1
        return self.rank

    def _single_tops(self, limit: float) -> list[_Tops]:
        """Components of more tokens than a rank takes whose top, as long as that, is not too much area."""
        pool, most = self.pool, self.most
        at = bisect_left(pool.by_size, (most, -1))
        tops = [
            (limit - pool.top_area(i, most), [(i, most)])
            for size, i in pool.by_size[at:]
            if self._is_cheap_cut(i, size - most)
        ]
        return [top for top in tops if top[0] >= 0]

    def _is_cheap_cut(self, i: int, count: int) -> bool:
        """Whether component i without its bottom `count` tokens leaves one that needs clearly fewer keys.

        Every part of a full document needs all of it: there a cut is as dear as a whole copy.
        """
        return count <= 0 or 4 * self.pool.bottom_need(i, count) <= 3 * self.pool.top_need(i)

    def _paired_tops(self, limit: float) -> list[_Tops]:
        """Pairs of a large and a small component of half a rank's tokens or more."""
        pool, most, pairs = self.pool, self.most, []
        low = bisect_left(pool.by_size, (most // 2, -1))
        high = bisect_left(pool.by_size, (most, -1))
        order = [i for size, i in pool.by_size[low:high] if self._is_cheap_cut(i, size // 4)]
        while len(order) > 1:
            large, small = order[-1], order[0]
            over = pool.size(large) + pool.size(small) - most
            counts = pool.size(large) - over // 2, pool.size(small) - (over - over // 2)
            if over < 0 or counts[1] <= 0:
                del order[0]
                continue
            area = pool.top_area(large, counts[0]) + pool.top_area(small, counts[1])
            if area <= limit:
                pairs.append((limit - area, [(large, counts[0]), (small, counts[1])]))
                del order[0]
            del order[-1]
        return pairs

    # A component too large for one rank.

    def _peel(self, top: int) -> None:
        """The top of one component, sparse fillers, and a closing piece."""
        pool, budget = self.pool, self.budget
        need = max(pool.top_need(top), 1)
        self.area_price = self.options.gap_price * need / max(budget.area, 1.0)
        while True:
            gap = budget.least - pool.top_tokens(top, budget.area)
            if gap <= 0:
                break
            fillers = self._choose_fillers(top, gap, need)
            if fillers is None:
                break
            for i in fillers:
                self._give(*pool.take_all(i))
        count = pool.top_tokens(top, budget.area)
        if count >= budget.least:
            self._take_top(top, min(count, budget.most))
        else:
            self._close(top, budget.least - count)

    def _choose_fillers(self, top: int, gap: int, need: int) -> list[int] | None:
        """Components to take whole into the gap, maybe none; None when a closing piece is better."""
        pool, budget = self.pool, self.budget
        by_density = pool.by_density
        first = 1 if by_density[0][2] == top else 0
        if first >= len(by_density):
            return None
        density, size, i = by_density[first]
        if gap >= self.options.run_ahead * size and density < need and pool.areas[i] <= budget.area:
            bias = self.options.own_bias if pool.size(top) >= gap else 0.0
            if need > _DEAREST * self.dearest_need and 8 * pool.bottom_need(top, size) < need:
                bias = 16 * max(bias, 1.0)
            # Never all of the top: the peel goes on with what is left of it.
            if size < pool.size(top) and pool.bottom_area(top, size) <= bias * pool.areas[i]:
                self._take_bottom(top, size)
                return []
            return self._run_ahead(top, gap, first)
        items = []
        for density, size, i in by_density[first : first + _LOOKAHEAD]:
            if density >= need:
                break
            if i != top and pool.areas[i] <= budget.area and size <= budget.most:
                # A filler also takes area from the top, so it closes less of the gap than its size.
                items.append((size * (1 - density / need), i, pool.areas[i], size))
        return self._best_filler(top, gap, sorted(items))

    def _run_ahead(self, top: int, gap: int, first: int) -> list[int]:
        """The next fillers in order: one, or as many small ones as a quarter of the gap holds."""
        pool = self.pool
        chosen = [pool.by_density[first][2]]
        size, area = pool.size(chosen[0]), pool.areas[chosen[0]]
        for _, more, i in pool.by_density[first + 1 :]:
            size, area = size + more, area + pool.areas[i]
            if 4 * size > gap or area > self.budget.area:
                break
            if i != top:
                chosen.append(i)
        return chosen

    def _best_filler(self, top: int, gap: int, items: list[tuple[float, int, int, int]]) -> list[int] | None:
        """One of `items`, or None, so that the least area is lost to the top.

        Fillers that close more than the gap leave area unused; that counts as lost, and is allowed
        as long as the later ranks can take what this one leaves.
        """
        pool, budget = self.pool, self.budget
        room = gap + budget.most - budget.least
        # What may stay unused: the ranks after this one should be left with 2% less than the mean.
        rest = self.cp_size - self.rank - 1
        spare = budget.area - max(0.0, self.area_left - rest * 0.98 * self.mean_area)
        best, choice = self._closing_loss(top, gap), None
        for closed, i, area, size in items:
            if area >= best:
                continue
            if closed <= room:
                lost = area + self._closing_loss(top, math.ceil(gap - closed))
            elif (count := budget.most - size) <= pool.size(top):
                lost = max(area, budget.area - pool.top_area(top, count))
                if lost - area > spare:
                    continue
            else:
                continue
            if lost < best:
                best, choice = lost, [i]
        return choice

    def _closing_loss(self, top: int, gap: int) -> float:
        """Area that closing a gap costs, rows counted as area: own bottom or that of another component."""
        if gap <= 0:
            return 0.0
        pool, count = self.pool, gap
        full = max(pool.top_need(top) * count, 1)  # area of the gap if the top filled it
        loss = float("inf")
        if count <= pool.size(top):
            area = pool.bottom_area(top, count)
            # What the bottom takes from the top must be filled as well, and so on.
            if area < 0.9 * full:
                loss = area / (1 - area / full)
        at = bisect_left(pool.by_size, (count, -1))
        for _, i in pool.by_size[at : at + 3]:
            if i != top:
                area, rows = pool.bottom_area(i, count), pool.bottom_need(i, count)
                if area < 0.9 * full:
                    loss = min(loss, (rows / self.area_price + area) / (1 - area / full))
        return loss

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

    def _closers(self, top: int, gap: int) -> list[int]:
        """Components whose bottom could fill the gap, cheapest first."""
        pool = self.pool
        at = bisect_left(pool.by_size, (gap, -1))
        # Masks differ in what makes a bottom cheap: a small component, or few keys seen at its end.
        near = [i for _, i in pool.by_size[at : at + _NUM_CLOSERS // 2]]
        low = [i for _, size, i in pool.by_bottom[: 12 * _NUM_CLOSERS] if size >= gap][:_NUM_CLOSERS]
        costs = []
        for i in dict.fromkeys([*near, *low, top, *(i for _, i in pool.by_need[-4:])]):
            count = min(gap, pool.size(i))
            rows = 0 if i == top else pool.bottom_need(i, count)
            short = (gap - count) * self.mean_density  # what is missing has to come from elsewhere
            costs.append((pool.bottom_area(i, count) * self.area_price + rows + short, i))
        return [i for _, i in sorted(costs)]

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
                break
            self._give(*self.pool.take_all(i))
        if budget.least > 0 and self.pool.by_density:
            self._close_pack()

    def _best_whole(self) -> int | None:
        """The component that fits and leaves the rank closest to the mean density, and nearly full."""
        pool, budget = self.pool, self.budget
        sparsest = pool.by_density[0][0]
        wanted = max(budget.floor, 0.0) / budget.least
        at = bisect_left(pool.by_density, (wanted, 0, 0))
        # Small components leave the last word to those after them.
        look = 16 if 64 * pool.by_density[min(at, len(pool.by_density) - 1)][1] > budget.least else 3
        best, choice = float("inf"), None
        for _, size, i in pool.by_density[max(at - look, 0) : at + look]:
            area_after = budget.area - pool.areas[i]
            tokens_after = max(0, budget.least - size)
            if size > budget.most or area_after < tokens_after * sparsest:
                continue
            short = abs(budget.floor - pool.areas[i] - self.mean_density * tokens_after)
            score = short / max(self.mean_area, 1.0) + 0.3 * tokens_after * self.cp_size / self.total_seqlen
            if score < best:
                best, choice = score, i
        return choice

    def _close_pack(self) -> None:
        """The cheapest single piece that reaches the token count within the area."""
        pool, budget = self.pool, self.budget
        tokens = budget.least
        price = 2 * self.mean_density / max(self.mean_area, 1.0)
        self.area_price = price
        at = bisect_left(pool.by_size, (tokens, -1))
        near = [i for _, i in pool.by_size[at : at + 4 * _NUM_CLOSERS]]
        best: tuple[float, int, bool] | None = None
        for i in dict.fromkeys([*near, *(i for _, i in pool.by_need[-12:])]):
            if pool.size(i) < tokens:
                continue
            bottom, top = pool.bottom_area(i, tokens), pool.top_area(i, tokens)
            if bottom <= budget.area:
                cost = pool.bottom_need(i, tokens) + max(0.0, budget.floor - bottom) * price
                best = min(best or (cost, i, False), (cost, i, False))
            if top <= budget.area:
                cost = pool.bottom_need(i, pool.size(i) - tokens + 1) + max(0.0, budget.floor - top) * price
                best = min(best or (cost, i, True), (cost, i, True))
        if best is None:
            i = pool.by_need[
                min(bisect_left(pool.by_need, (budget.floor / tokens, 0)), len(pool.by_need) - 1)
            ][1]
            self._close(i, max(tokens - pool.top_tokens(i, budget.area), 1))
        elif best[2]:
            self._take_top(best[1], tokens)
        else:
            self._take_bottom(best[1], tokens)
