"""Layer 1: with equal_shards every rank owns as many tokens, and plans stay exact and balanced."""

from __future__ import annotations

import numpy as np
import pytest

import cpattn
from cpattn import AttnMaskSpec, LayerKind
from cpattn.solver.place.equal import equal_shards
from cpattn.solver.placement import Placement
from cpattn.testing.plans import require_exact_plan

HEADS = {"num_heads_q": 4, "num_heads_kv": 2, "head_dim": 16}
MASKS = {
    "causal": AttnMaskSpec.causal(120),
    "documents": AttnMaskSpec.varlen([47, 0, 3, 31, 1, 38]),
    "window": AttnMaskSpec.sliding_window([50, 70], 9),
    "tree": AttnMaskSpec.prefix_tree([40, 30, 7, 43], [[0, 1], [0, 2], [0, 3]])[0],
    "empty": AttnMaskSpec.varlen([]),
    "cross": AttnMaskSpec.cross([24, 36], [60, 120]),
}


@pytest.mark.parametrize("options", [{}, {"chunk_size": 7}, {"layout": "zigzag"}, {"ranks_per_node": 2}], ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_every_rank_owns_as_many_tokens(name: str, options: dict) -> None:
    spec = MASKS[name]
    for cp_size in (4, 6) if "ranks_per_node" in options else (1, 4, 6):
        plan = cpattn.make_plan(spec, cp_size=cp_size, equal_shards=True, **HEADS, **options).plan
        assert plan.q_placement.num_tokens.tolist() == [spec.total_seqlen // cp_size] * cp_size
        assert plan.k_placement.num_tokens.tolist() == [spec.seqlen_k // cp_size] * cp_size
        require_exact_plan(plan, spec)


def test_tiles_and_masks_together() -> None:
    spec = MASKS["documents"]
    tiled = cpattn.make_plan(spec, cp_size=4, schedule="tiles", equal_shards=True, **HEADS)
    also = [LayerKind(None, 9, 3), LayerKind(AttnMaskSpec.causal(120))]
    together = cpattn.make_plan(spec, cp_size=4, also=also, equal_shards=True, **HEADS)
    for plan in (tiled.plan, *(kind.plan for kind in together.layer_plans)):
        assert set(plan.q_placement.num_tokens.tolist()) == {30}


def test_areas_stay_even() -> None:
    """The tokens that change hands are few, and exchanges of as many make up for their areas."""
    lengths = [700, 2100, 333, 67, 1800, 900, 2292]
    for spec in (AttnMaskSpec.causal(8192), AttnMaskSpec.varlen(lengths)):
        equal, free = (cpattn.make_plan(spec, cp_size=8, chunk_size=256, equal_shards=e, **HEADS).plan for e in (1, 0))
        assert set(equal.q_placement.num_tokens.tolist()) == {1024}
        areas = [plan.areas() for plan in (equal, free)]
        uneven = [a.max() / a.mean() for a in areas]
        assert uneven[0] <= max(uneven[1], 1.004) + 0.01, uneven


def test_edges_move_before_runs_are_cut() -> None:
    """2, 2, 8 tokens of 12: the edges give what a neighbour lacks, and only the rest is a run of its own."""
    placed = Placement.from_runs(np.array([2, 4, 12]), np.array([0, 1, 2]), cp_size=3)
    assert equal_shards(placed).runs_by_rank() == [[[0, 2], [10, 12]], [[2, 6]], [[6, 10]]]
    rng = np.random.default_rng(0)
    for _ in range(300):
        cp_size = int(rng.integers(1, 7))
        ends = np.append(np.sort(rng.integers(0, 40, 9)), 39) // cp_size * cp_size
        before = Placement.from_runs(ends, rng.integers(0, cp_size, len(ends)), cp_size=cp_size)
        after = equal_shards(before)
        share = before.total_seqlen // cp_size
        assert (after.num_tokens == share).all()
        tokens = np.arange(before.total_seqlen)
        changed = (before.owner_of(tokens) != after.owner_of(tokens)).sum()
        assert changed == np.abs(before.num_tokens - share).sum() // 2  # no token moves for nothing


def test_lengths_that_ranks_do_not_divide_are_refused() -> None:
    for make in (lambda **o: cpattn.make_plan(MASKS["causal"], cp_size=7, **o), _joint):
        with pytest.raises(ValueError, match="120 tokens are no multiple of 7 ranks: pad the sequence to 126"):
            make(equal_shards=True, **HEADS)


def _joint(**options) -> cpattn.planning.ready.ReadyPlan:
    return cpattn.make_plan(MASKS["causal"], cp_size=7, also=[LayerKind(None, 5)], **options)
