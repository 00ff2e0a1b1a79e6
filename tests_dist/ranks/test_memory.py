"""Runtime layer: the memory that a key states against what the allocator gives out while a call runs.

Bytes, not times: the same on every run.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import cpattn
from cpattn import AttnMaskSpec
from cpattn.backends.sdpa_cpu import _MANY_ROWS, _additive_band
from cpattn.launch.benchmarks.step import allocated_at_peak
from cpattn.runtime.execute import Attending, KeyRows, Scoring, kept_bytes, run_backward, run_forward
from tests_dist.support.harness import run_on_ranks

HEADS, DIM = (4, 2), 64
# What oneDNN packs for half-precision products depends on the CPU.
TOLERANCE = {torch.float32: 0.005, torch.bfloat16: 0.1}
SPECS = {
    "causal": AttnMaskSpec.causal(2048),
    "packed": AttnMaskSpec.varlen([900, 500, 17, 600, 31]),
    "window": AttnMaskSpec.sliding_window([2048], 256),
    "large tiles": AttnMaskSpec.causal(8192),
    "long window": AttnMaskSpec.sliding_window([16384], 512),
}


def key_for(
    spec: AttnMaskSpec, group: dist.ProcessGroup | None, chunk_size: int = 64, **options: Any
) -> cpattn.AttnKey:
    heads = {"num_heads_q": HEADS[0], "num_heads_kv": HEADS[1], "head_dim": DIM}
    return cpattn.make_key(spec, **heads, cp_group=group, chunk_size=chunk_size, **options)


def memory_on_rank(name: str, dtype: torch.dtype, options: dict[str, Any]) -> list[tuple[int, int]]:
    """Stated and measured peaks of forward and of backward."""
    key = key_for(SPECS[name], dist.group.WORLD, **options)
    q, dout = (torch.randn(key.num_tokens, HEADS[0], DIM).to(dtype) for _ in range(2))
    k, v = (torch.randn(key.num_keys, HEADS[1], DIM).to(dtype) for _ in range(2))
    plan = key.bind(q.device, dtype)
    kv, scoring = KeyRows(k, v), Scoring(0.125)
    kept = torch.empty(kept_bytes(plan, kv) if plan.keep_kv else 0, dtype=torch.uint8)

    def forward() -> tuple[torch.Tensor, torch.Tensor]:
        return run_forward(plan, q, kv, None, kept, scoring)

    out, lse = forward()
    stated = key.memory(dtype, "cpu")
    assert stated.kept == kept.numel()
    measured = (
        allocated_at_peak(forward) + stated.kept,
        allocated_at_peak(lambda: run_backward(plan, dout, Attending(q, out, lse), kv, kept, scoring)),
    )
    return list(zip(stated[:2], measured, strict=True))


# Largest tiles alone are in test_a_large_tile_does_not_stand_for_smaller_ones.
SELDOM = [
    ("causal", torch.float32, {"num_stages": 1, "schedule": "keys"}),
    ("causal", torch.bfloat16, {"num_stages": 4, "schedule": "keys"}),
    ("packed", torch.bfloat16, {"num_stages": 2, "schedule": "keys"}),
    ("window", torch.float32, {"num_stages": 1, "schedule": "keys"}),
    ("large tiles", torch.float32, {"num_stages": 1, "layout": "contiguous"}),
    ("large tiles", torch.bfloat16, {"num_stages": 1, "layout": "contiguous"}),
    ("long window", torch.float32, {"num_stages": 1, "schedule": "keys"}),
]


@pytest.mark.parametrize(
    ("name", "dtype", "options"),
    [
        ("causal", torch.float32, {"num_stages": 2, "schedule": "tiles"}),
        ("causal", torch.bfloat16, {"num_stages": 2, "schedule": "keys", "keep_kv": True}),
        ("causal", torch.float32, {"num_stages": 2, "schedule": "keys", "ranks_per_node": 2}),
        ("causal", torch.bfloat16, {"num_stages": 2, "schedule": "keys", "wire": "e4m3"}),
        ("packed", torch.float32, {"num_stages": 4, "schedule": "tiles"}),
        ("window", torch.bfloat16, {"num_stages": 2, "schedule": "keys"}),
        *(pytest.param(*case, marks=pytest.mark.nightly) for case in SELDOM),
    ],
)
def test_stated_memory_is_the_measured_one(name, dtype, options):
    num_ranks = 2 if name == "large tiles" else 4
    for rank, passes in enumerate(run_on_ranks(num_ranks, memory_on_rank, name, dtype, options)):
        for pass_, (stated, measured) in zip(("forward", "backward"), passes, strict=True):
            assert stated == pytest.approx(measured, rel=TOLERANCE[dtype]), f"rank {rank}, {pass_}"


def test_many_kernel_calls_are_stated_by_the_largest():
    """Of thousands of calls a few are run; the statement is that of all of them."""
    lengths = [17 + 13 * n % 97 for n in range(60)]
    key = key_for(AttnMaskSpec.varlen(lengths) | AttnMaskSpec.sliding_window(sum(lengths), 40), None)
    light = key.memory(torch.float32, "cpu")
    plan = key.bind(torch.device("cpu"), torch.float32)
    work = plan.stages[0].own_work
    few = plan.backend.heaviest(work, torch.float32)  # type: ignore[attr-defined]
    assert len(few.calls(torch.float32)) < len(work.calls(torch.float32)) / 4
    forward, backward = measured_alone(key)
    assert light.forward == pytest.approx(forward, rel=TOLERANCE[torch.float32])
    assert light.backward == pytest.approx(backward, rel=TOLERANCE[torch.float32])


def test_a_large_tile_does_not_stand_for_smaller_ones():
    """It has its heads one by one, where a smaller one has all at once and takes more."""
    spec = AttnMaskSpec.varlen([_MANY_ROWS + 100, _MANY_ROWS - 100])
    key = cpattn.make_key(spec, num_heads_q=8, num_heads_kv=8, head_dim=DIM)
    forward, backward = measured_alone(key)
    stated = key.memory(torch.float32, "cpu")
    assert stated.forward == pytest.approx(forward, rel=TOLERANCE[torch.float32])
    assert stated.backward == pytest.approx(backward, rel=TOLERANCE[torch.float32])


def measured_alone(key: cpattn.AttnKey) -> tuple[int, int]:
    """Measured peaks of forward and of backward of a key of one rank, in fp32."""
    plan = key.bind(torch.device("cpu"), torch.float32)
    q, dout = (torch.randn(key.num_tokens, key.num_heads_q, DIM) for _ in range(2))
    k, v = (torch.randn(key.num_keys, key.num_heads_kv, DIM) for _ in range(2))
    kv, scoring, none = KeyRows(k, v), Scoring(0.125), torch.empty(0, dtype=torch.uint8)
    out, lse = run_forward(plan, q, kv, None, none, scoring)
    return (
        allocated_at_peak(lambda: run_forward(plan, q, kv, None, none, scoring)),
        allocated_at_peak(lambda: run_backward(plan, dout, Attending(q, out, lse), kv, none, scoring)),
    )


def test_stating_memory_leaves_the_backend_as_it_was():
    """The masks of a window's blocks are kept: none without data may be among them. And kept or not, none is stated."""
    _additive_band.cache_clear()
    spec = AttnMaskSpec.sliding_window([1000], 100)
    stated = key_for(spec, None).memory(torch.float32, "cpu")
    assert _additive_band.cache_info().currsize > 0, "the mask has no such block"
    after = all_results(key_for(spec, None))
    assert key_for(spec, None, chunk_size=32).memory(torch.float32, "cpu") == stated
    _additive_band.cache_clear()
    for ours, expected in zip(after, all_results(key_for(spec, None)), strict=True):
        assert torch.equal(ours, expected)


