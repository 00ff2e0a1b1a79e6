"""Solver layer: cross-attention, whose queries and keys are separate sequences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cpattn import AttnMaskSpec
from cpattn.launch.benchmarks.workloads import document_lengths
from cpattn.masks.spec import lower_mask
from cpattn.solver import Plan, make_dispatch_plan, simulate
from cpattn.testing.plans import require_exact_plan

K = 1 << 10


def planned(spec: AttnMaskSpec, cp_size: int, **options: Any) -> Plan:
    size = {"total_seqlen": spec.total_seqlen, "total_seqlen_k": spec.seqlen_k, "cp_size": cp_size}
    return make_dispatch_plan(lower_mask(spec), **size, **options)


def packed(seqlen_q: int, seqlen_k: int, *, causal: bool) -> AttnMaskSpec:
    """Documents whose keys are in no proportion to their queries."""
    lengths = document_lengths(seqlen_q)
    others = 1 + np.random.default_rng(0).permutation(lengths) * (seqlen_k - len(lengths)) // seqlen_q
    return AttnMaskSpec.cross(lengths, others.tolist(), causal=causal)


@pytest.mark.parametrize("lengths", [(8 * K, 32 * K), (32 * K, 32 * K), (32 * K, 8 * K)])
@pytest.mark.parametrize("cp_size", [2, 8])
def test_causal_is_even_and_no_slower_than_zigzag(lengths: tuple[int, int], cp_size: int) -> None:
    """Also where most queries see nothing: in a sequence of fewer keys."""
    spec = AttnMaskSpec.cross([lengths[0]], [lengths[1]], causal=True)
    for schedule in ("keys", "auto"):
        plan = planned(spec, cp_size, schedule=schedule)
        assert plan.imbalance() <= 1.01
        for placement in (plan.q_placement, plan.k_placement):
            assert np.ptp(placement.num_tokens) <= 512
        zigzag = planned(spec, cp_size, layout="zigzag")
        assert simulate(plan).seconds <= 1.01 * simulate(zigzag).seconds


@pytest.mark.parametrize("causal", [False, True])
def test_auto_is_no_slower_than_a_plain_layout(causal: bool) -> None:
    """Documents: what is even may be slower than contiguous pieces, which have fewer rows to fetch."""
    for lengths in ((16 * K, 64 * K), (64 * K, 64 * K), (64 * K, 16 * K)):
        spec = packed(*lengths, causal=causal)
        auto = simulate(planned(spec, 16, schedule="auto")).seconds
        for layout in ("contiguous", "zigzag"):
            assert auto <= 1.03 * simulate(planned(spec, 16, layout=layout)).seconds, (lengths, layout)


@pytest.mark.parametrize("cp_size", [2, 5])
def test_dealt_out_exactly(cp_size: int) -> None:
    """Empty documents on either side, rows that see nothing, odd lengths."""
    for causal in (False, True):
        spec = AttnMaskSpec.cross([131, 0, 1, 30, 17], [61, 9, 40, 0, 33], causal=causal)
        for options in ({"schedule": "keys"}, {"schedule": "auto"}, {"schedule": "auto", "num_stages": 3}):
            plan = planned(spec, cp_size, chunk_size=4, **options)
            require_exact_plan(plan, spec)
