"""Solver layer: lower bounds. That they hold on small masks is in test_optimality; here what they are worth."""

from __future__ import annotations

import numpy as np
import pytest

from cpattn import AttnMaskSpec
from cpattn.launch.benchmarks.workloads import WORKLOADS
from cpattn.masks.spec import lower_mask
from cpattn.solver import (
    DEFAULT_HARDWARE,
    Heads,
    Limits,
    Plan,
    SliceTable,
    bytes_bound,
    kv_rows_bound,
    make_dispatch_plan,
    plan_report,
    row_costs,
    step_time_bound,
)
from tests_dist.support.masks import MASKS

K, M = 1 << 10, 1 << 20
SELF = [name for name, spec in MASKS.items() if not spec.is_cross]


def plan_of(table: SliceTable, total: int, ranks: int, **options: object) -> Plan:
    chunk = max(1, total // (16 * ranks))
    return make_dispatch_plan(table, total_seqlen=total, cp_size=ranks, chunk_size=chunk, **options)  # type: ignore[arg-type]


def test_window_bound_is_reached() -> None:
    """Contiguous pieces of a window of 4096 keys move 63 halos of 4095 rows, and nothing moves fewer."""
    table = lower_mask(WORKLOADS["window"](M))
    plan = plan_of(table, M, 64)
    bound = kv_rows_bound(table, total_seqlen=M, cp_size=64, limits=Limits.of_plan(plan))
    assert bound.total == 63 * 4095 == plan.kv_routes.num_rows()


def test_full_document_bound() -> None:
    """One full mask: every rank needs every key."""
    table = lower_mask(AttnMaskSpec.varlen([4096], causal=False))
    bound = kv_rows_bound(table, total_seqlen=4096, cp_size=4, limits=Limits(1024, 1024, 4096 * 1024))
    assert bound == (3 * 4096, 3 * 1024)


def test_causal_bound_is_the_zigzag() -> None:
    """Equal tokens and area: 3/4 of the sequence for each rank, within two chunks of what zigzag moves."""
    table = lower_mask(AttnMaskSpec.causal(64 * K))
    zigzag = plan_of(table, 64 * K, 8, layout="zigzag")
    bound = kv_rows_bound(table, total_seqlen=64 * K, cp_size=8, limits=Limits.of_plan(zigzag))
    rows = zigzag.kv_routes.num_rows()
    assert bound.total <= rows <= 1.02 * bound.total


@pytest.mark.parametrize(("ranks", "floor"), [(64, 1_539_000), (256, 6_819_000)])
def test_packed_documents_reach_the_floor_of_the_notes(ranks: int, floor: int) -> None:
    """The notes' floor takes areas exactly even; at 1.02 the bound is near it, or above for counting fillers."""
    table = lower_mask(WORKLOADS["varlen causal"](M))
    limits = Limits.even(table, M, ranks, chunk_size=M // (16 * ranks), imbalance=1.02)
    assert kv_rows_bound(table, total_seqlen=M, cp_size=ranks, limits=limits).total >= 0.97 * floor


def test_documents_pooled_are_worth_more_than_each_alone() -> None:
    """256 ranks cannot all be filled up with the sparsest tokens; the components alone give 7,069,265 rows."""
    table = lower_mask(WORKLOADS["varlen causal"](M))
    limits = Limits.even(table, M, 256, chunk_size=M // 4096, imbalance=1.02)
    assert kv_rows_bound(table, total_seqlen=M, cp_size=256, limits=limits).total >= 7_100_000


@pytest.mark.parametrize("name", SELF)
@pytest.mark.parametrize("schedule", ["keys", "tiles"])
def test_no_plan_is_below_its_bounds(name: str, schedule: str) -> None:
    spec = MASKS[name]
    table = lower_mask(spec)
    for ranks in (1, 2, 3, 5):
        plan = plan_of(table, spec.total_seqlen, ranks, schedule=schedule)
        report = plan_report(plan, mask=table, heads=Heads(4, 2, 8, 8), chunk_size=8)
        assert report.bytes_bound <= report.bytes_total + 1e-6
        assert report.bytes_worst_bound <= report.bytes_worst + 1e-6
        assert report.seconds_bound <= report.seconds + 1e-12
        if schedule == "keys":
            assert report.kv_rows_bound <= report.kv_rows
            assert report.kv_rows_worst_bound <= report.kv_rows_worst
        # Put together from tasks, the bounds still hold.
        again = plan_report(plan, heads=Heads(4, 2, 8, 8), rivals=False)
        assert again.bytes_bound <= report.bytes_total + 1e-6
        assert schedule == "tiles" or again.kv_rows_bound <= report.kv_rows


def test_bytes_fall_with_the_root_of_ranks() -> None:
    table, costs = lower_mask(AttnMaskSpec.causal(M)), row_costs(32, 8, 128, 128)
    bounds = []
    for p in (256, 1024, 4096):
        limits = Limits(M // p, M // p, table.area() // p)
        bounds.append(bytes_bound(table, total_seqlen=M, cp_size=p, limits=limits, costs=costs).total / p)
    assert bounds[0] / bounds[1] == pytest.approx(2, rel=0.15)
    assert bounds[1] / bounds[2] == pytest.approx(2, rel=0.15)


def test_time_bound_is_the_larger_of_work_and_wire() -> None:
    options = {"area": 10**12, "cp_size": 8, "heads": Heads(), "hardware": DEFAULT_HARDWARE, "backward": False}
    work = 10**12 / 8 * Heads().forward_flop / DEFAULT_HARDWARE.forward_flops
    assert step_time_bound(**options, worst_bytes=0.0) == pytest.approx(work)  # type: ignore[arg-type]
    assert step_time_bound(**options, worst_bytes=1e15) == pytest.approx(1e15 / 360e9)  # type: ignore[arg-type]


def test_report_speaks_of_rivals() -> None:
    table = lower_mask(WORKLOADS["varlen causal"](64 * K))
    report = plan_report(plan_of(table, 64 * K, 8), mask=table, chunk_size=512)
    by_name = {rival.name: rival for rival in report.rivals}
    assert set(by_name) == {"ring", "all-gather", "zigzag ring", "zigzag, needed", "min-heap, needed", "Ulysses"}
    row = Heads().row_bytes()
    assert by_name["ring"].bytes_total == 7 * 64 * K * (2 * row.kv + row.dkv)
    # The replayed min-heap dispatch moves what the rival's own planner was measured to move.
    assert by_name["min-heap, needed"].bytes_total / (2 * row.kv + row.dkv) == pytest.approx(148_453, rel=0.3)
    assert by_name["min-heap, needed"].imbalance < 1.02
    assert any("x the bytes" in line for line in report.lines())
    values = report.to_dict()
    assert values["kv_rows"] == report.kv_rows
    assert np.isfinite(values["seconds"])