def all_results(key: cpattn.AttnKey) -> list[torch.Tensor]:
    """out and the gradients of q, k and v, for inputs from a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((key.num_tokens, HEADS[0]), (key.num_keys, HEADS[1]), (key.num_keys, HEADS[1]))
    leaves = [torch.randn(*size, DIM, generator=generator).requires_grad_() for size in sizes]
    out = cpattn.attention(leaves[0], leaves[1], leaves[2], key)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


def test_stages_and_keeping_show_in_the_statement():
    """More stages hold less at once; keeping adds what is fetched."""
    one, four, keeping = run_on_ranks(2, stated_on_rank)[1]
    assert four.forward < one.forward
    assert four.backward < one.backward
    assert one.kept == four.kept == 0 < keeping.kept
    assert keeping.backward < four.backward


def stated_on_rank() -> list[Any]:
    options: list[dict[str, Any]] = [{"num_stages": 1}, {"num_stages": 4}, {"num_stages": 4, "keep_kv": True}]
    spec = AttnMaskSpec.varlen([2048], causal=False)
    return [key_for(spec, dist.group.WORLD, schedule="keys", **o).memory(torch.bfloat16, "cpu") for o in options]


class _InFlight:
    """Counts the exchanges that have been started and not waited for."""

    def __init__(self) -> None:
        self.now = self.most = self.started = 0

    def start(self, *args: Any, **options: Any) -> Any:
        work = _ALL_TO_ALL(*args, **options)
        self.now += 1
        self.started += 1
        self.most = max(self.most, self.now)
        return mock.Mock(wait=lambda: (work.wait(), self.arrive()))

    def arrive(self) -> None:
        self.now -= 1


_ALL_TO_ALL = dist.all_to_all_single


def gradients_in_flight_on_rank() -> tuple[int, int]:
    """Exchanges of a backward in which gradients alone travel: how many in all, and at once."""
    key = key_for(AttnMaskSpec.varlen([600], causal=False), dist.group.WORLD, num_stages=4, keep_kv=True)
    leaves = [torch.randn(key.num_tokens, heads, DIM).requires_grad_() for heads in (HEADS[0], HEADS[1], HEADS[1])]
    out = cpattn.attention(*leaves, key)
    flight = _InFlight()
    with mock.patch.object(dist, "all_to_all_single", flight.start):
        torch.autograd.grad(out.sum(), leaves)
    assert flight.now == 0
    return flight.started, flight.most


def test_gradients_of_one_stage_are_in_flight_at_once():
    """The statement of memory runs the same code, so it says nothing of a buffer more."""
    for started, most in run_on_ranks(2, gradients_in_flight_on_rank):
        assert started > 2
        assert most == 1


def test_describe_states_it():
    key = key_for(AttnMaskSpec.causal(100), None)
    stated = key.memory(torch.float32, "cpu")
    assert f"{stated.forward:,} bytes forward, {stated.backward:,} backward" in key.describe(torch.float32, "cpu")


def test_kernels_outside_torch_are_refused():
    key = key_for(AttnMaskSpec.causal(100), None, backend="flex")
    with pytest.raises(ValueError, match="memory is not stated for backend 'flex'"):
        key.memory(torch.float32, "cpu")
    assert "memory is not stated" in key.describe(torch.float32, "cpu")
