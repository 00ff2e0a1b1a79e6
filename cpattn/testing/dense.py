"""The oracle: dense fp64 attention under a mask that comes straight from the spec.

Shape legend: Q, K tokens, N query heads, G key heads, D, E head dims.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from cpattn import AttnMaskSpec


class Inputs(NamedTuple):
    """Global q, k, v and the gradient of out."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor


class Results(NamedTuple):
    """Everything that attention computes, over all tokens."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


def make_inputs(
    spec: AttnMaskSpec,
    *,
    heads: tuple[int, int],
    head_dim: int = 16,
    head_dim_v: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Inputs:
    """Normal random inputs for a mask, the same wherever they are made."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tokens: int, num_heads: int, dim: int) -> Tensor:
        return torch.randn(tokens, num_heads, dim, generator=generator, dtype=torch.float64).to(dtype)

    head_dim_v = head_dim_v or head_dim
    return Inputs(
        normal(spec.total_seqlen, heads[0], head_dim),
        normal(spec.seqlen_k, heads[1], head_dim),
        normal(spec.seqlen_k, heads[1], head_dim_v),
        normal(spec.total_seqlen, heads[0], head_dim_v),
    )


def dense_attention(
    q_QND: Tensor,
    k_KGD: Tensor,
    v_KGE: Tensor,
    visible_QK: np.ndarray,
    *,
    scale: float,
    softcap: float | None = None,
    sink: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out [Q, N, E], lse [Q, N]) by the definition, in the inputs' dtype; differentiable."""
    groups = q_QND.shape[1] // k_KGD.shape[1]
    k, v = k_KGD.repeat_interleave(groups, 1), v_KGE.repeat_interleave(groups, 1)
    scores = torch.einsum("qnd,knd->nqk", q_QND, k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~torch.from_numpy(visible_QK), -torch.inf)
    if sink is not None:
        logit = sink.to(scores.dtype)[:, None, None].expand(-1, scores.shape[1], 1)
        scores = torch.cat([scores, logit], dim=-1)
        v = torch.cat([v, v.new_zeros(1, *v.shape[1:])])
    lse = torch.logsumexp(scores, dim=-1)
    # Rows that see nothing have lse -inf; the exponent is made finite so that their gradient is 0.
    finite = torch.where(torch.isfinite(lse), lse, torch.zeros_like(lse))
    probabilities = torch.exp(scores - finite[..., None])
    return torch.einsum("nqk,kne->qne", probabilities, v), lse.T


def oracle(spec: AttnMaskSpec, inputs: Inputs, *, scale: float | None = None, **options: Any) -> Results:
    """Results in fp64."""
    leaves = [t.detach().double().clone().requires_grad_() for t in inputs[:3]]
    scale = inputs.q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = leaves
    out, lse = dense_attention(q, k, v, spec.to_dense(), scale=scale, **options)
    grads = torch.autograd.grad(out, leaves, inputs.dout.double())
    return Results(out.detach(), lse.detach(), *grads)


def torch_sdpa(spec: AttnMaskSpec, inputs: Inputs) -> Results:
    """Results of plain single-process torch SDPA in the inputs' dtype, for the size of its error.

    lse is not something SDPA returns: it is the oracle's rounded to fp32.
    """
    visible = torch.from_numpy(spec.to_dense())
    seen = visible.any(1)
    leaves = [t.detach().clone().requires_grad_() for t in inputs[:3]]
    q, k, v = (t.transpose(0, 1)[None] for t in leaves)
    # A row that sees nothing is NaN in SDPA: let it see everything, and take its output away.
    mask = visible | ~seen[:, None]
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    out = out[0].transpose(0, 1) * seen[:, None, None].to(out.dtype)
    grads = torch.autograd.grad(out, leaves, inputs.dout)
    return Results(out.detach(), oracle(spec, inputs).lse.float(), *grads)


def assert_exact(got: Results, truth: Results, what: str = "", tolerance: float = 1e-11) -> None:
    """Results in fp64 equal the oracle's: a pair that is lost, doubled or masked wrongly is off by far more."""
    for name, mine, exact in zip(Results._fields, got, truth, strict=True):
        prefix = f"{what} {name}: "
        torch.testing.assert_close(mine.double(), exact, rtol=tolerance, atol=tolerance, msg=prefix.__add__)


def assert_as_exact_as_sdpa(got: Results, spec: AttnMaskSpec, inputs: Inputs, what: str = "") -> None:
    """Error against fp64 at most twice that of torch SDPA in the same dtype, plus rounding."""
    exact, plain = oracle(spec, inputs), torch_sdpa(spec, inputs)
    eps = torch.finfo(inputs.q.dtype).eps
    for name, mine, truth, theirs in zip(Results._fields, got, exact, plain, strict=True):
        assert mine.shape == truth.shape, f"{what} {name}: shape {tuple(mine.shape)}"
        if not truth.numel():
            continue
        if name == "lse":
            assert torch.equal(torch.isinf(mine), torch.isinf(truth)), f"{what}: lse is -inf elsewhere"
        finite = torch.isfinite(truth)
        assert torch.isfinite(mine[finite]).all(), f"{what}: {name} has NaN or infinity"
        if not finite.any():
            continue
        error = (mine.double() - truth)[finite].abs().max().item()
        allowed = 2 * (theirs.double() - truth)[finite].abs().max().item()
        # Gradients are differences of dO.V and dO.O, which are several times larger than they are themselves.
        steps = 8 if name.startswith("d") else 4
        rounding = steps * eps * max(1.0, truth[finite].abs().max().item())
        assert error <= allowed + rounding, (
            f"{what}: {name} is off by {error:.3g}, plain SDPA by {allowed / 2:.3g}, rounding {rounding:.3g}"
        )
