"""Layer 2: the local part of mixers by fused kernels, against fakes that enforce the rules of the real ones (CPU)."""

from __future__ import annotations

import functools
import sys
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from cpattn import AttnMaskSpec, make_key
from cpattn.mixers import causal_conv1d, fused, linear_attention, mamba2
from tests_dist.mixers.test_mixers import (
    HEADS,
    PACKED,
    RECURRENCES,
    dout_of,
    key_of,
    make_inputs,
    on_shards,
    truth_of,
)
from tests_dist.support.fakes import mixers as fakes
from tests_dist.support.harness import run_on_ranks

# bf16 has 8 bits; outputs and what rows read of a state are each rounded to it.
ROUNDED = 0.03
RARE = ("linear", "lightning", "delta", "forgetful")


def with_fakes() -> Any:
    """fla, mamba_ssm and causal_conv1d as if installed, on the CPU."""
    modules = {"fla.ops": fakes.fla_ops(), "mamba_ssm.ops.triton.ssd_combined": fakes.mamba_ssd()}
    modules["causal_conv1d"] = fakes.causal_conv1d()
    packages = {name: ModuleType(name) for name in ("fla", "mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton")}
    stack = mock.patch.dict(sys.modules, {**packages, **modules})
    return stack, mock.patch.object(fused, "DEVICES", ["cuda", "cpu"])


def relative(got: Tensor, truth: Tensor) -> float:
    return float((got.double() - truth).norm() / truth.norm().clamp(min=1e-6))


def run_fused(q: Tensor, k: Tensor, v: Tensor, key: Any, **options: Tensor) -> Tensor:
    return linear_attention(q, k, v, key, decay=options.get("decay"), beta_TH=options.get("beta"), kernel="fused")


def check_fused(name: str, layout: str, truth: dict[str, Tensor]) -> None:
    key = key_of(PACKED, layout)
    inputs = {n: x.bfloat16() if n in "qkv" else x for n, x in make_inputs(RECURRENCES[name], sum(PACKED)).items()}
    dout = dout_of(inputs).bfloat16()
    modules, devices = with_fakes()
    with modules, devices:
        got = on_shards(run_fused, inputs, dout, key)
    for what, expected in truth.items():
        assert relative(got[what], expected) < ROUNDED, f"{name} {layout}: {what}"


@pytest.mark.parametrize(
    "name",
    ["gated", "gdn", "kda", *(pytest.param(n, marks=pytest.mark.nightly) for n in RARE)],
)
def test_fla_serves_the_local_part(name: str) -> None:
    run_on_ranks(3, check_fused, name, "zigzag", truth_of(name))


def run_mamba(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, key: Any, kernel: fused.Kernel = "torch") -> Tensor:
    A, D = -torch.linspace(0.1, 2.0, 4, dtype=torch.float64), torch.linspace(-1, 1, 4, dtype=torch.float64)
    return mamba2(x, dt, A, B, C, key, D=D, kernel=kernel)


def check_mamba(layout: str, precise: bool) -> None:
    key, alone = key_of(PACKED, layout), make_key(AttnMaskSpec.varlen(list(PACKED)), **HEADS)
    inputs = make_inputs(RECURRENCES["linear"], sum(PACKED))
    steps = make_inputs(RECURRENCES["gdn"], sum(PACKED))["beta"]
    given = {"x": inputs["v"], "dt": steps, "B": inputs["k"], "C": inputs["q"]}
    dout = dout_of(inputs)
    truth = on_shards(run_mamba, given, dout, alone)
    modules, devices = with_fakes()
    with modules, devices:
        rounded = given if precise else {n: x if n == "dt" else x.bfloat16() for n, x in given.items()}
        run = functools.partial(run_mamba, kernel="torch" if precise else "fused")
        got = on_shards(run, rounded, dout.to(rounded["x"].dtype), key)
    for what, expected in truth.items():
        assert relative(got[what], expected) < (1e-10 if precise else ROUNDED), what


@pytest.mark.parametrize("precise", [True, False])
def test_mamba_ssm_serves_the_local_part(precise: bool) -> None:
    run_on_ranks(3, check_mamba, "zigzag", precise)


def check_fused_convolution(channels: int) -> None:
    key = key_of(PACKED, "zigzag")
    x = torch.randn(key.num_tokens, channels, dtype=torch.float32, requires_grad=True)
    weight, bias = torch.randn(channels, 4, requires_grad=True), torch.randn(channels)
    results = []
    modules, devices = with_fakes()
    with modules, devices:
        for kernel in ("torch", "fused"):
            out = causal_conv1d(x, weight, key, bias_C=bias, activation="silu", kernel=kernel)  # type: ignore[arg-type]
            results.append((out, *torch.autograd.grad(out.square().sum(), [x, weight])))
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels", [16, 6])
def test_causal_conv1d_serves_the_convolution(channels: int) -> None:
    run_on_ranks(3, check_fused_convolution, channels)


def test_kernels_are_chosen_on_cuda_alone() -> None:
    key = make_key(AttnMaskSpec.varlen([3, 19]), **HEADS)
    q, v = torch.zeros(22, 2, 6, dtype=torch.bfloat16), torch.zeros(22, 4, 5, dtype=torch.bfloat16)
    modules, devices = with_fakes()
    with modules:
        assert "on cpu" in str(fused.refuse_recurrence(q, v))
        with pytest.raises(ValueError, match="tensors are on cpu"):
            linear_attention(q, q, v, key, kernel="fused")
        linear_attention(q, q, v, key)
        with devices:
            assert fused.refuse_recurrence(q, v) is None
            for refused, why in (
                (fused.refuse_recurrence(q, v.float()), "16-bit"),
                (fused.refuse_recurrence(torch.zeros(22, 2, 300), v), "at most 256"),
                (fused.refuse_mamba2(v.double()), "16-bit"),
                (fused.refuse_convolution(v, 5), "2 to 4"),
            ):
                assert why in str(refused)
    with pytest.raises(ValueError, match="kernel is 'fast'"):
        causal_conv1d(v.flatten(1), torch.zeros(20, 4), key, kernel="fast")  # type: ignore[arg-type]


def test_a_package_that_is_not_there_is_named() -> None:
    with mock.patch.object(fused, "DEVICES", ["cpu"]):
        refusal = fused.refuse_recurrence(torch.zeros(4, 1, 8), torch.zeros(4, 1, 8, dtype=torch.bfloat16))
    assert "flash-linear-attention is not installed" in str(refusal)
