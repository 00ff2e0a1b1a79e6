"""Repack: what two ranks hold is put together and divided anew, over and over, so that fewer rows travel.

A placement that fills one rank after the other leaves the last ones with what nobody wanted. Two ranks
together hold a dozen pieces of components; all their subsets can be looked at, and for each of them every
piece as the one that is cut, where the two ranks' areas and token counts allow it. That is a thousand
divisions, in closed form: a quarter of a millisecond. The best one is taken, or in a search one that is
somewhat worse, less and less so (simulated annealing).

A rank's rows are counted as the keys that its densest token of each component sees. That is exact for
packed documents; for other masks the caller compares what comes out by the exact count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .balance_profile import AreaRamp, DensityProfile
from .placement import Placement
from .slices import IntArray

FloatArray = NDArray[np.float64]

# Pieces of two ranks that are divided anew; the others stay where they are.
_MOST_FREE = 8
# Rows that one piece more is worth: every piece is a route to each rank that needs it.
_PIECE_PRICE = 16
# Rows that a rank's sending x times too much is worth, in units of x**2 times what the busiest receives.
_SEND_PRICE = 0.1
# First temperature of a search, as a share of the rows that a rank receives on average.
_TEMPERATURE = 0.003


class Piece(NamedTuple):
    """Tokens [start, end) of a component; keys seen by the first, the last and any of them; visible pairs."""

    component: int
    start: int
    end: int
    first: int
    last: int
    need: int
    area: int

    @property
    def tokens(self) -> int:
        return self.end - self.start


class Allowed(NamedTuple):
    """What a rank may hold: tokens within [least, most], visible pairs up to `area`."""

    least: int
    most: int
    area: float


def repack(
    placement: Placement,
    profile: DensityProfile,
    components: IntArray,
    allowed: Allowed,
    *,
    num_pairs: int,
    num_searched: int = 0,
) -> Placement:
    """The placement with pairs of ranks divided anew; balanced if it was, and with fewer rows or about as many.

    Args:
        components: first token of each component, ascending; no token sees one of another component.
        num_pairs: divisions tried at most of which only better ones are taken, pairs that share
            components of few holders first.
        num_searched: divisions of random pairs before that, of which worse ones are taken at first; the
            best placement met is kept.
    """
    holdings = Holdings(placement, profile, components, allowed)
    holdings.anneal(num_searched)
    holdings.descend(num_pairs)
    return holdings.placement()


class SendPrice(NamedTuple):
    """What sending costs, in rows: `sends` counts a piece's rows that go to other ranks, up to `free` cost nothing."""

    sends: Callable[[Piece], int]
    free: int

    def of(self, sent: FloatArray | float) -> FloatArray:
        """The price for ranks that send so many: it grows with the square, so the busiest counts most."""
        price: FloatArray = _SEND_PRICE * np.maximum(sent - self.free, 0.0) ** 2 / max(self.free, 1)
        return price


