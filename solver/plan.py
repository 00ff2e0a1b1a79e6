"""Plans: who owns, computes and sends what, for all ranks at once.

A `Plan` is pure data, equal on every rank and independent of process groups and devices. A
`RankPlan` is one rank's share of it in that rank's local row numbers: what the runtime executes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from .cost import DEFAULT_HARDWARE, Hardware, RowCosts, row_costs
from .estimate import Load, Staging, choose_stages
from .fingerprint import fingerprint_of
from .placement import Placement
from .relays import hop_tables, numbers_by_need, relayed_link_rows
from .routes import (
    Intervals,
    RouteTable,
    link_rows,
    make_routes,
    most_shared_stages,
    rows_missing,
    rows_sent,
    runs_needed,
    tokens_needed,
)
from .schedule import Schedule
from .slices import IntArray, SliceTable, expand_counts, merge_neighbours

# Heads 32:8 of dim 128 in 16 bits.
DEFAULT_COSTS = row_costs(32, 8, 128, 128)
# More stages than this split the remote keys into tiles too small to be worth it.
MAX_STAGES = 8
_FEW_STAGES = 3
# In two stages so much slower than another way to send rows, one is in any.
_SLOWER_WAY = 1.3
# Rows travel on where owners would send so much more than any rank receives, and that is estimated to be faster.
SENDS_MUCH, RELAYS_SECONDS = 1.2, 0.99


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

    kv: the hops of the exchange that brings the keys (none in the first stage, whose keys are local
        rows); see `RankPlan.queries`.
    own, guest: slices over (local query rows, key rows of this stage) and over (received query
    rows, key rows of this stage), in buffer row numbers.
    """

    kv: tuple[Exchange, ...]
    num_keys: int
    own: SliceTable
    guest: SliceTable


@dataclass(frozen=True, slots=True, eq=False)
class RankPlan:
    """What one rank owns, receives and computes.

    q_runs, k_runs: its tokens as global [start, end) runs, [n, 2]; its rows are these, in order.
    queries: the hops of the exchange that brings the queries of other ranks; partial results go back
        along it. One hop, and one more each on a two-level network and where rows travel on; a hop sends rows of
        [local rows, rows received in the hop before], and the last one delivers.
    stages: that of own keys, then the remote ones in order.
    """

    rank: int
    cp_size: int
    q_runs: IntArray = field(repr=False)
    k_runs: IntArray = field(repr=False)
    num_queries: int
    num_keys: int
    queries: tuple[Exchange, ...]
    stages: tuple[RankStage, ...]


class RowsMoved(NamedTuple):
    """Rows that each rank receives from others and sends to others, [cp_size]."""

    received: IntArray
    sent: IntArray


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
    relays: whether ranks pass on rows that they need, so that their owners need not send them to all (`relays`).
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
    relays: bool = False

    @property
    def cp_size(self) -> int:
        return self.q_placement.cp_size

    def require_whole(self) -> None:
        """Check that a plan that was stored or sent is still what its fingerprint says.

        Raises:
            ValueError: it is not.
        """
        placements, routes = (self.q_placement, self.k_placement), (self.q_routes, self.kv_routes)
        by = _ways(self.num_stages, self.ranks_per_node, self.relays)
        found = fingerprint_of(self.tasks, self.task_ranks, *placements, *routes, *by)
        if found != self.fingerprint:
            raise ValueError(
                f"the plan's contents have the fingerprint {found} and it says {self.fingerprint}: it was damaged or "
                f"changed after it was made; make it again"
            )

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
        fetched = [self._hops(self.kv_routes, stage, self.k_placement, rank) for stage in range(self.num_stages)]
        stages = [_rank_stage(kv, key_runs, mine, q_runs, guest_runs) for kv, key_runs in [((), k_runs), *fetched]]
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
        tables = self.hops(routes.of_stage(stage))
        runs = [received_runs(table, rank) for table in tables]
        landed = (None, *runs[:-1])
        return tuple(exchange_of(t, placement, rank, held) for t, held in zip(tables, landed, strict=True)), runs[-1]

    def key_rows_moved(self) -> RowsMoved:
        """Key rows that each rank moves: to and from each rank that needs them, or where they travel on, hop by hop."""
        routes = (self.kv_routes.of_stage(stage) for stage in range(self.num_stages))
        tables = [table for each in routes for table in self.hops(each)] if self.relays else [self.kv_routes]
        away = [(t, (t.ends - t.starts) * (t.srcs != t.dsts)) for t in tables]
        received, sent = (
            sum((np.bincount(getattr(t, side), rows, self.cp_size) for t, rows in away), np.zeros(self.cp_size))
            for side in ("dsts", "srcs")
        )
        return RowsMoved(received.astype(np.int64), sent.astype(np.int64))

    @property
    def num_hops(self) -> int:
        """Hops of an exchange."""
        return 1 + (1 < self.ranks_per_node < self.cp_size) + self.relays

    def hops(self, routes: RouteTable) -> tuple[RouteTable, ...]:
        """The hops in which rows travel these routes of the plan: `hop_tables`."""
        return hop_tables(routes, cp_size=self.cp_size, ranks_per_node=self.ranks_per_node, relays=self.relays)


