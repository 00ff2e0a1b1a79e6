"""Several masks over one placement: full and sliding-window layers of one model, balanced jointly.

A model dispatches its tokens once, and all of its layers share the rows that each rank then has. Layers
run one after the other and meet at every exchange, so what counts is

    sum over masks m of weight_m * (largest area of a rank under mask m)

and not the balance of the sum: a rank that is early in one kind of layer cannot help in another.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import Literal, NamedTuple

import numpy as np

from .cost import DEFAULT_HARDWARE, FloatArray, Hardware, RowCosts
from .dispatch import Asked, Layout, Staged, check_sizes, keys_schedule, or_stages, row_ms
from .draft import DEFAULT_COSTS, Draft
from .place.balance import place_balanced
from .place.density import DensityProfile
from .place.equal import chunk_of_equal, require_divisible
from .place.equal import equal_shards as share_equally
from .place.nodes import place_on_nodes
from .place.queues import place_by_density
from .placement import Placement, place_contiguous, place_zigzag
from .plan import Plan
from .routes import runs_needed, tokens_needed
from .schedule import Schedule, bisect_tasks, place_for_schedule
from .slices import IntArray, SliceTable, distinct

# The joint imbalance that swaps aim at, and the largest that is accepted for the sake of less traffic: the simulation
# pays for imbalance itself, and what is further from balance was the fastest for none of 78 pairs of masks.
JOINT_LIMIT, WORST_JOINT = 1.02, 1.3
# So many of the fastest are tried with their ranks renumbered, too.
_MOST_RENUMBERED = 3
# Candidates of more routes than this are left out, unless there are none of fewer.
_MOST_ROUTES = 1 << 18
# A placement this far from balance takes so many swaps that hardly a row is left beside its neighbours.
_WORTH_EVENING = 1.5
# Swaps that even a placement out: pieces for each rank, partners looked at, and the number of swaps.
_SWAP_PIECES, _SWAP_PARTNERS, _SWAPS_PER_RANK = 32, 6, 8
# Pieces for each rank into which tokens are cut for interleaved placements.
_INTERLEAVED = (4, 8, 16)


class JointPlans(NamedTuple):
    """Plans that share one placement, in the order of their masks.

    imbalance: the weighted sum over masks of the largest area, over that of the mean areas.
    """

    plans: tuple[Plan, ...]
    imbalance: float


def make_joint_plans(
    masks: Sequence[SliceTable],
    weights: Sequence[float] | None = None,
    *,
    total_seqlen: int,
    cp_size: int,
    chunk_size: int = 512,
    layout: Layout = "balanced",
    num_stages: int | None = None,
    schedule: Literal["auto", "keys"] = "keys",
    ranks_per_node: int | None = None,
    search_effort: int = 0,
    costs: RowCosts = DEFAULT_COSTS,
    hardware: Hardware = DEFAULT_HARDWARE,
    equal_shards: bool = False,
    relays: bool | None = None,
) -> JointPlans:
    """Plans for several masks of self-attention over the same tokens, with one placement for all.

    Candidates are balanced within `WORST_JOINT` where any is, and of those the one is taken whose layers
    are done first by the cost model: the best placements of each mask alone, equal pieces, two and more
    interleaved pieces for each rank, dense with sparse tokens of the weighted sum of the masks' densities,
    with schedule "auto" also tiles of one mask; those near balance also after swaps that even them out.

    Args:
        masks: disjoint banded rectangles of each mask.
        weights: how many layers have each mask, or any numbers in proportion; None: one each.
        layout: "balanced" for all masks together, or "contiguous" or "zigzag" by name.
        schedule: "keys": queries are computed where they lie. "auto": those of one mask may move.
        total_seqlen, cp_size, chunk_size, num_stages, ranks_per_node, search_effort, costs, hardware,
            equal_shards, relays: as in `make_dispatch_plan`.

    Raises:
        ValueError: no masks, weights that are not one finite number above 0 for each, a size out of
            range, or an unknown layout or schedule.
    """
    weights = [1.0] * len(masks) if weights is None else [float(w) for w in weights]
    if not masks or len(weights) != len(masks) or not all(math.isfinite(w) and w > 0 for w in weights):
        raise ValueError(
            f"{len(masks)} masks with weights {weights}: give at least one mask, and for each a finite weight above 0"
        )
    check_sizes(total_seqlen, None, cp_size, chunk_size, num_stages, layout, search_effort)
    if equal_shards:
        require_divisible(total_seqlen, cp_size)
        chunk_size = chunk_of_equal(total_seqlen, cp_size, chunk_size)
    if schedule not in ("auto", "keys"):
        raise ValueError(f"schedule is {schedule!r}: masks that share a placement have 'auto' or 'keys'")
    if layout == "balanced":
        worth = row_ms(costs, hardware, ranks_per_node)
        placements = list(
            _placements(masks, weights, total_seqlen, cp_size, chunk_size, search_effort, ranks_per_node, worth)
        )
        if equal_shards:
            placements = list(map(share_equally, placements))
        candidates = list(_with_evened(masks, weights, placements))
        if schedule == "auto" and cp_size > 2:
            candidates += _tiled(masks, weights, total_seqlen, cp_size, costs)
    else:
        by_name = {"contiguous": place_contiguous, "zigzag": place_zigzag}
        placement = by_name[layout](total_seqlen, cp_size)
        candidates = [_Candidate.of(masks, share_equally(placement) if equal_shards else placement)]

    asked = Asked(costs, hardware, ranks_per_node, num_stages, relays, {})

    def timed(candidate: _Candidate) -> _Timed:
        where = candidate.placement
        staged = tuple(asked.staged(Draft.of(each, where, where)) for each in candidate.schedules)
        seconds = sum(weight * asked.simulated(one) for weight, one in zip(weights, staged, strict=True))
        return _Timed(seconds, staged, candidate)

    found = sorted(map(timed, _in_balance(candidates, weights, chunk_size)), key=attrgetter("seconds"))
    unaware = found[:_MOST_RENUMBERED] if layout == "balanced" and ranks_per_node is None else []
    near = [candidate for one in unaware for candidate in _renumbered(masks, one.staged)]
    best = min([*found[:1], *map(timed, near)], key=attrgetter("seconds"))
    plans = tuple(asked.plan(or_stages(one, asked)) for one in best.staged)
    return JointPlans(plans, best.candidate.imbalance(weights))


def _renumbered(masks: Sequence[SliceTable], staged: Sequence[Staged]) -> list[_Candidate]:
    """Where rows travel on over nodes that the placement did not know: with ranks that need the same next to it."""
    over_nodes = [one.draft for one in staged if one.staging.relays > 1]
    if not over_nodes or any(one.queries_travel for one in staged):
        return []
    most = max(over_nodes, key=lambda draft: int(draft.keys_missing.sum()))
    return [_Candidate.of(masks, most.renumbered().k_placement)]


def joint_imbalance(masks: Sequence[SliceTable], weights: Sequence[float], placement: Placement) -> float:
    """Weighted sum over masks of the largest area of a rank, over that of the mean areas; at least 1."""
    return _Candidate.of(masks, placement).imbalance(weights)


class _Candidate(NamedTuple):
    """A placement, and for each mask who computes what on it."""

    placement: Placement
    schedules: tuple[Schedule, ...]

    @classmethod
    def of(cls, masks: Sequence[SliceTable], placement: Placement) -> _Candidate:
        return cls(placement, tuple(keys_schedule(mask, placement) for mask in masks))

    def imbalance(self, weights: Sequence[float]) -> float:
        largest = mean = 0.0
        for (tasks, ranks), weight in zip(self.schedules, weights, strict=True):
            areas = np.bincount(ranks, tasks.areas(), self.placement.cp_size)
            largest += weight * float(areas.max())
            mean += weight * float(areas.mean())
        return largest / mean if mean else 1.0

    def num_routes(self) -> int:
        """At most so many routes do its plans have."""
        return sum(
            int(runs_needed(needed, self.placement)[1].sum())
            for schedule in self.schedules
            for needed in tokens_needed(*schedule)
        )


class _Timed(NamedTuple):
    """Seconds of both passes of all layers by simulation, and what was simulated for each mask."""

    seconds: float
    staged: tuple[Staged, ...]
    candidate: _Candidate


def _in_balance(candidates: list[_Candidate], weights: Sequence[float], chunk_size: int) -> list[_Candidate]:
    """Those that are balanced well enough, or the nearest to it; of them those that are not too large to simulate.

    Token counts that differ by more than a chunk weigh more than any imbalance.
    """

    def excess(candidate: _Candidate) -> float:
        uneven = int(np.ptp(candidate.placement.num_tokens)) > chunk_size
        return max(candidate.imbalance(weights) - WORST_JOINT, 0.0) + (1e6 if uneven else 0.0)

    excesses = [excess(candidate) for candidate in candidates]
    balanced = [c for c, each in zip(candidates, excesses, strict=True) if each == min(excesses)]
    if len(balanced) == 1:
        return balanced
    sizes = [candidate.num_routes() for candidate in balanced]
    return [c for c, size in zip(balanced, sizes, strict=True) if size <= max(_MOST_ROUTES, min(sizes))]


def _with_evened(
    masks: Sequence[SliceTable], weights: Sequence[float], placements: Sequence[Placement]
) -> Iterator[_Candidate]:
    """The placements, and those near enough to balance also after swaps that bring them there."""
    candidates = [_Candidate.of(masks, placement) for placement in placements]
    imbalances = [candidate.imbalance(weights) for candidate in candidates]
    yield from candidates
    for placement, imbalance in zip(placements, imbalances, strict=True):
        if JOINT_LIMIT < imbalance <= max(_WORTH_EVENING, min(imbalances)):
            yield _Candidate.of(masks, _even_out(masks, weights, placement))


def _tiled(
    masks: Sequence[SliceTable], weights: Sequence[float], total_seqlen: int, cp_size: int, costs: RowCosts
) -> Iterator[_Candidate]:
    """For each mask the placement of its tiles, as it is and evened out for the other masks.

    Who computes a tile does not depend on who owns its rows, so evening out costs the mask a little
    traffic and no balance.
    """
    for at, mask in enumerate(masks):
        tiles = bisect_tasks(mask, cp_size, q_cost=costs.q, k_cost=costs.kv)
        placement = place_for_schedule(
            tiles, total_seqlen=total_seqlen, cp_size=cp_size, q_cost=costs.q, k_cost=costs.kv
        )
        others = [*masks[:at], *masks[at + 1 :]]
        apart = [*weights[:at], *weights[at + 1 :]]
        for placed in (placement, _even_out(others, apart, placement)) if others else (placement,):
            schedules = [keys_schedule(other, placed) for other in masks]
            schedules[at] = tiles
            yield _Candidate(placed, tuple(schedules))


def _even_out(
    masks: Sequence[SliceTable], weights: Sequence[float], placement: Placement
) -> Placement:
    """Swap equal pieces between ranks until every mask is in balance, or no swap helps.

    Token counts stay as they are. The rank with the largest overload under some mask swaps with the
    ranks that have the least of that mask; of all pairs of pieces the one that lowers the squared
    overloads of all masks most is swapped. A fixed number of swaps at most.
    """
    cp_size, total = placement.cp_size, placement.total_seqlen
    grain = max(1, total // (cp_size * _SWAP_PIECES))
    ends = distinct(np.concatenate([placement.ends, np.arange(grain, total, grain)]))
    lengths = np.diff(ends, prepend=0)
    owners = placement.owner_of(ends - 1)
    pairs = np.stack([_piece_areas(mask, ends, total) for mask in masks])
    mean = sum(weight * float(column.sum()) for weight, column in zip(weights, pairs, strict=True)) / cp_size
    areas = pairs * (np.array(weights)[:, None] / max(mean, 1.0))
    loads = np.stack([np.bincount(owners, column, cp_size).astype(np.float64) for column in areas])
    target = loads.mean(axis=1, keepdims=True) * (1 + 0.75 * (JOINT_LIMIT - 1))
    for _ in range(_SWAPS_PER_RANK * cp_size):
        over = loads - target
        mask, rank = np.unravel_index(int(over.argmax()), over.shape)
        if over[mask, rank] <= 0:
            break
        mine = np.flatnonzero((owners == rank) & (lengths == grain))
        others = np.argsort(loads[mask], kind="stable")[:_SWAP_PARTNERS]
        partner_of = np.zeros(cp_size, dtype=bool)
        partner_of[others] = True
        theirs = np.flatnonzero(partner_of[owners] & (lengths == grain) & (owners != rank))
        if not len(mine) or not len(theirs):
            break
        given = areas[:, mine][:, :, None] - areas[:, theirs][:, None, :]
        before = np.maximum(over, 0) ** 2
        partner = owners[theirs]
        now = np.maximum(over[:, rank][:, None, None] - given, 0) ** 2
        now += np.maximum(over[:, partner][:, None, :] + given, 0) ** 2
        gain = (before[:, rank][:, None, None] + before[:, partner][:, None, :] - now).sum(axis=0)
        a, b = np.unravel_index(int(gain.argmax()), gain.shape)
        if gain[a, b] <= 0:
            break
        other = partner[b]
        owners[mine[a]], owners[theirs[b]] = other, rank
        loads[:, rank] -= given[:, a, b]
        loads[:, other] += given[:, a, b]
    return Placement.from_runs(ends, owners, cp_size=cp_size)


def _piece_areas(mask: SliceTable, ends: IntArray, total: int) -> FloatArray:
    """Visible pairs of the queries of each piece, [n]."""
    cut = DensityProfile.from_table(mask, total).cut(ends[:-1])
    areas = np.bincount(np.searchsorted(ends, cut.starts, side="right"), cut.areas, len(ends))
    return areas.astype(np.float64)


def _placements(
    masks: Sequence[SliceTable],
    weights: Sequence[float],
    total_seqlen: int,
    cp_size: int,
    chunk_size: int,
    search_effort: int,
    ranks_per_node: int | None,
    worth: float,
) -> Iterator[Placement]:
    yield place_contiguous(total_seqlen, cp_size)
    if total_seqlen < 2 * cp_size or cp_size == 1:
        return
    yield place_zigzag(total_seqlen, cp_size)
    size = {"total_seqlen": total_seqlen, "cp_size": cp_size, "chunk_size": chunk_size, "search_effort": search_effort}
    for mask in masks:
        yield place_balanced(mask, **size, row_ms=worth)
        yield from place_on_nodes(mask, **size, ranks_per_node=ranks_per_node, row_ms=worth)
    profile = weighted_profile(masks, weights, total_seqlen)
    yield place_by_density(profile, total_seqlen=total_seqlen, cp_size=cp_size)
    for pieces in _INTERLEAVED:
        if total_seqlen >= pieces * cp_size:
            yield _interleaved(total_seqlen, cp_size, pieces)
    # Pieces sorted by the density of one mask and dealt back and forth: even under that mask, and each
    # rank's sample of tokens is like any other's under the rest.
    for pieces in _INTERLEAVED[1:]:
        if total_seqlen >= pieces * cp_size:
            yield _dealt_by_density(profile, total_seqlen, cp_size, pieces)


def weighted_profile(masks: Sequence[SliceTable], weights: Sequence[float], total_seqlen: int) -> DensityProfile:
    """The weighted sum of the masks' densities, scaled to integers (the smallest weight counts 64)."""
    scale = 64 / min(weights)
    profiles = [DensityProfile.from_table(mask, total_seqlen) for mask in masks]
    cuts = distinct(np.concatenate([profile.starts for profile in profiles]))
    profiles = [profile.cut(cuts) for profile in profiles]
    base = profiles[0]
    counts = [round(weight * scale) for weight in weights]

    def total(name: str) -> IntArray:
        column: IntArray = np.sum([n * getattr(p, name) for n, p in zip(counts, profiles, strict=True)], axis=0)
        return column

    return DensityProfile(base.starts, base.ends, total("first"), total("slopes"), total("areas"))