class Holdings:
    """Pieces of every rank, `pieces`, and the ranks that hold some of each component, `holders`.

    Mutable on purpose: it is the working state of one search and never leaves it. A rank's list of pieces
    is replaced, never changed.
    """

    def __init__(
        self, placement: Placement, profile: DensityProfile, components: IntArray, allowed: Allowed
    ) -> None:
        self.ramp: AreaRamp = profile.ramp()
        self.cp_size, self.allowed = placement.cp_size, allowed
        starts = np.unique(np.concatenate([placement.starts, components]))
        ends = np.append(starts[1:], placement.total_seqlen)
        below = profile.area_below()
        first, last = profile.density(starts), profile.density(ends - 1)
        component = np.searchsorted(components, starts, side="right") - 1
        columns = (component, starts, ends, first, last, np.maximum(first, last), below(ends) - below(starts))
        self.pieces: list[list[Piece]] = [[] for _ in range(self.cp_size)]
        rows = zip(*(column.tolist() for column in columns), strict=True)
        for rank, row in zip(placement.owner_of(starts).tolist(), rows, strict=True):
            self.pieces[rank].append(Piece(*row))
        self.holders: dict[int, set[int]] = {}
        for rank, mine in enumerate(self.pieces):
            for piece in mine:
                self.holders.setdefault(piece.component, set()).add(rank)

    def _piece(self, component: int, start: int, end: int) -> Piece:
        first, last = self.ramp.density(start), self.ramp.density(end - 1)
        area = self.ramp.below(end) - self.ramp.below(start)
        return Piece(component, start, end, first, last, max(first, last), area)

    def _give(self, rank: int, pieces: list[Piece]) -> None:
        for piece in self.pieces[rank]:
            self.holders[piece.component].discard(rank)
        for piece in pieces:
            self.holders[piece.component].add(rank)
        self.pieces[rank] = pieces

    def placement(self) -> Placement:
        """Owner of every token."""
        runs = sorted((piece.end, rank) for rank, mine in enumerate(self.pieces) for piece in mine)
        table = np.array(runs, dtype=np.int64).reshape(-1, 2)
        return Placement.from_runs(table[:, 0], table[:, 1], cp_size=self.cp_size)

    def sharing_pairs(self) -> Iterator[tuple[int, int]]:
        """Pairs of ranks that hold pieces of one component, those of the fewest holders first."""
        shared = sorted((sorted(ranks) for ranks in self.holders.values() if len(ranks) > 1), key=len)
        seen = set()
        for ranks in shared:
            for pair in combinations(ranks, 2):
                if pair not in seen:
                    seen.add(pair)
                    yield pair

    def received(self, rank: int) -> int:
        """Rows that the rank receives."""
        mine = self.pieces[rank]
        return _needed(mine) - sum(piece.tokens for piece in mine)

    def descend(self, num_pairs: int) -> None:
        """Take better divisions only, until none is left or `num_pairs` are tried."""
        tried: dict[tuple[int, int], tuple[list[Piece], list[Piece]]] = {}
        gained = True
        while gained:
            gained = False
            for a, b in self.sharing_pairs():
                mine, other = self.pieces[a], self.pieces[b]
                if (a, b) in tried and tried[a, b][0] is mine and tried[a, b][1] is other:
                    continue
                if not num_pairs:
                    return
                num_pairs -= 1
                gained |= self.divide(a, b) > 0
                tried[a, b] = self.pieces[a], self.pieces[b]

    def anneal(self, num_pairs: int) -> None:
        """Random pairs at a falling temperature; keeps the best state."""
        if not num_pairs:
            return
        rng = np.random.default_rng(0)
        hot = _TEMPERATURE * sum(_needed(mine) for mine in self.pieces) / self.cp_size
        gain = best = 0.0
        best_pieces = list(self.pieces)
        for i in range(num_pairs):
            if i % 256 == 0:
                shared = [sorted(ranks) for ranks in self.holders.values() if len(ranks) > 1]
            # Holders of one component, of any as often as of another, or any two ranks.
            near = shared[int(rng.integers(len(shared)))] if shared and rng.random() < 0.5 else range(self.cp_size)
            a, b = rng.choice(near, 2, replace=False).tolist()
            gain += self.divide(a, b, temperature=hot * (1 - i / num_pairs) ** 2, rng=rng)
            if gain > best:
                best, best_pieces = gain, list(self.pieces)
        for rank, mine in enumerate(best_pieces):
            self._give(rank, mine)

    def divide(
        self,
        a: int,
        b: int,
        *,
        temperature: float = 0.0,
        rng: np.random.Generator | None = None,
        price: SendPrice | None = None,
    ) -> float:
        """Divide what ranks a and b hold; the rows gained, less prices, or 0 if all stays as it was.

        With `rng` a worse division is taken, too, when it costs not much more than `temperature`. With
        `price` no rank comes to receive more than price.free.
        """
        before = _cost(self.pieces[a], price) + _cost(self.pieces[b], price)
        free, fixed_a, fixed_b = self._pool(a, b, rng)
        if not free:
            return 0.0
        division = _best_division(free, fixed_a, fixed_b, self.allowed, temperature, rng, price)
        if division is None:
            return 0.0
        mine, other = list(fixed_a), list(fixed_b)
        for i, piece in enumerate(free):
            if i == division.cut:
                # The sparser end goes to rank a.
                rising = piece.first <= piece.last
                at = piece.start + division.tokens if rising else piece.end - division.tokens
                low, high = self._piece(piece.component, piece.start, at), self._piece(piece.component, at, piece.end)
                mine.append(low if rising else high)
                other.append(high if rising else low)
            else:
                (mine if division.subset >> i & 1 else other).append(piece)
        gain = before - _cost(mine, price) - _cost(other, price)
        patience = temperature * rng.standard_exponential() if rng is not None else 0.0
        if gain <= 0 and gain <= -patience:
            return 0.0
        for pieces in (mine, other):
            if sum(piece.area for piece in pieces) > self.allowed.area:
                return 0.0  # a piece whose density is no straight line
            if price is not None and _needed(pieces) - sum(piece.tokens for piece in pieces) > price.free:
                return 0.0
        self._give(a, mine)
        self._give(b, other)
        return gain

    def _pool(
        self, a: int, b: int, rng: np.random.Generator | None
    ) -> tuple[list[Piece], list[Piece], list[Piece]]:
        """Pieces to be divided, neighbours joined, and those that stay with either rank."""
        held = sorted([(p.start, p, a) for p in self.pieces[a]] + [(p.start, p, b) for p in self.pieces[b]])
        joined: list[tuple[Piece, set[int]]] = []
        for _, piece, rank in held:
            last = joined[-1][0] if joined else None
            if last is not None and last.end == piece.start and last.component == piece.component:
                need, area = max(last.need, piece.need), last.area + piece.area
                whole = Piece(piece.component, last.start, piece.end, last.first, piece.last, need, area)
                joined[-1] = (whole, joined[-1][1] | {rank})
            else:
                joined.append((piece, {rank}))
        # What lies on both ranks has to be divided; then long pieces, or in a search any.
        weight = rng.random(len(joined)).tolist() if rng is not None else [1.0] * len(joined)
        order = sorted(
            range(len(joined)), key=lambda i: (len(joined[i][1]), joined[i][0].tokens * weight[i]), reverse=True
        )
        free = [joined[i][0] for i in order[:_MOST_FREE]]
        rest = [joined[i] for i in order[_MOST_FREE:]]
        return free, [p for p, ranks in rest if a in ranks], [p for p, ranks in rest if a not in ranks]


