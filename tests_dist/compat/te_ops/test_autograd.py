"""One process: what fused attention gives autograd, and what it refuses it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cpattn import te_ops
from tests_dist.compat.te_ops.test_convert import prefix_sums

COMMON: dict[str, Any] = {"qkv_layout": "thd_thd_thd", "attn_mask_type": "padding_causal"}


def _inputs(rows: int = 10) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(rows, 2, 8, generator=generator).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("written", ["cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded"])
def test_lengths_written_to_after_forward_change_nothing(written: str) -> None:
    grads = []
    for change in (False, True):
        names = ("cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded")
        sums = {name: prefix_sums((4, 6)) for name in names}
        inputs = _inputs()
        out = te_ops.fused_attn(*inputs, max_seqlen_q=8, max_seqlen_kv=8, **sums, **COMMON)
        if change:
            sums[written].copy_(prefix_sums((6, 4)))
        grads.append(torch.autograd.grad(out.square().sum(), inputs))
    for kept, changed in zip(*grads, strict=True):
        assert torch.equal(kept, changed)


@pytest.mark.parametrize("options", [{}, {"backend": "reference"}, {"attn_bias": torch.zeros(1, 1, 10, 10)}])
def test_a_second_derivative_is_refused(options: dict[str, Any]) -> None:
    x, cu = _inputs()[0], prefix_sums((10,))
    if "attn_bias" in options:
        options = {**options, "attn_bias_type": "post_scale_bias"}
    out = te_ops.fused_attn(x, x, x, cu, cu, 10, 10, **COMMON, **options)
    (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="fused_attn has no second derivative"):
        torch.autograd.grad(first.square().sum(), x)


@pytest.mark.parametrize("softmax_type", ["vanilla", "off-by-one"])
def test_the_plain_operations_leave_no_graph(softmax_type: str) -> None:
    inputs, cu = _inputs(), prefix_sums((10,))
    out, aux = te_ops.fused_attn_fwd(True, 10, 10, cu, cu, *inputs, softmax_type=softmax_type, **COMMON)
    grads = te_ops.fused_attn_bwd(
        10, 10, cu, cu, *inputs, out, torch.ones_like(out), aux_ctx_tensors=aux, softmax_type=softmax_type, **COMMON
    )
    assert not any(t.requires_grad for t in (out, *aux, *grads) if isinstance(t, Tensor))
    table, caches = torch.zeros(1, 1, dtype=torch.int32), [torch.zeros(1, 10, 2, 8) for _ in range(2)]
    te_ops.copy_to_kv_cache(*inputs[1:], *caches, table, cu, cu, "thd", 1, 10, 10, 1, False)
    assert torch.equal(caches[0][0], inputs[1])
    assert not caches[0].requires_grad


@pytest.mark.parametrize("backend", ["auto", "flex"])
@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_scales_that_are_not_positive(scale: float, backend: str) -> None:
    cu, results = prefix_sums((4, 6)), []
    for name in (backend, "reference"):
        inputs = _inputs()
        out = te_ops.fused_attn(*inputs, cu, cu, 6, 6, attn_scale=scale, backend=name, **COMMON)
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_a_scale_that_is_no_number_is_refused() -> None:
    cu = prefix_sums((10,))
    with pytest.raises(ValueError, match="attn_scale is nan: it must be a finite number"):
        te_ops.fused_attn(*_inputs(), cu, cu, 10, 10, attn_scale=float("nan"), **COMMON)
