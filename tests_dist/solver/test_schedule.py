"""Solver layer: schedules in which queries travel. That they compute every pair once is in test_plan."""

from __future__ import annotations

import numpy as np
import pytest

from cpattn.launch.benchmarks.workloads import WORKLOADS
from cpattn.masks.spec import lower_mask
from cpattn.solver import Limits, Plan, SliceTable, bytes_bound, make_dispatch_plan, row_costs
from cpattn.solver.schedule import bisect_tasks

K, M = 1 << 10, 1 << 20
COSTS = row_costs(32, 8, 128, 128)


def plan_of(table: SliceTable, total: int, ranks: int, schedule: str) -> Plan:
    return make_dispatch_plan(
        table,
        total_seqlen=total,
        cp_size=ranks,
        chunk_size=max(1, total // (16 * ranks)),
        schedule=schedule,  # type: ignore[arg-type]
        costs=COSTS,
        num_stages=1,
    )


def bytes_of(plan: Plan) -> int:
    return plan.q_routes.num_rows() * COSTS.q + plan.kv_routes.num_rows() * COSTS.kv


@pytest.mark.parametrize(("mask", "factor"), [("prefix tree", 1.25), ("causal", 1.15)])
def test_tiles_are_near_the_bound(mask: str, factor: float) -> None:
    """1M tokens on 64 ranks. With one cut for own and other keys the prefix tree is at 1.28."""
    table = lower_mask(WORKLOADS[mask](M))
    plan = plan_of(table, M, 64, "tiles")
    bound = bytes_bound(table, total_seqlen=M, cp_size=64, limits=Limits.of_plan(plan), costs=COSTS)
    assert bound.total <= bytes_of(plan) <= factor * bound.total
    assert plan.imbalance() <= 1.001


@pytest.mark.parametrize("cp_size", [1, 2, 3, 7, 64])
def test_an_even_share_for_any_number_of_ranks(cp_size: int) -> None:
    table = lower_mask(WORKLOADS["prefix tree"](64 * K))
    tasks, ranks = bisect_tasks(table, cp_size, q_cost=3.0, k_cost=1.0)
    areas = np.bincount(ranks, tasks.areas(), cp_size)
    assert areas.sum() == table.area()
    assert areas.max() <= 1.05 * areas.mean()


def test_no_pairs_no_tasks() -> None:
    tasks, ranks = bisect_tasks(SliceTable.empty(), 4, q_cost=1.0, k_cost=1.0)
    assert len(tasks) == len(ranks) == 0
