"""Runtime layer: rows in 8-bit floats on the wire: the codec, the error it adds to each mask, the bytes it saves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import cpattn
from cpattn import AttnMaskSpec
from cpattn.collectives import Fp8Rows
from tests_dist.support.harness import run_on_ranks
from tests_dist.support.masks import MASKS
from tests_dist.support.oracle import Inputs, Results, make_inputs, oracle
from tests_dist.support.rank_cases import run_attention


def relative_error(mine: torch.Tensor, exact: torch.Tensor) -> float:
    """Norm of the difference over the norm."""
    return ((mine.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize(("fmt", "bound", "floor"), [("e4m3", 2**-4, 2**-17), ("e5m2", 2**-3, 2**-30)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codec_error_is_bounded_for_every_element(fmt, bound, floor, dtype):
    """Rows of magnitudes from 1e-30 to 1e30, each with its own scale."""
    spread = torch.logspace(-30, 30, 600) if dtype != torch.float16 else torch.logspace(-4, 4, 600)
    g = torch.Generator().manual_seed(0)
    x = (torch.randn(600, 3, 40, generator=g) * spread[:, None, None]).to(dtype)
    codec = Fp8Rows(fmt)
    (travelling,) = codec.encode((x,))
    assert travelling.dtype == torch.uint8
    assert travelling.shape == (600, 3, 41)
    (back,) = codec.decode((travelling,), dtype)
    assert back.dtype == dtype
    largest = x.double().abs().amax(-1, keepdim=True)
    allowed = torch.maximum(bound * x.double().abs(), floor * largest)
    if dtype == torch.float16:  # its own subnormals
        allowed += 2.0**-24
    assert ((back.double() - x.double()).abs() <= allowed).all()


def test_codec_keeps_what_fits_exactly_and_what_is_broken():
    codec = Fp8Rows()
    exact = torch.tensor([[[0.0, 1.0, -2.5, 0.375]], [[0.0, 0.0, 0.0, 0.0]], [[4096.0, 1024.0, -8.0, 0.0]]])
    (back,) = codec.decode(codec.encode((exact,)), torch.float32)
    assert torch.equal(back, exact)
    broken = torch.tensor([[[1.0, torch.inf], [1.0, 2.0]], [[torch.nan, 1.0], [3.0, 4.0]]])
    (back,) = codec.decode(codec.encode((broken,)), torch.float32)
    assert back[:, 0].isnan().all()
    assert torch.equal(back[:, 1], broken[:, 1])
    (none,) = codec.decode(codec.encode((torch.zeros(0, 2, 8),)), torch.bfloat16)
    assert none.shape == (0, 2, 8)


@pytest.mark.parametrize("fmt", ["e4m3", "e5m2"])
def test_scales_have_finite_inverses_that_are_no_subnormals(fmt):
    """Exponents of 1 to 253: scale and inverse are right where the processor flushes subnormals, too."""
    tiny, huge = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max / 2
    x = torch.tensor([0.0, tiny / 8, tiny, 2 * tiny, 1.0, huge, torch.inf, torch.nan]).view(-1, 1, 1).repeat(1, 2, 4)
    codec = Fp8Rows(fmt)
    for flush in (False, True):
        if not torch.set_flush_denormal(flush):
            pytest.skip("this processor cannot flush subnormals")
        try:
            (travelling,) = codec.encode((x,))
            (back,) = codec.decode((travelling,), torch.float32)
        finally:
            torch.set_flush_denormal(False)
        assert travelling[..., -1].min() >= 1
        assert travelling[..., -1].max() <= 253
        torch.testing.assert_close(back[2:6], x[2:6], rtol=2**-3, atol=0)
        assert back[6:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fmt", ["e4m3", "e5m2"])
def test_the_largest_numbers_of_a_dtype_stay_numbers(fmt, dtype):
    """They are rounded to 8 bits, and what that rounds up beyond the dtype is its largest number."""
    largest = torch.finfo(dtype).max
    x = torch.tensor([largest, -largest, largest * 0.97, 1.0]).to(dtype).expand(2, 3, 4)
    codec = Fp8Rows(fmt)
    (back,) = codec.decode(codec.encode((x,)), dtype)
    assert back.isfinite().all()
    torch.testing.assert_close(back[..., :3].double(), x[..., :3].double(), rtol=2**-3, atol=0)


def integers(spec: AttnMaskSpec) -> Inputs:
    """Inputs that 8 bits hold exactly."""
    inputs = make_inputs(spec, heads=(4, 2))
    return Inputs(*((t * 2).round().clamp(-8, 8) / 2 for t in inputs))


def exact_on_rank(mask: str, options: dict[str, Any]) -> bool:
    """Whether rows that 8 bits hold give the same bits with and without the codec."""
    inputs = integers(MASKS[mask])
    plain = run_attention(MASKS[mask], inputs, key_options={"chunk_size": 8, **options})
    coded = run_attention(MASKS[mask], inputs, key_options={"chunk_size": 8, **options, "wire": "e4m3"})
    return all(torch.equal(a, b) for a, b in zip(plain, coded, strict=True))


WAYS: dict[str, dict[str, Any]] = {
    # Of more than two stages the sizes are chosen, by the bytes on the wire among others.
    "keys": {"schedule": "keys", "num_stages": 2},
    "tiles": {"schedule": "tiles"},
    "two levels": {"ranks_per_node": 2, "num_stages": 2},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mask", ["causal", "varlen", "holes", "cross"])
def test_rows_that_fit_arrive_bit_for_bit(mask, way):
    """So the codec touches only what travels, in the right places, in every kind of exchange."""
    if MASKS[mask].is_cross and way == "tiles":
        pytest.skip("queries do not travel in cross-attention")
    assert all(run_on_ranks(4, exact_on_rank, mask, WAYS[way]))


def errors_on_rank(mask: str, dtype: torch.dtype, wire: str | None, options: dict[str, Any]) -> Results:
    inputs = make_inputs(MASKS[mask], heads=(4, 2), dtype=dtype)
    return run_attention(MASKS[mask], inputs, key_options={"chunk_size": 8, "wire": wire, **options})


SEEING = [name for name, spec in MASKS.items() if spec.to_dense().any()]


@pytest.mark.parametrize(
    "mask",
    [pytest.param(m, marks=[pytest.mark.nightly] * (m not in ("varlen", "cross", "holes"))) for m in SEEING],
)
def test_error_of_every_mask_stays_near_that_of_the_cast(mask):
    """The cast's own error of a row is about 2.6 % in norm; what comes out is within that, beside bf16's 0.3 %."""
    exact = oracle(MASKS[mask], make_inputs(MASKS[mask], heads=(4, 2), dtype=torch.bfloat16))
    for way in ("keys",) if MASKS[mask].is_cross else ("keys", "tiles"):
        plain, coded = (
            run_on_ranks(3, errors_on_rank, mask, torch.bfloat16, wire, {"schedule": way})[0] for wire in (None, "e4m3")
        )
        for name, mine, base, truth in zip(Results._fields, coded, plain, exact, strict=True):
            finite = torch.isfinite(truth)
            assert torch.equal(torch.isinf(mine), torch.isinf(truth)), name
            error, before = (relative_error(t[finite], truth[finite]) for t in (mine, base))
            assert error <= 0.04 + 2 * before, f"{mask} {way}: {name} is off by {error:.4f}, bf16 by {before:.4f}"


def test_gradients_are_those_of_the_rounded_forward():
    """Forward and backward see the same rounded rows: equal to attention over rows rounded beforehand."""
    spec = AttnMaskSpec.causal(120)
    results = run_on_ranks(2, rounded_on_rank, 120)[0]
    for name, mine, theirs in zip(Results._fields, *results, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert spec.total_seqlen == 120


def rounded_on_rank(tokens: int) -> tuple[Results, Results]:
    """One query side and one key side: rank 1's queries see rank 0's keys, all of them through the wire."""
    half = tokens // 2
    spec = AttnMaskSpec([[half, tokens]], [[0, half]], ["full"], tokens)
    inputs = make_inputs(spec, heads=(4, 2))
    options = {"layout": "contiguous", "schedule": "keys", "chunk_size": half}
    coded = run_attention(spec, inputs, key_options={**options, "wire": "e4m3"})
    codec = Fp8Rows()
    k, v = codec.decode(codec.encode((inputs.k, inputs.v)), torch.float32)
    return coded, run_attention(spec, inputs._replace(k=k, v=v), key_options=options)


def bytes_on_rank(dtype: torch.dtype, wire: str | None, schedule: str) -> tuple[int, int]:
    """Bytes of rows received in forward, and in backward by all but the gradients that go home."""
    spec = AttnMaskSpec.causal(512)
    received: list[int] = []
    original = dist.all_to_all_single

    def counted(output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        received.append(output.numel() * output.element_size())
        return original(output, *args, **kwargs)

    inputs = make_inputs(spec, heads=(4, 4), head_dim=64, dtype=dtype)
    key = cpattn.make_key(
        spec,
        num_heads_q=4,
        num_heads_kv=4,
        head_dim=64,
        cp_group=dist.group.WORLD,
        chunk_size=16,
        wire=wire,
        schedule=schedule,
        num_stages=1,
    )
    q, k, v = (cpattn.dispatch(t, key).requires_grad_() for t in inputs[:3])
    dist.all_to_all_single = counted
    try:
        out = cpattn.attention(q, k, v, key)
        forward = sum(received)
        received.clear()
        out.backward(cpattn.dispatch(inputs.dout, key))  # type: ignore[union-attr]
        return forward, received[0]
    finally:
        dist.all_to_all_single = original


@pytest.mark.parametrize(("dtype", "itemsize"), [(torch.bfloat16, 2), (torch.float32, 4)])
def test_bytes_counted_at_the_transport(dtype, itemsize):
    """65 bytes for 64 elements and a scale, and a row's 260 brought to a multiple of 8: 0.516 of bf16's 512."""
    plain = np.array(run_on_ranks(4, bytes_on_rank, dtype, None, "keys"))
    coded = np.array(run_on_ranks(4, bytes_on_rank, dtype, "e4m3", "keys"))
    assert plain.sum() > 0
    assert (coded * (4 * 64 * itemsize) == plain * 264).all()


def test_moved_queries_are_halved_too():
    plain = np.array(run_on_ranks(4, bytes_on_rank, torch.bfloat16, None, "tiles"))
    coded = np.array(run_on_ranks(4, bytes_on_rank, torch.bfloat16, "e4m3", "tiles"))
    # Backward's first exchange is that of queries: dout and q in 8 bits beside lse and delta in fp32.
    if (coded == plain).all():
        pytest.skip("the plan moves no queries")
    assert coded[:, 1].sum() < 0.56 * plain[:, 1].sum()


def test_unknown_formats_are_refused():
    with pytest.raises(ValueError, match="wire is 'int8': use 'e4m3', 'e5m2' or None"):
        cpattn.make_key(AttnMaskSpec.causal(4), num_heads_q=1, num_heads_kv=1, head_dim=8, wire="int8")
