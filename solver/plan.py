"""Plans: who owns, computes and sends what, for all ranks at once.

A `Plan` is pure data, equal on every rank and independent of process groups and devices. A
`RankPlan` is one rank's share of it in that rank's local row numbers: what the runtime executes.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, NamedTuple

import numpy as np

from .balance import AREA_LIMIT, place_balanced
from .bounds import Limits, quick_rows_bound
from .cost import DEFAULT_HARDWARE, Hardware, RowCosts, choose_num_stages, row_costs
from .placement import Placement, place_contiguous, place_zigzag
from .routes import RouteTable, make_routes, rows_missing, tokens_needed, two_level_routes
from .schedule import Schedule, bisect_tasks, place_for_schedule
from .slices import IntArray, SliceTable, expand_counts, merge_neighbours

Layout = Literal["balanced", "contiguous", "zigzag"]
LAYOUTS: tuple[Layout, ...] = ("balanced", "contiguous", "zigzag")

ScheduleKind = Literal["auto", "keys", "tiles"]
SCHEDULES: tuple[ScheduleKind, ...] = ("auto", "keys", "tiles")

# Heads 32:8 of dim 128 in 16 bits.
DEFAULT_COSTS = row_costs(32, 8, 128, 128)
# Moving queries costs more exchanges and merges: it must save this factor in bytes to be chosen.
TILES_GAIN = 0.95

# More stages than this split the remote keys into tiles too small to be worth it.
MAX_STAGES = 8


@dataclass(frozen=True, slots=True, eq=False)
class Exchange:
    """One rank's part in one all-to-all of rows.

    send_runs: int64 [n, 2], local rows [start, end) in the order sent, receiver by receiver.
    send_splits, recv_splits: rows to and from each rank, [cp_size].
    active: whether any rank of the group moves a row in it (equal on all ranks: it decides whether
    the collective runs).
    """

    send_runs: IntArray = field(repr=False)
    send_splits: tuple[int, ...]
    recv_splits: tuple[int, ...]
    active: bool

    @property
    def num_received(self) -> int:
        return sum(self.recv_splits)

    @property
    def num_sent(self) -> int:
        return sum(self.send_splits)


@dataclass(frozen=True, slots=True, eq=False)
class RankStage:
    """One step of a rank's attention: keys that arrive together, and the work on them.

    kv: the hops of the exchange that brings the keys (none in the host stage, whose keys are local
        rows); see `RankPlan.queries`.
    host, guest: slices over (local query rows, key rows of this stage) and over (received query
    rows, key rows of this stage), in buffer row numbers.
    """

    kv: tuple[Exchange, ...]
    num_keys: int
    host: SliceTable
    guest: SliceTable


@dataclass(frozen=True, slots=True, eq=False)
class RankPlan:
    """What one rank owns, receives and computes.

    q_runs, k_runs: its tokens as global [start, end) runs, [n, 2]; its rows are these, in order.
    queries: the hops of the exchange that brings the queries of other ranks; partial results go back
        along it. One hop, or two on a two-level network; a hop sends rows of
        [local rows, rows received in the hop before], and the last one delivers.
    stages: the host stage, then the remote ones in order.
    """

    rank: int
    cp_size: int
    q_runs: IntArray = field(repr=False)
    k_runs: IntArray = field(repr=False)
    num_queries: int
    num_keys: int
    queries: tuple[Exchange, ...]
    stages: tuple[RankStage, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """Distributed attention under one mask, for every rank.

    tasks: disjoint banded rectangles in global token indices that cover the mask exactly.
    task_ranks: which rank computes each, [len(tasks)].
    q_routes: queries that a rank computes for and does not own (stage 0 only).
    kv_routes: keys that a rank needs and does not own, in num_stages stages.
    ranks_per_node: ranks r with equal r // ranks_per_node share a node: rows go between nodes once
        per node and then fan out. As many as there are ranks (or 1) is a network of one level.
    fingerprint: hex digest of all of it; ranks with equal fingerprints execute matching collectives.
    """

    q_placement: Placement
    k_placement: Placement
    tasks: SliceTable
    task_ranks: IntArray = field(repr=False)
    q_routes: RouteTable
    kv_routes: RouteTable
    num_stages: int
    ranks_per_node: int
    fingerprint: str

    @property
    def cp_size(self) -> int:
        return self.q_placement.cp_size

    def areas(self) -> IntArray:
        """Visible pairs that each rank computes, [cp_size]."""
        # bincount sums in float64, which is exact up to 2**53 pairs.
        return np.bincount(self.task_ranks, self.tasks.areas(), self.cp_size).astype(np.int64)

    def imbalance(self) -> float:
        """Most visible pairs on one rank over the mean; 1.0 for an empty mask."""
        areas = self.areas()
        return float(areas.max() / areas.mean()) if areas.any() else 1.0

    def for_rank(self, rank: int) -> RankPlan:
        """One rank's share, in its local row numbers."""
        mine = self.tasks.take(self.task_ranks == rank)
        q_runs, k_runs = _own_runs(self.q_placement, rank), _own_runs(self.k_placement, rank)
        queries, guest_runs = self._hops(self.q_routes, 0, self.q_placement, rank)
        stages = []
        for stage in range(-1, self.num_stages):
            kv, key_runs = ((), k_runs) if stage < 0 else self._hops(self.kv_routes, stage, self.k_placement, rank)
            num_keys = int((key_runs.ends - key_runs.starts).sum())
            host = _to_buffers(mine, q_runs, key_runs)
            guest = _to_buffers(mine, guest_runs, key_runs)
            stages.append(RankStage(kv, num_keys, host, guest))
        return RankPlan(
            rank=rank,
            cp_size=self.cp_size,
            q_runs=self.q_placement.runs_of(rank),
            k_runs=self.k_placement.runs_of(rank),
            num_queries=int(self.q_placement.num_tokens[rank]),
            num_keys=int(self.k_placement.num_tokens[rank]),
            queries=queries,
            stages=tuple(stages),
        )


    def _hops(
        self, routes: RouteTable, stage: int, placement: Placement, rank: int
    ) -> tuple[tuple[Exchange, ...], Runs]:
        """The exchange of one stage for one rank, hop by hop, and what it delivers."""
        routes = routes.of_stage(stage)
        if not 1 < self.ranks_per_node < self.cp_size:
            return (exchange_of(routes, placement, rank),), received_runs(routes, rank)
        across, within = two_level_routes(routes, self.ranks_per_node)
        landed = received_runs(across, rank)
        first = exchange_of(across, placement, rank)
        return (first, exchange_of(within, placement, rank, landed)), received_runs(within, rank)


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
) -> Plan:
    """Plan attention under a mask for every rank of a group.

    Args:
        slices: disjoint banded rectangles of the mask (`disjoint_union` makes them so).
        total_seqlen: query tokens, and key tokens unless total_seqlen_k is given (cross-attention).
        cp_size: number of ranks.
        chunk_size: tokens by which ranks' token counts may differ, and the grain of placement.
        layout: "balanced" (even area and tokens, least traffic), "contiguous" or "zigzag".
        num_stages: parts in which remote keys are fetched; None chooses.
        schedule: "keys": queries are computed where they lie, and only keys and values travel.
            "tiles": each rank computes a tile of queries x keys and queries travel too. "auto":
            tiles where they move fewer bytes. Tiles bring their own layout, so they go only with
            layout "balanced" and self-attention.
        costs: what a query row and a key row cost to move.
        ranks_per_node: ranks that share a node, in a two-level network; None: one level.
        search_effort: extra placement search, in units of a fixed number of steps (about 25 ms each, the
            same result on every rank); 0 is the fast default.
        hardware: speeds by which num_stages is chosen.

    Raises:
        ValueError: a size is out of range or the layout is unknown.
    """
    check_sizes(total_seqlen, total_seqlen_k, cp_size, chunk_size, num_stages, layout)
    can_tile = layout == "balanced" and total_seqlen_k is None
    if schedule not in SCHEDULES or (schedule == "tiles" and not can_tile):
        raise ValueError(
            f"schedule {schedule!r} with layout {layout!r} and total_seqlen_k {total_seqlen_k}: use one of "
            f"{', '.join(SCHEDULES)}; 'tiles' needs layout 'balanced' and self-attention"
        )
    assemble = partial(
        assemble_plan, num_stages=num_stages, ranks_per_node=ranks_per_node, costs=costs, hardware=hardware
    )
    limit = math.inf  # bytes up to which a plan that moves no query is preferred
    if schedule == "tiles" or (schedule == "auto" and can_tile and cp_size > 2):
        tiles = bisect_tasks(slices, cp_size, q_cost=costs.q, k_cost=costs.kv)
        placement = place_for_schedule(
            tiles, total_seqlen=total_seqlen, cp_size=cp_size, q_cost=costs.q, k_cost=costs.kv
        )
        if schedule == "auto":
            limit = _bytes_moved(tiles, placement, placement, costs) / TILES_GAIN
        if schedule == "tiles" or limit < _least_bytes(slices, total_seqlen, cp_size, chunk_size, costs):
            return assemble(*tiles, placement, placement)
    placed = _place(slices, total_seqlen, total_seqlen_k, cp_size, chunk_size, layout, search_effort)
    keys = keys_schedule(slices, placed[0])
    if _bytes_moved(keys, *placed, costs) <= limit:
        return assemble(*keys, *placed)
    return assemble(*tiles, placement, placement)


