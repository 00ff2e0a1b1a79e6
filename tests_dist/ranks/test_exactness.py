"""Runtime layer: out, lse, dq, dk, dv of every mask against dense fp64, over ranks, dtypes and heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cpattn import AttnMaskSpec
from tests_dist.harness import run_on_ranks
from tests_dist.masks import MASKS
from tests_dist.oracle import Results, assert_as_exact_as_sdpa, make_inputs
from tests_dist.rank_cases import run_attention

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEADS = {"mha": (2, 2), "gqa": (6, 2), "mqa": (3, 1)}


def grid_on_rank(spec: AttnMaskSpec, options: dict[str, Any]) -> dict[str, Results]:
    """Every dtype and head count for one mask; on all ranks alike."""
    results = {}
    for dtype in DTYPES:
        for name, heads in HEADS.items():
            inputs = make_inputs(spec, heads=heads, dtype=dtype)
            results[f"{name} {dtype}"] = run_attention(spec, inputs, key_options=options)
    return results if torch.distributed.get_rank() == 0 else {}


def check_grid(cp_size: int, mask: str, schedule: str, **more: Any) -> None:
    """Chunks of 8 tokens, so that documents are split over ranks; two stages and three."""
    spec = MASKS[mask]
    options = {"chunk_size": 8, "num_stages": 2 + cp_size % 2, "schedule": schedule, **more}
    results = run_on_ranks(cp_size, grid_on_rank, spec, options)[0]
    assert len(results) == len(DTYPES) * len(HEADS)
    for dtype in DTYPES:
        for name, heads in HEADS.items():
            inputs = make_inputs(spec, heads=heads, dtype=dtype)
            what = f"{mask} cp {cp_size} {schedule} {name} {dtype}"
            assert_as_exact_as_sdpa(results[f"{name} {dtype}"], spec, inputs, what)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("cp_size", [1, 2, 3, 4, 8])
def test_as_exact_as_one_process_sdpa(cp_size, mask):
    check_grid(cp_size, mask, "keys")


@pytest.mark.parametrize("mask", [name for name, spec in MASKS.items() if not spec.is_cross])
@pytest.mark.parametrize("cp_size", [2, 3, 4])
def test_as_exact_when_queries_travel(cp_size, mask):
    check_grid(cp_size, mask, "tiles")


@pytest.mark.parametrize("mask", ["causal", "varlen", "prefix_tree", "cross", "holes", "empty"])
@pytest.mark.parametrize("schedule", ["keys", "tiles"])
@pytest.mark.parametrize(("cp_size", "ranks_per_node"), [(4, 2), (8, 4)])
def test_as_exact_on_two_levels(cp_size, ranks_per_node, schedule, mask):
    """Rows cross between nodes once per node and fan out; gradients are summed inside a node first."""
    if schedule == "tiles" and MASKS[mask].is_cross:
        pytest.skip("tiles need self-attention")
    check_grid(cp_size, mask, schedule, ranks_per_node=ranks_per_node)
