"""What a plan's step would look like on given hardware: a timeline for every rank, without running it.

Kernels are timed by the visible pairs and slices that each rank has in each stage, exchanges by the rows that
each rank moves on either kind of link; an exchange begins when all its peers have issued it. `Clock` replays
both passes. Everything is an array over ranks: a thousand ranks cost as much Python as two.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .clock import LATE_SHARE, Clock, Leg, PassTimeline, legs
from .cost import DEFAULT_HARDWARE, FloatArray, Hardware, Heads
from .plan import Plan
from .routes import Intervals, RouteTable, merge_intervals
from .slices import IntArray, SliceTable, distinct, expand_counts


class StepTimeline(NamedTuple):
    """Forward and backward of one attention call."""

    forward: PassTimeline
    backward: PassTimeline

    @property
    def seconds(self) -> float:
        """Both passes, each as long as its slowest rank."""
        return float(self.forward.seconds.max() + self.backward.seconds.max())


def simulate(plan: Plan, hardware: Hardware = DEFAULT_HARDWARE, heads: Heads | None = None) -> StepTimeline:
    """Timeline of one attention call, forward and backward, on every rank.

    Args:
        plan: any plan; ranks r with equal r // hardware.ranks_per_node are taken to share a node. A
            plan of two levels sends each row between nodes once.
        heads: of the call; None is 32 query and 8 key heads of 128 in 16 bits.
    """
    heads = Heads() if heads is None else heads
    row = heads.row_bytes()
    (queries,) = _wires(plan, plan.q_routes, 1, hardware, row.of_queries)
    stages = _wires(plan, plan.kv_routes, plan.num_stages, hardware, row.of_keys)
    clock = Clock((2, plan.cp_size), plan.num_hops, hardware.transfer_load, by_host=hardware.hops_by_host)
    clock.run(_kernels(plan, hardware, heads), queries, stages)
    return StepTimeline(clock.timeline(backward=False), clock.timeline(backward=True))


def _kernels(plan: Plan, hardware: Hardware, heads: Heads) -> list[dict[str, FloatArray]]:
    """Seconds of both passes of each stage's work, [2, cp_size], by side."""
    seconds = {}
    for side, work in _stage_works(plan).items():
        seconds[side] = hardware.both_kernels_seconds(work.areas[None], work.slices[None], heads)
        seconds[side][:, 1:] += hardware.both_merges_seconds(work.rows[1:], work.keys[1:], heads)
        if side == "own" and plan.num_stages:
            first, last = work.at_home(1 - LATE_SHARE), work.at_home(LATE_SHARE)
            seconds[side][1, 0] = hardware.kernel_seconds(first.areas, first.slices, heads, backward=True)
            late = hardware.kernel_seconds(last.areas, last.slices, heads, backward=True)
            # What comes last is added to what came first.
            late += hardware.merge_seconds(last.rows, last.keys, heads, backward=True)
    kernels = [{side: each[:, stage] for side, each in seconds.items()} for stage in range(plan.num_stages + 1)]
    if plan.num_stages:
        kernels[0]["late"] = np.stack([np.zeros_like(late), late])
    return kernels


class _Work(NamedTuple):
    """What each rank has to do in each stage, that of own keys first, [num_stages + 1, cp_size].

    areas, slices: pairs and slices. rows, keys: so many rows of queries and of keys these touch.
    """

    areas: FloatArray
    slices: FloatArray
    rows: FloatArray
    keys: FloatArray

    def at_home(self, share: float) -> _Work:
        """A share of the work on own keys, [cp_size]."""
        return _Work(*(column[0] * share for column in self))


def _stage_works(plan: Plan) -> dict[str, _Work]:
    """On own queries, and on received ones where any are."""
    placement, routes, size = plan.k_placement, plan.kv_routes, plan.cp_size
    # Stages are told apart by their ranks' numbers, and cut together: rank r of stage s is s * cp_size + r.
    arrive = merge_intervals((routes.stages + 1) * size + routes.dsts, routes.starts, routes.ends)
    own = Intervals(placement.owners, placement.starts, placement.ends)
    keys = Intervals(*(np.concatenate(pair) for pair in zip(own, arrive, strict=True)))
    rows = {"own": (plan.tasks.data, plan.task_ranks)}
    if len(plan.q_routes):
        own = Intervals(plan.q_placement.owners, plan.q_placement.starts, plan.q_placement.ends)
        guests = merge_intervals(plan.q_routes.dsts, plan.q_routes.starts, plan.q_routes.ends)
        stride = plan.q_placement.total_seqlen + 1
        rows = {side: _cut(*rows["own"], held, 0, stride) for side, held in (("own", own), ("guest", guests))}
    return {side: _work_on(plan, *tasks, keys) for side, tasks in rows.items()}


def _work_on(plan: Plan, tasks: IntArray, ranks: IntArray, keys: Intervals) -> _Work:
    """The work of each rank's tasks on the keys of each stage, [num_stages + 1, cp_size]."""
    stages, size = plan.num_stages + 1, plan.cp_size
    numbers = (np.arange(stages)[:, None] * size + ranks).ravel()
    rows, owners = _cut(np.tile(tasks, (stages, 1)), numbers, keys, 2, plan.k_placement.total_seqlen + 1)
    table, kept = SliceTable(rows).canonical()
    owner = owners[kept]
    q_rows, k_rows = (merge_intervals(owner, *ends) for ends in ((table.q0, table.q1), (table.k0, table.k1)))

    def per_rank(numbers: IntArray, counts: IntArray) -> FloatArray:
        return np.bincount(numbers, counts, stages * size).astype(np.float64).reshape(stages, size)

    return _Work(
        areas=per_rank(owner, table.areas()),
        slices=per_rank(owner, np.ones_like(owner)),
        rows=per_rank(q_rows.ranks, q_rows.ends - q_rows.starts),
        keys=per_rank(k_rows.ranks, k_rows.ends - k_rows.starts),
    )


