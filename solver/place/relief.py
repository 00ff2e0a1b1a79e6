"""Relief of the busiest senders: a step waits for the busiest link, in either direction.

The keys near the start of a long document go to all its ranks, and a rank that holds many of them sends
several times what any rank receives. Such a rank is divided anew with one that has area left or sees the
same keys, rows against sending (`SendPrice`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np

from ..placement import Placement
from ..slices import IntArray
from .density import AreaRamp, DensityProfile
from .divide import PIECE_PRICE, Allowed, FloatArray, Pool, Sending, best_divisions, sending_price

# Ranks of either kind tried for taking from the busiest sender.
_NUM_TAKERS = 6
# Rows sent over most received from which a sender is relieved.
BUSY_SENDER = 2.5
# Pieces of two ranks that are divided anew; the others stay where they are.
_MOST_FREE = 8


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


class SendPrice(NamedTuple):
    """What sending costs, in rows: `sends` counts a piece's rows that go to other ranks, up to `free` cost nothing."""

    sends: Callable[[Piece], int]
    free: int


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

    def received(self, rank: int) -> int:
        """Rows that the rank receives."""
        mine = self.pieces[rank]
        return _needed(mine) - sum(piece.tokens for piece in mine)

    def divide(self, a: int, b: int, price: SendPrice) -> float:
        """Divide what ranks a and b hold; the rows gained, less prices, or 0 if all stays as it was.

        No rank comes to receive more than price.free.
        """
        free, kept_a, kept_b = self._pool(a, b)
        if not free:
            return 0.0
        kept = kept_a, kept_b
        sending = Sending(
            np.array([[price.sends(piece) for piece in free]], dtype=np.float64),
            np.array([[sum(map(price.sends, pieces)) for pieces in kept]], dtype=np.float64),
            price.free,
        )
        found, subset, cut, tokens = best_divisions(_as_pool(free, kept), self.allowed, sending=sending)
        if not found[0]:
            return 0.0
        mine, other = list(kept_a), list(kept_b)
        for i, piece in enumerate(free):
            if i == cut[0]:
                # The sparser end goes to rank a.
                rising = piece.first <= piece.last
                at = piece.start + int(tokens[0]) if rising else piece.end - int(tokens[0])
                low, high = self._piece(piece.component, piece.start, at), self._piece(piece.component, at, piece.end)
                mine.append(low if rising else high)
                other.append(high if rising else low)
            else:
                (mine if subset[0] >> i & 1 else other).append(piece)
        gain = _cost(self.pieces[a], price) + _cost(self.pieces[b], price) - _cost(mine, price) - _cost(other, price)
        if gain <= 0:
            return 0.0
        for pieces in (mine, other):
            if sum(piece.area for piece in pieces) > self.allowed.area:
                return 0.0  # a piece whose density is no straight line
            if _needed(pieces) - sum(piece.tokens for piece in pieces) > price.free:
                return 0.0
        self._give(a, mine)
        self._give(b, other)
        return gain

    def _pool(self, a: int, b: int) -> tuple[list[Piece], list[Piece], list[Piece]]:
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
        # What lies on both ranks has to be divided; then long pieces.
        joined.sort(key=lambda item: (len(item[1]), item[0].tokens), reverse=True)
        free, rest = [piece for piece, _ in joined[:_MOST_FREE]], joined[_MOST_FREE:]
        return free, [p for p, ranks in rest if a in ranks], [p for p, ranks in rest if a not in ranks]


def _as_pool(free: list[Piece], kept: tuple[list[Piece], list[Piece]]) -> Pool:
    """The pieces of one pair of ranks."""

    def row(values: list[int]) -> FloatArray:
        return np.array([values], dtype=np.float64)

    kept_need = [
        [max((p.need for p in pieces if p.component == piece.component), default=0) for piece in free]
        for pieces in kept
    ]
    return Pool(
        row([piece.component for piece in free]),
        row([piece.tokens for piece in free]),
        row([piece.area for piece in free]),
        row([piece.need for piece in free]),
        row([min(piece.first, piece.last) for piece in free]),
        row([abs(piece.last - piece.first) for piece in free]),
        np.array([kept_need], dtype=np.float64),
        row([sum(piece.tokens for piece in pieces) for pieces in kept]),
        row([sum(piece.area for piece in pieces) for pieces in kept]),
    )


def _needed(mine: list[Piece]) -> int:
    """Keys that a rank needs, its own included."""
    needs: dict[int, int] = {}
    for piece in mine:
        if piece.need > needs.get(piece.component, 0):
            needs[piece.component] = piece.need
    return sum(needs.values())


def _cost(mine: list[Piece], price: SendPrice) -> float:
    sent = np.array(float(sum(map(price.sends, mine))))
    return float(_needed(mine) + PIECE_PRICE * len(mine) + sending_price(sent, price.free))


class _Shared(NamedTuple):
    """A component on several ranks: these, the keys of it that each needs, and the rows of it that each sends."""

    ranks: IntArray
    needs: IntArray
    sent: IntArray


