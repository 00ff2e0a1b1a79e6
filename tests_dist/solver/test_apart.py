"""Solver layer: masks whose components are interleaved."""

from __future__ import annotations

import numpy as np
import pytest

from cpattn import AttnMaskSpec
from cpattn.masks.spec import lower_mask
from cpattn.solver import Placement, make_dispatch_plan
from cpattn.solver.place.apart import lay_apart
from cpattn.testing.plans import require_exact_plan


def blocks(lengths: list[int], kinds: list[int]) -> AttnMaskSpec:
    """Blocks that see themselves causally and the blocks of their kind before them; those of kind 0 see nothing."""
    ends = np.cumsum(lengths).tolist()
    spans = [[end - length, end] for end, length in zip(ends, lengths, strict=True)]
    pairs = [(a, b) for a in range(len(kinds)) for b in range(a + 1) if kinds[a] == kinds[b] > 0]
    types = ["causal" if a == b else "full" for a, b in pairs]
    return AttnMaskSpec([spans[a] for a, _ in pairs], [spans[b] for _, b in pairs], types, ends[-1])


@pytest.mark.parametrize("seed", range(8))
def test_the_same_mask_in_another_order(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(3, 12))
    spec = blocks(rng.integers(16, 60, count).tolist(), [1, 2, 1, *rng.integers(0, 4, count - 3).tolist()])
    total, table = spec.total_seqlen, lower_mask(spec)
    apart = lay_apart(table, total)
    assert apart is not None
    order = np.concatenate([start + np.arange(n) for start, n in zip(apart.starts, apart.lengths, strict=True)])
    dense = table.to_dense(total, total)
    np.testing.assert_array_equal(apart.table.to_dense(total, total), dense[np.ix_(order, order)])
    assert lay_apart(apart.table, total) is None
    ends = np.sort(rng.choice(total, 5, replace=False)) + 1
    placement = Placement.from_runs(np.append(ends, total), np.arange(6) % 3, cp_size=3)
    back = apart.back(placement)
    np.testing.assert_array_equal(back.owner_of(order), placement.owner_of(np.arange(total)))


@pytest.mark.parametrize(
    "spec",
    [
        AttnMaskSpec.varlen([30, 0, 100, 7]),
        AttnMaskSpec.sliding_window([200, 90], 20),
        AttnMaskSpec.prefix_tree([40, 20, 30, 50, 9], [[0, 1], [0, 2], [3, 4]])[0],
        AttnMaskSpec.sliding_window(300, 16) | AttnMaskSpec([[16, 300]], [[0, 4]], ["full"], 300),
        AttnMaskSpec([], [], [], 64),
    ],
)
def test_what_lies_apart_is_left_alone(spec: AttnMaskSpec) -> None:
    assert lay_apart(lower_mask(spec), spec.total_seqlen) is None


def test_single_tokens_that_take_turns_are_left_alone() -> None:
    """Every run of the placement would be a token."""
    spec = blocks([1] * 64, [1, 2] * 32)
    assert lay_apart(lower_mask(spec), 64) is None


def test_components_that_fit_ranks_move_nothing() -> None:
    """Blocks that see every other block, on two ranks; on three, each rank needs keys of one kind, or of both."""
    spec = blocks([1000] * 16, [1, 2] * 8)
    table = lower_mask(spec)
    plan = make_dispatch_plan(table, total_seqlen=16_000, cp_size=2)
    assert plan.kv_routes.num_rows() == 0
    assert plan.imbalance() == 1
    for cp_size in (3, 4):
        plan = make_dispatch_plan(table, total_seqlen=16_000, cp_size=cp_size)
        assert plan.imbalance() <= 1.02
        assert np.ptp(plan.q_placement.num_tokens) <= 512
        contiguous = make_dispatch_plan(table, total_seqlen=16_000, cp_size=cp_size, layout="zigzag")
        assert plan.kv_routes.num_rows() <= 0.7 * contiguous.kv_routes.num_rows()


@pytest.mark.parametrize("options", [{}, {"schedule": "auto"}, {"equal_shards": True}, {"ranks_per_node": 2}])
def test_exact(options: dict[str, object]) -> None:
    spec = blocks([31, 17, 40, 23, 9, 56, 30, 18], [1, 2, 0, 1, 2, 3, 1, 3])
    plan = make_dispatch_plan(lower_mask(spec), total_seqlen=224, cp_size=4, chunk_size=4, **options)  # type: ignore[arg-type]
    require_exact_plan(plan, spec)