@dataclass(frozen=True, slots=True, eq=False)
class Draft:
    """Who computes which task (disjoint) and who owns what, with the rows that follow, before routes are made.

    A task may be computed by a rank that owns neither its queries nor its keys. queries, keys: rows that
    each rank needs.
    """

    tasks: SliceTable
    task_ranks: IntArray
    q_placement: Placement
    k_placement: Placement
    queries: Intervals
    keys: Intervals
    # What `_load` found, by its arguments: it is asked for again with every number of stages.
    _loads: dict[tuple[int, bool, bool], Load] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, schedule: Schedule, q_placement: Placement, k_placement: Placement) -> Draft:
        """The draft of a schedule over rows placed as given."""
        return cls(*schedule, q_placement, k_placement, *tokens_needed(*schedule))

    def renumbered(self) -> Draft:
        """The same with ranks that need the same keys next to each other; queries and keys must be placed alike."""
        placement = self.k_placement
        number = numbers_by_need(self.keys, placement.cp_size)
        placement = Placement.from_runs(placement.ends, number[placement.owners], cp_size=placement.cp_size)
        return Draft.of(Schedule(self.tasks, number[self.task_ranks]), placement, placement)

    def bytes_moved(self, costs: RowCosts) -> int:
        """Bytes that travel in both passes, over all ranks."""
        q_rows, kv_rows = rows_missing(self.queries, self.q_placement), rows_missing(self.keys, self.k_placement)
        return int(q_rows.sum()) * costs.q + int(kv_rows.sum()) * costs.kv

    def staging(
        self,
        costs: RowCosts,
        hardware: Hardware,
        ranks_per_node: int | None,
        num_stages: int | None,
        relays: bool | None = False,
    ) -> Staging:
        """How remote keys travel best, in any number of stages or the given one, and the estimated time.

        relays: whether rows travel on; None: where that is estimated to be faster, and owners would send too much.

        Raises:
            ValueError: cp_size is no multiple of ranks_per_node.
        """
        load = self._load(hardware, ranks_per_node)
        if not load.keys.any():
            return choose_stages(load, costs.heads, hardware, (0,))
        counts = (num_stages,) if num_stages is not None else range(1, self._most_stages() + 1)
        nodes = self._relay_nodes(hardware, ranks_per_node)
        ways: dict[int, Load] = {} if relays else {0: load}
        if relays or (relays is None and self._may_relay(nodes if ranks_per_node is None else 1)):
            ways[nodes] = self._load(hardware, None if nodes == 1 else nodes, relays=True)

        def staged(way: int, counts: Iterable[int]) -> Staging:
            return choose_stages(ways[way], costs.heads, hardware, counts)._replace(relays=way)

        if len(ways) > 1 and num_stages is None:
            # One way may be far slower than the other, in whatever number of stages.
            tried = [staged(way, (2,)) for way in ways]
            least = min(one.seconds for one in tried)
            ways = {one.relays: ways[one.relays] for one in tried if one.seconds < _SLOWER_WAY * least}
        # Rows travel on only where that is a clear gain.
        return min(
            (staged(way, counts) for way in ways), key=lambda one: one.seconds / (RELAYS_SECONDS if one.relays else 1)
        )

    def _may_relay(self, nodes: int) -> bool:
        """Whether there are nodes, or a rank sends clearly more rows than any receives and others could do it."""
        if nodes > 1 or self.k_placement.cp_size <= 2:
            return nodes > 1
        sent = rows_sent(self.keys, self.k_placement, self.k_placement).max()
        return bool(sent > SENDS_MUCH * rows_missing(self.keys, self.k_placement).max())

    def _relay_nodes(self, hardware: Hardware, ranks_per_node: int | None) -> int:
        """Ranks of the nodes over which rows travel on: the plan's, else the hardware's; 1 where there are none."""
        size = self.k_placement.cp_size
        nodes = hardware.ranks_per_node if ranks_per_node is None else _ranks_per_node(ranks_per_node, size)
        return nodes if nodes < size and size % nodes == 0 else 1

    def _load(self, hardware: Hardware, ranks_per_node: int | None, *, relays: bool = False) -> Load:
        """What each rank computes and moves."""
        cp_size = self.q_placement.cp_size
        per_node = _ranks_per_node(ranks_per_node, cp_size)
        two_level = 1 < per_node < cp_size
        # Hops go by the plan's nodes; on one level a row takes the link that the hardware has between two ranks.
        nodes = per_node if two_level else hardware.ranks_per_node
        known = self._loads.get((nodes, two_level, relays))
        return known or self._loads.setdefault((nodes, two_level, relays), self._counted(nodes, two_level, relays))

    def _counted(self, nodes: int, two_level: bool, relays: bool) -> Load:
        """What each rank computes and moves over such nodes."""
        sides = ((self.queries, self.q_placement), (self.keys, self.k_placement))
        if relays:
            queries, keys = (relayed_link_rows(*side, nodes, once_per_node=two_level) for side in sides)
        else:
            queries, keys = (link_rows(*side, nodes, once_per_node=two_level) for side in sides)
        # Only what links carry depends on how rows travel.
        ways: dict[str, Any] = {"queries": queries, "keys": keys, "two_level": two_level, "relays": relays}
        if known := next(iter(self._loads.values()), None):
            return replace(known, **ways)
        return Load.of(self.tasks, self.task_ranks, self.queries, self.keys, self.q_placement, self.k_placement, **ways)

    def num_runs(self) -> int:
        """Runs of the placement that ranks need keys of: routes of one stage, and those at home."""
        return int(runs_needed(self.keys, self.k_placement)[1].sum())

    def _most_stages(self) -> int:
        """As many as can share all senders, if that is a few; where it is not, they do not share them anyway."""
        shared = most_shared_stages(self.num_runs())
        return min(shared, MAX_STAGES) if shared >= _FEW_STAGES else MAX_STAGES

    def plan(self, staging: Staging, ranks_per_node: int | None) -> Plan:
        """The plan whose remote keys travel so; raises as `staging`."""
        cp_size, relays = self.q_placement.cp_size, staging.relays > 0
        ranks_per_node = _ranks_per_node(staging.relays if staging.relays > 1 else ranks_per_node, cp_size)
        num_stages = len(staging.weights)
        same_node = ranks_per_node if 1 < ranks_per_node < cp_size else 1
        q_routes = make_routes(self.queries, self.q_placement)
        kv_routes = make_routes(self.keys, self.k_placement, staging.weights or (1,), ranks_per_node=same_node)
        tasks = (self.tasks, self.task_ranks)
        placements = (self.q_placement, self.k_placement)
        ways = _ways(num_stages, ranks_per_node, relays)
        return Plan(
            q_placement=self.q_placement,
            k_placement=self.k_placement,
            tasks=self.tasks,
            task_ranks=self.task_ranks,
            q_routes=q_routes,
            kv_routes=kv_routes,
            num_stages=num_stages,
            ranks_per_node=ranks_per_node,
            fingerprint=fingerprint_of(*tasks, *placements, q_routes, kv_routes, *ways),
            relays=relays,
        )


