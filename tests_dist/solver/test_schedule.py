"""Solver layer: schedules in which queries travel. That they compute every pair once is in test_plan."""

from __future__ import annotations

import numpy as np
import pytest

from cpattn import AttnMaskSpec
from cpattn.launch.benchmarks.workloads import WORKLOADS
from cpattn.mask_spec import lower_mask
from cpattn.solver import Limits, Plan, SliceTable, bytes_bound, make_dispatch_plan, row_costs
from cpattn.solver import plan as planning
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


def test_auto_is_the_cheaper_of_both() -> None:
    masks = {name: make(64 * K) for name, make in WORKLOADS.items()}
    masks["documents"] = AttnMaskSpec.varlen([9 * K, K, 30 * K, 24 * K])
    for name, spec in masks.items():
        table = lower_mask(spec)
        keys, tiles, auto = (plan_of(table, 64 * K, 16, kind) for kind in ("keys", "tiles", "auto"))
        prefers_keys = bytes_of(keys) * planning.TILES_GAIN <= bytes_of(tiles)
        assert auto.fingerprint == (keys if prefers_keys else tiles).fingerprint, name


def test_auto_does_not_place_keys_that_cannot_win(monkeypatch: pytest.MonkeyPatch) -> None:
    """For one causal sequence the bound on plans that move keys alone is far above the tiles' bytes."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("placed for keys")

    monkeypatch.setattr(planning, "place_balanced", refuse)
    plan = plan_of(lower_mask(AttnMaskSpec.causal(64 * K)), 64 * K, 16, "auto")
    assert len(plan.q_routes)
    with pytest.raises(AssertionError, match="placed for keys"):
        plan_of(lower_mask(WORKLOADS["window"](64 * K)), 64 * K, 16, "auto")