def keys_schedule(slices: SliceTable, q_placement: Placement) -> Schedule:
    """The schedule in which the owner of a query computes everything for it."""
    tasks, _ = slices.split_q(q_placement.starts[1:])
    return Schedule(tasks, q_placement.owner_of(tasks.q0))


def _least_bytes(
    slices: SliceTable, total_seqlen: int, cp_size: int, chunk_size: int, costs: RowCosts
) -> int:
    """Bytes below which no balanced plan gets in which every query is computed where it lies."""
    limits = Limits.even(slices, total_seqlen, cp_size, chunk_size=chunk_size, imbalance=AREA_LIMIT)
    return costs.kv * quick_rows_bound(slices, total_seqlen=total_seqlen, cp_size=cp_size, limits=limits)


def _bytes_moved(
    schedule: Schedule, q_placement: Placement, k_placement: Placement, costs: RowCosts
) -> int:
    queries, keys = tokens_needed(schedule.tasks, schedule.task_ranks)
    q_rows, kv_rows = rows_missing(queries, q_placement), rows_missing(keys, k_placement)
    return int(q_rows.sum()) * costs.q + int(kv_rows.sum()) * costs.kv


def assemble_plan(
    tasks: SliceTable,
    task_ranks: IntArray,
    q_placement: Placement,
    k_placement: Placement,
    *,
    num_stages: int | None = None,
    ranks_per_node: int | None = None,
    costs: RowCosts = DEFAULT_COSTS,
    hardware: Hardware = DEFAULT_HARDWARE,
) -> Plan:
    """The plan in which rank task_ranks[i] computes tasks[i] (disjoint) and tokens lie as placed.

    A task may be computed by a rank that owns neither its queries nor its keys. Without num_stages
    the number is chosen for the heads of `costs` on `hardware`.
    """
    cp_size = q_placement.cp_size
    queries, keys = tokens_needed(tasks, task_ranks)
    q_routes = make_routes(queries, q_placement)
    kv_rows = rows_missing(keys, k_placement)
    if num_stages is None:
        num_stages = choose_num_stages(
            np.bincount(task_ranks, tasks.areas(), cp_size),
            kv_rows,
            k_placement.num_tokens,
            heads=costs.heads,
            hardware=hardware,
            ranks_per_node=cp_size if ranks_per_node is None else ranks_per_node,
            most=MAX_STAGES,
        )
    if not kv_rows.any():
        num_stages = 0
    kv_routes = make_routes(keys, k_placement, max(num_stages, 1))
    ranks_per_node = cp_size if ranks_per_node is None else ranks_per_node
    if ranks_per_node < 1 or cp_size % ranks_per_node:
        raise ValueError(
            f"ranks_per_node is {ranks_per_node} and cp_size is {cp_size}: nodes must be of equal size; "
            f"pass None for a network of one level"
        )
    parts = (tasks, task_ranks, q_placement, k_placement, q_routes, kv_routes, num_stages, ranks_per_node)
    return Plan(
        q_placement=q_placement,
        k_placement=k_placement,
        tasks=tasks,
        task_ranks=task_ranks,
        q_routes=q_routes,
        kv_routes=kv_routes,
        num_stages=num_stages,
        ranks_per_node=ranks_per_node,
        fingerprint=_fingerprint(*parts),
    )


