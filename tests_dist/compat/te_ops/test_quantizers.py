"""One process: 8-bit floats bit for bit, quantizers against their definitions, FP8 attention within its tolerance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cpattn.te_ops import (
    CurrentScalingQuantizer,
    DelayedScalingQuantizer,
    Fp8Tensor,
    MXFP8Quantizer,
    NoQuantizer,
    fused_attn_bwd,
    fused_attn_fwd,
    quantizer_helper,
)
from cpattn.te_ops.fp8 import (
    E4M3,
    E5M2,
    current_scale,
    exponents_to_scale,
    from_fp8_bits,
    quantize_bits,
    scale_exponents,
    to_fp8_bits,
)

FORMATS = [E4M3, E5M2]


def all_of(dtype: torch.dtype) -> Tensor:
    return torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype)


def some_float32() -> Tensor:
    """Random bit patterns, and the neighbourhood of every rounding boundary."""
    g = torch.Generator().manual_seed(0)
    bits = torch.randint(-(1 << 31), (1 << 31) - 1, (500_000,), generator=g, dtype=torch.int64).to(torch.int32)
    near = []
    for fmt in FORMATS:
        exact = from_fp8_bits(torch.arange(256, dtype=torch.uint8), fmt)
        exact = exact[exact.isfinite()].sort().values
        middle = (exact[1:] + exact[:-1]) / 2
        for edge in (exact, middle):
            near += [edge, edge.nextafter(torch.tensor(torch.inf)), edge.nextafter(torch.tensor(-torch.inf))]
    return torch.cat([bits.view(torch.float32), *near])


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_casts_equal_torch_in_every_bit(fmt, source):
    """All 65536 values of the 16-bit formats; half a million bit patterns and all boundaries in fp32."""
    x = all_of(source) if source.itemsize == 2 else some_float32().to(source)
    assert torch.equal(to_fp8_bits(x, fmt), x.to(fmt.torch_dtype).view(torch.uint8))


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_values_equal_torch(fmt):
    code = torch.arange(256, dtype=torch.uint8)
    mine, theirs = from_fp8_bits(code, fmt), code.view(fmt.torch_dtype).float()
    assert torch.equal(mine.isnan(), theirs.isnan())
    assert torch.equal(mine.nan_to_num(7.0), theirs.nan_to_num(7.0))
    assert torch.equal(from_fp8_bits(code, fmt, torch.bfloat16).nan_to_num(7.0), mine.bfloat16().nan_to_num(7.0))


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_overflow_is_chosen_or_torchs(fmt):
    x = torch.tensor([fmt.max * 2, -torch.inf, torch.nan, fmt.max])
    assert from_fp8_bits(to_fp8_bits(x, fmt, saturate=True), fmt)[[0, 1, 3]].tolist() == [fmt.max, -fmt.max, fmt.max]
    unbounded = from_fp8_bits(to_fp8_bits(x, fmt, saturate=False), fmt)
    assert unbounded[:2].isinf().all() if fmt.has_inf else unbounded[:2].isnan().all()
    assert unbounded[2].isnan()
    saturated = from_fp8_bits(quantize_bits(x, 3.0, fmt), fmt)
    assert saturated[0] == fmt.max
    assert saturated[2].isnan()


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_scales(fmt):
    amax = torch.rand(5000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-38, 38, 5000)
    scale = current_scale(amax, fmt)
    normal = amax > 1e-33
    assert ((amax * scale)[normal] / fmt.max - 1).abs().max() < 1e-6
    power = current_scale(amax, fmt, power_of_two=True)
    assert torch.equal(torch.frexp(power).mantissa, torch.full_like(power, 0.5))
    assert ((power <= scale) & (power * 2 > scale)).all()
    special = torch.tensor([0.0, torch.inf, torch.nan])
    assert current_scale(special, fmt).tolist() == [1.0, 1.0, 1.0]
    e8m0 = exponents_to_scale(scale_exponents(amax, fmt))
    assert (amax / e8m0 <= fmt.max).all()
    assert ((amax / (e8m0 / 2) > fmt.max) | (e8m0 <= 2.0**-126)).all()
    assert exponents_to_scale(torch.arange(255, dtype=torch.uint8)).log2().tolist() == list(range(-127, 128))


def test_delayed_scaling_follows_its_recipe():
    """Scale from the largest of the last amaxes; unchanged after a step of zeros or of infinity."""
    q = DelayedScalingQuantizer(E4M3)
    history = torch.zeros(3)
    for largest, expected in ((7.0, 448 / 7), (0.5, 448 / 7), (3.5, 448 / 7), (0.25, 448 / 3.5)):
        x = torch.tensor([largest, -largest / 2])
        before = q.scale.item()
        stored = q.quantize(x)
        assert isinstance(stored, Fp8Tensor)
        wanted = (x * before).clamp(-448, 448).to(torch.float8_e4m3fn)
        assert torch.equal(stored.data, wanted.view(torch.uint8))
        torch.testing.assert_close(stored.dequantize(), wanted.float() / before)
        q.quantize(x / 2)
        assert q.amax.item() == largest
        q.update_scale(history)
        assert q.scale.item() == pytest.approx(expected)
        assert q.amax.item() == 0
    for bad in (torch.zeros(2), torch.tensor([torch.inf])):
        scale = q.scale.item()
        q.quantize(bad)
        q.update_scale(history, algorithm="most_recent")
        assert q.scale.item() == scale
    q.quantize(torch.tensor([2.0]))
    q.update_scale(history, margin=1.0, algorithm="most_recent")
    assert q.scale.item() == 112.0


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_current_scaling_uses_the_whole_range(fmt):
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)) * 1e-4
    stored = CurrentScalingQuantizer(fmt).quantize(x)
    assert stored.dequantize().abs().max().item() == pytest.approx(x.abs().max().item(), rel=1e-6)
    error = (stored.dequantize() - x).abs() / x.abs().clamp(min=1e-7)
    assert error.max() <= 2.0 ** -(fmt.mantissa_bits + 1) * 1.01
    assert CurrentScalingQuantizer(fmt).quantize(torch.zeros(3)).dequantize().tolist() == [0.0] * 3
    assert CurrentScalingQuantizer(fmt).quantize(torch.zeros(0, 4)).shape == (0, 4)
    clamped = CurrentScalingQuantizer(fmt, amax_epsilon=1.0).quantize(x)
    assert clamped.scale_inv.item() == pytest.approx(1 / fmt.max)


def test_mxfp8_blocks():
    """A block of tiny numbers beside one of large ones keeps its digits; every block against the plain definition."""
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(0))
    x[:, :32] *= 1e-5
    x[:, 64:] *= 1e5
    x[1, 32:64] = 0
    stored = MXFP8Quantizer().quantize(x)
    for row in range(3):
        for block in range(3):
            part = x[row, 32 * block : 32 * block + 32]
            exponent = -127 if not part.any() else int(torch.ceil(torch.log2(part.abs().max() / 448)))
            assert stored.scale_inv[row, block].item() == exponent + 127
            wanted = (part / 2.0**exponent).to(torch.float8_e4m3fn)
            assert torch.equal(stored.data[row, 32 * block : 32 * block + 32], wanted.view(torch.uint8))
    relative = (stored.dequantize() - x).norm() / x.norm()
    assert relative < 0.04
    with pytest.raises(ValueError, match="a multiple of 32: the shape is"):
        MXFP8Quantizer().quantize(torch.zeros(2, 40))


def test_quantizer_helper_makes_the_right_storage():
    plain = quantizer_helper(None, (2, 3), torch.bfloat16)
    assert (plain.kind, plain.tensor.dtype, plain.scale) == ("none", torch.bfloat16, None)
    data = torch.zeros(2, 3)
    assert quantizer_helper(NoQuantizer(), (2, 3), torch.float32, data=data).tensor is data
    delayed = DelayedScalingQuantizer(scale=torch.tensor([4.0]))
    made = quantizer_helper(delayed, (2, 3), torch.bfloat16)
    assert isinstance(made.tensor, Fp8Tensor)
    assert made.scale is delayed.scale
    assert made.amax is delayed.amax
    assert made.tensor.scale_inv.item() == 0.25
    bits = torch.zeros(0, dtype=torch.uint8)
    assert quantizer_helper(delayed, (0,), torch.float32, data=bits).tensor.data is bits
    hp = quantizer_helper(CurrentScalingQuantizer(), (4,), torch.float16, create_hp_tensor=True)
    assert hp.tensor.dtype == torch.float16
    assert hp.amax is not None
    assert isinstance(quantizer_helper(CurrentScalingQuantizer(E5M2), (4,), torch.float16).tensor, Fp8Tensor)
    mx = quantizer_helper(MXFP8Quantizer(), (2, 64), torch.bfloat16).tensor
    assert mx.scale_inv.shape == (2, 2)
    assert mx.dtype == torch.bfloat16
    for quantizer, name in ((CurrentScalingQuantizer(), "Float8CurrentScaling"), (MXFP8Quantizer(), "MXFP8")):
        with pytest.raises(ValueError, match=f"{name} quantizer cannot wrap existing data"):
            quantizer_helper(quantizer, (64,), torch.float32, data=torch.zeros(64))
    with pytest.raises(ValueError, match="delayed scaling wraps fp8 bits, uint8"):
        quantizer_helper(delayed, (2, 3), torch.float32, data=data)
    with pytest.raises(ValueError, match=r"data has shape \(2, 3\): expected \(3, 3\)"):
        quantizer_helper(None, (3, 3), torch.float32, data=data)
    with pytest.raises(ValueError, match="a multiple of 32"):
        quantizer_helper(MXFP8Quantizer(), (2, 40), torch.float32)


def quantizers(kind: str) -> dict[str, object]:
    """For q, k, v, S, O (E4M3), and dO, dP, dQKV (E5M2), as TransformerEngine's hybrid recipe has them."""
    make = {"current": CurrentScalingQuantizer, "mxfp8": MXFP8Quantizer}.get(kind)
    if make is not None:
        return {
            "fwd": make(E4M3),
            "s": CurrentScalingQuantizer(E4M3),
            "bwd": make(E5M2),
            "dp": CurrentScalingQuantizer(E5M2),
        }
    # Delayed scaling after its first steps: scales that fit.
    return {
        "fwd": DelayedScalingQuantizer(E4M3, scale=torch.tensor([64.0])),
        "s": DelayedScalingQuantizer(E4M3, scale=torch.tensor([256.0])),
        "bwd": DelayedScalingQuantizer(E5M2, scale=torch.tensor([8192.0])),
        "dp": DelayedScalingQuantizer(E5M2, scale=torch.tensor([8192.0])),
    }