def _cut(
    tasks: IntArray, task_ranks: IntArray, held: Intervals, column: int, stride: int
) -> tuple[IntArray, IntArray]:
    """The parts of slices (rows as in `SliceTable.data`) in what their rank holds, and the rank of each part.

    column: 0 cuts along queries, 2 along keys. stride: more than any token.
    """
    order = np.argsort(held.ranks * stride + held.starts, kind="stable")
    ranks, starts, ends = (values[order] for values in held)
    base = task_ranks * stride
    first = np.searchsorted(ranks * stride + ends, base + tasks[:, column], side="right")
    last = np.searchsorted(ranks * stride + starts, base + tasks[:, column + 1], side="left")
    task, nth = expand_counts(last - first)
    at = first[task] + nth
    rows = tasks[task]
    rows[:, column] = np.maximum(rows[:, column], starts[at])
    rows[:, column + 1] = np.minimum(rows[:, column + 1], ends[at])
    return rows, task_ranks[task]


class _HopRows(NamedTuple):
    """Rows that each rank receives and sends in a collective of each stage, by kind of link, [num_stages, cp_size]."""

    received_within: IntArray
    sent_within: IntArray
    received_across: IntArray
    sent_across: IntArray

    @classmethod
    def of(cls, routes: RouteTable, num_stages: int, cp_size: int, ranks_per_node: int) -> _HopRows:
        rows = (routes.ends - routes.starts).astype(np.float64)
        rows = np.where(routes.srcs == routes.dsts, 0.0, rows)
        far = rows * (routes.srcs // ranks_per_node != routes.dsts // ranks_per_node)
        sides, size = [routes.stages * cp_size + side for side in (routes.dsts, routes.srcs)], num_stages * cp_size
        counts = [np.bincount(side, part, size) for part in (rows - far, far) for side in sides]
        return cls(*(count.astype(np.int64).reshape(num_stages, cp_size) for count in counts))

    @property
    def received(self) -> IntArray:
        return self.received_within + self.received_across

    @property
    def sent(self) -> IntArray:
        return self.sent_within + self.sent_across

    def seconds(self, row_bytes: FloatArray, hardware: Hardware) -> tuple[FloatArray, FloatArray]:
        """On links inside nodes and between them, which work at once, in both directions."""
        near = np.maximum(self.received_within, self.sent_within) * row_bytes
        far = np.maximum(self.received_across, self.sent_across) * row_bytes
        return hardware.within.seconds(near), hardware.across.seconds(far)


class _Peers(NamedTuple):
    """Who waits for whom in a hop: ranks[i] for each of others[first[i]:first[i + 1]]."""

    ranks: IntArray
    first: IntArray
    others: IntArray

    @classmethod
    def of(cls, routes: RouteTable, cp_size: int) -> _Peers:
        pairs = np.concatenate([routes.dsts * cp_size + routes.srcs, routes.srcs * cp_size + routes.dsts])
        ranks, others = np.divmod(distinct(pairs), cp_size)
        first = np.flatnonzero(np.append(True, ranks[1:] != ranks[:-1])[: len(ranks)])
        return cls(ranks[first], first, others)


class _Wire(NamedTuple):
    """The exchange of one stage. peers: of each hop."""

    there: Leg
    home: Leg
    peers: tuple[_Peers, ...]

    def started(self, ready: FloatArray, hop: int) -> FloatArray:
        """When all peers are ready."""
        ranks, first, others = self.peers[hop]
        starts = ready.copy()
        if len(first):
            latest = np.maximum.reduceat(ready[:, others], first, axis=1)
            starts[:, ranks] = np.maximum(starts[:, ranks], latest)
        return starts


def _wires(
    plan: Plan, routes: RouteTable, num_stages: int, hardware: Hardware, row_bytes: tuple[int, int, int, int]
) -> list[_Wire | None]:
    """The exchange of each stage; row_bytes: as `RowBytes` has them."""
    if not len(routes):
        return [None] * num_stages
    size, weights = plan.cp_size, np.reshape(row_bytes, (4, 1, 1)).astype(np.float64)
    tables = plan.hops(routes)
    hops = [_HopRows.of(table, num_stages, size, hardware.ranks_per_node) for table in tables]
    copying = weights / hardware.copy_bytes_per_s
    ways = legs(
        [hop.seconds(weights, hardware) for hop in hops],
        hops[0].sent * copying,
        hops[-1].received * copying,
        by_host=hardware.hops_by_host,
    )
    return [
        _Wire(*ways[stage], tuple(_Peers.of(table.of_stage(stage), size) for table in tables))
        if len(routes.of_stage(stage))
        else None
        for stage in range(num_stages)
    ]


def traffic_matrix(plan: Plan, heads: Heads, *, bins: int | None = None) -> FloatArray:
    """Bytes of a forward and backward pass from each rank (row) to each other, [n, n], n = cp_size.

    With bins < cp_size, summed over groups of neighbouring ranks. Rows that go home travel the other
    way. A two-level plan is counted by owner and user, not by hop.
    """
    size = plan.cp_size
    n = size if bins is None else min(bins, size)
    row = heads.row_bytes()
    matrix = np.zeros((n, n))
    for routes, out, home in (
        (plan.kv_routes, row.kv + row.kv_again, row.dkv),
        (plan.q_routes, row.q + row.q_again, row.partial + row.dq),
    ):
        pair = (routes.srcs * n // size) * n + routes.dsts * n // size
        rows = np.bincount(pair, routes.ends - routes.starts, n * n).reshape(n, n)
        matrix += rows * out + rows.T * home
    return matrix

