"""One process: the arguments and the order of TransformerEngine 2.20, and biases that all queries share."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from cpattn.te_ops import extension, fused_attn, fused_attn_bwd, fused_attn_fwd

SUMS = torch.tensor([0, 5, 12], dtype=torch.int32)
LAYOUT = "bshd_bshd_bshd"


def tensors() -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(2, 7, 4, 8, generator=g, dtype=torch.float64) for _ in range(4)]


def older() -> tuple[Tensor, Any, list[Tensor]]:
    q, k, v, dout = tensors()
    masks = ("no_bias", "padding_causal")
    out, aux = fused_attn_fwd(True, 7, 7, SUMS, SUMS, q, k, v, None, None, *[None] * 7, 0.3, 0.0, True, LAYOUT, *masks)
    grads = fused_attn_bwd(
        7, 7, SUMS, SUMS, q, k, v, out, dout, None, None, aux, None, *[None] * 5, 0.3, 0.0, True, LAYOUT, *masks
    )
    return out, aux, list(grads[:3])


def test_the_order_of_2_20_by_position():
    q, k, v, dout = tensors()
    want, _, grads = older()
    masks = ("no_bias", "padding_causal")
    out, aux = fused_attn_fwd(
        True, 7, 7, SUMS, SUMS, q, k, v, None, None, *[None] * 7, 0.3, 0.0, True, LAYOUT, "sbhd", None, *masks
    )
    assert torch.equal(out.transpose(0, 1), want)
    formats = ("sbhd", "bhsd", "sbhd_sbhd_sbhd", None, None)
    got = fused_attn_bwd(
        7, 7, SUMS, SUMS, q, k, v, out, dout.transpose(1, 2), None, aux, None, *[None] * 5, 0.3, 0.0, True, LAYOUT,
        *formats, *masks,
    )  # fmt: skip
    for mine, theirs in zip(got[:3], grads, strict=True):
        assert torch.equal(mine.transpose(0, 1), theirs)


def test_the_extension_in_the_order_of_2_20():
    q, k, v, dout = tensors()
    want, _, grads = older()

    def member(name: str) -> Any:
        return SimpleNamespace(name=name)

    masks = (member("NVTE_NO_BIAS"), member("NVTE_PADDING_CAUSAL_MASK"), member("NVTE_VANILLA_SOFTMAX"), (-1, -1), None)
    fmt, layout = member("NVTE_BSHD"), member("NVTE_BSHD_BSHD_BSHD")
    out, *aux = extension.fused_attn_fwd(7, 7, True, 0.3, 0.0, True, layout, fmt, fmt, *masks, SUMS, SUMS, q, k, v)
    assert torch.equal(out, want)
    formats = (layout, fmt, fmt, layout, fmt, fmt)
    got = extension.fused_attn_bwd(
        7, 7, 0.3, 0.0, True, *formats, *masks, False, SUMS, SUMS, q, k, v, out, dout, None, aux
    )
    assert all(torch.equal(a, b) for a, b in zip(got[:3], grads, strict=True))


def test_formats_have_gradients():
    q, k, v, dout = tensors()
    leaves = [t.requires_grad_() for t in (q, k, v)]
    call = {"qkv_layout": LAYOUT, "attn_mask_type": "padding_causal", "attn_scale": 0.3, "o_format": "bhsd"}
    fused_attn(*leaves, SUMS, SUMS, 7, 7, **call).backward(dout.transpose(1, 2))
    for leaf, want in zip(leaves, older()[2], strict=True):
        assert torch.equal(leaf.grad, want)


def test_formats_that_do_not_fit_are_refused():
    q, k, v, dout = tensors()
    call = {"qkv_layout": LAYOUT, "attn_mask_type": "padding_causal"}
    with pytest.raises(ValueError, match="o_format is 'thd' and q has 'bshd'"):
        fused_attn_fwd(True, 7, 7, SUMS, SUMS, q, k, v, **call, o_format="thd")
    out, aux = fused_attn_fwd(True, 7, 7, SUMS, SUMS, q, k, v, **call)
    with pytest.raises(ValueError, match="dqkv_layout is 'thd_thd_thd', qkv_layout 'bshd_bshd_bshd'"):
        fused_attn_bwd(7, 7, SUMS, SUMS, q, k, v, out, dout, aux_ctx_tensors=aux, **call, dqkv_layout="thd_thd_thd")
    order = (True, 7, 7, SUMS, SUMS, q, k, v, None, None, *[None] * 7, 0.3, 0.0, True, LAYOUT, "sbhd")
    with pytest.raises(TypeError, match=r"twice: \['cu_seqlens_q'\]"):
        fused_attn_fwd(*order, cu_seqlens_q=SUMS)


def test_a_bias_that_all_queries_share():
    """Shape 111s of TransformerEngine's tables, against the same bias written out."""
    q, k, v, dout = tensors()
    call = {"qkv_layout": LAYOUT, "attn_mask_type": "no_mask", "attn_bias_type": "post_scale_bias"}
    shared = torch.randn(1, 1, 1, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    results = []
    for bias in (shared, shared.expand(1, 1, 7, 7).contiguous()):
        bias.requires_grad_()
        out = fused_attn(q, k, v, SUMS, SUMS, 7, 7, attn_bias=bias, **call)
        out.backward(dout)
        results.append((out.detach(), bias.grad))
    (out, dbias), (whole, dwhole) = results
    torch.testing.assert_close(out, whole)
    assert float(dbias.abs().max()) > 1e-3
    torch.testing.assert_close(dbias, dwhole.sum(2, keepdim=True))
