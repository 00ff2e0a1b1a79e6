"""Runtime layer: out, lse, dq, dk, dv of every mask against dense fp64, over ranks, dtypes and heads."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import cpattn
from cpattn import AttnMaskSpec, LayerKind
from tests_dist.support.harness import run_on_ranks
from tests_dist.support.masks import MASKS, within_window
from tests_dist.support.oracle import Results, assert_as_exact_as_sdpa, assert_exact, make_inputs, oracle
from tests_dist.support.profiles import each_once
from tests_dist.support.rank_cases import run_attention, run_with_key
from tests_dist.support.strategies import random_spec

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEADS = {"mha": (2, 2), "gqa": (6, 2), "mqa": (3, 1)}


Combination = tuple[torch.dtype, tuple[int, int]]


def grid_on_rank(
    spec: AttnMaskSpec, options: dict[str, Any], combinations: list[Combination]
) -> dict[Combination, Results]:
    """Some dtypes and head counts for one mask; on all ranks alike."""
    results = {}
    for dtype, heads in combinations:
        inputs = make_inputs(spec, heads=heads, dtype=dtype)
        results[dtype, heads] = run_attention(spec, inputs, key_options=options)
    return results if torch.distributed.get_rank() == 0 else {}


def check_grid(cp_size: int, mask: str, schedule: str, dtypes: str, **more: Any) -> None:
    """Chunks of 8 tokens, so that documents are split over ranks; two stages and three.

    dtypes: "each" with one of the head counts, which take turns from mask to mask, or with "all" of them.
    """
    spec = MASKS[mask]
    options = {"chunk_size": 8, "num_stages": 2 + cp_size % 2, "schedule": schedule, **more}
    heads, turn = list(HEADS.values()), list(MASKS).index(mask) + cp_size
    combinations = list(itertools.product(DTYPES, heads))
    if dtypes == "each":
        combinations = [(dtype, heads[(turn + nth) % len(heads)]) for nth, dtype in enumerate(DTYPES)]
    results = run_on_ranks(cp_size, grid_on_rank, spec, options, combinations)[0]
    assert len(results) == len(combinations)
    for (dtype, shape), got in results.items():
        inputs = make_inputs(spec, heads=shape, dtype=dtype)
        assert_as_exact_as_sdpa(got, spec, inputs, f"{mask} cp {cp_size} {schedule} {shape} {dtype}")


some_and_all = pytest.mark.parametrize("dtypes", ["each", pytest.param("all", marks=pytest.mark.nightly)])


@pytest.mark.shows("masks", "lengths", "group size", "cross-attention")
@some_and_all
@each_once(mask=MASKS, cp_size=[2, 3, 4, 8, 1])
def test_as_exact_as_one_process_sdpa(cp_size, mask, dtypes):
    check_grid(cp_size, mask, "keys", dtypes)


@some_and_all
@each_once(mask=[name for name, spec in MASKS.items() if not spec.is_cross], cp_size=[4, 2, 3])
def test_as_exact_when_queries_travel(cp_size, mask, dtypes):
    check_grid(cp_size, mask, "tiles", dtypes)


@some_and_all
@each_once(
    mask=["causal", "varlen", "prefix_tree", "cross", "holes", "empty"],
    nodes=[(4, 2, "tiles"), (8, 4, "keys"), (8, 4, "tiles"), (4, 2, "keys")],
)
def test_as_exact_on_two_levels(mask, nodes, dtypes):
    """Rows cross between nodes once per node and fan out; gradients are summed inside a node first."""
    cp_size, ranks_per_node, schedule = nodes
    if schedule == "tiles" and MASKS[mask].is_cross:
        pytest.skip("tiles need self-attention")
    check_grid(cp_size, mask, schedule, dtypes, ranks_per_node=ranks_per_node)


# ----------------------------------------------------------------------------------------------------
# Several masks that are planned together.

NODES = [(2, None), (4, None), (8, None), (4, 2), (8, 4)]
DOCUMENTS = [5, 0, 190, 1, 77]
JOINT: dict[str, list[LayerKind]] = {
    "documents and window": [
        LayerKind(AttnMaskSpec.varlen(DOCUMENTS), num_layers=6),
        LayerKind(AttnMaskSpec.sliding_window(DOCUMENTS, 32), num_layers=26),
    ],
    "blocks, a prefix and nothing": [
        LayerKind(AttnMaskSpec.block_causal([157, 50], 24)),
        LayerKind(AttnMaskSpec.prefix_lm([30, 11], [140, 67]), num_layers=0.5),
        LayerKind(AttnMaskSpec([], [], [], 207), num_layers=2),
    ],
}


def joint_keys(kinds: list[LayerKind], inputs: Any, **options: Any) -> list[cpattn.AttnKey]:
    """A key for each of several masks that are planned together, the first of them made by make_key."""
    key = cpattn.make_key(
        kinds[0].spec,
        window=kinds[0].window,
        num_layers=kinds[0].num_layers,
        also=kinds[1:],
        num_heads_q=inputs.q.shape[1],
        num_heads_kv=inputs.k.shape[1],
        head_dim=inputs.q.shape[2],
        cp_group=dist.group.WORLD,
        **{"chunk_size": 8, "num_stages": 2, **options},
    )
    keys = [key.with_mask(kind.spec or key.spec, window=kind.window) for kind in kinds]
    assert keys[0] is key
    for mine, (_, plan) in zip(keys, key.layer_plans, strict=True):
        assert mine.plan.fingerprint == plan.fingerprint, "planned again, for this mask alone"
        assert mine.q_placement.owners.tolist() == key.q_placement.owners.tolist()
    return keys


def joint_on_rank(name: str, options: dict[str, Any]) -> dict[torch.dtype, list[Results]]:
    results = {}
    for dtype in DTYPES:
        inputs = make_inputs(JOINT[name][0].spec, heads=HEADS["gqa"], dtype=dtype)
        results[dtype] = [run_with_key(key, inputs) for key in joint_keys(JOINT[name], inputs, **options)]
    return results if dist.get_rank() == 0 else {}


@each_once(nodes=NODES, name=JOINT)
def test_masks_planned_together_are_as_exact(nodes, name):
    cp_size, ranks_per_node = nodes
    results = run_on_ranks(cp_size, joint_on_rank, name, {"ranks_per_node": ranks_per_node})[0]
    for dtype in DTYPES:
        inputs = make_inputs(JOINT[name][0].spec, heads=HEADS["gqa"], dtype=dtype)
        for number, (kind, got) in enumerate(zip(JOINT[name], results[dtype], strict=True)):
            what = f"{name} mask {number} cp {cp_size} per node {ranks_per_node} {dtype}"
            assert_as_exact_as_sdpa(got, kind.spec, inputs, what)


def test_masks_planned_together_with_sharded_heads():
    """Blocks of two ranks share heads; the masks are planned for the blocks."""
    name = "documents and window"
    results = run_on_ranks(4, joint_on_rank, name, {"head_degree": 2})[0]
    for dtype in DTYPES:
        inputs = make_inputs(JOINT[name][0].spec, heads=HEADS["gqa"], dtype=dtype)
        for kind, got in zip(JOINT[name], results[dtype], strict=True):
            assert_as_exact_as_sdpa(got, kind.spec, inputs, f"{kind.num_layers} {dtype}")


def random_joint_on_rank(seeds: range, ranks_per_node: int | None) -> int:
    """Random slice sets over the same tokens, one of them with a window on top; exact in fp64."""
    checked = 0
    for seed in seeds:
        rng = np.random.default_rng(seed)
        first = random_spec(rng)
        window = int(rng.integers(1, 12))
        truths = [first, within_window(first, window)]
        truths += [random_spec(rng, total=first.total_seqlen) for _ in range(rng.integers(1, 3))]
        kinds = [LayerKind(spec, None, float(rng.uniform(0.1, 9))) for spec in truths]
        kinds[1] = LayerKind(None, window, 3)
        options = {"num_stages": int(rng.integers(1, 4)), "chunk_size": int(rng.integers(1, 9))}
        inputs = make_inputs(first, heads=(2, 1), head_dim=8, dtype=torch.float64, seed=seed)
        keys = joint_keys(kinds, inputs, ranks_per_node=ranks_per_node, **options)
        results = [run_with_key(key, inputs) for key in keys]
        if seed % dist.get_world_size() == dist.get_rank():
            for spec, got in zip(truths, results, strict=True):
                assert_exact(got, oracle(spec, inputs), f"seed {seed}:")
            checked += 1
    return checked


@pytest.mark.parametrize("cases", [6, pytest.param(48, marks=pytest.mark.nightly)])
@pytest.mark.parametrize(("cp_size", "ranks_per_node"), NODES)
def test_random_masks_planned_together(cp_size, ranks_per_node, cases):
    seeds = range(100 * cp_size, 100 * cp_size + -(-cases // cp_size))
    assert sum(run_on_ranks(cp_size, random_joint_on_rank, seeds, ranks_per_node)) == len(seeds)
