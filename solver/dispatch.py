"""From a mask to a plan: where tokens lie, whether queries travel, and in how many stages keys do."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np

from .cost import DEFAULT_HARDWARE, FloatArray, Hardware, RowCosts
from .draft import DEFAULT_COSTS, MAX_STAGES, Draft
from .estimate import Staging
from .place.apart import lay_apart
from .place.balance import place_balanced
from .place.components import find_components
from .place.cross import place_cross
from .place.equal import chunk_of_equal, equal_and_even, require_divisible
from .place.equal import equal_shards as share_equally
from .place.nodes import place_on_nodes
from .placement import Placement, place_contiguous, place_zigzag
from .plan import Plan
from .schedule import Schedule, bisect_tasks, place_for_schedule
from .simulate import simulate
from .slices import SliceTable

Layout = Literal["balanced", "contiguous", "zigzag"]
LAYOUTS: tuple[Layout, ...] = ("balanced", "contiguous", "zigzag")

ScheduleKind = Literal["auto", "keys", "tiles"]
SCHEDULES: tuple[ScheduleKind, ...] = ("auto", "keys", "tiles")

# Where nothing but the estimate says so, queries travel only if it says that they save so much: it is rough for them.
TILES_SECONDS = 0.9
# Tiles are looked at where this share of what is left to gain, times a key row's cost over a query row's, pays for so
# many milliseconds for each level of their bisection, or where nobody computes in such a share of the step.
_TILES_SHARE, _TILES_MS, _TILES_LOST = 0.5, 0.75, 0.35
# To simulate a plan takes about so many milliseconds, and so many for each stage and for each route.
_CHECK_MS, _CHECK_STAGE_MS, _CHECK_ROUTE_MS = 0.4, 0.16, 4e-4
# It may gain such a share of a step, of which a model has as many as layers; and it takes no longer than this, beside
# what plans for hundreds of ranks take otherwise.
_CHECK_GAIN, _LAYERS, _MOST_CHECK_MS = 0.12, 32, 10.0
# What is estimated to take so many times as long as the best may still be faster; and where rows travel on.
_NEAR, _NEAR_RELAYS = 1.04, 1.08
# What is so much slower in as many stages as the best has is not faster in another number of them.
_HOPELESS = 1.2
# Plain layouts are looked at where there is so much to gain.
_PLAIN_MS = 1.5
# Links between nodes that are slower than those inside by no more than this are not worth a placement of their own.
_LINKS_ALIKE = 2.0
# A plain layout is taken where it is estimated to be so much faster than a balanced one.
_PLAIN_SECONDS = 0.98
# Uneven tokens, by which other layers take longer, are accepted where that makes attention so much faster.
_UNEVEN_SECONDS = 0.95
# Layers that a search for fewer rows is to pay for: as many as a model has, half of whose transfers hide behind work.
_LAYERS_PAID = _LAYERS // 2
# Routes of a plan up to which it is simulated where placements over nodes are compared.
_MOST_SIMULATED = 1 << 17


def make_dispatch_plan(
    slices: SliceTable,
    *,
    total_seqlen: int,
    cp_size: int,
    total_seqlen_k: int | None = None,
    chunk_size: int = 512,
    layout: Layout = "balanced",
    num_stages: int | None = None,
    schedule: ScheduleKind = "keys",
    costs: RowCosts = DEFAULT_COSTS,
    ranks_per_node: int | None = None,
    search_effort: int = 0,
    hardware: Hardware = DEFAULT_HARDWARE,
    equal_shards: bool = False,
    relays: bool | None = None,
) -> Plan:
    """Plan attention under a mask for every rank of a group.

    Args:
        slices: disjoint banded rectangles of the mask (`disjoint_union` makes them so).
        total_seqlen: query tokens, and key tokens unless total_seqlen_k is given (cross-attention).
        cp_size: number of ranks.
        chunk_size: tokens by which ranks' token counts may differ, and the grain of placement.
        layout: "balanced" (even area and tokens, least traffic; with schedule "auto" one of the others where that is
            predicted to be faster), "contiguous" or "zigzag".
        num_stages: parts in which remote keys are fetched; None chooses. Their sizes are chosen.
        schedule: "keys": queries are computed where they lie, and only keys and values travel.
            "tiles": each rank computes a tile of queries x keys and queries travel too. "auto":
            tiles where they are predicted to be faster. Tiles bring their own layout,
            so they go only with layout "balanced" and self-attention.
        costs: what a query row and a key row cost to move.
        ranks_per_node: ranks that share a node, in a two-level network; None: one level.
        search_effort: how long to search for a placement of fewer rows, in units of a fixed number of steps (about
            100 ms each, the same result on every rank). 0: as long as a step may gain by it, one unit at most.
        hardware: speeds by which that, placement on two levels, schedule and stages are chosen.
        equal_shards: every rank owns as many tokens.
        relays: whether ranks pass on rows that others need as well (`solver.relays`); over nodes where there are any,
            and those of `hardware` if ranks_per_node is None. None: where owners would send more than any rank
            receives, or only the hardware has nodes, and it is estimated to be faster.

    Raises:
        ValueError: a size is out of range, the layout is unknown, or the tokens cannot be shared equally.
    """
    check_sizes(total_seqlen, total_seqlen_k, cp_size, chunk_size, num_stages, layout, search_effort)
    for total in (total_seqlen, total_seqlen_k or 0) if equal_shards else ():
        require_divisible(total, cp_size)
        chunk_size = chunk_of_equal(total_seqlen, cp_size, chunk_size)
    can_tile = layout == "balanced" and total_seqlen_k is None
    if schedule not in SCHEDULES or (schedule == "tiles" and not can_tile):
        raise ValueError(
            f"schedule {schedule!r} with layout {layout!r} and total_seqlen_k {total_seqlen_k}: use one of "
            f"{', '.join(SCHEDULES)}; 'tiles' needs layout 'balanced' and self-attention"
        )
    asked = Asked(costs, hardware, ranks_per_node, num_stages, relays, {})
    if schedule == "tiles":
        return asked.plan(asked.staged(_tiles(slices, total_seqlen, cp_size, costs)))
    if layout == "balanced" and total_seqlen_k is None:
        placements = _place_balanced(
            slices,
            ranks_per_node=ranks_per_node,
            hardware=hardware,
            total_seqlen=total_seqlen,
            cp_size=cp_size,
            chunk_size=chunk_size,
            search_effort=search_effort,
            row_ms=row_ms(costs, hardware, ranks_per_node),
        )
        if equal_shards:
            placements = (equal_and_even(slices, placement) for placement in placements)
        drafts = [Draft.of(keys_schedule(slices, placement), placement, placement) for placement in placements]
    else:
        if layout == "balanced" and total_seqlen_k is not None and cp_size > 1:
            pairs = list(place_cross(slices, total_seqlen, total_seqlen_k, cp_size, chunk_size))
        else:
            pairs = [_place_by_name(total_seqlen, total_seqlen_k, cp_size, layout)]
        if equal_shards:
            pairs = [(share_equally(queries), share_equally(keys)) for queries, keys in pairs]
        drafts = [Draft.of(keys_schedule(slices, queries), queries, keys) for queries, keys in pairs]
    staged = [asked.staged(draft) for draft in drafts]
    best = _fastest(staged, asked) if total_seqlen_k is None else _even_or_faster(staged, asked)
    best = _or_renumbered(best, asked) if can_tile else best
    if schedule == "auto" and layout == "balanced":
        tiled = _tiled(best, slices, asked) if can_tile else ()
        best = _fastest_of(best, [*_plain(best, slices, asked, equal_shards), *tiled], asked)
    return asked.plan(or_stages(best, asked))


class Staged(NamedTuple):
    """A draft with its stages and the estimated time."""

    staging: Staging
    draft: Draft

    @property
    def seconds(self) -> float:
        return self.staging.seconds

    @property
    def near(self) -> float:
        """So many times as slow as the best it may still be faster: the estimate knows little of who passes on what."""
        return _NEAR_RELAYS if self.staging.relays else _NEAR

    @property
    def queries_travel(self) -> bool:
        return bool(self.draft.queries_missing.any())


class Asked(NamedTuple):
    """What plans are chosen by, and what was asked for. simulated_seconds: of plans that were simulated."""

    costs: RowCosts
    hardware: Hardware
    ranks_per_node: int | None
    num_stages: int | None
    relays: bool | None
    simulated_seconds: dict[Staged, float]

    def staged(self, draft: Draft) -> Staged:
        how = self.ranks_per_node, self.num_stages, self.relays
        return Staged(draft.staging(self.costs, self.hardware, *how), draft)

    def rival(self, draft: Draft, best: Staged) -> Staged:
        """Staged like the best at hand, and as it suits itself only if it comes near that."""
        count = max(len(best.staging.weights), 1) if self.num_stages is None else self.num_stages
        alike = self._replace(num_stages=count).staged(draft)
        return alike if alike.seconds > _HOPELESS * best.seconds else self.staged(draft)

    def plan(self, staged: Staged) -> Plan:
        return staged.draft.plan(staged.staging, self.ranks_per_node)

    def simulated(self, staged: Staged) -> float:
        """Seconds of both passes by simulation."""
        if staged not in self.simulated_seconds:
            self.simulated_seconds[staged] = simulate(self.plan(staged), self.hardware, self.costs.heads).seconds
        return self.simulated_seconds[staged]

    def least(self, areas: FloatArray) -> float:
        """Seconds in which ranks compute these areas of both passes alone: no plan of theirs is done before."""
        slices, heads = np.ones(len(areas)), self.costs.heads
        passes = (self.hardware.kernel_seconds(areas, slices, heads, backward=backward) for backward in (False, True))
        return float(sum(seconds.max() for seconds in passes))

    def gain_ms(self, staged: Staged) -> float:
        """Milliseconds that a better plan may save, until a plan is made anew: of the time in which nobody computes."""
        even = self.least(np.array([staged.draft.tasks.area() / staged.draft.q_placement.cp_size]))
        return 1e3 * _LAYERS_PAID * max(staged.seconds - even, 0.0)

    def margin(self, rival: Staged, best: Staged) -> float:
        """How much faster than the best a rival has to be by nothing but the estimate."""
        if rival is best:
            return 1.0
        return TILES_SECONDS if rival.queries_travel else _PLAIN_SECONDS

    def worth_checking(self, staged: list[Staged], expected: float = 0.0) -> bool:
        """Whether what simulation may show to be faster outweighs the time that it takes.

        expected: share of the step that the estimate says is gained.
        """
        check_ms = sum(map(_check_ms, staged))
        layer_ms = 1e3 * min(one.seconds for one in staged)
        return check_ms < min(_MOST_CHECK_MS, max(_CHECK_GAIN, expected) * _LAYERS * layer_ms)


def _tiles(slices: SliceTable, total_seqlen: int, cp_size: int, costs: RowCosts) -> Draft:
    """Queries travel, too."""
    tiled = bisect_tasks(slices, cp_size, q_cost=costs.q, k_cost=costs.kv)
    placement = place_for_schedule(tiled, total_seqlen=total_seqlen, cp_size=cp_size, q_cost=costs.q, k_cost=costs.kv)
    return Draft.of(tiled, placement, placement)


def _fastest(staged: list[Staged], asked: Asked) -> Staged:
    """The first to be done with both passes: by simulation while that is a matter of milliseconds, else by estimate."""
    if len(staged) == 1:
        return staged[0]
    small = all(_routes(one) <= _MOST_SIMULATED for one in staged)
    return min(staged, key=asked.simulated if small else lambda one: one.seconds)


def _even_or_faster(staged: list[Staged], asked: Asked) -> Staged:
    """Cross-attention: the last, whose tokens are even, unless the first is clearly faster."""
    pieces, even = staged[0], staged[-1]
    faster = pieces.seconds < _UNEVEN_SECONDS * even.seconds and _fastest([pieces, even], asked) is pieces
    return pieces if faster else even


def _or_renumbered(best: Staged, asked: Asked) -> Staged:
    """Where rows travel on over nodes that the placement did not know, ranks that need the same keys share a node."""
    if best.staging.relays < 2 or asked.ranks_per_node is not None:
        return best
    asked = asked._replace(relays=True)
    near = asked.rival(best.draft.renumbered(), best)
    return near if near.seconds < best.seconds else best


def _routes(staged: Staged) -> int:
    """About as many as a plan of it has."""
    return max(len(staged.staging.weights), 1) * staged.draft.num_runs()


def _check_ms(staged: Staged) -> float:
    """Milliseconds that it takes to simulate its plan."""
    num_exchanges = len(staged.staging.weights) * (2 if staged.staging.relays else 1)
    return _CHECK_MS + _CHECK_STAGE_MS * num_exchanges + _CHECK_ROUTE_MS * _routes(staged)


def _plain(best: Staged, slices: SliceTable, asked: Asked, equal_shards: bool) -> Iterator[Staged]:
    """Plain layouts that may be faster than the best balanced one.

    Where transfers weigh more than the kernels, a less even layout of fewer or better spread rows can be. One whose
    busiest rank computes too long alone is not looked at.
    """
    if asked.gain_ms(best) < _PLAIN_MS:
        return
    cp_size = best.draft.q_placement.cp_size
    placements = dict.fromkeys((best.draft.q_placement, best.draft.k_placement))  # one in self-attention
    for place in (place_contiguous, place_zigzag):
        placed = [place(each.total_seqlen, cp_size) for each in placements]
        placed = list(map(share_equally, placed)) if equal_shards else placed
        queries, keys = placed[0], placed[-1]
        plain = keys_schedule(slices, queries)
        areas = np.bincount(plain.task_ranks, plain.tasks.areas(), cp_size).astype(np.float64)
        if asked.least(areas) < _PLAIN_SECONDS * best.seconds:
            yield asked.rival(Draft.of(plain, queries, keys), best)


def _tiled(best: Staged, slices: SliceTable, asked: Asked) -> Iterator[Staged]:
    """Tiles, where it may pay to look at them: a query row is the dearer beside a key row, the less they save."""
    costs, total, cp_size = asked.costs, best.draft.q_placement.total_seqlen, best.draft.q_placement.cp_size
    gain_ms = asked.gain_ms(best)
    much = gain_ms > _TILES_LOST * 1e3 * _LAYERS_PAID * best.seconds
    may_save = _TILES_SHARE * costs.kv / costs.q * gain_ms
    if cp_size > 2 and (much or may_save >= _TILES_MS * math.log2(cp_size)):
        yield asked.rival(_tiles(slices, total, cp_size, costs), best)


def _fastest_of(best: Staged, rivals: list[Staged], asked: Asked) -> Staged:
    """The best balanced plan or a rival: by simulation, where that is worth it, of those near in the estimate."""
    order = sorted([best, *rivals], key=lambda one: one.seconds)
    near = [one for one in order if one.seconds < max(one.near, order[0].near) * order[0].seconds]
    if len(near) == 1 and near[0] is best:
        return best
    others = [one for one in near if one is not best]
    expected = 1 - order[0].seconds / max(best.seconds, 1e-12)
    for count in range(len(others), 0, -1):
        if asked.worth_checking([best, *others[:count]], expected=expected):
            return min([best, *others[:count]], key=asked.simulated)
    return min([best, *rivals], key=lambda one: one.seconds / asked.margin(one, best))


def or_stages(best: Staged, asked: Asked) -> Staged:
    """The draft at hand, in more or fewer stages where simulation prefers that, and is worth its time."""
    count = len(best.staging.weights)
    if asked.num_stages is not None or not count or not asked.worth_checking([best] * 2):
        return best
    asked, start, seconds = asked._replace(relays=best.staging.relays > 0), best, math.inf
    for step in (1, -1):
        while 1 <= (count := len(best.staging.weights) + step) <= MAX_STAGES:
            other = asked._replace(num_stages=count).staged(best.draft)
            if other.seconds > other.near * best.seconds or not asked.worth_checking([other]):
                break
            seconds = asked.simulated(best) if seconds == math.inf else seconds
            found = asked.simulated(other)
            if found >= seconds:
                break
            best, seconds = other, found
        if best is not start:
            break
    return best


def row_ms(costs: RowCosts, hardware: Hardware, ranks_per_node: int | None) -> float:
    """Milliseconds for which a search that saves a row of the busiest rank is worth its time."""
    link = hardware.within if ranks_per_node is None else hardware.across
    return 1e3 * _LAYERS_PAID * costs.kv / link.bytes_per_s


def keys_schedule(slices: SliceTable, q_placement: Placement) -> Schedule:
    """The schedule in which the owner of a query computes everything for it."""
    tasks, _ = slices.split_q(q_placement.starts[1:])
    return Schedule(tasks, q_placement.owner_of(tasks.q0))


def check_sizes(
    total_seqlen: int,
    total_seqlen_k: int | None,
    cp_size: int,
    chunk_size: int,
    num_stages: int | None,
    layout: str,
    search_effort: int,
) -> None:
    for name, value, least in (
        ("total_seqlen", total_seqlen, 0),
        ("total_seqlen_k", total_seqlen_k, 0),
        ("cp_size", cp_size, 1),
        ("chunk_size", chunk_size, 1),
        ("num_stages", num_stages, 1),
        ("search_effort", search_effort, 0),
    ):
        if value is not None and value < least:
            raise ValueError(f"{name} is {value}: it must be at least {least}")
    if num_stages is not None and num_stages > MAX_STAGES:
        raise ValueError(f"num_stages is {num_stages}: at most {MAX_STAGES} stages are planned")
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is unknown: use one of {', '.join(LAYOUTS)}")


def _place_balanced(
    slices: SliceTable,
    *,
    ranks_per_node: int | None,
    hardware: Hardware,
    total_seqlen: int,
    cp_size: int,
    chunk_size: int,
    search_effort: int,
    row_ms: float,
) -> Iterator[Placement]:
    """Placements to choose from by time: one, or several on a network of two levels.

    Others: as of `place_balanced`.
    """
    size = {"total_seqlen": total_seqlen, "cp_size": cp_size, "chunk_size": chunk_size, "search_effort": search_effort}
    apart = lay_apart(slices, total_seqlen)
    slices = apart.table if apart else slices
    found = list(place_on_nodes(slices, **size, ranks_per_node=ranks_per_node, row_ms=row_ms))
    # Placed as on one level, documents are spread over nodes: not worth the time where that is slow.
    alike = _LINKS_ALIKE * hardware.across.bytes_per_s >= hardware.within.bytes_per_s
    if not found or alike or len(find_components(slices, total_seqlen)[0]) == 1:
        found.append(place_balanced(slices, **size, row_ms=row_ms))
    return map(apart.back, found) if apart else iter(found)


def _place_by_name(
    total_seqlen: int, total_seqlen_k: int | None, cp_size: int, layout: Layout
) -> tuple[Placement, Placement]:
    """Placements of queries and keys in a plain layout."""
    by_name = place_zigzag if layout == "zigzag" else place_contiguous
    q_placement = by_name(total_seqlen, cp_size)
    return q_placement, q_placement if total_seqlen_k is None else by_name(total_seqlen_k, cp_size)