def check_sizes(
    total_seqlen: int,
    total_seqlen_k: int | None,
    cp_size: int,
    chunk_size: int,
    num_stages: int | None,
    layout: str,
) -> None:
    for name, value, least in (
        ("total_seqlen", total_seqlen, 0),
        ("total_seqlen_k", total_seqlen_k, 0),
        ("cp_size", cp_size, 1),
        ("chunk_size", chunk_size, 1),
        ("num_stages", num_stages, 1),
    ):
        if value is not None and value < least:
            raise ValueError(f"{name} is {value}: it must be at least {least}")
    if num_stages is not None and num_stages > MAX_STAGES:
        raise ValueError(f"num_stages is {num_stages}: at most {MAX_STAGES} stages are planned")
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is unknown: use one of {', '.join(LAYOUTS)}")


def _place(
    slices: SliceTable,
    total_seqlen: int,
    total_seqlen_k: int | None,
    cp_size: int,
    chunk_size: int,
    layout: Layout,
    search_effort: int,
) -> tuple[Placement, Placement]:
    if layout == "contiguous" or cp_size == 1:
        by_name = place_contiguous
    elif layout == "zigzag":
        by_name = place_zigzag
    elif total_seqlen_k is None:
        placement = place_balanced(
            slices,
            total_seqlen=total_seqlen,
            cp_size=cp_size,
            chunk_size=chunk_size,
            search_effort=search_effort,
        )
        return placement, placement
    else:
        return place_cross(slices, total_seqlen, total_seqlen_k, cp_size, chunk_size)
    q_placement = by_name(total_seqlen, cp_size)
    if total_seqlen_k is None:
        return q_placement, q_placement
    return q_placement, by_name(total_seqlen_k, cp_size)


