"""The one move of the search: what a pair of ranks holds is put together and divided anew.

A placement that fills one rank after the other leaves the last ones with what nobody wanted. The state is all
pieces of components with their owners, as columns (`Holdings`); the move is `Holdings.divide`, for one pair of ranks
or for many at once; the price is rows needed, plus `PIECE_PRICE` for each piece. What differs is how pairs are chosen:

- `repack`: at random, all ranks round after round, each with one that holds some of the same component if it can be.
  Divisions that are somewhat worse are taken too, less and less so (simulated annealing).
- `relieve_heaviest`: the heaviest rank with the lightest ones, whatever rows it takes, until areas are within bounds.

A rank's rows are counted as the keys that its densest token of each component sees, from the component's sparse end
on. That is exact for packed documents; for other masks the caller compares what comes out by the exact count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..placement import Placement
from ..slices import IntArray, distinct
from .density import DensityProfile
from .divide import PIECE_PRICE, Allowed, BoolArray, Divisions, FloatArray, Pool, best_divisions
from .even import NUM_PARTNERS

# Pieces of two ranks that are divided anew; the others stay where they are.
_MOST_FREE = 5
# First temperature of repacking, as a share of the rows that a rank needs on average.
_TEMPERATURE = 0.002


def repack(state: Holdings, *, num_rounds: int) -> Placement:
    """The cheapest draft with pairs of ranks divided anew; balanced if it was, and with no more to pay.

    No rank comes to receive more than the one of its draft that received most.

    Args:
        num_rounds: how often all ranks are paired; the best that any draft came to is kept.
    """
    rng = np.random.default_rng(0)
    hot = _TEMPERATURE * float(state.costs.mean())
    best = state.cheapest()
    for i in range(num_rounds):
        state.divide(state.partners(rng), temperature=hot * (1 - i / num_rounds) ** 2, rng=rng)
        best = min(best, state.cheapest(), key=lambda found: found[0])
    return state.placement(*best[1:])


def relieve_heaviest(state: Holdings, *, num_rounds: int) -> Placement:
    """The only draft with all ranks brought to the area allowed, as far as num_rounds rounds do it."""
    rng = np.random.default_rng(0)
    limit, in_vain = float(state.allowed.area), 0
    for _ in range(num_rounds):
        area = _sums(state.pieces.owner, state.pieces.area, state.cp_size)
        lightest = np.argsort(area, kind="stable")
        heavy = lightest[::-1][: int((area > limit).sum())]
        light = np.roll(lightest[: state.cp_size - len(heavy)], -in_vain)
        pairs = np.stack([heavy[: len(light)], light[: len(heavy)]], axis=-1)
        if not len(pairs) or in_vain == NUM_PARTNERS:
            break
        # Where it takes several to relieve a rank, each takes a part: half of what would make them even.
        part = (area[pairs[:, 0]] + area[pairs].mean(axis=1)) / 2
        state.allowed = state.allowed._replace(area=np.maximum(limit, part))
        in_vain = 0 if state.divide(pairs, rng=rng, at_any_price=True) else in_vain + 1
    return state.placement()


class Pieces:
    """Tokens [start, end) of a component and their owner, as columns of one table, [8, num_pieces].

    first, last, need: keys seen by the first token, the last and any; area: visible pairs.
    """

    __slots__ = ("area", "component", "end", "first", "last", "need", "owner", "start", "table")

    def __init__(self, table: IntArray) -> None:
        self.table = table
        self.component, self.start, self.end, self.first, self.last, self.need, self.area, self.owner = table

    def take(self, which: IntArray | BoolArray) -> Pieces:
        """Some of the pieces."""
        return Pieces(self.table[:, which])

    @staticmethod
    def concat(*parts: Pieces) -> Pieces:
        """The pieces of all parts, one after the other."""
        return Pieces(np.concatenate([part.table for part in parts], axis=1))


class _Joined(NamedTuple):
    """What the paired ranks hold, neighbours joined (most of those on both): owned by one of the pair, or by both.

    held: the same before. pair: of which pair; side: of the owner within it, the first one's if both own some. slot:
    place among the pair's pieces; those before _MOST_FREE are free to move.
    """

    held: Pieces
    pieces: Pieces
    pair: IntArray
    side: IntArray
    slot: IntArray


class Holdings:
    """The pieces of all ranks, and what each rank's cost, while pairs of ranks divide theirs.

    Several drafts of a placement may be worked on side by side, which takes little longer than one: rank r of draft d
    is here d * cp_size + r, and each has components of its own. Mutable on purpose: it is the working state of
    one search and never leaves it. Its arrays are replaced, never changed.
    """

    def __init__(
        self, drafts: Sequence[Placement], profile: DensityProfile, components: IntArray, allowed: Allowed
    ) -> None:
        """components: their first tokens, ascending."""
        self.profile, self.allowed = profile, allowed
        self.cp_size, self.num_drafts = drafts[0].cp_size, len(drafts)
        self.num_ranks, self.total_seqlen = self.cp_size * self.num_drafts, drafts[0].total_seqlen
        self.num_components = len(components) * self.num_drafts
        tables = {draft: _cut(draft, components) for draft in dict.fromkeys(drafts)}
        step = np.array((len(components), 0, 0, self.cp_size))[:, None]
        self.pieces = self._make(*np.concatenate([tables[draft] + d * step for d, draft in enumerate(drafts)], axis=1))
        self.costs, received = self._costs_of(self.pieces)
        # Where queries see fewer keys than their component has, this may count less than nothing.
        worst = np.maximum(received.reshape(self.num_drafts, -1).max(axis=1), 0.0)
        self.most_received = np.repeat(worst, self.cp_size)

    def placement(self, draft: int = 0, pieces: Pieces | None = None) -> Placement:
        """A draft as it is now, or as it was with these pieces of all drafts."""
        pieces = pieces or self.pieces
        low, high = np.searchsorted(pieces.owner // self.cp_size, (draft, draft + 1))
        return Placement.from_runs(
            pieces.end[low:high], pieces.owner[low:high] - draft * self.cp_size, cp_size=self.cp_size
        )

    def cheapest(self) -> tuple[float, int, Pieces]:
        """The cost of the cheapest draft as it is now, which one that is, and the pieces of all."""
        costs = self.costs.reshape(self.num_drafts, -1).sum(axis=1)
        return float(costs.min()), int(costs.argmin()), self.pieces

    def _make(self, component: IntArray, start: IntArray, end: IntArray, owner: IntArray) -> Pieces:
        first, last = self.profile.density(start), self.profile.density(end - 1)
        area = self.profile.area_below(end) - self.profile.area_below(start)
        return Pieces(np.array((component, start, end, first, last, np.maximum(first, last), area, owner)))

    def _costs_of(self, pieces: Pieces) -> tuple[FloatArray, FloatArray]:
        """Keys that each rank needs, its own included, plus the price of its pieces; keys it receives; [num_ranks]."""
        _, owner, need = _needs(pieces)
        needed = _sums(owner, need, self.num_ranks)
        price = PIECE_PRICE * np.bincount(pieces.owner, minlength=self.num_ranks)
        return needed + price, needed - _sums(pieces.owner, pieces.end - pieces.start, self.num_ranks)

    def partners(self, rng: np.random.Generator) -> IntArray:
        """Pairs of different ranks of one draft: holders of one component as far as possible, at random."""
        key = distinct(self.pieces.owner * self.num_components + self.pieces.component)
        owner, component = np.divmod(key, self.num_components)
        shared = np.bincount(component, minlength=self.num_components) > 1
        # Each rank takes part for one component that it shares, if there is any: that which comes first today.
        order = np.where(shared, rng.random(self.num_components), 1.0)
        first = np.ones(self.num_ranks)
        np.minimum.at(first, owner, order[component])
        # Where an odd number takes part for a component, the last is paired with the next one's first.
        ranks = np.lexsort((rng.random(self.num_ranks), first, np.arange(self.num_ranks) // self.cp_size))
        return ranks.reshape(self.num_drafts, -1)[:, : self.cp_size // 2 * 2].reshape(-1, 2)

    def divide(
        self,
        ranks: IntArray,
        *,
        temperature: float = 0.0,
        rng: np.random.Generator | None = None,
        at_any_price: bool = False,
    ) -> bool:
        """Divide what each pair of `ranks` holds, where that gains or costs not much more than the temperature.

        Args:
            ranks: pairs, [M, 2]; no rank is in two of them, and both are of one draft.
            rng: for the temperature, and for which pieces are looked at; without it the longest are.
            at_any_price: divide wherever it is allowed.

        Returns:
            Whether any pair's was divided.
        """
        joined, others = self._join(ranks, rng)
        divisions = best_divisions(_pool(joined, len(ranks)), self.allowed, temperature=temperature, rng=rng)
        new = self._divided(joined, ranks, divisions)
        costs, received = self._costs_of(new)
        gain = (self.costs[ranks] - costs[ranks]).sum(axis=1)
        taken = divisions.found
        if not at_any_price:
            patience = 0.0 if rng is None else temperature * rng.standard_exponential(len(ranks))
            # The busiest receiver sets the time of the exchange.
            taken &= (gain > -patience) & (received[ranks] <= self.most_received[ranks]).all(axis=1)
        # A piece whose density is no straight line may break a limit.
        taken &= _sums(new.owner, new.area, self.num_ranks)[ranks].max(axis=1) <= self.allowed.area
        changed = np.zeros(self.num_ranks, dtype=np.bool_)
        changed[ranks[taken]] = True
        together = Pieces.concat(others, joined.held.take(~changed[joined.held.owner]), new.take(changed[new.owner]))
        order = np.argsort(together.start + together.owner // self.cp_size * self.total_seqlen)
        self.pieces = together.take(order)
        self.costs = np.where(changed, costs, self.costs)
        return bool(taken.any())

    def _join(self, ranks: IntArray, rng: np.random.Generator | None) -> tuple[_Joined, Pieces]:
        """What the pairs hold, and what all others do."""
        pair_of = np.full(self.num_ranks, -1)
        side_of = np.zeros(self.num_ranks, dtype=np.int64)
        pair_of[ranks] = np.arange(len(ranks))[:, None]
        side_of[ranks[:, 1]] = 1
        in_pair = pair_of[self.pieces.owner] >= 0
        held, others = self.pieces.take(in_pair), self.pieces.take(~in_pair)
        pair, side = pair_of[held.owner], side_of[held.owner]
        apart = (pair[1:] != pair[:-1]) | (held.component[1:] != held.component[:-1])
        apart |= held.start[1:] != held.end[:-1]
        if rng is not None and self.num_drafts > 1:
            # Of the cuts between the two one can move. Where there are rounds enough, half of the others stay.
            apart |= (side[1:] != side[:-1]) & (rng.random(len(apart)) < 0.5)
        opens = np.flatnonzero(np.append(True, apart)[: len(pair)])
        last = np.append(opens[1:], len(pair))[: len(opens)] - 1
        pieces = held.take(opens)
        pieces.end[:], pieces.last[:] = held.end[last], held.last[last]
        pieces.need[:], pieces.area[:] = np.maximum.reduceat(held.need, opens), np.add.reduceat(held.area, opens)
        pair, side_joined = pair[opens], np.minimum.reduceat(side, opens)
        weight = (pieces.end - pieces.start).astype(np.float64)
        if rng is not None:
            weight = np.sqrt(weight) * rng.random(len(opens))
        # What lies on both ranks has to be divided; then any, long pieces more often.
        weight += self.total_seqlen * (side_joined < np.maximum.reduceat(side, opens))
        order = np.lexsort((-weight, pair))
        slot = np.empty(len(opens), dtype=np.int64)
        slot[order] = np.arange(len(opens)) - np.searchsorted(pair[order], pair[order])
        return _Joined(held, pieces, pair, side_joined, slot), others

    def _divided(self, joined: _Joined, ranks: IntArray, divisions: Divisions) -> Pieces:
        """What the paired ranks hold afterwards, in no order."""
        pieces, pair, slot = joined.pieces, joined.pair, joined.slot
        free = slot < _MOST_FREE
        side = np.where(free, 1 - (divisions.subset[pair] >> np.minimum(slot, _MOST_FREE) & 1), joined.side)
        is_cut = free & (slot == divisions.cut[pair])
        whole = pieces.take(~is_cut)
        whole.owner[:] = ranks[pair, side][~is_cut]
        cut, pair = pieces.take(is_cut), pair[is_cut]
        rising = cut.first <= cut.last
        at = np.where(rising, cut.start + divisions.tokens[pair], cut.end - divisions.tokens[pair])
        # The sparser end goes to the first rank.
        owners = ranks[pair, 1 - rising], ranks[pair, rising.astype(np.int64)]
        starts, ends = np.concatenate([cut.start, at]), np.concatenate([at, cut.end])
        return Pieces.concat(whole, self._make(np.tile(cut.component, 2), starts, ends, np.concatenate(owners)))


def _cut(draft: Placement, components: IntArray) -> IntArray:
    """Component, start, end and owner of each piece, [4, num_pieces]."""
    starts = distinct(np.concatenate([draft.starts, components]))
    component = np.searchsorted(components, starts, side="right") - 1
    return np.array((component, starts, np.append(starts[1:], draft.total_seqlen), draft.owner_of(starts)))


def _needs(pieces: Pieces) -> tuple[IntArray, IntArray, IntArray]:
    """Component, rank and keys needed, for each component that a rank holds some of; by rank, then component."""
    stride = int(pieces.component.max(initial=0)) + 1
    key = pieces.owner * stride + pieces.component
    order = np.argsort(key, kind="stable")
    key = key[order]
    opens = _opens(key)
    owner, component = np.divmod(key[opens], stride)
    return component, owner, np.maximum.reduceat(pieces.need[order], opens)


def _opens(key: IntArray) -> IntArray:
    """Where runs of equal keys begin."""
    result: IntArray = np.flatnonzero(np.append(True, key[1:] != key[:-1])[: len(key)])
    return result


def _sums(place: IntArray, values: IntArray, size: int) -> FloatArray:
    """Sum of the values at each place, [size]."""
    return np.bincount(place, values, size).astype(np.float64)


def _pool(joined: _Joined, num_pairs: int) -> Pool:
    is_kept = joined.slot >= _MOST_FREE
    free, kept = joined.pieces.take(~is_kept), joined.pieces.take(is_kept)
    columns = np.zeros((6, num_pairs, _MOST_FREE))
    columns[0] = -1
    sparse, rise = np.minimum(free.first, free.last), np.abs(free.last - free.first)
    values = np.array((free.component, free.end - free.start, free.area, free.need, sparse, rise))
    columns[:, joined.pair[~is_kept], joined.slot[~is_kept]] = values
    pair, side = joined.pair[is_kept], joined.side[is_kept]
    kept_need = np.zeros((num_pairs, 2, _MOST_FREE))
    i, slot = np.nonzero(kept.component[:, None] == columns[0, pair])
    np.maximum.at(kept_need, (pair[i], side[i], slot), kept.need[i])
    tokens, area = (
        _sums(2 * pair + side, each, 2 * num_pairs).reshape(-1, 2) for each in (kept.end - kept.start, kept.area)
    )
    return Pool._make((*columns, kept_need, tokens, area))