def fetched_at_once(rank_plan: RankPlan) -> RankPlan:
    """A rank's work with all of its keys in one buffer: its own, then those of each stage in turn; nothing travels.

    For callers who fetch the rows themselves. The plan must move no queries.
    """
    assert not any(hop.active for hop in rank_plan.queries), "queries of other ranks would be left out"
    ends = np.cumsum([stage.num_keys for stage in rank_plan.stages])
    shifted = [
        stage.own.shift(0, int(end) - stage.num_keys) for stage, end in zip(rank_plan.stages, ends, strict=True)
    ]
    slices = merge_neighbours(SliceTable.concat(shifted))
    whole = RankStage((), int(ends[-1]), slices, SliceTable.empty())
    return replace(rank_plan, num_keys=whole.num_keys, stages=(whole,))


def _ranks_per_node(ranks_per_node: int | None, cp_size: int) -> int:
    """As many as there are ranks for a network of one level."""
    if ranks_per_node is None:
        return cp_size
    if ranks_per_node < 1 or cp_size % ranks_per_node:
        raise ValueError(
            f"ranks_per_node is {ranks_per_node} and cp_size is {cp_size}: nodes must be of equal size; "
            f"pass None for a network of one level"
        )
    return ranks_per_node


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
    draft = Draft.of(Schedule(tasks, task_ranks), q_placement, k_placement)
    return draft.plan(draft.staging(costs, hardware, ranks_per_node, num_stages), ranks_per_node)


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
    starts, ends = routes.starts[sent], routes.ends[sent]
    held = _own_runs(placement, rank)
    if landed is not None and len(landed.starts):
        held = _joined(held, landed._replace(offsets=landed.offsets + int(placement.num_tokens[rank])))
    return Exchange(
        send_runs=_rows_held(held, starts, ends),
        send_splits=_splits(routes.dsts[sent], ends - starts, placement.cp_size),
        recv_splits=_splits(routes.srcs[received], (routes.ends - routes.starts)[received], placement.cp_size),
        active=len(routes) > 0,
    )