def relieve_senders(
    placement: Placement,
    profile: DensityProfile,
    components: IntArray,
    allowed: Allowed,
    *,
    sent: IntArray,
    num_pairs: int,
) -> Placement:
    """The placement with about num_pairs pairs divided so that no rank sends more than the busiest receives.

    Keys of a component are taken to be seen from its sparse end on, as in causal and full documents; for
    other masks the caller has to check what is gained.

    Args:
        components: first token of each component, ascending; no token sees one of another component.
        allowed: bounds that the placement keeps, and so does the result.
        sent: rows that each rank sends, [cp_size].
    """
    holdings = Holdings(placement, profile, components, allowed)
    _Relief(holdings, components.tolist(), placement.total_seqlen, sent).run(num_pairs)
    return holdings.placement()


class _Relief:
    """Rows that every rank sends, kept up to date while pairs are divided."""

    def __init__(self, holdings: Holdings, components: list[int], total_seqlen: int, sent: IntArray) -> None:
        self.holdings = holdings
        self.starts, self.ends = components, [*components[1:], total_seqlen]
        self.sent = sent.copy()
        self.shared: dict[int, _Shared] = {}  # as far as looked at

    def run(self, num_pairs: int) -> None:
        """Divide the busiest sender, again and again, as long as it sends too much and somebody can help."""
        holdings = self.holdings
        # Where queries see fewer keys than their component has, `received` may count less than nothing.
        most = max(0, *(holdings.received(rank) for rank in range(holdings.cp_size)))
        areas = np.array([sum(piece.area for piece in mine) for mine in holdings.pieces])
        settled = np.zeros(holdings.cp_size, dtype=np.int64)  # what a rank sends that nobody can help
        while num_pairs > 0 and (self.sent - settled).max() > BUSY_SENDER * most:
            busiest = int((self.sent - settled).argmax())
            settled[busiest] = self.sent[busiest]
            for other in self._takers(busiest, areas):
                num_pairs -= 1
                if holdings.divide(busiest, other, SendPrice(self._sends_beside(busiest, other), most)) > 0:
                    for rank in (busiest, other):
                        areas[rank] = sum(piece.area for piece in holdings.pieces[rank])
                    for component in {piece.component for r in (busiest, other) for piece in holdings.pieces[r]}:
                        old = self.shared.pop(component, None)
                        if old is not None:
                            self.sent[old.ranks] -= old.sent
                        new = self._look(component)
                        self.sent[new.ranks] += new.sent
                    settled[:] = 0
                    break

    def _takers(self, busiest: int, areas: IntArray) -> list[int]:
        """Ranks that send little and have the most area left, or see the keys that the busiest sends most of."""
        if not self.holdings.pieces[busiest]:
            return []  # of a mask whose keys are not seen from the sparse end on: its rows are counted wrongly
        dearest = max(self.holdings.pieces[busiest], key=self._sends_beside(busiest, busiest))
        light = 2 * self.sent < self.sent[busiest]
        others = np.flatnonzero(light)
        roomy = others[np.argsort(areas[others], kind="stable")]
        seeing = self._look(dearest.component).ranks
        near = seeing[light[seeing]]
        near = near[np.argsort(self.sent[near], kind="stable")]
        return list(dict.fromkeys([*roomy[:_NUM_TAKERS].tolist(), *near[:_NUM_TAKERS].tolist()]))

    def _keys_before(self, piece: Piece) -> int:
        """Keys of its component that are nearer to the sparse end, where all queries begin to see."""
        if piece.first <= piece.last:
            return piece.start - self.starts[piece.component]
        return self.ends[piece.component] - piece.end

    def _sends_beside(self, a: int, b: int) -> Callable[[Piece], int]:
        """Rows of a piece that go to other ranks than a and b."""

        @cache
        def sends(piece: Piece) -> int:
            if len(self.holdings.holders[piece.component]) == 1:
                return 0
            shared = self._look(piece.component)
            # Not np.clip, which takes five times as long for a few numbers.
            seen = np.minimum(np.maximum(shared.needs - self._keys_before(piece), 0), piece.tokens)
            return int(seen[(shared.ranks != a) & (shared.ranks != b)].sum())

        return sends

    def _look(self, component: int) -> _Shared:
        """Who holds and sends what of a component."""
        if component not in self.shared:
            ranks = sorted(self.holdings.holders[component])
            held = [[p for p in self.holdings.pieces[rank] if p.component == component] for rank in ranks]
            needs = np.array([max(piece.need for piece in mine) for mine in held])
            holder = np.repeat(np.arange(len(ranks)), [len(mine) for mine in held])
            before = np.array([self._keys_before(piece) for mine in held for piece in mine])
            tokens = np.array([piece.tokens for mine in held for piece in mine])
            seen = np.minimum(np.maximum(needs - before[:, None], 0), tokens[:, None])
            seen[np.arange(len(holder)), holder] = 0
            sent = np.bincount(holder, seen.sum(axis=1), len(ranks)).astype(np.int64)
            self.shared[component] = _Shared(np.array(ranks), needs, sent)
        return self.shared[component]