def place_cross(
    slices: SliceTable, seqlen_q: int, seqlen_k: int, cp_size: int, chunk_size: int
) -> tuple[Placement, Placement]:
    """Placements for cross-attention: queries in contiguous pieces of even area, keys beside them.

    Queries and keys are separate sequences, so the keys can lie where they are used: key token j
    goes to the rank whose queries begin to see it, in pieces of equal length. Queries are cut where
    area and token count, each weighted half, reach the next rank's share.
    """
    cuts = np.arange(0, seqlen_q + chunk_size, chunk_size).clip(max=seqlen_q)
    pieces, _ = slices.split_q(cuts)
    chunk = np.searchsorted(cuts, pieces.q0, side="right") - 1
    areas = np.bincount(chunk, pieces.areas(), len(cuts) - 1)
    tokens = np.diff(cuts).astype(np.float64)
    weight = tokens / max(tokens.sum(), 1.0) + areas / max(areas.sum(), 1.0)
    filled = np.concatenate([[0.0], np.cumsum(weight)])
    targets = filled[-1] * np.arange(1, cp_size) / cp_size
    ends = np.interp(targets, filled, cuts).astype(np.int64)
    q_placement = Placement.from_runs(
        np.append(ends, seqlen_q), np.arange(cp_size), cp_size=cp_size
    )
    return q_placement, place_contiguous(seqlen_k, cp_size)


class Runs(NamedTuple):
    """Tokens [starts, ends) that lie in a buffer from row `offsets` on; sorted by token."""

    offsets: IntArray
    starts: IntArray
    ends: IntArray


def _own_runs(placement: Placement, rank: int) -> Runs:
    mine = placement.owners == rank
    return Runs(placement.local_starts[mine], placement.starts[mine], placement.ends[mine])