@pytest.mark.parametrize("kind", ["delayed", "current", "mxfp8"])
@pytest.mark.parametrize("mask", ["no_mask", "causal", "padding_causal"])
def test_fp8_attention_is_within_te_tolerance(kind, mask):
    """RMSE below 0.15 of the range, which TransformerEngine's tests ask for; measured about a tenth of that."""
    g = torch.Generator().manual_seed(0)
    b, s, h, d = 2, 128, 4, 64
    q, k, v, dout = (torch.randn(b, s, h, d, generator=g).clamp(-1, 1).bfloat16() for _ in range(4))
    cu = torch.arange(b + 1, dtype=torch.int32) * s
    shared = {
        "max_seqlen_q": s,
        "max_seqlen_kv": s,
        "cu_seqlens_q": cu,
        "cu_seqlens_kv": cu,
        "qkv_layout": "bshd_bshd_bshd",
        "attn_mask_type": mask,
        "fake_dtype": torch.bfloat16,
    }
    exact_in = [t.double() for t in (q, k, v)]
    o64, aux64 = fused_attn_fwd(True, q=exact_in[0], k=exact_in[1], v=exact_in[2], **{**shared, "fake_dtype": None})
    truth = [
        o64,
        *fused_attn_bwd(
            q=exact_in[0],
            k=exact_in[1],
            v=exact_in[2],
            o=o64,
            d_o=dout.double(),
            aux_ctx_tensors=aux64,
            **{**shared, "fake_dtype": None},
        )[:3],
    ]
    by_role = quantizers(kind)
    q8, k8, v8 = (by_role["fwd"].quantize(t) for t in (q, k, v))
    out, aux = fused_attn_fwd(True, q=q8, k=k8, v=v8, s_quantizer=by_role["s"], o_quantizer=by_role["fwd"], **shared)
    assert isinstance(out, Fp8Tensor)
    assert out.dequantize().dtype == torch.bfloat16
    grads = fused_attn_bwd(
        q=q8,
        k=k8,
        v=v8,
        o=out,
        d_o=by_role["bwd"].quantize(dout),
        aux_ctx_tensors=aux,
        s_quantizer=by_role["s"],
        dp_quantizer=by_role["dp"],
        dqkv_quantizer=by_role["bwd"],
        **shared,
    )[:3]
    for name, mine, exact in zip(("out", "dq", "dk", "dv"), (out, *grads), truth, strict=True):
        error = mine.dequantize().double() - exact
        share = error.pow(2).mean().sqrt() / (exact.max() - exact.min())
        print(f"{kind} {mask}: RMSE of {name} is {share:.4f} of its range")
        assert share < 0.03, f"{name}: RMSE is {share:.4f} of the range"
    if kind == "delayed":
        assert by_role["s"].amax.item() > 0


def test_fp8_inputs_alone_go_through_the_fast_kernel():
    """Without quantizers for the probabilities, only the inputs are rounded: equal to attention of the rounded ones."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 16, 2, 32, generator=g) for _ in range(3))
    cu = torch.tensor([0, 16], dtype=torch.int32)
    shared = {
        "max_seqlen_q": 16,
        "max_seqlen_kv": 16,
        "cu_seqlens_q": cu,
        "cu_seqlens_kv": cu,
        "qkv_layout": "bshd_bshd_bshd",
        "attn_mask_type": "causal",
    }
    stored = [MXFP8Quantizer().quantize(t) for t in (q, k, v)]
    out, _ = fused_attn_fwd(False, q=stored[0], k=stored[1], v=stored[2], **shared)
    plain, _ = fused_attn_fwd(
        False, q=stored[0].dequantize(), k=stored[1].dequantize(), v=stored[2].dequantize(), **shared
    )
    assert torch.equal(out, plain)
