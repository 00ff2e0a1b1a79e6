"""The whole path on a GPU: several ranks share one card over gloo, which exercises streams and events."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cpattn import AttnMaskSpec
from tests_dist.support.fakes.installed import FAKES, GPU
from tests_dist.support.harness import run_on_ranks
from tests_dist.support.masks import MASKS
from tests_dist.support.oracle import Inputs, Results, assert_as_exact_as_sdpa, make_inputs
from tests_dist.support.rank_cases import run_attention

pytestmark = pytest.mark.gpu


def on_one_card(spec: AttnMaskSpec, inputs: Inputs, options: dict[str, Any]) -> Results:
    """Global results, brought to the CPU."""
    if not FAKES:
        torch.cuda.set_device(0)
    results = run_attention(spec, Inputs(*(t.to(GPU) for t in inputs)), key_options=options)
    return Results(*(t.cpu() for t in results))


@pytest.mark.parametrize("schedule", ["keys", "tiles"])
@pytest.mark.parametrize("mask", ["causal", "varlen", "sliding_window", "prefix_tree", "holes"])
@pytest.mark.parametrize("cp_size", [1, 2, 4])
def test_ranks_that_share_a_card(cp_size: int, mask: str, schedule: str) -> None:
    spec = MASKS[mask]
    inputs = make_inputs(spec, heads=(4, 2), head_dim=64, dtype=torch.bfloat16)
    options = {"chunk_size": 8, "num_stages": 2, "schedule": schedule}
    for results in run_on_ranks(cp_size, on_one_card, spec, inputs, options):
        assert_as_exact_as_sdpa(results, spec, inputs, f"{mask} cp {cp_size} {schedule}")
