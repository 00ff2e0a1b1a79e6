"""Plans: who owns, computes and sends what, for all ranks at once.

A `Plan` is pure data, equal on every rank and independent of process groups and devices. A
`RankPlan` is one rank's share of it in that rank's local row numbers: what the runtime executes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from .fingerprint import fingerprint_of
from .placement import Placement
from .relays import hop_tables
from .routes import RouteTable
from .slices import IntArray, SliceTable, expand_counts, merge_neighbours

# Routes up to which the hops of all stages are made together.
_MOST_TOGETHER = 1 << 17


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
        by = how_rows_travel(self.num_stages, self.ranks_per_node, self.relays)
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
        queries, guest_runs = _exchanges(self.hops(self.q_routes), self.q_placement, rank)
        fetched = [_exchanges(tables, self.k_placement, rank) for tables in self.key_hops()]
        own, guest = (_in_rows(mine, runs).transpose() for runs in (q_runs, guest_runs))
        stages = [_rank_stage(kv, key_runs, own, guest) for kv, key_runs in [((), k_runs), *fetched]]
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

    def key_rows_moved(self) -> RowsMoved:
        """Key rows that each rank moves: to and from each rank that needs them, or where they travel on, hop by hop."""
        tables = [table for stage in self.key_hops() for table in stage] if self.relays else [self.kv_routes]
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

    def key_hops(self) -> list[tuple[RouteTable, ...]]:
        """The hops of each stage of keys: those of all stages are made together, as a simulation has them; but of very
        many routes stage by stage, which takes less memory.
        """
        if len(self.kv_routes) > _MOST_TOGETHER:
            return [self.hops(self.kv_routes.of_stage(stage)) for stage in range(self.num_stages)]
        tables = self.hops(self.kv_routes)
        return [tuple(table.of_stage(stage) for table in tables) for stage in range(self.num_stages)]


def _exchanges(
    tables: tuple[RouteTable, ...], placement: Placement, rank: int
) -> tuple[tuple[Exchange, ...], Runs]:
    """The exchange of one stage for one rank, hop by hop, and what it delivers."""
    runs = [received_runs(table, rank) for table in tables]
    landed = (None, *runs[:-1])
    return tuple(exchange_of(t, placement, rank, held) for t, held in zip(tables, landed, strict=True)), runs[-1]


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
    mine = _of_receiver(routes, rank)
    starts, ends = routes.starts[mine], routes.ends[mine]
    offsets = np.cumsum(ends - starts) - (ends - starts)
    order = np.argsort(starts, kind="stable")
    return Runs(offsets[order], starts[order], ends[order])


def _of_receiver(routes: RouteTable, rank: int) -> slice:
    """Which routes of one stage bring a rank its rows: the table is sorted by receiver."""
    return slice(*routes.dsts.searchsorted((rank, rank + 1)).tolist())


def exchange_of(
    routes: RouteTable, placement: Placement, rank: int, landed: Runs | None = None
) -> Exchange:
    """One rank's part in the exchange of routes of one stage, over rows placed as given.

    landed: rows that an earlier hop brought; they lie behind the local rows and may be sent on.
    """
    sent, received = np.flatnonzero(routes.srcs == rank), _of_receiver(routes, rank)
    starts, ends = routes.starts[sent], routes.ends[sent]
    held = _own_runs(placement, rank)
    if landed is not None and len(landed.starts):
        held = _joined(held, landed._replace(offsets=landed.offsets + int(placement.num_tokens[rank])))
    return Exchange(
        send_runs=_rows_held(held, starts, ends),
        send_splits=_splits(routes.dsts[sent], ends - starts, placement.cp_size),
        recv_splits=_splits(routes.srcs[received], routes.ends[received] - routes.starts[received], placement.cp_size),
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


def _rank_stage(kv: tuple[Exchange, ...], key_runs: Runs, own: SliceTable, guest: SliceTable) -> RankStage:
    """The work with the keys that an exchange delivers, of slices over keys and query rows (`_in_rows`, transposed)."""
    num_keys = int((key_runs.ends - key_runs.starts).sum())
    own, guest = (merge_neighbours(_in_rows(slices, key_runs).transpose()) for slices in (own, guest))
    return RankStage(kv, num_keys, own, guest)


def _in_rows(table: SliceTable, runs: Runs) -> SliceTable:
    """Slices cut to the tokens of a buffer along queries, and renumbered to buffer rows."""
    if not len(table) or not len(runs.starts):
        return SliceTable.empty()
    first = np.searchsorted(runs.ends, table.q0, side="right")
    last = np.searchsorted(runs.starts, table.q1, side="left")
    parent, nth = expand_counts(last - first)
    run = first[parent] + nth
    rows = table.data[parent]
    rows[:, 0] = np.maximum(rows[:, 0], runs.starts[run])
    rows[:, 1] = np.minimum(rows[:, 1], runs.ends[run])
    cut, kept = SliceTable(rows).canonical()
    run = run[kept]
    return cut.shift(runs.offsets[run] - runs.starts[run], 0)


def how_rows_travel(num_stages: int, ranks_per_node: int, relays: bool) -> tuple[int, ...]:
    """How rows travel, for the fingerprint."""
    return (num_stages, ranks_per_node, 1) if relays else (num_stages, ranks_per_node)
