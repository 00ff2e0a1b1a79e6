"""Runtime layer: gradients of keys that travel in bf16: rounded once, where they travel, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

import cpattn
from cpattn import AttnMaskSpec
from tests_dist.ranks.test_fp8_wire import relative_error
from tests_dist.support.harness import run_on_ranks
from tests_dist.support.interpreter import needs_interpreter, quicken
from tests_dist.support.masks import MASKS
from tests_dist.support.oracle import Results, make_inputs, oracle
from tests_dist.support.profiles import each_once
from tests_dist.support.rank_cases import run_attention

WAYS: dict[str, dict[str, Any]] = {
    "keys": {"schedule": "keys", "num_stages": 3},
    "tiles": {"schedule": "tiles"},
    "two levels": {"ranks_per_node": 2, "num_stages": 2},
    "kept": {"schedule": "keys", "keep_kv": True, "wire": "e4m3"},
}


def both_on_rank(spec: AttnMaskSpec, dtype: torch.dtype, options: dict[str, Any]) -> tuple[Results, Results]:
    """With gradients in fp32 and in bf16."""
    if options.get("backend") == "triton":
        quicken()
    inputs = make_inputs(spec, heads=(4, 2), dtype=dtype)
    options = {"chunk_size": 8, **options}
    plain = run_attention(spec, inputs, key_options=options)
    return plain, run_attention(spec, inputs, key_options={**options, "grad_wire": "bf16"})


@pytest.mark.parametrize("backend", ["auto", pytest.param("triton", marks=needs_interpreter)])
def test_a_sum_that_travels_is_rounded_once(backend: str) -> None:
    """Rank 1's queries see rank 0's keys and no others: what comes home is the fp32 sum in bf16, bit for bit."""
    half = 60
    spec = AttnMaskSpec([[half, 2 * half]], [[0, half]], ["full"], 2 * half)
    options = {"layout": "contiguous", "schedule": "keys", "chunk_size": half, "backend": backend}
    for plain, rounded in run_on_ranks(2, both_on_rank, spec, torch.float32, options):
        assert all(torch.equal(a, b) for a, b in zip(plain[:3], rounded[:3], strict=True))
        for sums, came in zip(plain[3:], rounded[3:], strict=True):
            assert torch.equal(came.bfloat16().float(), came)
            assert not torch.equal(sums, came)
            if backend == "auto":
                assert torch.equal(sums.bfloat16().float(), came)
            else:  # its kernel stores bf16, and the interpreter cuts digits off where GPUs round to nearest
                torch.testing.assert_close(came, sums, rtol=2**-7, atol=0)


@each_once(way=WAYS, mask=["varlen", "holes", "causal"])
def test_error_of_keys_gradients(mask: str, way: str) -> None:
    """fp32 inputs: out, lse and dq are the same bits; dk and dv are off by no more than bf16's rounding at each hop."""
    spec = MASKS[mask]
    plain, rounded = run_on_ranks(4, both_on_rank, spec, torch.float32, WAYS[way])[0]
    assert all(torch.equal(a, b) for a, b in zip(plain[:3], rounded[:3], strict=True))
    exact = oracle(spec, make_inputs(spec, heads=(4, 2), dtype=torch.float32))
    hops = 2 if way == "two levels" else 1
    for name in ("dk", "dv"):
        mine, base, truth = (getattr(r, name) for r in (rounded, plain, exact))
        error, before = relative_error(mine, truth), relative_error(base, truth)
        assert error <= before + hops * 2**-9, f"{mask} {way} {name}: {error:.5f} and {before:.5f} in fp32"
        assert not torch.equal(mine, base)


def bytes_on_rank(grad_wire: str | None, schedule: str) -> list[int]:
    """Bytes received in each exchange of backward."""
    spec = AttnMaskSpec.causal(512)
    received: list[int] = []
    original = dist.all_to_all_single

    def counted(output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        received.append(output.numel() * output.element_size())
        return original(output, *args, **kwargs)

    inputs = make_inputs(spec, heads=(4, 4), head_dim=64, dtype=torch.bfloat16)
    options = {"chunk_size": 16, "num_stages": 1, "schedule": schedule, "keep_kv": True, "grad_wire": grad_wire}
    heads = {"num_heads_q": 4, "num_heads_kv": 4, "head_dim": 64}
    key = cpattn.make_key(spec, **heads, cp_group=dist.group.WORLD, **options)  # type: ignore[arg-type]
    q, k, v = (cpattn.dispatch(t, key).requires_grad_() for t in inputs[:3])
    out = cpattn.attention(q, k, v, key)
    dist.all_to_all_single = counted
    try:
        out.backward(cpattn.dispatch(inputs.dout, key))
        return received
    finally:
        dist.all_to_all_single = original


def profiled_on_rank() -> None:
    spec = AttnMaskSpec.causal(96)
    with cpattn.profile():
        run_attention(spec, make_inputs(spec, heads=(4, 2)), key_options={"chunk_size": 8, "grad_wire": "bf16"})


def test_profiles_see_it() -> None:
    run_on_ranks(2, profiled_on_rank)


def test_half_the_bytes() -> None:
    """Counted at the transport: keys are kept, so gradients are all that travels in backward."""
    plain, rounded = (run_on_ranks(4, bytes_on_rank, way, "keys") for way in (None, "bf16"))
    assert sum(sum(rank) for rank in plain) > 0
    assert [[2 * n for n in rank] for rank in rounded] == plain


def test_unknown_formats_are_refused() -> None:
    with pytest.raises(ValueError, match="grad_wire is 'fp8': use 'bf16' or None"):
        cpattn.make_key(AttnMaskSpec.causal(4), num_heads_q=1, num_heads_kv=1, head_dim=8, grad_wire="fp8")
