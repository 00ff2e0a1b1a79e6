"""How good a plan is: its balance and traffic against lower bounds and against the usual alternatives."""

from __future__ import annotations

import heapq
import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from .bounds import Limits, bytes_bound, kv_rows_bound, step_time_bound
from .cost import DEFAULT_HARDWARE, Hardware, Heads
from .dispatch import keys_schedule
from .draft import assemble_plan
from .place.measure import kv_rows_received, rank_areas
from .placement import Placement, place_contiguous, place_zigzag
from .plan import Plan
from .simulate import simulate
from .slices import IntArray, SliceTable, merge_neighbours

# A plan of more routes than this is reported without its predicted time, rivals' plans of more likewise.
_MOST_ROUTES, _MOST_RIVAL_ROUTES = 1 << 23, 1 << 21


class Rival(NamedTuple):
    """Another way to compute the same attention.

    imbalance: most pairs on a rank over the mean. bytes_total, bytes_worst: received, forward and
    backward, over all ranks and on the busiest. seconds: forward and backward, by the cost model;
    NaN where it cannot run (see note).
    """

    name: str
    imbalance: float
    bytes_total: float
    bytes_worst: float
    seconds: float
    note: str = ""


@dataclass(frozen=True, slots=True)
class PlanReport:
    """A plan in numbers; bytes are received, forward and backward together; seconds of both passes.

    *_bound: what no plan as balanced as this one falls below (`solver.bounds`); kv_rows_bound is for
    plans that move keys only. kv_rows_sent_worst: the busiest sender, which on one-level networks can
    be slower than the busiest receiver. relays: whether rows travel on.
    """

    cp_size: int
    seqlen_q: int
    seqlen_k: int
    area: int
    num_tasks: int
    num_stages: int
    ranks_per_node: int
    relays: bool
    imbalance: float
    tokens_min: int
    tokens_max: int
    tokens_mean: float
    kv_rows: int
    kv_rows_worst: int
    kv_rows_sent_worst: int
    q_rows: int
    q_rows_worst: int
    bytes_total: float
    bytes_worst: float
    bytes_mean: float
    kv_rows_bound: int
    kv_rows_worst_bound: int
    bytes_bound: float
    bytes_worst_bound: float
    seconds: float
    seconds_bound: float
    rivals: tuple[Rival, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; what does not exist is None."""
        values = asdict(self)
        values["rivals"] = [rival._asdict() for rival in self.rivals]
        for row in (values, *values["rivals"]):
            row.update({k: None for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)})
        return values

    @property
    def moves_queries(self) -> bool:
        return self.q_rows > 0

    def lines(self) -> list[str]:
        """The report in a few lines of text."""
        bound = f"{self.bytes_total / self.bytes_bound:.2f}x" if self.bytes_bound else "no"
        lines = [
            f"received, forward and backward: {self.bytes_total:,.0f} bytes over all ranks ({bound} bound on any "
            f"schedule), {self.bytes_worst:,.0f} on the busiest",
        ]
        if not self.moves_queries and self.kv_rows_bound:
            lines.append(
                f"key rows: {self.kv_rows:,}, {self.kv_rows / self.kv_rows_bound:.2f}x the bound on plans that move "
                f"keys only; busiest receiver {self.kv_rows_worst:,}, busiest sender {self.kv_rows_sent_worst:,}"
            )
        for rival in self.rivals:
            if self.bytes_total and math.isfinite(rival.bytes_total):
                lines.append(
                    f"  {rival.name}: {rival.bytes_total / self.bytes_total:.2f}x the bytes, imbalance "
                    f"{rival.imbalance:.3f}"
                )
        return lines


def plan_report(
    plan: Plan,
    *,
    mask: SliceTable | None = None,
    heads: Heads | None = None,
    hardware: Hardware = DEFAULT_HARDWARE,
    chunk_size: int = 512,
    rivals: bool = True,
) -> PlanReport:
    """Measure a plan against bounds and rivals.

    Args:
        mask: the slices that it was made for (None: put together again from its tasks; bounds are then
            no better and may be weaker).
        heads: of the attention call; None is 32:8 heads of 128 in 16 bits.
        hardware: for the predicted seconds.
        chunk_size: the grain of the min-heap rival.
        rivals: leave the comparisons out if False (cross-attention has none).
    """
    heads = Heads() if heads is None else heads
    table = merge_neighbours(plan.tasks) if mask is None else mask
    size, seqlen_q, seqlen_k = plan.cp_size, plan.q_placement.total_seqlen, plan.k_placement.total_seqlen
    kv, q = plan.kv_routes.rows_received(size), plan.q_routes.rows_received(size)
    sent = plan.key_rows_moved().sent
    moved = received_bytes(q, plan.q_routes.rows_sent(size), kv, sent, heads)
    tokens = plan.q_placement.num_tokens
    self_attention = plan.q_placement is plan.k_placement
    bounds = _bounds_of(plan, table, heads, hardware)
    few = len(plan.kv_routes) + len(plan.q_routes) <= _MOST_ROUTES
    return PlanReport(
        cp_size=size,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        area=plan.tasks.area(),
        num_tasks=len(plan.tasks),
        num_stages=plan.num_stages,
        ranks_per_node=plan.ranks_per_node,
        relays=plan.relays,
        imbalance=plan.imbalance(),
        tokens_min=int(tokens.min()),
        tokens_max=int(tokens.max()),
        tokens_mean=float(tokens.mean()),
        kv_rows=int(kv.sum()),
        kv_rows_worst=int(kv.max()),
        kv_rows_sent_worst=int(sent.max()),
        q_rows=int(q.sum()),
        q_rows_worst=int(q.max()),
        bytes_total=float(moved.sum()),
        bytes_worst=float(moved.max()),
        bytes_mean=float(moved.mean()),
        kv_rows_bound=bounds.kv_rows,
        kv_rows_worst_bound=bounds.kv_rows_worst,
        bytes_bound=bounds.bytes_total,
        bytes_worst_bound=bounds.bytes_worst,
        seconds=simulate(plan, hardware, heads).seconds if few else math.nan,
        seconds_bound=bounds.seconds,
        rivals=tuple(compare(table, seqlen_q, size, heads, hardware, chunk_size)) if rivals and self_attention else (),
    )


class _Bounds(NamedTuple):
    """What no plan goes below; rows and bytes are 0 in cross-attention, for which none are known."""

    kv_rows: int
    kv_rows_worst: int
    bytes_total: float
    bytes_worst: float
    seconds: float


def _bounds_of(plan: Plan, table: SliceTable, heads: Heads, hardware: Hardware) -> _Bounds:
    size = plan.cp_size
    rows, total = (0, 0), (0.0, 0.0)
    if plan.q_placement is plan.k_placement:
        limits, seqlen = Limits.of_plan(plan), plan.q_placement.total_seqlen
        rows = kv_rows_bound(table, total_seqlen=seqlen, cp_size=size, limits=limits)
        total = bytes_bound(table, total_seqlen=seqlen, cp_size=size, limits=limits, costs=heads.row_costs())

    def seconds(area: int, worst_bytes: float, backward: bool) -> float:
        return step_time_bound(
            area=area, cp_size=size, worst_bytes=worst_bytes, heads=heads, hardware=hardware, backward=backward
        )

    area = plan.tasks.area()
    work = seconds(area, 0.0, False) + seconds(area, 0.0, True)
    return _Bounds(*rows, *total, max(work, seconds(0, total[1], False)))


def received_bytes(
    q_received: IntArray, q_sent: IntArray, kv_received: IntArray, kv_sent: IntArray, heads: Heads
) -> IntArray:
    """Bytes that come in on each rank over both passes, [cp_size]; what goes home comes in at the owner."""
    row = heads.row_bytes()
    result: IntArray = (
        q_received * (row.q + row.q_again)
        + q_sent * (row.partial + row.dq)
        + kv_received * (row.kv + row.kv_again)
        + kv_sent * row.dkv
    )
    return result


def compare(
    table: SliceTable, total_seqlen: int, cp_size: int, heads: Heads, hardware: Hardware, chunk_size: int
) -> list[Rival]:
    """The usual alternatives for the same mask, group and heads.

    ring and all-gather bring every rank every key, with contiguous pieces; zigzag ring the same with
    two pieces to a rank; "zigzag, needed" and "min-heap" (chunks in order of falling area, each to the
    rank with the least area that has room; the published default of MagiAttention) bring only needed
    keys. Ulysses trades sequence for heads.
    """
    contiguous, zigzag = place_contiguous(total_seqlen, cp_size), place_zigzag(total_seqlen, cp_size)
    heap = place_min_heap(table, total_seqlen, cp_size, chunk_size)
    row = heads.row_bytes()
    model = _RivalTimes(table.area(), cp_size, total_seqlen, heads, hardware)
    key_bytes = row.kv + row.kv_again + row.dkv
    rivals = []
    for name, placement in (("ring", contiguous), ("all-gather", contiguous), ("zigzag ring", zigzag)):
        uneven = _imbalance(table, placement)
        each = (total_seqlen - placement.num_tokens) * key_bytes
        seconds = model.gathered(uneven) if name == "all-gather" else model.ring(uneven)
        rivals.append(Rival(name, uneven, float(each.sum()), float(each.max()), seconds))
    for name, placement in (("zigzag, needed", zigzag), ("min-heap, needed", heap)):
        rows = kv_rows_received(table, placement)
        each = rows * key_bytes
        uneven = _imbalance(table, placement)
        seconds = math.nan
        if cp_size * len(placement.ends) <= _MOST_RIVAL_ROUTES:
            costs = heads.row_costs()
            schedule = keys_schedule(table, placement)
            plan = assemble_plan(*schedule, placement, placement, costs=costs, hardware=hardware)
            seconds = simulate(plan, hardware, heads).seconds
        rivals.append(Rival(name, uneven, float(each.sum()), float(each.max()), seconds))
    rivals.append(_ulysses(model))
    return rivals


def place_min_heap(table: SliceTable, total_seqlen: int, cp_size: int, chunk_size: int) -> Placement:
    """Chunks, largest area first, each to the rank with the least area that still has room."""
    per_rank = max(1, -(-total_seqlen // (cp_size * max(chunk_size, 1))))
    cuts = np.arange(1, per_rank * cp_size + 1) * total_seqlen // (per_rank * cp_size)
    pieces, _ = table.split_q(cuts[:-1])
    areas = np.bincount(np.searchsorted(cuts, pieces.q0, side="right"), pieces.areas(), len(cuts))
    owners = np.zeros(len(cuts), dtype=np.int64)
    heap = [(0.0, rank, per_rank) for rank in range(cp_size)]
    for chunk in np.argsort(-areas, kind="stable").tolist():
        area, rank, room = heapq.heappop(heap)
        owners[chunk] = rank
        if room > 1:
            heapq.heappush(heap, (area + float(areas[chunk]), rank, room - 1))
    return Placement.from_runs(cuts, owners, cp_size=cp_size)


def _imbalance(table: SliceTable, placement: Placement) -> float:
    areas = rank_areas(table, placement)
    return float(areas.max() / areas.mean()) if areas.any() else 1.0


class _RivalTimes(NamedTuple):
    """Predicted seconds of the rivals, forward and backward."""

    area: int
    cp_size: int
    total_seqlen: int
    heads: Heads
    hardware: Hardware

    def work(self, imbalance: float) -> tuple[float, float]:
        pairs = self.area / self.cp_size * imbalance
        heads, hardware = self.heads, self.hardware
        return (
            pairs * heads.forward_flop / hardware.forward_flops,
            pairs * heads.backward_flop / hardware.backward_flops,
        )

    def move(self, num_bytes: float) -> float:
        """To one neighbour, over the slowest link on the way round."""
        hardware = self.hardware
        link = hardware.across if self.cp_size > hardware.ranks_per_node else hardware.within
        return link.latency_s + num_bytes / link.bytes_per_s

    def spread(self, num_bytes: float) -> float:
        """In equal parts to all others: those of the node and those beyond it at once."""
        hardware, others = self.hardware, max(self.cp_size - 1, 1)
        near = min(hardware.ranks_per_node, self.cp_size) - 1
        parts = num_bytes / others * np.array([near, others - near], dtype=np.float64)
        return float(max(hardware.within.seconds(parts[:1])[0], hardware.across.seconds(parts[1:])[0]))

    def copy(self, num_bytes: float) -> float:
        """To pack what leaves, as for our plans."""
        return num_bytes / self.hardware.copy_bytes_per_s

    def ring(self, imbalance: float) -> float:
        """Each of P steps computes on one shard while the next one travels; dK and dV go round as well, and once more.

        From the second step on a result is merged into those before.
        """
        row, shard = self.heads.row_bytes(), self.total_seqlen / self.cp_size
        rows, keys = np.array([shard]), np.array([shard])
        seconds = self.move(shard * row.dkv)
        moved = ((False, row.kv), (True, row.kv_again + row.dkv))
        for work, (backward, num_bytes) in zip(self.work(imbalance), moved, strict=True):
            step = work / self.cp_size + self.hardware.launch_s
            merging = float(self.hardware.merge_seconds(rows, keys, self.heads, backward=backward)[0])
            seconds += step + (self.cp_size - 1) * max(step + merging, self.move(shard * num_bytes))
        return seconds

    def gathered(self, imbalance: float) -> float:
        """Nothing overlaps: gather, compute; in backward gather, compute, scatter."""
        row, others = self.heads.row_bytes(), self.total_seqlen * (1 - 1 / self.cp_size)
        return sum(self.work(imbalance)) + sum(self.spread(others * part) for part in (row.kv, row.kv_again, row.dkv))


def _ulysses(model: _RivalTimes) -> Rival:
    """All-to-all from sequence to heads and back: q, k, v, out forward; their gradients backward."""
    heads, size = model.heads, model.cp_size
    # Key heads are repeated where there are more ranks than them.
    kv_heads = max(heads.num_kv, min(size, heads.num_q))
    q_row = heads.itemsize * heads.num_q * (heads.head_dim + heads.head_dim_v)
    kv_row = heads.itemsize * kv_heads * (heads.head_dim + heads.head_dim_v)
    each = 2 * (q_row + kv_row) * model.total_seqlen / size * (1 - 1 / size)
    if heads.num_q % size:
        note = f"{size} ranks, {heads.num_q} heads"
        return Rival("Ulysses", math.nan, math.nan, math.nan, math.nan, note)
    seconds = sum(model.work(1.0)) + 4 * model.spread(each / 4) + model.copy(each)
    return Rival("Ulysses", 1.0, each * size, each, seconds)

