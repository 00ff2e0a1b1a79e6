"""Solver layer, one process: plans of all ranks replayed on token indices (`cpattn.testing.plans`)."""

from __future__ import annotations

import dataclasses
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpattn import AttnMaskSpec
from cpattn.masks.spec import lower_mask
from cpattn.solver import (
    LAYOUTS,
    Placement,
    Plan,
    SliceTable,
    assemble_plan,
    make_dispatch_plan,
    place_contiguous,
)
from cpattn.testing.plans import require_exact_plan
from tests_dist.support.masks import MASKS
from tests_dist.support.strategies import random_spec, specs

STAGES = (1, 2, 3, 8)


def plan_of(spec: AttnMaskSpec, cp_size: int, **options: Any) -> Plan:
    options = {"chunk_size": 8, **options}
    return make_dispatch_plan(
        lower_mask(spec),
        total_seqlen=spec.total_seqlen,
        total_seqlen_k=spec.total_seqlen_k,
        cp_size=cp_size,
        **options,
    )


def random_placement(rng: np.random.Generator, total: int, cp_size: int) -> Placement:
    """Runs of random lengths to random ranks; some ranks may own nothing."""
    ends = np.unique(np.append(rng.integers(0, total + 1, cp_size * 3), total))
    return Placement.from_runs(ends, rng.integers(0, cp_size, len(ends)), cp_size=cp_size)


def scattered_plan(spec: AttnMaskSpec, cp_size: int, seed: int, **options: Any) -> Plan:
    """Tasks cut at random and computed by random ranks: queries and keys both travel."""
    rng = np.random.default_rng(seed)
    q_cuts = np.unique(rng.integers(0, spec.total_seqlen + 1, 3))
    k_cuts = np.unique(rng.integers(0, spec.seqlen_k + 1, 3))
    tasks = lower_mask(spec).split_q(q_cuts).table.split_k(k_cuts).table
    q_placement = random_placement(rng, spec.total_seqlen, cp_size)
    k_placement = random_placement(rng, spec.seqlen_k, cp_size) if spec.is_cross else q_placement
    return assemble_plan(tasks, rng.integers(0, cp_size, len(tasks)), q_placement, k_placement, **options)


@pytest.mark.parametrize("cp_size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("mask", MASKS)
def test_every_pair_once_in_every_layout(mask, cp_size):
    spec = MASKS[mask]
    for number, layout in enumerate(LAYOUTS):
        require_exact_plan(plan_of(spec, cp_size, layout=layout, num_stages=STAGES[number]), spec)


@pytest.mark.parametrize("mask", [name for name, spec in MASKS.items() if not spec.is_cross])
def test_every_pair_once_where_queries_travel(mask):
    spec = MASKS[mask]
    for cp_size in (1, 2, 3, 5, 8):
        require_exact_plan(plan_of(spec, cp_size, schedule="tiles", num_stages=1 + cp_size % 3), spec)


@given(
    specs(length=24), st.integers(1, 5), st.integers(1, 9), st.sampled_from(STAGES), st.sampled_from(LAYOUTS)
)
def test_every_pair_once_of_random_masks(spec, cp_size, chunk_size, num_stages, layout):
    require_exact_plan(plan_of(spec, cp_size, chunk_size=chunk_size, num_stages=num_stages, layout=layout), spec)


@given(specs(length=24), st.integers(1, 5))
def test_every_pair_once_of_random_masks_in_tiles(spec, cp_size):
    require_exact_plan(plan_of(spec, cp_size, schedule="tiles"), spec)


@pytest.mark.parametrize("mask", MASKS)
def test_every_pair_once_where_any_rank_computes_any_task(mask):
    """Also a rank that owns neither the queries nor the keys, and ranks that own or compute nothing."""
    for seed in range(4):
        plan = scattered_plan(MASKS[mask], cp_size=2 + seed, seed=seed, num_stages=STAGES[seed])
        require_exact_plan(plan, MASKS[mask])


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.sampled_from(STAGES))
def test_every_pair_once_of_random_masks_computed_anywhere(seed, cp_size, num_stages):
    spec = random_spec(np.random.default_rng(seed), length=24)
    require_exact_plan(scattered_plan(spec, cp_size, seed, num_stages=num_stages), spec)


