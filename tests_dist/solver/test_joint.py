"""Solver layer: several masks over one placement."""

from __future__ import annotations

import numpy as np
import pytest

from cpattn import AttnMaskSpec, LayerKind, make_plan
from cpattn.launch.benchmarks.joint_masks import MODELS, masks_of, rows_of
from cpattn.launch.benchmarks.workloads import document_lengths
from cpattn.masks.spec import lower_mask
from cpattn.solver import (
    HARDWARE,
    JointPlans,
    Plan,
    joint_imbalance,
    keys_schedule,
    make_dispatch_plan,
    make_joint_plans,
)
from cpattn.solver.joint import WORST_JOINT
from tests_dist.support.masks import MASKS
from tests_dist.support.profiles import each_once

K = 1 << 10


def full_and_window(lengths: list[int], ranks: int, weights: list[float], window: int = 1024) -> JointPlans:
    masks = [lower_mask(AttnMaskSpec.varlen(lengths)), lower_mask(AttnMaskSpec.sliding_window(lengths, window))]
    total = sum(lengths)
    return make_joint_plans(masks, weights, total_seqlen=total, cp_size=ranks, chunk_size=total // (16 * ranks))


@pytest.mark.parametrize("lengths", [[64 * K], document_lengths(64 * K), document_lengths(64 * K, seed=1)])
def test_full_and_window_layers_are_balanced_together(lengths: list[int]) -> None:
    """A placement for the full mask alone leaves the window's work uneven, and the other way round."""
    weights = [1.0, 5.0]
    joint = full_and_window(lengths, 8, weights)
    assert joint.imbalance <= WORST_JOINT
    assert joint.plans[0].q_placement is joint.plans[1].q_placement
    masks = [lower_mask(AttnMaskSpec.varlen(lengths)), lower_mask(AttnMaskSpec.sliding_window(lengths, 1024))]
    assert joint.imbalance == pytest.approx(joint_imbalance(masks, weights, joint.plans[0].q_placement))
    for mask in masks:
        alone = make_dispatch_plan(mask, total_seqlen=64 * K, cp_size=8, chunk_size=512)
        assert joint.imbalance <= max(joint_imbalance(masks, weights, alone.q_placement), WORST_JOINT)


def work(plans: list[Plan], weights: list[float]) -> float:
    """What a step waits for: over all layers, the visible pairs of the busiest rank."""
    return sum(weight * float(plan.areas().max()) for plan, weight in zip(plans, weights, strict=True))


@pytest.mark.parametrize(("window", "num_full", "num_local"), [(2048, 6, 26), (4096, 1, 5), (4096, 23, 23)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_layers_planned_together_wait_for_less(seed: int, window: int, num_full: int, num_local: int) -> None:
    """Packed documents and windows of half their mean length or all of it, so that both kinds of layers weigh.

    Against the placement of either mask, which the other then has to bear, unless that very one is taken, being done
    first by the cost model.
    """
    lengths = document_lengths(256 * K, seed=seed)
    spec, weights = AttnMaskSpec.varlen(lengths), [float(num_full), float(num_local)]
    shape = {"num_heads_q": 32, "num_heads_kv": 8, "head_dim": 128, "cp_size": 8, "schedule": "keys"}
    also = [LayerKind(window=window, num_layers=num_local)]
    joint = [planned.plan for planned in make_plan(spec, num_layers=num_full, also=also, **shape).layer_plans]
    masks = [lower_mask(spec), lower_mask(spec, (window - 1, None))]
    for own in (None, window):
        placement = make_plan(spec, window=own, **shape).plan.q_placement
        areas = [np.bincount(ranks, tasks.areas()) for tasks, ranks in (keys_schedule(m, placement) for m in masks)]
        alone = sum(weight * float(area.max()) for weight, area in zip(weights, areas, strict=True))
        taken = joint[0].q_placement
        same = np.array_equal(taken.ends, placement.ends) and np.array_equal(taken.owners, placement.owners)
        assert work(joint, weights) < alone or same
    assert work(joint, weights) <= WORST_JOINT * sum(w * p.areas().mean() for w, p in zip(weights, joint, strict=True))


@each_once(name=masks_of(1, 0), cp_size=[8, 32])
def test_never_slower_by_the_model_than_a_balanced_placement_of_one_mask(name: str, cp_size: int) -> None:
    """Of one mask's placements those count that leave all layers as balanced as joint ones have to be."""
    spec = masks_of(256 * K, 0)[name]
    for model in MODELS:
        *alone, joint = rows_of(model, spec, cp_size, HARDWARE["h100"])
        assert joint.work <= WORST_JOINT
        for row in alone:
            assert joint.milliseconds <= row.milliseconds or row.work > WORST_JOINT, (model.name, row, joint)


def test_queries_of_one_mask_may_move() -> None:
    """A long causal sequence over many ranks: tiles for the full layers, and the window's tasks on their placement."""
    masks = [lower_mask(AttnMaskSpec.causal(64 * K)), lower_mask(AttnMaskSpec.sliding_window(64 * K, 512))]
    options = {"total_seqlen": 64 * K, "cp_size": 64, "chunk_size": 64, "relays": False}
    tiles, keys = (make_joint_plans(masks, [1, 5], schedule=s, **options) for s in ("auto", "keys"))  # type: ignore[arg-type]
    assert [len(plan.q_routes) > 0 for plan in (*tiles.plans, *keys.plans)] == [True, False, False, False]
    assert tiles.plans[0].q_placement is tiles.plans[1].q_placement
    assert tiles.imbalance <= WORST_JOINT
    for plan, mask in zip(tiles.plans, masks, strict=True):
        assert plan.tasks.area() == mask.area()
    with pytest.raises(ValueError, match="schedule is 'tiles': masks that share a placement have 'auto' or 'keys'"):
        make_joint_plans(masks, schedule="tiles", **options)  # type: ignore[arg-type]


def test_layouts_by_name() -> None:
    masks = [lower_mask(AttnMaskSpec.causal(64)), lower_mask(AttnMaskSpec.sliding_window(64, 9))]
    joint = make_joint_plans(masks, total_seqlen=64, cp_size=4, layout="zigzag")
    alone = make_dispatch_plan(masks[1], total_seqlen=64, cp_size=4, layout="zigzag", num_stages=1)
    assert joint.plans[0].q_placement is joint.plans[1].q_placement
    assert joint.plans[1].q_placement.owners.tolist() == alone.q_placement.owners.tolist()
    with pytest.raises(ValueError, match="layout 'spiral' is unknown"):
        make_joint_plans(masks, total_seqlen=64, cp_size=4, layout="spiral")  # type: ignore[arg-type]


def test_every_mask_is_covered() -> None:
    specs = [MASKS["union"], AttnMaskSpec.causal(163), AttnMaskSpec.sliding_window(163, 9)]
    masks = [lower_mask(spec) for spec in specs]
    for ranks, schedule in ((1, "keys"), (2, "auto"), (5, "keys"), (5, "auto")):
        joint = make_joint_plans(masks, total_seqlen=163, cp_size=ranks, chunk_size=16, schedule=schedule)  # type: ignore[arg-type]
        for plan, mask in zip(joint.plans, masks, strict=True):
            assert np.array_equal(plan.tasks.to_dense(163, 163), mask.to_dense(163, 163))
            assert plan.tasks.area() == mask.area()
            assert np.ptp(plan.q_placement.num_tokens) <= 16


def test_equal_on_every_call() -> None:
    first, second = (full_and_window(document_lengths(16 * K), 4, [1, 3]) for _ in range(2))
    assert [p.fingerprint for p in first.plans] == [p.fingerprint for p in second.plans]


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, float("nan")], [1.0, -2.0]])
def test_bad_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="finite weight above 0"):
        full_and_window([100], 2, weights)
