"""Solver layer: several masks over one placement."""

from __future__ import annotations

import numpy as np
import pytest

from cpattn import AttnMaskSpec
from cpattn.launch.benchmarks.workloads import document_lengths
from cpattn.mask_spec import lower_mask
from cpattn.solver import JointPlans, joint_imbalance, make_dispatch_plan, make_joint_plans
from tests_dist.masks import MASKS

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
    assert joint.imbalance <= 1.08
    assert joint.plans[0].q_placement is joint.plans[1].q_placement
    masks = [lower_mask(AttnMaskSpec.varlen(lengths)), lower_mask(AttnMaskSpec.sliding_window(lengths, 1024))]
    assert joint.imbalance == pytest.approx(joint_imbalance(masks, weights, joint.plans[0].q_placement))
    for mask in masks:
        alone = make_dispatch_plan(mask, total_seqlen=64 * K, cp_size=8, chunk_size=512)
        assert joint.imbalance <= max(joint_imbalance(masks, weights, alone.q_placement), 1.08)


def test_every_mask_is_covered() -> None:
    specs = [MASKS["union"], AttnMaskSpec.causal(163), AttnMaskSpec.sliding_window(163, 9)]
    masks = [lower_mask(spec) for spec in specs]
    for ranks in (1, 2, 5):
        joint = make_joint_plans(masks, total_seqlen=163, cp_size=ranks, chunk_size=16)
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