@pytest.mark.parametrize(("cp_size", "per_node"), [(4, 2), (6, 3), (6, 2), (8, 4), (4, 1), (4, 4)])
@pytest.mark.parametrize("mask", MASKS)
def test_every_pair_once_on_two_levels(mask, cp_size, per_node):
    """Rows cross between nodes once per node and fan out inside; keys schedule, and tasks anywhere."""
    spec = MASKS[mask]
    require_exact_plan(plan_of(spec, cp_size, ranks_per_node=per_node, num_stages=2), spec)
    plan = scattered_plan(spec, cp_size, seed=cp_size + per_node, ranks_per_node=per_node, num_stages=2)
    require_exact_plan(plan, spec)


def test_a_row_crosses_between_nodes_once():
    """Full attention over 2 nodes of 4: each key crosses once, not four times."""
    spec = AttnMaskSpec.varlen([64], causal=False)
    plan = plan_of(spec, 8, ranks_per_node=4, layout="contiguous", num_stages=1)
    crossed = sum(
        rows
        for rank in range(8)
        for to, rows in enumerate(plan.for_rank(rank).stages[1].kv[0].send_splits)
        if to // 4 != rank // 4
    )
    assert crossed == 64


def test_replay_notices_a_wrong_plan():
    """The test of the test: a task given to nobody, one given twice, a key that is not sent."""
    spec = MASKS["varlen"]
    plan = plan_of(spec, 4)
    for tasks, ranks in (
        (plan.tasks.take(np.arange(1, len(plan.tasks))), plan.task_ranks[1:]),
        (SliceTable.concat([plan.tasks, plan.tasks.take(np.array([0]))]), np.append(plan.task_ranks, 3)),
    ):
        wrong = assemble_plan(tasks, ranks, plan.q_placement, plan.k_placement)
        with pytest.raises(AssertionError):
            require_exact_plan(wrong, spec)
    routes = dataclasses.replace(plan.kv_routes, ends=plan.kv_routes.ends - 1)
    with pytest.raises(AssertionError):
        require_exact_plan(dataclasses.replace(plan, kv_routes=routes), spec)


def test_fewer_tokens_than_ranks():
    for total in range(9):
        for layout in LAYOUTS:
            spec = AttnMaskSpec.causal(total)
            require_exact_plan(plan_of(spec, 8, layout=layout), spec)
    for seqlen_q, seqlen_k in ((0, 5), (5, 0), (3, 17), (1, 1)):
        spec = AttnMaskSpec.cross([seqlen_q], [seqlen_k])
        for layout in LAYOUTS:
            require_exact_plan(plan_of(spec, 4, layout=layout), spec)


@pytest.mark.parametrize("cp_size", [2, 3, 8])
def test_long_documents_are_balanced(cp_size):
    """The area of the busiest rank over the mean, and token counts within a chunk."""
    for spec in (AttnMaskSpec.causal(40_000), AttnMaskSpec.varlen([3000, 17, 25_000, 4000, 9000])):
        plan = plan_of(spec, cp_size, chunk_size=512)
        assert plan.imbalance() <= 1.05
        tokens = plan.q_placement.num_tokens
        assert tokens.max() - tokens.min() <= 512


def flat(value: Any) -> list[Any]:
    """Every number of a plan, in order."""
    if dataclasses.is_dataclass(value):
        return [x for f in dataclasses.fields(value) for x in [f.name, *flat(getattr(value, f.name))]]
    if isinstance(value, np.ndarray):
        return [str(value.dtype), value.shape, *value.ravel().tolist()]
    if isinstance(value, tuple):
        return [len(value), *(x for item in value for x in flat(item))]
    return [value]


@pytest.mark.parametrize("plan", [plan_of(MASKS["holes"], 3), scattered_plan(MASKS["cross"], 4, seed=1)])
def test_a_plan_travels_by_pickle_whole(plan):
    copy = pickle.loads(pickle.dumps(plan))
    assert flat(copy) == flat(plan)
    for rank in range(plan.cp_size):
        mine = plan.for_rank(rank)
        assert flat(copy.for_rank(rank)) == flat(mine) == flat(pickle.loads(pickle.dumps(mine)))
    copy.require_whole()
    copy.task_ranks[0] = (copy.task_ranks[0] + 1) % copy.cp_size
    with pytest.raises(ValueError, match=r"the plan's contents have the fingerprint .* it was damaged or changed"):
        copy.require_whole()


