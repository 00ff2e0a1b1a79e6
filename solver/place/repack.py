"""Repack: what two ranks hold is put together and divided anew, over and over, so that fewer rows travel.

A placement that fills one rank after the other leaves the last ones with what nobody wanted. Here all ranks
are paired, round after round, each with one that holds some of the same component if it can be, and every pair
takes the best division of what it holds (`best_divisions`), or one that is somewhat worse, less and less so
(simulated annealing). All pairs of a round are divided at once.

A rank's rows are counted as the keys that its densest token of each component sees. That is exact for
packed documents; for other masks the caller compares what comes out by the exact count.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..placement import Placement
from ..slices import IntArray
from .density import DensityProfile
from .divide import PIECE_PRICE, Allowed, BoolArray, Divisions, FloatArray, Pool, best_divisions

# Pieces of two ranks that are divided anew; the others stay where they are.
_MOST_FREE = 5
# First temperature, as a share of the rows that a rank needs on average.
_TEMPERATURE = 0.003


def repack(
    placement: Placement,
    profile: DensityProfile,
    components: IntArray,
    allowed: Allowed,
    *,
    num_rounds: int,
) -> Placement:
    """The placement with pairs of ranks divided anew; balanced if it was, and with fewer rows or about as many.

    No rank comes to need clearly more keys than the one that needed most.

    Args:
        components: first token of each component, ascending; no token sees one of another component.
        num_rounds: how often all ranks are paired; the best placement met is kept.
    """
    search = _Search(placement, profile, components, allowed)
    search.run(num_rounds)
    return search.placement()


class _Pieces(NamedTuple):
    """Tokens [start, end) of a component and their owner, ascending.

    first, last, need: keys seen by the first token, the last and any; area: visible pairs. int64 [num_pieces].
    """

    component: IntArray
    start: IntArray
    end: IntArray
    first: IntArray
    last: IntArray
    need: IntArray
    area: IntArray
    owner: IntArray

    def take(self, which: IntArray | BoolArray) -> _Pieces:
        """Some of the pieces."""
        return _Pieces(*(column[which] for column in self))


class _Joined(NamedTuple):
    """What the paired ranks hold, neighbours joined: owned by one of the pair, or by both.

    pair: of which pair; side: of the owner within it, the first one's if both own some. slot: place among the
    pair's pieces; those before _MOST_FREE are free to move.
    """

    pieces: _Pieces
    pair: IntArray
    side: IntArray
    slot: IntArray


class _Search:
    """The pieces of all ranks, what each rank needs, and the most that any may come to need, while they are divided.

    Mutable on purpose: it is the working state of one search and never leaves it. Its arrays are replaced,
    never changed.
    """

    def __init__(
        self, placement: Placement, profile: DensityProfile, components: IntArray, allowed: Allowed
    ) -> None:
        self.profile, self.area_below = profile, profile.area_below()
        self.cp_size, self.num_components, self.allowed = placement.cp_size, len(components), allowed
        starts = np.unique(np.concatenate([placement.starts, components]))
        ends = np.append(starts[1:], placement.total_seqlen)
        component = np.searchsorted(components, starts, side="right") - 1
        self.pieces = self._make(component, starts, ends, placement.owner_of(starts))
        self.costs = self._costs_of(self.pieces)
        self.highest = float(self.costs.max())

    def placement(self) -> Placement:
        """Owner of every token."""
        return Placement.from_runs(self.pieces.end, self.pieces.owner, cp_size=self.cp_size)

    def run(self, num_rounds: int) -> None:
        """Divide all pairs of ranks of each round, at a falling temperature; keeps the best state."""
        rng = np.random.default_rng(0)
        hot = _TEMPERATURE * float(self.costs.sum()) / self.cp_size
        gain = best = 0.0
        kept = self.pieces, self.costs
        for i in range(num_rounds):
            gain += self._divide(self._partners(rng), hot * (1 - i / num_rounds) ** 2, rng)
            if gain > best:
                best, kept = gain, (self.pieces, self.costs)
        self.pieces, self.costs = kept

    def _make(self, component: IntArray, start: IntArray, end: IntArray, owner: IntArray) -> _Pieces:
        first, last = self.profile.density(start), self.profile.density(end - 1)
        area = self.area_below(end) - self.area_below(start)
        return _Pieces(component, start, end, first, last, np.maximum(first, last), area, owner)

    def _costs_of(self, pieces: _Pieces) -> FloatArray:
        """Keys that each rank needs, its own included, and the price of its pieces, [cp_size]."""
        key = pieces.owner * self.num_components + pieces.component
        order = np.argsort(key, kind="stable")
        key = key[order]
        opens = _opens(key)
        need = np.maximum.reduceat(pieces.need[order], opens)
        rows = _sums(key[opens] // self.num_components, need, self.cp_size)
        return rows + PIECE_PRICE * np.bincount(pieces.owner, minlength=self.cp_size)

    def _partners(self, rng: np.random.Generator) -> IntArray:
        """Pairs of different ranks, [cp_size // 2, 2]: holders of one component as far as possible, at random."""
        component, owner = np.divmod(np.unique(self.pieces.component * self.cp_size + self.pieces.owner), self.cp_size)
        shared = np.bincount(component, minlength=self.num_components)[component] > 1
        component, owner = component[shared], owner[shared]
        order = np.lexsort((rng.random(len(component)), rng.random(self.num_components)[component]))
        pairs: list[tuple[int, int]] = []
        single = set(range(self.cp_size))
        waiting, of = -1, -1
        for c, rank in zip(component[order].tolist(), owner[order].tolist(), strict=True):
            if rank not in single:
                continue
            if of == c and waiting >= 0:
                pairs.append((waiting, rank))
                single -= {waiting, rank}
                waiting = -1
            else:
                waiting, of = rank, c
        left = rng.permutation(sorted(single)).tolist()
        pairs.extend(zip(left[0::2], left[1::2], strict=False))
        return np.array(pairs, dtype=np.int64).reshape(-1, 2)

    def _divide(self, ranks: IntArray, temperature: float, rng: np.random.Generator) -> float:
        """Divide what each pair of `ranks` holds, where that gains or costs not much more than the temperature.

        Returns the rows gained, less prices.
        """
        joined = self._join(ranks, rng)
        divisions = best_divisions(_pool(joined, len(ranks)), self.allowed, temperature=temperature, rng=rng)
        new = self._divided(joined, ranks, divisions)
        costs = self._costs_of(new)
        gain = (self.costs[ranks] - costs[ranks]).sum(axis=1)
        patience = temperature * rng.standard_exponential(len(ranks))
        taken = divisions.found & ((gain > 0) | (gain > -patience))
        # The busiest receiver sets the time of the exchange.
        taken &= (costs[ranks] <= self.highest).all(axis=1)
        # A piece whose density is no straight line may break a limit.
        area = _sums(new.owner, new.area, self.cp_size)[ranks]
        taken &= (area <= self.allowed.area).all(axis=1)
        changed = np.zeros(self.cp_size, dtype=np.bool_)
        changed[ranks[taken]] = True
        old, new = self.pieces.take(~changed[self.pieces.owner]), new.take(changed[new.owner])
        together = _Pieces(*(np.concatenate(columns) for columns in zip(old, new, strict=True)))
        self.pieces = together.take(np.argsort(together.start))
        self.costs = np.where(changed, costs, self.costs)
        return float(gain[taken].sum())

    def _join(self, ranks: IntArray, rng: np.random.Generator) -> _Joined:
        pair_of = np.full(self.cp_size, -1)
        side_of = np.zeros(self.cp_size, dtype=np.int64)
        pair_of[ranks] = np.arange(len(ranks))[:, None]
        side_of[ranks[:, 1]] = 1
        held = self.pieces.take(pair_of[self.pieces.owner] >= 0)
        pair, side = pair_of[held.owner], side_of[held.owner]
        apart = (pair[1:] != pair[:-1]) | (held.component[1:] != held.component[:-1])
        apart |= held.start[1:] != held.end[:-1]
        opens = np.flatnonzero(np.append(True, apart)[: len(pair)])
        last = np.append(opens[1:], len(pair))[: len(opens)] - 1
        pieces = _Pieces(
            held.component[opens],
            held.start[opens],
            held.end[last],
            held.first[opens],
            held.last[last],
            np.maximum.reduceat(held.need, opens),
            np.add.reduceat(held.area, opens),
            held.owner[opens],
        )
        pair, both = pair[opens], np.minimum.reduceat(side, opens) < np.maximum.reduceat(side, opens)
        # What lies on both ranks has to be divided; then any, long pieces more often.
        weight = np.sqrt(pieces.end - pieces.start) * rng.random(len(opens))
        order = np.lexsort((-weight, ~both, pair))
        slot = np.empty(len(opens), dtype=np.int64)
        slot[order] = np.arange(len(opens)) - np.searchsorted(pair[order], pair[order])
        return _Joined(pieces, pair, np.minimum.reduceat(side, opens), slot)

    def _divided(self, joined: _Joined, ranks: IntArray, divisions: Divisions) -> _Pieces:
        """What the paired ranks hold afterwards, in no order."""
        pieces, pair, slot = joined.pieces, joined.pair, joined.slot
        free = slot < _MOST_FREE
        side = np.where(free, 1 - (divisions.subset[pair] >> np.minimum(slot, _MOST_FREE) & 1), joined.side)
        is_cut = free & (slot == divisions.cut[pair])
        whole = pieces._replace(owner=ranks[pair, side]).take(~is_cut)
        cut, pair = pieces.take(is_cut), pair[is_cut]
        rising = cut.first <= cut.last
        at = np.where(rising, cut.start + divisions.tokens[pair], cut.end - divisions.tokens[pair])
        # The sparser end goes to the first rank.
        low = self._make(cut.component, cut.start, at, ranks[pair, 1 - rising])
        high = self._make(cut.component, at, cut.end, ranks[pair, rising.astype(np.int64)])
        return _Pieces(*(np.concatenate(columns) for columns in zip(whole, low, high, strict=True)))


def _opens(key: IntArray) -> IntArray:
    """Where runs of equal keys begin."""
    result: IntArray = np.flatnonzero(np.append(True, key[1:] != key[:-1])[: len(key)])
    return result


def _sums(place: IntArray, values: IntArray, size: int) -> FloatArray:
    """Sum of the values at each place, [size]."""
    return np.bincount(place, values, size).astype(np.float64)


def _pool(joined: _Joined, num_pairs: int) -> Pool:
    is_free = joined.slot < _MOST_FREE
    free, kept = joined.pieces.take(is_free), joined.pieces.take(~is_free)
    place = joined.pair[is_free], joined.slot[is_free]

    def padded(values: IntArray) -> FloatArray:
        result = np.zeros((num_pairs, _MOST_FREE))
        result[place] = values
        return result

    component = np.full((num_pairs, _MOST_FREE), -1)
    component[place] = free.component
    rank = 2 * joined.pair[~is_free] + joined.side[~is_free]
    size = 2 * num_pairs
    return Pool(
        component.astype(np.float64),
        padded(free.end - free.start),
        padded(free.area),
        padded(free.need),
        padded(np.minimum(free.first, free.last)),
        padded(np.abs(free.last - free.first)),
        _kept_need(component, rank, kept),
        _sums(rank, kept.end - kept.start, size).reshape(-1, 2),
        _sums(rank, kept.area, size).reshape(-1, 2),
    )


def _kept_need(component: IntArray, rank: IntArray, kept: _Pieces) -> FloatArray:
    """Keys of the component of each free piece that the first and the second rank need for what they keep."""
    num_pairs, num_free = component.shape
    needs = np.zeros((num_pairs, 2, num_free))
    if not len(rank):
        return needs
    stride = int(max(component.max(), kept.component.max())) + 1
    key = rank * stride + kept.component
    order = np.argsort(key, kind="stable")
    key = key[order]
    opens = _opens(key)
    key, need = key[opens], np.maximum.reduceat(kept.need[order], opens)
    wanted = np.arange(2 * num_pairs).reshape(-1, 2, 1) * stride + component[:, None, :]
    at = np.minimum(np.searchsorted(key, wanted), len(key) - 1)
    # A pair without that many pieces has component -1, which looks like the last one of the rank before: harmless.
    needs[:] = np.where(key[at] == wanted, need[at], 0)
    return needs