def _interleaved(total_seqlen: int, cp_size: int, pieces: int) -> Placement:
    """Equal pieces dealt back and forth: 0, 1, ..., P - 1, P - 1, ..., 1, 0, 0, ..."""
    count = pieces * cp_size
    ends = np.arange(1, count + 1) * total_seqlen // count
    return Placement.from_runs(ends, _back_and_forth(count, cp_size), cp_size=cp_size)


def _dealt_by_density(profile: DensityProfile, total_seqlen: int, cp_size: int, pieces: int) -> Placement:
    """Equal pieces, densest first, dealt back and forth."""
    count = pieces * cp_size
    ends = np.arange(1, count + 1) * total_seqlen // count
    cut = profile.cut(ends[:-1])
    areas = np.bincount(np.searchsorted(ends, cut.starts, side="right"), cut.areas, count)
    owners = np.empty(count, dtype=np.int64)
    owners[np.argsort(-areas, kind="stable")] = _back_and_forth(count, cp_size)
    return Placement.from_runs(ends, owners, cp_size=cp_size)


def _back_and_forth(count: int, cp_size: int) -> IntArray:
    turn, at = np.divmod(np.arange(count), cp_size)
    owners: IntArray = np.where(turn % 2 == 0, at, cp_size - 1 - at)
    return owners