def test_planning_again_gives_the_same_plan():
    for mask, spec in MASKS.items():
        plans = [plan_of(spec, 4) for _ in range(2)]
        assert flat(plans[0]) == flat(plans[1]), mask


def test_planning_does_not_depend_on_the_process():
    """Other hash seeds, as ranks have them: the same plans. No torch is needed on the way."""
    code = (
        "import sys; from tests_dist.solver.test_plan import *\n"
        "assert 'torch' not in sys.modules\n"
        "for layout, schedule in (('balanced', 'keys'), ('balanced', 'tiles'), ('zigzag', 'keys')):\n"
        "    for name in ('varlen', 'prefix_tree', 'holes', 'from_dense'):\n"
        "        print(plan_of(MASKS[name], 4, layout=layout, schedule=schedule).fingerprint)"
    )
    prints = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in (1, 2)
    ]
    assert prints[0] == prints[1]
    assert len(set(prints[0].split())) == 12


def test_fingerprints_tell_plans_apart():
    """Whatever differs between plans, on any rank, differs in the fingerprint."""
    spec = MASKS["varlen"]
    base = plan_of(spec, 4, num_stages=2)
    other_ranks = base.task_ranks.copy()
    other_ranks[-1] = (other_ranks[-1] + 1) % 4
    shorter = AttnMaskSpec([[0, 273]], [[0, 273]], ["full"], 273)
    k_placement = place_contiguous(spec.total_seqlen, 4)
    variants = [
        base,
        plan_of(spec, 4, num_stages=3),
        plan_of(spec, 3, num_stages=2),
        plan_of(spec, 4, num_stages=2, layout="zigzag"),
        plan_of(spec, 4, num_stages=2, layout="contiguous"),
        plan_of(shorter, 4, num_stages=2),
        plan_of(spec, 4, num_stages=2, ranks_per_node=2),
        assemble_plan(base.tasks, other_ranks, base.q_placement, base.k_placement, num_stages=2),
        assemble_plan(base.tasks, base.task_ranks, base.q_placement, k_placement, num_stages=2),
        assemble_plan(base.tasks.take(np.arange(len(base.tasks) - 1)), base.task_ranks[:-1],
                      base.q_placement, base.k_placement, num_stages=2),
        # Equal but for tokens at the end that nobody sees.
        plan_of(AttnMaskSpec([], [], [], 8), 4),
        plan_of(AttnMaskSpec([], [], [], 9), 4),
        # Nothing travels, in nodes of another size.
        plan_of(AttnMaskSpec.varlen([64] * 4), 4),
        plan_of(AttnMaskSpec.varlen([64] * 4), 4, ranks_per_node=2),
    ]  # fmt: skip
    prints = [plan.fingerprint for plan in variants]
    assert len(set(prints)) == len(variants)
    assert plan_of(spec, 4, num_stages=2).fingerprint == base.fingerprint


BAD = {
    "cp_size is 0: it must be at least 1": {"cp_size": 0},
    "chunk_size is 0: it must be at least 1": {"chunk_size": 0},
    "num_stages is 0: it must be at least 1": {"num_stages": 0},
    "num_stages is 9: at most 8 stages are planned": {"num_stages": 9},
    "layout 'diagonal' is unknown: use one of balanced, contiguous, zigzag": {"layout": "diagonal"},
    "schedule 'rows' with layout 'balanced'": {"schedule": "rows"},
    "'tiles' needs layout 'balanced' and self-attention": {"schedule": "tiles", "layout": "zigzag"},
    "ranks_per_node is 2 and cp_size is 3: nodes must be of equal size": {"cp_size": 3, "ranks_per_node": 2},
    "ranks_per_node is 0 and cp_size is 2": {"ranks_per_node": 0},
    "total_seqlen is -1: it must be at least 0": {"total_seqlen": -1},
    "total_seqlen_k is -5: it must be at least 0": {"total_seqlen_k": -5},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_sizes(message):
    options = {"total_seqlen": 4, "cp_size": 2, **BAD[message]}
    with pytest.raises(ValueError) as raised:
        make_dispatch_plan(SliceTable.empty(), **options)
    assert message in str(raised.value)