def _needed(mine: list[Piece]) -> int:
    """Keys that a rank needs, its own included."""
    needs: dict[int, int] = {}
    for piece in mine:
        if piece.need > needs.get(piece.component, 0):
            needs[piece.component] = piece.need
    return sum(needs.values())


def _cost(mine: list[Piece], price: SendPrice | None) -> float:
    sending = float(price.of(float(sum(map(price.sends, mine))))) if price else 0.0
    return _needed(mine) + _PIECE_PRICE * len(mine) + sending


class _Division(NamedTuple):
    """Rank a takes the pieces in the bits of `subset` and the sparser `tokens` of piece `cut` (-1: none)."""

    subset: int
    cut: int
    tokens: int


@lru_cache(maxsize=_MOST_FREE + 1)
def _subsets(n: int) -> tuple[FloatArray, IntArray]:
    """Members of all subsets of n pieces, 0 or 1, [2**n, n]; and the subsets without each piece, [n, 2**(n - 1)]."""
    members = (np.arange(1 << n)[:, None] >> np.arange(n)) & 1
    without = np.stack([np.flatnonzero(members[:, i] == 0) for i in range(n)])
    return members.astype(np.float64), without


def _best_division(
    free: list[Piece],
    fixed_a: list[Piece],
    fixed_b: list[Piece],
    allowed: Allowed,
    temperature: float,
    rng: np.random.Generator | None,
    price: SendPrice | None = None,
) -> _Division | None:
    """The division of the fewest rows (give or take the temperature) among those allowed; None if none is."""
    members, without = _subsets(len(free))
    tokens = np.array([piece.tokens for piece in free], dtype=np.float64)
    areas = np.array([piece.area for piece in free], dtype=np.float64)
    tokens_a = members @ tokens + sum(piece.tokens for piece in fixed_a)
    area_a = members @ areas + sum(piece.area for piece in fixed_a)
    all_tokens = tokens.sum() + sum(piece.tokens for piece in (*fixed_a, *fixed_b))
    all_area = areas.sum() + sum(piece.area for piece in (*fixed_a, *fixed_b))
    # Bounds for rank a under which rank b, which gets the rest, is within its own.
    least, most = max(allowed.least, all_tokens - allowed.most), min(allowed.most, all_tokens - allowed.least)
    floor, limit = all_area - allowed.area, allowed.area
    if least > most or floor > limit:
        return None
    rows, need_a = _rows(free, fixed_a, fixed_b, members)
    fits = (tokens_a >= least) & (tokens_a <= most) & (area_a >= floor) & (area_a <= limit)
    whole = np.where(fits, rows, np.inf)

    # One piece cut: t tokens from its sparser end go to rank a, area first * t + slope * t * (t - 1) / 2.
    first = np.array([float(min(piece.first, piece.last)) for piece in free])[:, None]
    rise = np.array([float(abs(piece.last - piece.first)) for piece in free])[:, None]
    slope = rise / np.maximum(tokens[:, None] - 1, 1)
    half = first - slope / 2

    def count_of(area: FloatArray) -> FloatArray:
        return 2 * area / np.maximum(half + np.sqrt(np.maximum(half * half + 2 * slope * area, 0)), 1e-9)

    before, open_ = area_a[without], tokens_a[without]
    fewest = np.maximum(np.maximum(least - open_, 1), np.ceil(count_of(np.maximum(floor - before, 0))))
    largest = np.minimum(most - open_, tokens[:, None] - 1)
    largest = np.minimum(largest, np.where(before <= limit, np.floor(count_of(np.maximum(limit - before, 0))), 0))
    extra = np.maximum(first + slope * (fewest - 1) - np.take_along_axis(need_a, without, axis=1), 0)
    cut = np.where(fewest <= largest, rows[without] + extra + _PIECE_PRICE, np.inf)

    if price is not None:
        sends = np.array([float(price.sends(piece)) for piece in free])
        at_a, at_b = (float(sum(map(price.sends, fixed))) for fixed in (fixed_a, fixed_b))

        def sending(sent_a: FloatArray) -> FloatArray:
            return price.of(at_a + sent_a) + price.of(at_b + sends.sum() - sent_a)

        whole_sent = members @ sends
        whole = whole + sending(whole_sent)
        cut = cut + sending(whole_sent[without] + sends[:, None] * fewest / np.maximum(tokens[:, None], 1))
    scores = np.concatenate([whole, cut.ravel()])
    if rng is not None and temperature > 0:
        scores = scores + temperature * rng.standard_exponential(len(scores))
    best = int(scores.argmin())
    if not np.isfinite(scores[best]):
        return None
    if best < len(whole):
        return _Division(best, -1, 0)
    i, nth = divmod(best - len(whole), without.shape[1])
    return _Division(int(without[i, nth]), i, int(fewest[i, nth]))


def _rows(
    free: list[Piece], fixed_a: list[Piece], fixed_b: list[Piece], members: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Keys needed by both ranks for each subset, less a constant; and by rank a of each piece's component.

    A component with one piece is needed once, wherever that goes: only the others make a difference.
    """
    rows, need_a = np.zeros(len(members)), np.zeros((len(free), len(members)))
    pieces: dict[int, list[int]] = {}
    for i, piece in enumerate(free):
        pieces.setdefault(piece.component, []).append(i)
    for component, own in pieces.items():
        at_a = max((p.need for p in fixed_a if p.component == component), default=0)
        at_b = max((p.need for p in fixed_b if p.component == component), default=0)
        if len(own) == 1 and not at_a and not at_b:
            continue
        needs = np.array([float(free[i].need) for i in own])
        a = np.maximum((members[:, own] * needs).max(axis=1), at_a)
        b = np.maximum(((1 - members[:, own]) * needs).max(axis=1), at_b)
        rows += a + b
        need_a[own] = a
    return rows, need_a
