"""Layer 3: profiles by CUDA events; ranks share one card over gloo. Structure and order, never times."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.distributed as dist

import cpattn
from cpattn import AttnMaskSpec
from cpattn.runtime.trace import Trace
from tests_dist.support.harness import run_on_ranks

pytestmark = pytest.mark.gpu


def trace_on_rank() -> Trace | None:
    key = cpattn.make_key(
        AttnMaskSpec.causal(4096),
        num_heads_q=4,
        num_heads_kv=2,
        head_dim=64,
        cp_group=dist.group.WORLD,
        num_stages=2,
        schedule="keys",
    )
    q, k, v = (
        torch.randn(key.num_tokens, heads, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        for heads in (4, 2, 2)
    )
    with cpattn.profile() as profile:
        cpattn.attention(q, k, v, key).float().square().sum().backward()
    return profile.gather(dist.group.WORLD)


def test_events_are_in_order() -> None:
    """Kernels of three stages, in order, inside their calls; what the thread does is one thing at a time."""
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    trace = run_on_ranks(2, trace_on_rank)[0]
    for rank in trace.ranks:
        assert [call.name for call in rank.calls] == ["forward", "backward"]
        for call in rank.calls:
            assert [span.stage for span in call.spans if span.name == "kernel"] == [0, 1, 2]
            busy = [span for span in call.spans if span.thread != "transfer"]
            for before, after in pairwise(busy):
                assert before.start <= before.end <= after.start + 1e-6
            assert {span.name for span in call.spans if span.thread == "transfer"} >= {"keys 1", "keys 2"}
