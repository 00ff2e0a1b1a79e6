"""Runtime layer: out, lse, dq, dk, dv of every mask against dense fp64, over ranks, dtypes and heads."""

from __future__ import annotations

import pytest
import torch

from cpattn import AttnMaskSpec
from tests_dist.harness import run_on_ranks
from tests_dist.masks import MASKS
from tests_dist.oracle import Results, assert_as_exact_as_sdpa, make_inputs
from tests_dist.rank_cases import run_attention

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEADS = {"mha": (2, 2), "gqa": (6, 2), "mqa": (3, 1)}


def grid_on_rank(spec: AttnMaskSpec, num_stages: int, schedule: str) -> dict[str, Results]:
    """Every dtype and head count for one mask; on all ranks alike."""
    results = {}
    for dtype in DTYPES:
        for name, heads in HEADS.items():
            inputs = make_inputs(spec, heads=heads, dtype=dtype)
            options = {"chunk_size": 8, "num_stages": num_stages, "schedule": schedule}
            results[f"{name} {dtype}"] = run_attention(spec, inputs, key_options=options)
    return results if torch.distributed.get_rank() == 0 else {}


def check_grid(cp_size: int, mask: str, schedule: str) -> None:
    """Chunks of 8 tokens, so that documents are split over ranks; two stages and three."""
    spec = MASKS[mask]
    results = run_on_ranks(cp_size, grid_on_rank, spec, num_stages=2 + cp_size % 2, schedule=schedule)[0]
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