def _joined(runs: Runs, others: Runs) -> Runs:
    """Two buffers of different tokens."""
    columns = [np.concatenate(pair) for pair in zip(runs, others, strict=True)]
    order = np.argsort(columns[1], kind="stable")
    return Runs(*(column[order] for column in columns))


def _rows_held(held: Runs, starts: IntArray, ends: IntArray) -> IntArray:
    """Where the tokens of each [start, end) lie, as runs of rows, one after the other; there may be several for one."""
    first = np.searchsorted(held.ends, starts, side="right")
    piece, nth = expand_counts(np.searchsorted(held.starts, ends, side="left") - first)
    at = first[piece] + nth
    low, high = np.maximum(starts[piece], held.starts[at]), np.minimum(ends[piece], held.ends[at])
    result: IntArray = np.stack([low, high], axis=-1) + (held.offsets[at] - held.starts[at])[:, None]
    return result


def _splits(ranks: IntArray, lengths: IntArray, cp_size: int) -> tuple[int, ...]:
    return tuple(np.bincount(ranks, lengths, cp_size).astype(np.int64).tolist())


def _rank_stage(
    kv: tuple[Exchange, ...], key_runs: Runs, tasks: SliceTable, q_runs: Runs, guest_runs: Runs
) -> RankStage:
    """The work of a rank's tasks with the keys that an exchange delivers."""
    num_keys = int((key_runs.ends - key_runs.starts).sum())
    return RankStage(kv, num_keys, _to_buffers(tasks, q_runs, key_runs), _to_buffers(tasks, guest_runs, key_runs))


def _to_buffers(table: SliceTable, q_runs: Runs, k_runs: Runs) -> SliceTable:
    """Slices cut to the tokens of two buffers and renumbered to buffer rows, in few pieces."""
    if not len(q_runs.starts) or not len(k_runs.starts):
        return SliceTable.empty()
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


def _ways(num_stages: int, ranks_per_node: int, relays: bool) -> tuple[int, ...]:
    """How rows travel, for the fingerprint."""
    return (num_stages, ranks_per_node, 1) if relays else (num_stages, ranks_per_node)
