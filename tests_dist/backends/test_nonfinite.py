"""One process: NaN and inf reach what sees them, and nothing else, on every kernel that runs here."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import cpattn
from cpattn import AttnMaskSpec
from cpattn.backends import flex
from tests_dist.backends.test_flex import _differentiable
from tests_dist.support.oracle import make_inputs

# Documents of one token are joined to one band for the kernels; 150 tokens take two blocks of flex.
MASKS = {
    "documents": AttnMaskSpec.varlen([1, 1, 1, 1, 29, 0, 117]),
    "window": AttnMaskSpec.sliding_window(150, 9),
    "full documents": AttnMaskSpec.varlen([70, 80], causal=False),
}
# What is poisoned: token 2 is a document of its own, 40 lies inside one.
TOKENS = (2, 40)


def _results(spec: AttnMaskSpec, backend: str, poison: dict[str, float]) -> tuple[list[Tensor], list[Tensor]]:
    """(out, dq, dk, dv) and (q, k, v, dout), with those values at TOKENS in the first head."""
    inputs = make_inputs(spec, heads=(4, 2))
    given = [t.clone() for t in inputs]
    for name, value in poison.items():
        given["qkvd".index(name)][list(TOKENS), 0] = value
    leaves = [t.requires_grad_() for t in given[:3]]
    key = cpattn.make_key(spec, num_heads_q=4, num_heads_kv=2, head_dim=16, backend=backend)
    out = cpattn.attention(*leaves, key)
    return [out.detach(), *torch.autograd.grad(out, leaves, given[3])], given


@pytest.mark.parametrize("poison", [{"k": torch.nan}, {"v": torch.inf}, {"q": torch.nan}, {"d": -torch.inf}])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("backend", ["sdpa", "reference", "flex", "flex on CUDA"])
def test_what_is_not_finite_reaches_what_sees_it(
    backend: str, name: str, poison: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All other elements are bit for bit what they are beside a token of other, finite values."""
    if backend == "flex on CUDA":  # its algebra, without a GPU
        backend = "flex"
        monkeypatch.setattr(flex, "_call", _differentiable)
        monkeypatch.setattr(flex, "_forward_cpu", flex._forward_cuda)
        monkeypatch.setattr(flex, "_backward_cpu", flex._backward_cuda)
        monkeypatch.setattr("cpattn.backends.nonfinite._surely_finite", lambda *_: True)
        monkeypatch.setattr("cpattn.backends.nonfinite._has_nan", lambda _: False)
    spec = MASKS[name]
    visible = torch.from_numpy(spec.to_dense())
    results, _ = _results(spec, backend, poison)
    clean, _ = _results(spec, backend, {})
    bad = torch.zeros(150, dtype=torch.bool)
    bad[list(TOKENS)] = True
    from_key = bool({"k", "v"} & poison.keys())
    rows = visible[:, bad].any(1) if from_key else bad  # queries whose gradient the poison reaches
    keys = visible[rows].any(0)
    outs = rows if from_key or "q" in poison else torch.zeros_like(bad)
    for which, (result, plain, reached) in enumerate(zip(results, clean, (outs, rows, keys, keys), strict=True)):
        assert torch.equal(result[~reached], plain[~reached])
        if reached.any() and not ("v" in poison and which == 3):  # gradients of values do not depend on them
            assert not result[reached].isfinite().all()
        # Heads of another key head stay what they are.
        other = slice(result.shape[1] // 2, None)
        assert torch.equal(result[:, other], plain[:, other])


def test_flex_in_a_compiled_graph_with_gradients_and_a_softcap() -> None:
    key = cpattn.make_key(AttnMaskSpec.causal(97), num_heads_q=2, num_heads_kv=1, head_dim=16, backend="flex")
    leaves = [torch.randn(97, heads, 16, requires_grad=True) for heads in (2, 1, 1)]

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return cpattn.attention(q * 1.0, k, v, key, softcap=20.0).square().sum()

    eager = torch.autograd.grad(step(*leaves), leaves)
    flex._compiled.cache_clear()
    torch._dynamo.reset()
    compiled = torch.autograd.grad(torch.compile(step, backend="aot_eager")(*leaves), leaves)
    for ours, expected in zip(compiled, eager, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("rows", [128, 256])
def test_flex_trains_on_the_cpu_where_nothing_is_padded(rows: int) -> None:
    """flex_attention itself then sees tensors that require gradients, and refuses those on the CPU."""
    spec = AttnMaskSpec.causal(rows)
    for ours, expected in zip(_results(spec, "flex", {})[0], _results(spec, "reference", {})[0], strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("rows", "keys", "heads"), [(8192, 32, 1), (32, 16384, 1), (1024, 32, 8)])
def test_gradients_in_16_bits_keep_their_digits_however_many_are_added(rows: int, keys: int, heads: int) -> None:
    """Over query rows, over keys, and over the query heads of a key head; against the kernel that adds in fp32."""
    spec = AttnMaskSpec.cross([rows], [keys])
    inputs = make_inputs(spec, heads=(heads, 1), dtype=torch.bfloat16)
    dout = inputs.dout + 1  # sums that grow
    results = {}
    for backend, dtype in (("sdpa", torch.bfloat16), ("reference", torch.bfloat16), ("reference", torch.float64)):
        key = cpattn.make_key(spec, num_heads_q=heads, num_heads_kv=1, head_dim=16, backend=backend)
        leaves = [t.detach().to(dtype).requires_grad_() for t in inputs[:3]]
        results[backend, dtype] = torch.autograd.grad(cpattn.attention(*leaves, key), leaves, dout.to(dtype))
    truth = results.pop(("reference", torch.float64))
    ours, exact = (
        [float((g.double() - t).norm() / t.norm()) for g, t in zip(grads, truth, strict=True)]
        for grads in results.values()
    )
    assert all(a < 2.6 * b for a, b in zip(ours, exact, strict=True)), (ours, exact)
