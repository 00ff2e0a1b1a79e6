"""Runtime layer: all options of keys and of calls at once, drawn at random, in fp64 against the dense oracle.

Other tests hold one option against many masks; here any option meets any other: moving queries with sharded heads, a
window over documents in nodes, kept keys of masks planned together, and so on.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist

import cpattn
from cpattn import AttnMaskSpec, LayerKind
from cpattn.solver import HARDWARE, LAYOUTS
from tests_dist.support.harness import run_on_ranks
from tests_dist.support.masks import MASKS, Window, within_window
from tests_dist.support.oracle import assert_exact, make_inputs, oracle
from tests_dist.support.rank_cases import run_with_key
from tests_dist.support.strategies import random_spec


class Case(NamedTuple):
    """A mask, heads, head dims of q and k and of v, and options of `make_key` and of `attention`."""

    spec: AttnMaskSpec
    heads: tuple[int, int]
    head_dims: tuple[int, int]
    key_options: dict[str, Any]
    scale: float | None
    call: dict[str, Any]


def random_case(rng: np.random.Generator, cp_size: int) -> Case:
    """Anything that `make_key` does not refuse."""
    spec = random_mask(rng)
    num_kv = int(rng.integers(1, 4))
    num_q = num_kv * int(rng.integers(1, 5))
    layout = str(rng.choice(LAYOUTS)) if rng.integers(3) == 0 else "balanced"
    schedules = ["keys", "tiles", "auto"] if layout == "balanced" and not spec.is_cross else ["keys"]
    divisors = [n for n in range(1, cp_size + 1) if cp_size % n == 0]
    degree: Any = rng.choice([1, 1, "auto", *(n for n in divisors if n <= num_q)])
    degree = "auto" if degree == "auto" else int(degree)
    per_node = int(rng.choice(divisors))
    if degree != "auto" and per_node % degree and degree % per_node:
        per_node = cp_size
    options: dict[str, Any] = {
        "chunk_size": int(rng.integers(1, 40)),
        "layout": layout,
        "schedule": str(rng.choice(schedules)),
        "num_stages": [None, 1, 2, 4][rng.integers(4)],
        "keep_kv": bool(rng.integers(2)),
        "transport": str(rng.choice(["all_to_all", "p2p", "auto"])),
        "search_effort": int(rng.integers(4) == 0),
        "head_degree": degree,
        "ranks_per_node": None if rng.integers(2) else (cp_size if degree == "auto" else per_node),
        "hardware": str(rng.choice(list(HARDWARE))),
        "backend": str(rng.choice(["auto", "reference"])),
        "window": random_window(rng, spec),
    }
    if options["schedule"] != "tiles" and not spec.is_cross and rng.integers(3) == 0:
        options["num_layers"] = float(rng.integers(1, 6))
        options["also"] = [random_layer(rng, spec) for _ in range(rng.integers(1, 3))]
    call: dict[str, Any] = {}
    if rng.integers(3) == 0:
        call["sink"] = torch.from_numpy(rng.normal(size=num_q))
    if rng.integers(3) == 0:
        call["softcap"] = float(rng.uniform(0.5, 5))
    head_dims = int(rng.choice([4, 5, 8])), int(rng.choice([4, 6, 12]))
    return Case(spec, (num_q, num_kv), head_dims, options, [None, 0.3, -0.2][rng.integers(3)], call)


def random_mask(rng: np.random.Generator) -> AttnMaskSpec:
    """Overlapping rectangles, documents, a tree, or one of MASKS."""
    kind = rng.integers(4)
    if kind == 0:
        return random_spec(rng, length=90)
    if kind == 1:
        return MASKS[str(rng.choice(list(MASKS)))]
    if kind == 2:
        return AttnMaskSpec.varlen(rng.integers(0, 60, rng.integers(1, 9)).tolist(), causal=bool(rng.integers(2)))
    lengths = rng.integers(0, 25, rng.integers(1, 8)).tolist()
    paths = [[0]]
    for node in range(1, len(lengths)):
        paths.append([*paths[rng.integers(node)], node])
    leaves = [path for path in paths if not any(other[:-1] == path for other in paths)]
    return AttnMaskSpec.prefix_tree(lengths, leaves)[0]


def random_window(rng: np.random.Generator, spec: AttnMaskSpec) -> Window:
    if spec.is_cross or rng.integers(2):
        return None
    left, right = (int(n) for n in rng.integers(0, 16, 2))
    return (left + 1, (left, right), (left, None), (None, right))[rng.integers(4)]


def random_layer(rng: np.random.Generator, spec: AttnMaskSpec) -> LayerKind:
    other = random_spec(rng, total=spec.total_seqlen) if rng.integers(2) else None
    return LayerKind(other, random_window(rng, spec), float(rng.integers(1, 6)))


def options_together_on_rank(seeds: range) -> int:
    """Exact for every seed, and every mask of its key; each rank checks its part of the seeds."""
    rank, size = dist.get_rank(), dist.get_world_size()
    checked = 0
    for seed in seeds:
        spec, heads, (head_dim, head_dim_v), options, scale, call = random_case(np.random.default_rng(seed), size)
        inputs = make_inputs(
            spec, heads=heads, head_dim=head_dim, head_dim_v=head_dim_v, dtype=torch.float64, seed=seed
        )
        key = cpattn.make_key(
            spec,
            num_heads_q=heads[0],
            num_heads_kv=heads[1],
            head_dim=head_dim,
            head_dim_v=head_dim_v,
            cp_group=dist.group.WORLD,
            **options,
        )
        masks = [(spec, options["window"])] + [(kind.spec or spec, kind.window) for kind in options.get("also", [])]
        for number, (mask, window) in enumerate(masks):
            used = key.with_mask(mask, window=window) if number else key
            got = run_with_key(used, inputs, softmax_scale=scale, **call)
            if seed % size == rank:
                truth = oracle(within_window(mask, window), inputs, scale=scale, **call)
                assert_exact(got, truth, f"seed {seed}, mask {number}, {heads}, {options}, {call}, {spec}:")
        checked += seed % size == rank
    return checked


@pytest.mark.parametrize("cp_size", [2, 3, 4])
def test_any_option_with_any_other(cp_size):
    seeds = range(100 * cp_size, 100 * cp_size + 16)
    assert sum(run_on_ranks(cp_size, options_together_on_rank, seeds)) == len(seeds)


@pytest.mark.nightly
@pytest.mark.parametrize("cp_size", [2, 3, 4, 6])
def test_any_option_with_any_other_200_times(cp_size):
    seeds = range(1000 * cp_size, 1000 * cp_size + 200)
    assert sum(run_on_ranks(cp_size, options_together_on_rank, seeds, timeout=1500)) == len(seeds)
