"""Layer 3, one GPU: the memory that a key states against what the caching allocator gives out."""

from __future__ import annotations

import pytest
import torch

import cpattn
from cpattn import AttnMaskSpec

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", [AttnMaskSpec.causal(8192), AttnMaskSpec.varlen([5000, 3000, 192])])
def test_stated_memory_is_the_measured_one(spec: AttnMaskSpec, dtype: torch.dtype) -> None:
    """Forward and backward on one rank, within 10 %; `sdpa`, whose kernels are torch's operators."""
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    key = cpattn.make_key(spec, num_heads_q=8, num_heads_kv=2, head_dim=64, backend="sdpa")
    q, k, v = (torch.randn(key.num_tokens, h, 64, dtype=dtype, device="cuda", requires_grad=True) for h in (8, 2, 2))
    stated = key.memory(dtype, "cuda")

    def peak_above(before: int) -> int:
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    for _ in range(2):  # the first call fills caches
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = cpattn.attention(q, k, v, key)
        forward = peak_above(before)
        dout = torch.randn_like(out)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        grads = torch.autograd.grad(out, (q, k, v), dout)
        backward = peak_above(before)
        del out, grads
    assert stated.forward == pytest.approx(forward, rel=0.1)
    assert stated.backward == pytest.approx(backward, rel=0.1)
