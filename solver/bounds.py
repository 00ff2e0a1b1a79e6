"""Lower bounds on the bytes and the time of any plan for a mask: proofs are in the docstrings.

All of them hold for every placement whose ranks own between `min_tokens` and `max_tokens` tokens, and
for every schedule whose ranks compute at most `max_area` pairs. `Limits.of_plan` takes these numbers
from a plan, so the bound is over all plans that are as balanced as that one.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .cost import Hardware, Heads, RowCosts
from .place.components import find_components
from .place.density import DensityProfile
from .slices import IntArray, SliceTable, distinct, expand_counts

if TYPE_CHECKING:
    from .plan import Plan

# Cells in which the sparsest tokens are counted: one token each up to this length, longer after it.
_MOST_CELLS = 1 << 17
# Even thresholds at which all components are looked at together.
_THRESHOLDS = 1 << 12
# Ranks x pieces, summed over zones, beyond which a partition of the keys is not tried.
_MOST_WORK = 1 << 21


class Limits(NamedTuple):
    """How uneven a plan may be: tokens owned by a rank, and pairs computed by it."""

    min_tokens: int
    max_tokens: int
    max_area: int

    @classmethod
    def of_plan(cls, plan: Plan) -> Limits:
        """The limits that a plan keeps."""
        tokens = plan.q_placement.num_tokens
        return cls(int(tokens.min()), int(tokens.max()), int(plan.areas().max(initial=0)))

    @classmethod
    def even(cls, table: SliceTable, total_seqlen: int, cp_size: int, *, chunk_size: int, imbalance: float) -> Limits:
        """Token counts within one chunk of each other, areas within `imbalance` times the mean."""
        least = max(0, total_seqlen // cp_size - chunk_size)
        most = min(total_seqlen, -(-total_seqlen // cp_size) + chunk_size)
        return cls(least, most, math.ceil(imbalance * table.area() / cp_size))


class RowsBound(NamedTuple):
    """KV rows that any KV-only plan moves: over all ranks, and on the busiest one."""

    total: int
    worst: int


class _Sparsest(NamedTuple):
    """Fewest pairs of any m query tokens: cells of tokens sorted by density, as running sums."""

    counts: IntArray
    area: IntArray
    density: IntArray

    @classmethod
    def of(cls, profile: DensityProfile, total_seqlen: int, *, num_cells: int) -> _Sparsest:
        """Exact up to num_cells tokens; above, a cell counts as its sparsest token, which is less."""
        step = max(1, -(-total_seqlen // num_cells))
        cells = profile.cut(np.arange(step, total_seqlen, step))
        count = cells.ends - cells.starts
        last = cells.first + cells.slopes * (count - 1)
        density = np.minimum(cells.first, last)
        order = np.argsort(density, kind="stable")
        count, density = count[order], density[order]
        ends, area = np.cumsum(count), np.cumsum(count * density)
        return cls(np.append(0, ends), np.append(0, area), np.append(density, density[-1:]))

    def area_of(self, tokens: IntArray) -> IntArray:
        """Pairs of that many sparsest tokens."""
        tokens = np.clip(tokens, 0, self.counts[-1])
        i = np.searchsorted(self.counts, tokens, side="right") - 1
        result: IntArray = self.area[i] + (tokens - self.counts[i]) * self.density[i]
        return result


def kv_rows_bound(table: SliceTable, *, total_seqlen: int, cp_size: int, limits: Limits) -> RowsBound:
    """Rows of K and V that any plan moves in which every rank computes its own queries.

    Take any set Z of keys (a zone). Write n_r(Z) for the keys of Z that rank r's queries see; it owns
    some of them, and each key has one owner, so the rows of Z that travel are at least

        sum_r n_r(Z) - |Z|.                                                                      (1)

    *Threshold bound.* n_r(Z) is at least the number of keys of Z that the rank's best-sighted query
    sees, so sum_r n_r(Z) >= sum over z >= 0 of R(z), where R(z) ranks hold a query that sees more than
    z keys of Z. Let D be these queries. R ranks can hold them all only if

        R * max_tokens >= |D|   and   R * max_area >= area(D) + sparsest(R * min_tokens - |D|),  (2)

    since together they own at least R * min_tokens tokens, and their other tokens have at least the
    area of that many sparsest tokens of the mask. The least R that satisfies (2) is what is summed.
    For one causal sequence this is 3/4 of the sequence for each rank: the zigzag.

    *Band bound.* Let B be the queries of a slice whose band is cut on both sides (a window of w keys),
    |B| + w - 1 its keys. n queries of it see at least n + w - 1 of them (a sum of integer sets: |X + Y|
    >= |X| + |Y| - 1), so by (1) at least (R - 1) * (w - 1) rows travel, with R from (2) for D = B.

    The rows of disjoint zones add up. Zones tried: the components of the mask (packed documents), and
    within each the stretches between the edges of its slices (a prefix tree's nodes); for each component
    the better of the two counts.

    *Pooled bound.* Each component alone may find ranks that hold nothing else; all of them together do
    not. Write N(z) for the pairs of a rank and a component of which it holds a query that sees more than
    z keys, and D(z) for the components that have one: by (1) at least sum N(z) - total_seqlen rows
    travel. N(z) is at least the sum of R(z) over the components, and at least the R that satisfies (2)
    with D all queries of the mask that see more than z keys. In N(z) - D(z) every component counts its
    ranks less one, or nothing at all, and neither grows with z: so N(z) - D(z) is at least what it is
    known to be at any z' >= z.

    *Busiest rank.* At least the total over the ranks; and the rank that holds the query that sees most,
    D keys, receives at least D less what it owns.

    Args:
        table: disjoint canonical slices of self-attention over total_seqlen tokens.
    """
    if not len(table) or cp_size == 1:
        return RowsBound(0, 0)
    profile = DensityProfile.from_table(table, total_seqlen)
    sparsest = _Sparsest.of(profile, total_seqlen, num_cells=_MOST_CELLS)
    starts, _ = find_components(table, total_seqlen)
    coarse, steps = _zone_rows(table, profile, sparsest, np.append(starts, total_seqlen), cp_size, limits)
    pooled = _pooled_rows(profile, sparsest, starts, steps, cp_size, limits)
    edges = distinct(np.concatenate([[0, total_seqlen], table.k0, table.k1, starts]))
    if len(edges) > len(starts) + 1:
        fine, _ = _zone_rows(table, profile, sparsest, edges, cp_size, limits)
        owner = np.searchsorted(starts, edges[:-1], side="right") - 1
        coarse = np.maximum(coarse, np.bincount(owner, fine, len(starts)))
    total = max(int(coarse.sum()), pooled)
    at_end = profile.first + profile.slopes * (profile.ends - profile.starts - 1)
    most_seen = int(np.maximum(profile.first, at_end).max())
    return RowsBound(total, max(-(-total // cp_size), most_seen - limits.max_tokens, 0))


class _Steps(NamedTuple):
    """Where R(z) of a zone falls by one: it counts the steps of the zone with value > z."""

    zones: IntArray
    values: IntArray


def _pooled_rows(
    profile: DensityProfile, sparsest: _Sparsest, starts: IntArray, steps: _Steps, cp_size: int, limits: Limits
) -> int:
    """The pooled bound of `kv_rows_bound`; starts and steps are those of the components."""
    pieces = profile.cut(starts)
    at_end = pieces.first + pieces.slopes * (pieces.ends - pieces.starts - 1)
    most_seen = np.zeros(len(starts), dtype=np.int64)
    owner = np.searchsorted(starts, pieces.starts, side="right") - 1
    np.maximum.at(most_seen, owner, np.maximum(pieces.first, at_end))
    one_rank = np.delete(most_seen, distinct(steps.zones))
    apart = np.sort(np.concatenate([steps.values, one_rank]))
    z = distinct(np.concatenate([np.linspace(0, most_seen.max(), _THRESHOLDS).astype(np.int64), apart]))
    # Only cells all of whose tokens see more than z.
    cell = np.searchsorted(sparsest.density[:-1], z, side="right")
    tokens, pairs = sparsest.counts[-1] - sparsest.counts[cell], sparsest.area[-1] - sparsest.area[cell]
    together = _ranks_needed(tokens, pairs, sparsest, cp_size, limits)
    num_apart = len(apart) - np.searchsorted(apart, z, side="right")
    num_components = len(starts) - np.searchsorted(np.sort(most_seen), z, side="right")
    known = np.maximum(together, num_apart) - num_components
    extra = np.maximum.accumulate(known[::-1])[::-1]
    return int(extra[1:] @ np.diff(z) + most_seen.sum()) - int(sparsest.counts[-1])


def _zone_rows(
    table: SliceTable, profile: DensityProfile, sparsest: _Sparsest, cuts: IntArray, cp_size: int, limits: Limits
) -> tuple[NDArray[np.float64], _Steps]:
    """Rows that must travel in each zone of keys [cuts[i], cuts[i + 1]), [num_zones], and the zones' R(z)."""
    num_zones = len(cuts) - 1
    pieces, _ = table.split_k(cuts[1:-1])
    zone = np.searchsorted(cuts, pieces.k0, side="right") - 1
    steps = _thresholds(pieces, zone, profile, sparsest, cuts, cp_size, limits)
    # The sum of R(z) over z is the sum of where it falls by one.
    threshold = np.bincount(steps.zones, steps.values, num_zones) - np.diff(cuts)
    rows = np.maximum(threshold, 0.0)
    width = pieces.hi - pieces.lo + 1
    q0, q1, k0, k1, lo, hi = pieces.data.T
    # Rows that see the whole band: the keys of row i are [i + lo, i + hi].
    b0, b1 = np.maximum(q0, k0 - lo), np.minimum(q1, k1 - hi)
    banded = b1 > b0
    count, width, zone, b0, b1 = (a[banded] for a in (b1 - b0, width, zone, b0, b1))
    if len(count):
        below = profile.area_below
        need = _ranks_needed(count, below(b1) - below(b0), sparsest, cp_size, limits)
        np.maximum.at(rows, zone, (need - 1.0) * (width - 1))
    return rows, steps


def _ranks_needed(
    count: IntArray, area: IntArray, sparsest: _Sparsest, cp_size: int, limits: Limits
) -> IntArray:
    """The least R that satisfies (2) for sets of `count` tokens with `area` pairs; cp_size at most."""
    low, high = np.where(count > 0, 1, 0), np.where(count > 0, cp_size, 0)
    # R * max_area - sparsest(R * min_tokens - count) is concave in R and (2) holds for all ranks together,
    # so it holds from the least R on: bisection.
    while (low < high).any():
        middle = (low + high) // 2
        enough = _holds(middle, count, area, sparsest, limits)
        low, high = np.where(enough, low, middle + 1), np.where(enough, middle, high)
    return low


def _holds(ranks: IntArray, count: IntArray, area: IntArray, sparsest: _Sparsest, limits: Limits) -> NDArray[np.bool_]:
    fillers = sparsest.area_of(ranks * limits.min_tokens - count)
    result: NDArray[np.bool_] = (ranks * limits.max_tokens >= count) & (ranks * limits.max_area >= area + fillers)
    return result


def _thresholds(
    pieces: SliceTable,
    zone: IntArray,
    profile: DensityProfile,
    sparsest: _Sparsest,
    cuts: IntArray,
    cp_size: int,
    limits: Limits,
) -> _Steps:
    """R(z) of each zone: for each R below the most that it needs, the smallest z for which R ranks are enough."""
    num_zones, total = len(cuts) - 1, int(cuts[-1])
    # One profile for all zones: each has its own copy of the query axis.
    seen = DensityProfile.from_table(pieces.shift(zone * total, zone * total), num_zones * total)
    seen = _only(seen, (seen.first > 0) | (seen.slopes != 0))
    # Cut where the mask's own profile bends, so that areas of sub-runs come from one piece of it.
    starts, ends, below = seen.starts, seen.ends, profile.area_below
    owner = starts // total
    of_zone = np.searchsorted(owner, np.arange(num_zones + 1))
    sub_starts, sub_ends = starts - owner * total, ends - owner * total
    count = ends - starts
    all_count = np.add.reduceat(np.append(count, 0), of_zone[:-1]) * (of_zone[1:] > of_zone[:-1])
    area = below(sub_ends) - below(sub_starts)
    all_area = np.add.reduceat(np.append(area, 0), of_zone[:-1]) * (of_zone[1:] > of_zone[:-1])
    most = _ranks_needed(all_count, all_area, sparsest, cp_size, limits)
    # A zone that one rank can hold moves nothing.
    most = np.where(most > 1, most, 0)
    if int((most * np.diff(of_zone)).sum()) > _MOST_WORK:
        none = np.zeros(0, dtype=np.int64)
        return _Steps(none, none)
    group, ranks = expand_counts(most)
    row, nth = expand_counts(np.diff(of_zone)[group])
    piece = of_zone[group[row]] + nth
    first, slope, length = seen.first[piece], seen.slopes[piece], count[piece]
    sub_start = sub_starts[piece]
    low, high = np.zeros(len(group), dtype=np.int64), np.diff(cuts)[group]
    while (low < high).any():
        middle = (low + high) // 2
        from_, to = _denser(first, slope, length, middle[row])
        tokens = np.bincount(row, to - from_, len(group)).astype(np.int64)
        pairs = np.bincount(row, below(sub_start + to) - below(sub_start + from_), len(group)).astype(np.int64)
        enough = (tokens == 0) | ((ranks > 0) & _holds(ranks, tokens, pairs, sparsest, limits))
        low, high = np.where(enough, low, middle + 1), np.where(enough, middle, high)
    return _Steps(group, low)


def _denser(first: IntArray, slope: IntArray, length: IntArray, z: IntArray) -> tuple[IntArray, IntArray]:
    """Positions [from, to) of the tokens of linear pieces that see more than z keys."""
    step = np.maximum(np.abs(slope), 1)
    up = np.clip((z - first) // step + 1, 0, length)  # first + step * t > z
    down = np.clip(-((z - first) // step), 0, length)  # first - step * t > z
    flat = np.where(first > z, length, 0)
    from_ = np.where(slope > 0, up, 0)
    to = np.where(slope > 0, length, np.where(slope < 0, down, flat))
    return from_, to


def _only(profile: DensityProfile, keep: NDArray[np.bool_]) -> DensityProfile:
    columns = (profile.starts, profile.ends, profile.first, profile.slopes, profile.areas)
    return DensityProfile(*(column[keep] for column in columns))


class BytesBound(NamedTuple):
    """Bytes, forward and backward, that any plan moves: over all ranks, and on the busiest one."""

    total: float
    worst: float


def bytes_bound(
    table: SliceTable, *, total_seqlen: int, cp_size: int, limits: Limits, costs: RowCosts
) -> BytesBound:
    """Bytes that any plan moves, whichever rows it moves: queries, keys or both.

    A rank that computes a pairs of one component of n tokens touches x of its queries and y of its
    keys with x * y >= a (a set of pairs lies in the product of its projections), x, y <= n. That costs
    q x + k y, less at most q + k for each token of the component that it owns. The cost for given a,

        g(a) = min of q x + k y  over  x y >= a, x <= n, y <= n,

    is concave with g(0) = 0, so g(a) / a falls, and the ranks' shares of the component's area, each at
    most min(max_area, area) = m, cost at least area * g(m) / m together. Every token has one owner:

        bytes of the component  >=  area * g(m) / m - (q + k) n.

    Components add up. Busiest rank: at least the mean; and one rank computes at least the mean area,
    which costs min over x of q (x - T)+ + k (area / x - T)+ when it owns T <= max_tokens tokens.

    With x and y free, g(a) = 2 sqrt(q k a): traffic grows as 1 / sqrt(ranks) and not less.
    """
    if not len(table) or cp_size == 1:
        return BytesBound(0.0, 0.0)
    below = DensityProfile.from_table(table, total_seqlen).area_below
    starts, ends = find_components(table, total_seqlen)
    n, area = (ends - starts).astype(np.float64), (below(ends) - below(starts)).astype(np.float64)
    share = np.minimum(area, max(limits.max_area, 1))
    q, k = float(costs.q), float(costs.kv)
    # The best y is sqrt(q a / k), within [a / n, n].
    y = np.clip(np.sqrt(q * share / k), share / n, n)
    least = q * share / np.maximum(y, 1e-9) + k * y
    moved = area * np.where(share > 0, least / np.maximum(share, 1), 0.0) - (q + k) * n
    total = float(np.maximum(moved, 0).sum())
    mean, own = table.area() / cp_size, float(limits.max_tokens)
    x = max(own, math.sqrt(k * mean / q))
    alone = min(
        q * (x - own) + k * max(mean / x - own, 0.0),
        q * max(mean / max(own, 1.0) - own, 0.0),
    )
    return BytesBound(total, max(total / cp_size, alone))


def step_time_bound(
    *, area: float, cp_size: int, worst_bytes: float, heads: Heads, hardware: Hardware, backward: bool
) -> float:
    """Seconds below which no plan takes one pass.

    The rank with at least the mean area computes for area / cp_size pairs at the device's rate, and the
    busiest rank's bytes (of this pass) come in over both its links at once, hidden behind the work at
    best: the larger of the two.
    """
    flop = heads.backward_flop if backward else heads.forward_flop
    rate = hardware.backward_flops if backward else hardware.forward_flops
    wires = hardware.within.bytes_per_s + (hardware.across.bytes_per_s if cp_size > hardware.ranks_per_node else 0.0)
    return max(area / cp_size * flop / rate, worst_bytes / wires)
