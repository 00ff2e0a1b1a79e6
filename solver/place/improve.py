"""The one move of the search: what a pair of ranks holds is put together and divided anew.

A placement that fills one rank after the other leaves the last ones with what nobody wanted. The state is all
pieces of components with their owners, as columns (`Holdings`); the move is `Holdings.divide`, for one pair of ranks
or for many at once; the price is rows needed, plus `PIECE_PRICE` for each piece, plus what rows sent cost
(`sending_price`) where a sender is to be relieved. What differs is how pairs are chosen:

- `repack`: at random, all ranks round after round, each with one that holds some of the same component if it can be.
  Divisions that are somewhat worse are taken too, less and less so (simulated annealing).
- `relieve_senders`: the busiest sender with ranks that have area left or see the same keys. A step waits for the
  busiest link, and the keys near the start of a long document go to all its ranks.

- `relieve_heaviest`: the heaviest rank with the lightest ones, whatever rows it takes, until areas are within bounds.

A rank's rows are counted as the keys that its densest
token of each component sees, from the component's sparse end on. That is exact for packed documents; for other masks
the caller compares what comes out by the exact count.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..placement import Placement
from ..slices import IntArray
from .density import DensityProfile
from .divide import PIECE_PRICE, Allowed, BoolArray, Divisions, FloatArray, Pool, Sending, best_divisions, sending_price

# Pieces of two ranks that are divided anew; the others stay where they are.
_MOST_FREE = 5
# First temperature of repacking, as a share of the rows that a rank needs on average.
_TEMPERATURE = 0.003
# Rows sent over most received from which a sender is relieved.
BUSY_SENDER = 2.5
# Ranks tried as the other one of a pair.
NUM_PARTNERS = 8


def repack(
    placement: Placement, profile: DensityProfile, components: IntArray, allowed: Allowed, *, num_rounds: int
) -> Placement:
    """The placement with pairs of ranks divided anew; balanced if it was, and with fewer rows or about as many.

    No rank comes to receive more than the one that received most.

    Args:
        components: first token of each component, ascending; no token sees one of another component.
        num_rounds: how often all ranks are paired; the best placement met is kept.
    """
    state = Holdings(placement, profile, components, allowed)
    rng = np.random.default_rng(0)
    hot = _TEMPERATURE * float(state.costs.sum()) / state.cp_size
    best, kept = 0.0, state.pieces
    for i in range(num_rounds):
        state.divide(state.partners(rng), temperature=hot * (1 - i / num_rounds) ** 2, rng=rng)
        if state.gained > best:
            best, kept = state.gained, state.pieces
    return Placement.from_runs(kept.end, kept.owner, cp_size=state.cp_size)


def relieve_senders(
    placement: Placement, profile: DensityProfile, components: IntArray, allowed: Allowed, *, num_pairs: int
) -> Placement:
    """The placement with about num_pairs pairs divided so that no rank sends far more than the busiest receives.

    Args:
        components, allowed: as in `repack`.
    """
    state = Holdings(placement, profile, components, allowed)
    settled = np.zeros(state.cp_size)  # what a rank sends that nobody can help
    while num_pairs > 0:
        sharing = _Sharing.of(state)
        sent = _sums(state.pieces.owner, sharing.sent(state.pieces, state.pieces.owner[:, None]), state.cp_size)
        busiest = int((sent - settled).argmax())
        if sent[busiest] - settled[busiest] <= BUSY_SENDER * state.most_received:
            break
        settled[busiest] = sent[busiest]
        for other in _takers(state, sharing, busiest, sent):
            num_pairs -= 1
            if state.divide(np.array([[busiest, other]]), sharing=sharing):
                settled[:] = 0
                break
    return Placement.from_runs(state.pieces.end, state.pieces.owner, cp_size=state.cp_size)


def relieve_heaviest(
    placement: Placement, profile: DensityProfile, components: IntArray, allowed: Allowed, *, num_divisions: int
) -> Placement:
    """The placement with the heaviest ranks brought to allowed.area, as far as up to num_divisions divisions do it.

    Args:
        components, allowed: as in `repack`, but areas may be larger.
    """
    state = Holdings(placement, profile, components, allowed)
    for _ in range(num_divisions):
        area = _sums(state.pieces.owner, state.pieces.area, state.cp_size)
        heaviest = int(area.argmax())
        lightest = np.argsort(area, kind="stable")[:NUM_PARTNERS].tolist()
        pairs = (np.array([[heaviest, other]]) for other in lightest if other != heaviest)
        if area[heaviest] <= allowed.area or not any(state.divide(pair, at_any_price=True) for pair in pairs):
            break
    return Placement.from_runs(state.pieces.end, state.pieces.owner, cp_size=state.cp_size)


def _takers(state: Holdings, sharing: _Sharing, busiest: int, sent: FloatArray) -> list[int]:
    """Ranks that send little and have the most area left, or see the keys that the busiest sends most of."""
    mine = state.pieces.take(state.pieces.owner == busiest)
    if not len(mine.owner):
        return []  # of a mask whose keys are not seen from the sparse end on: its rows are counted wrongly
    dearest = mine.component[sharing.sent(mine, mine.owner[:, None]).argmax()]
    light = 2 * sent < sent[busiest]
    area = _sums(state.pieces.owner, state.pieces.area, state.cp_size)
    seeing = np.unique(state.pieces.owner[state.pieces.component == dearest])
    found = []
    for some, by in ((np.arange(state.cp_size), area), (seeing, sent)):
        some = some[light[some]]
        found += some[np.argsort(by[some], kind="stable")][:NUM_PARTNERS].tolist()
    return list(dict.fromkeys(found))


class Pieces(NamedTuple):
    """Tokens [start, end) of a component and their owner, ascending.

    first, last, need: keys seen by the first token, the last and any; area: visible pairs. before: tokens of the
    component nearer to its sparse end. int64 [num_pieces].
    """

    component: IntArray
    start: IntArray
    end: IntArray
    first: IntArray
    last: IntArray
    need: IntArray
    area: IntArray
    before: IntArray
    owner: IntArray

    def take(self, which: IntArray | BoolArray) -> Pieces:
        """Some of the pieces."""
        return Pieces(*(column[which] for column in self))

    @staticmethod
    def concat(*parts: Pieces) -> Pieces:
        """The pieces of all parts, one after the other."""
        return Pieces(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


class _Joined(NamedTuple):
    """What the paired ranks hold, neighbours joined: owned by one of the pair, or by both.

    pair: of which pair; side: of the owner within it, the first one's if both own some. slot: place among the
    pair's pieces; those before _MOST_FREE are free to move.
    """

    pieces: Pieces
    pair: IntArray
    side: IntArray
    slot: IntArray


class Holdings:
    """The pieces of all ranks, and what each rank's cost, while pairs of ranks divide theirs.

    Mutable on purpose: it is the working state of one search and never leaves it. Its arrays are replaced,
    never changed.
    """

    def __init__(
        self, placement: Placement, profile: DensityProfile, components: IntArray, allowed: Allowed
    ) -> None:
        self.profile, self.area_below = profile, profile.area_below()
        self.cp_size, self.allowed = placement.cp_size, allowed
        self.components = np.append(components, placement.total_seqlen)
        starts = np.unique(np.concatenate([placement.starts, components]))
        ends = np.append(starts[1:], placement.total_seqlen)
        component = np.searchsorted(components, starts, side="right") - 1
        self.pieces = self._make(component, starts, ends, placement.owner_of(starts))
        self.costs, received = self._costs_of(self.pieces)
        self.gained = 0.0
        # Where queries see fewer keys than their component has, this may count less than nothing.
        self.most_received = max(float(received.max()), 0.0)

    def _make(self, component: IntArray, start: IntArray, end: IntArray, owner: IntArray) -> Pieces:
        first, last = self.profile.density(start), self.profile.density(end - 1)
        area = self.area_below(end) - self.area_below(start)
        before = np.where(first <= last, start - self.components[component], self.components[component + 1] - end)
        return Pieces(component, start, end, first, last, np.maximum(first, last), area, before, owner)

    def _costs_of(self, pieces: Pieces) -> tuple[FloatArray, FloatArray]:
        """Keys that each rank needs, its own included, plus the price of its pieces; keys it receives; [cp_size]."""
        _, owner, need = _needs(pieces, self.cp_size)
        needed = _sums(owner, need, self.cp_size)
        price = PIECE_PRICE * np.bincount(pieces.owner, minlength=self.cp_size)
        return needed + price, needed - _sums(pieces.owner, pieces.end - pieces.start, self.cp_size)

    def partners(self, rng: np.random.Generator) -> IntArray:
        """Pairs of different ranks, [cp_size // 2, 2]: holders of one component as far as possible, at random."""
        component, owner = np.divmod(np.unique(self.pieces.component * self.cp_size + self.pieces.owner), self.cp_size)
        num_components = len(self.components) - 1
        shared = np.bincount(component, minlength=num_components)[component] > 1
        component, owner = component[shared], owner[shared]
        order = np.lexsort((rng.random(len(component)), rng.random(num_components)[component]))
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

    def divide(
        self,
        ranks: IntArray,
        *,
        temperature: float = 0.0,
        rng: np.random.Generator | None = None,
        sharing: _Sharing | None = None,
        at_any_price: bool = False,
    ) -> bool:
        """Divide what each pair of `ranks` holds, where that gains or costs not much more than the temperature.

        Args:
            ranks: pairs, [M, 2]; no rank is in two of them.
            rng: for the temperature, and for which pieces are looked at; without it the longest are.
            sharing: who needs what now, if rows sent are to count; needs a single pair.
            at_any_price: divide wherever it is allowed.

        Returns:
            Whether any pair's was divided; what all pairs gained is added to `gained`.
        """
        joined = self._join(ranks, rng)
        sending = None if sharing is None else _sending(joined, ranks, sharing, self.most_received)
        pool = _pool(joined, len(ranks))
        divisions = best_divisions(pool, self.allowed, temperature=temperature, rng=rng, sending=sending)
        new = self._divided(joined, ranks, divisions)
        costs, received = self._costs_of(new)
        gain = self.costs[ranks] - costs[ranks]
        if sharing is not None:
            for sign, pieces in ((1, self.pieces.take(np.isin(self.pieces.owner, ranks))), (-1, new)):
                sent = _sums(pieces.owner, sharing.sent(pieces, ranks), self.cp_size)
                gain += sign * sending_price(sent[ranks], self.most_received)
        pair_gain = gain.sum(axis=1)
        taken = divisions.found
        if not at_any_price:
            patience = 0.0 if rng is None else temperature * rng.standard_exponential(len(ranks))
            # The busiest receiver sets the time of the exchange.
            taken &= (pair_gain > -patience) & (received[ranks] <= self.most_received).all(axis=1)
        # A piece whose density is no straight line may break a limit.
        taken &= (_sums(new.owner, new.area, self.cp_size)[ranks] <= self.allowed.area).all(axis=1)
        changed = np.zeros(self.cp_size, dtype=np.bool_)
        changed[ranks[taken]] = True
        together = Pieces.concat(self.pieces.take(~changed[self.pieces.owner]), new.take(changed[new.owner]))
        self.pieces = together.take(np.argsort(together.start))
        self.costs = np.where(changed, costs, self.costs)
        self.gained += float(pair_gain[taken].sum())
        return bool(taken.any())

    def _join(self, ranks: IntArray, rng: np.random.Generator | None) -> _Joined:
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
        pieces = held.take(opens)._replace(
            end=held.end[last],
            last=held.last[last],
            need=np.maximum.reduceat(held.need, opens),
            area=np.add.reduceat(held.area, opens),
            before=np.minimum.reduceat(held.before, opens),
        )
        pair, both = pair[opens], np.minimum.reduceat(side, opens) < np.maximum.reduceat(side, opens)
        # What lies on both ranks has to be divided; then any, long pieces more often.
        weight = (pieces.end - pieces.start).astype(np.float64)
        if rng is not None:
            weight = np.sqrt(weight) * rng.random(len(opens))
        order = np.lexsort((-weight, ~both, pair))
        slot = np.empty(len(opens), dtype=np.int64)
        slot[order] = np.arange(len(opens)) - np.searchsorted(pair[order], pair[order])
        return _Joined(pieces, pair, np.minimum.reduceat(side, opens), slot)

    def _divided(self, joined: _Joined, ranks: IntArray, divisions: Divisions) -> Pieces:
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
        return Pieces.concat(whole, low, high)


class _Sharing(NamedTuple):
    """Keys of each component that its holders need, by which rows sent are counted.

    A piece of t tokens with b nearer to the sparse end sends min(max(need - b, 0), t) rows to a rank, so to all ranks
    G(b + t) - G(b), where G(x) is the sum of min(need, x) over the component's holders.
    """

    holders: IntArray  # component * cp_size + rank, ascending
    needs: IntArray  # of each of these
    levels: IntArray  # component * stride + need, ascending
    below: IntArray  # sums of the needs before each level
    first: IntArray  # where each component's levels begin
    stride: int
    cp_size: int

    @classmethod
    def of(cls, state: Holdings) -> _Sharing:
        component, owner, needs = _needs(state.pieces, state.cp_size)
        by_component = np.lexsort((owner, component))
        component, owner, needs = component[by_component], owner[by_component], needs[by_component]
        stride = int(state.components[-1]) + 1
        levels = np.sort(component * stride + needs)
        below = np.append(0, np.cumsum(levels % stride))
        first = np.searchsorted(levels, np.arange(len(state.components)) * stride)
        return cls(component * state.cp_size + owner, needs, levels, below, first, stride, state.cp_size)

    def sent(self, pieces: Pieces, but: IntArray) -> IntArray:
        """Rows of each piece that go to other ranks than but[i], all [num_pieces] with `but` [num_pieces or 1, any]."""
        component, tokens, before = pieces.component, pieces.end - pieces.start, pieces.before

        def up_to(x: IntArray) -> IntArray:
            at = np.searchsorted(self.levels, component * self.stride + x)
            result: IntArray = self.below[at] - self.below[self.first[component]] + x * (self.first[component + 1] - at)
            return result

        key = component[:, None] * self.cp_size + but
        at = np.minimum(np.searchsorted(self.holders, key), len(self.holders) - 1)
        need = np.where(self.holders[at] == key, self.needs[at], 0)
        not_sent = np.minimum(np.maximum(need - before[:, None], 0), tokens[:, None]).sum(axis=1)
        result: IntArray = up_to(before + tokens) - up_to(before) - not_sent
        return result


def _needs(pieces: Pieces, cp_size: int) -> tuple[IntArray, IntArray, IntArray]:
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


def _padded(joined: _Joined, num_pairs: int, values: IntArray) -> FloatArray:
    """Values of the free pieces, [num_pairs, _MOST_FREE]; values: of all pieces."""
    is_free = joined.slot < _MOST_FREE
    result = np.zeros((num_pairs, _MOST_FREE))
    result[joined.pair[is_free], joined.slot[is_free]] = values[is_free]
    return result


def _pool(joined: _Joined, num_pairs: int) -> Pool:
    pieces, is_kept = joined.pieces, joined.slot >= _MOST_FREE

    def padded(values: IntArray) -> FloatArray:
        return _padded(joined, num_pairs, values)

    component = padded(pieces.component + 1) - 1
    kept = pieces.take(is_kept)
    rank, size = 2 * joined.pair[is_kept] + joined.side[is_kept], 2 * num_pairs
    return Pool(
        component,
        padded(pieces.end - pieces.start),
        padded(pieces.area),
        padded(pieces.need),
        padded(np.minimum(pieces.first, pieces.last)),
        padded(np.abs(pieces.last - pieces.first)),
        _kept_need(component, rank, kept),
        _sums(rank, kept.end - kept.start, size).reshape(-1, 2),
        _sums(rank, kept.area, size).reshape(-1, 2),
    )


def _kept_need(component: FloatArray, rank: IntArray, kept: Pieces) -> FloatArray:
    """Keys of the component of each free piece that the first and the second rank need for what they keep."""
    num_pairs, num_free = component.shape
    if not len(rank):
        return np.zeros((num_pairs, 2, num_free))
    stride = int(max(component.max(), kept.component.max())) + 1
    key = rank * stride + kept.component
    order = np.argsort(key, kind="stable")
    key = key[order]
    opens = _opens(key)
    key, need = key[opens], np.maximum.reduceat(kept.need[order], opens)
    wanted = np.arange(2 * num_pairs).reshape(-1, 2, 1) * stride + component[:, None, :].astype(np.int64)
    at = np.minimum(np.searchsorted(key, wanted), len(key) - 1)
    # A pair without that many pieces has component -1, which looks like the last one of the rank before: harmless.
    return np.where(key[at] == wanted, need[at], 0).astype(np.float64)


def _sending(joined: _Joined, ranks: IntArray, sharing: _Sharing, free: float) -> Sending:
    """What the pieces of a pair send to other ranks."""
    sent = sharing.sent(joined.pieces, ranks)
    kept = joined.slot >= _MOST_FREE
    return Sending(_padded(joined, 1, sent), _sums(joined.side[kept], sent[kept], 2)[None], free)
