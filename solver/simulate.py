"""What a plan's step would look like on given hardware: a timeline for every rank, without running it.

Kernels are timed by the visible pairs and slices that each rank has in each stage, exchanges by the rows that
each rank moves on either kind of link; an exchange begins when all its peers have issued it. `Clock` replays
both passes. Everything is an array over ranks: a thousand ranks cost as much Python as two.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .clock import LATE_SHARE, Clock, PassTimeline
from .cost import DEFAULT_HARDWARE, FloatArray, Hardware, Heads
from .plan import Plan
from .routes import Intervals, RouteTable, merge_intervals
from .slices import IntArray, SliceTable, expand_counts


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
    works = _stage_works(plan)
    row = heads.row_bytes()
    queries = _Wire.of(plan, plan.q_routes, hardware)
    stages = [_Wire.of(plan, plan.kv_routes.of_stage(stage), hardware) for stage in range(plan.num_stages)]

    def kernel(work: StageWork, *, backward: bool, first: bool) -> FloatArray:
        seconds = hardware.kernel_seconds(work.areas, work.slices, heads, backward=backward)
        if first:
            return seconds
        return seconds + hardware.merge_seconds(work.rows, work.keys, heads, backward=backward)

    def kernels(backward: bool) -> list[dict[str, FloatArray]]:
        seconds = [
            {side: kernel(work, backward=backward, first=number == 0) for side, work in sides.items()}
            for number, sides in enumerate(works)
        ]
        if backward and plan.num_stages:
            home = works[0]["own"]
            for side, share in (("own", 1 - LATE_SHARE), ("late", LATE_SHARE)):
                part = StageWork(home.areas * share, home.slices * share, home.rows * share, home.keys * share)
                seconds[0][side] = kernel(part, backward=True, first=side == "own")
        return seconds

    num_hops = len(queries.hops)
    forward = Clock((plan.cp_size,), num_hops, hardware.transfer_load)
    forward.run(kernels(False), queries, stages, out_bytes=row.q, kv_bytes=row.kv, home_bytes=row.partial, dkv_bytes=0)
    backward = Clock((plan.cp_size,), num_hops, hardware.transfer_load)
    backward.run(
        kernels(True),
        queries,
        stages,
        out_bytes=row.q_again,
        kv_bytes=row.kv_again,
        home_bytes=row.dq,
        dkv_bytes=row.dkv,
    )
    return StepTimeline(forward.timeline(), backward.timeline())


class StageWork(NamedTuple):
    """Pairs and slices of each rank in one stage, and how many rows of queries and of keys these touch, [cp_size]."""

    areas: FloatArray
    slices: FloatArray
    rows: FloatArray
    keys: FloatArray


def _stage_works(plan: Plan) -> list[dict[str, StageWork]]:
    """The first stage's work, then each remote stage's: on own queries, and on received ones where any are."""
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
    works = {side: _work_on(plan, *tasks, keys) for side, tasks in rows.items()}
    return [
        {side: StageWork(*(column[stage] for column in work)) for side, work in works.items()}
        for stage in range(plan.num_stages + 1)
    ]


def _work_on(plan: Plan, tasks: IntArray, ranks: IntArray, keys: Intervals) -> StageWork:
    """The work of each rank's tasks on the keys of each stage, [num_stages + 1, cp_size]."""
    stages, size = plan.num_stages + 1, plan.cp_size
    numbers = (np.arange(stages)[:, None] * size + ranks).ravel()
    rows, owners = _cut(np.tile(tasks, (stages, 1)), numbers, keys, 2, plan.k_placement.total_seqlen + 1)
    table, kept = SliceTable(rows).canonical()
    owner = owners[kept]
    q_rows, k_rows = (merge_intervals(owner, *ends) for ends in ((table.q0, table.q1), (table.k0, table.k1)))

    def per_rank(numbers: IntArray, counts: IntArray) -> FloatArray:
        return np.bincount(numbers, counts, stages * size).astype(np.float64).reshape(stages, size)

    return StageWork(
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


class _Hop(NamedTuple):
    """Rows that each rank receives and sends in one collective, by kind of link, [cp_size]."""

    received_within: IntArray
    sent_within: IntArray
    received_across: IntArray
    sent_across: IntArray

    @classmethod
    def of(cls, routes: RouteTable, cp_size: int, ranks_per_node: int) -> _Hop:
        rows = (routes.ends - routes.starts).astype(np.float64)
        rows = np.where(routes.srcs == routes.dsts, 0.0, rows)
        far = rows * (routes.srcs // ranks_per_node != routes.dsts // ranks_per_node)
        near = rows - far
        counts = [np.bincount(side, part, cp_size) for part in (near, far) for side in (routes.dsts, routes.srcs)]
        return cls(*(count.astype(np.int64) for count in counts))

    def seconds(self, row_bytes: int, hardware: Hardware) -> FloatArray:
        """Both directions and both kinds of link work at once: the slowest decides."""
        near = np.maximum(self.received_within, self.sent_within) * float(row_bytes)
        far = np.maximum(self.received_across, self.sent_across) * float(row_bytes)
        return np.maximum(hardware.within.seconds(near), hardware.across.seconds(far))


class _Wire(NamedTuple):
    """The exchange of one stage: its hops, and who waits for whom."""

    hops: tuple[_Hop, ...]
    pairs: IntArray
    hardware: Hardware

    @classmethod
    def of(cls, plan: Plan, routes: RouteTable, hardware: Hardware) -> _Wire:
        size = plan.cp_size
        tables = plan.hops(routes)
        pairs = np.unique(routes.dsts * size + routes.srcs)
        return cls(tuple(_Hop.of(table, size, hardware.ranks_per_node) for table in tables), pairs, hardware)

    @property
    def active(self) -> bool:
        return len(self.pairs) > 0

    def seconds(self, row_bytes: int) -> FloatArray:
        total: FloatArray = np.sum([hop.seconds(row_bytes, self.hardware) for hop in self.hops], axis=0)
        return total

    def packing(self, row_bytes: int, *, home: bool) -> tuple[FloatArray, FloatArray]:
        """Seconds to pack what leaves and to take in what comes (home: the way back)."""
        out, into = self.hops[0], self.hops[-1]
        row_seconds = np.float64(row_bytes / self.hardware.copy_bytes_per_s)
        sent: FloatArray = (out.sent_within + out.sent_across) * row_seconds
        received: FloatArray = (into.received_within + into.received_across) * row_seconds
        return (received, sent) if home else (sent, received)

    def started(self, ready: FloatArray) -> FloatArray:
        """When all peers are ready."""
        dsts, srcs = np.divmod(self.pairs, len(ready))
        starts = ready.copy()
        np.maximum.at(starts, dsts, ready[srcs])
        np.maximum.at(starts, srcs, ready[dsts])
        return starts


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