def received_runs(routes: RouteTable, rank: int) -> Runs:
    """The receive buffer of routes of one stage, as runs sorted by token."""
    mine = routes.dsts == rank
    starts, ends = routes.starts[mine], routes.ends[mine]
    offsets = np.cumsum(ends - starts) - (ends - starts)
    order = np.argsort(starts, kind="stable")
    return Runs(offsets[order], starts[order], ends[order])


def exchange_of(
    routes: RouteTable, placement: Placement, rank: int, landed: Runs | None = None
) -> Exchange:
    """One rank's part in the exchange of routes of one stage, over rows placed as given.

    landed: rows that an earlier hop brought; they lie behind the local rows and may be sent on.
    """
    sent, received = routes.srcs == rank, routes.dsts == rank
    starts, lengths = routes.starts[sent], (routes.ends - routes.starts)[sent]
    run = np.searchsorted(placement.ends, starts, side="right")
    rows = placement.local_starts[run] + starts - placement.starts[run]
    if landed is not None and len(landed.starts):
        at = np.searchsorted(landed.starts, starts, side="right") - 1
        forwarded = int(placement.num_tokens[rank]) + landed.offsets[at] + starts - landed.starts[at]
        rows = np.where(placement.owners[run] == rank, rows, forwarded)
    return Exchange(
        send_runs=np.stack([rows, rows + lengths], axis=-1),
        send_splits=_splits(routes.dsts[sent], lengths, placement.cp_size),
        recv_splits=_splits(routes.srcs[received], (routes.ends - routes.starts)[received], placement.cp_size),
        active=len(routes) > 0,
    )


def _splits(ranks: IntArray, lengths: IntArray, cp_size: int) -> tuple[int, ...]:
    return tuple(np.bincount(ranks, lengths, cp_size).astype(np.int64).tolist())


def _to_buffers(table: SliceTable, q_runs: Runs, k_runs: Runs) -> SliceTable:
    """Slices cut to the tokens of two buffers and renumbered to buffer rows, in few pieces."""
    cut, dq = _to_buffer_rows(table, q_runs)
    cut = cut.shift(dq, 0).transpose()
    cut, dk = _to_buffer_rows(cut, k_runs)
    return merge_neighbours(cut.shift(dk, 0).transpose())


def _to_buffer_rows(table: SliceTable, runs: Runs) -> tuple[SliceTable, IntArray]:
    """Slices cut to the runs along queries, and the shift to buffer rows of each piece."""
    first = np.searchsorted(runs.ends, table.q0, side="right")
    last = np.searchsorted(runs.starts, table.q1, side="left")
    parent, nth = expand_counts(last - first)
    run = first[parent] + nth
    rows = table.data[parent]
    rows[:, 0] = np.maximum(rows[:, 0], runs.starts[run])
    rows[:, 1] = np.minimum(rows[:, 1], runs.ends[run])
    cut, kept = SliceTable(rows).canonical()
    run = run[kept]
    return cut, runs.offsets[run] - runs.starts[run]


# Odd, about 2**61 over the golden ratio: weights of neighbouring rows differ in all bits (int64 wraps round).
_MIX = 0x13C6EF372FE94F83


def _fingerprint(*parts: SliceTable | IntArray | Placement | RouteTable | int) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, Placement):
            arrays = [np.array([part.cp_size, part.total_seqlen]), part.ends, part.owners]
        elif isinstance(part, RouteTable):
            # They follow from the rest, and at a thousand ranks there are millions: a weighted sum will do.
            columns = (part.dsts, part.srcs, part.starts, part.ends, part.stages)
            position = np.arange(1, len(part) + 1) * _MIX
            arrays = [np.array([len(part), *(int(column @ position) for column in columns)])]
        else:
            arrays = [part.data if isinstance(part, SliceTable) else np.asarray(part)]
        for array in arrays:
            digest.update(np.array(array.shape, dtype=np.int64).tobytes())
            digest.update(np.ascontiguousarray(array, dtype=np.int64).tobytes())
    return digest.hexdigest()
