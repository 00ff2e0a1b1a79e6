"""Runtime layer: a packed kernel (the fake of FlashAttention 2 in torch) on ranks, with row operators of both kinds."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from cpattn import backends
from cpattn.backends.sdpa_cuda import CudaSdpaBackend
from cpattn.collectives import row_kernels
from tests_dist.support.fakes.flash import FakeAten
from tests_dist.support.harness import run_on_ranks
from tests_dist.support.interpreter import needs_interpreter, quicken
from tests_dist.support.masks import MASKS
from tests_dist.support.oracle import Results, assert_as_exact_as_sdpa, make_inputs
from tests_dist.support.rank_cases import run_attention


def on_rank(mask: str, options: dict[str, Any], fused: bool) -> Results:
    """The kernel stores what comes first, so accumulators hold anything before."""
    saved = list(backends._backends)
    backends._backends[:] = [CudaSdpaBackend("cpu", FakeAten())]
    if fused:
        quicken()
    inputs = make_inputs(MASKS[mask], heads=(4, 2), dtype=torch.bfloat16)
    try:
        with row_kernels.also_on("cpu") if fused else nullcontext():
            return run_attention(MASKS[mask], inputs, key_options={"chunk_size": 8, "backend": "sdpa", **options})
    finally:
        backends._backends[:] = saved


OPTIONS: dict[str, dict[str, Any]] = {
    "holes": {"schedule": "tiles"},
    "varlen": {"schedule": "keys", "num_stages": 2, "grad_wire": "bf16"},
    "causal": {"schedule": "keys", "num_stages": 3, "ranks_per_node": 2},
}
# By default the interpreter has the least of them.
CASES = [
    pytest.param(mask, fused, marks=[*(needs_interpreter,) * fused, *(pytest.mark.nightly,) * seldom])
    for mask in OPTIONS
    for fused, seldom in ((False, mask == "holes"), (True, mask != "holes"))
]


@pytest.mark.parametrize(("mask", "fused"), CASES)
def test_as_exact_as_plain_attention(mask: str, fused: bool) -> None:
    options = OPTIONS[mask]
    inputs = make_inputs(MASKS[mask], heads=(4, 2), dtype=torch.bfloat16)
    for results in run_on_ranks(4, on_rank, mask, options, fused):
        assert_as_exact_as_sdpa(results, MASKS[mask], inputs, f"{mask} {options} {fused}")
