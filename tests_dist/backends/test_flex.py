"""flex_attention: block masks from slices, compilations, score functions, its CUDA backward's algebra."""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import flex_attention

import cpattn
from cpattn import AttnMaskSpec
from cpattn.backends import flex
from cpattn.backends.base import Attending, KeyRows, Returning, Scoring
from cpattn.backends.flex import BLOCK, FlexBackend, make_passes
from cpattn.solver import SliceTable
from tests_dist.support.backend_cases import CASES, check_backend, random_table
from tests_dist.support.fakes.dense import attend
from tests_dist.support.oracle import Results, assert_as_exact_as_sdpa, make_inputs

CPU = torch.device("cpu")


@pytest.mark.parametrize("seed", range(12))
def test_block_masks_are_the_slices(seed: int) -> None:
    """Every pair of the table in one pass; blocks are full, partial or absent as their pairs are."""
    table = random_table(seed, 400, 6)
    dense = np.zeros((bucketed := flex.bucket(400), bucketed), dtype=int)
    dense[:400, :400] = table.to_dense(400, 400)
    total = np.zeros_like(dense)
    for step in make_passes(table, 400, 400, CPU):
        at = torch.arange(bucketed)
        seen = step.blocks.mask_mod(at, at, at[:, None], at).numpy()
        total += seen
        counts = seen.reshape(bucketed // BLOCK, BLOCK, -1, BLOCK).sum((1, 3))
        full, partial = np.zeros_like(counts), np.zeros_like(counts)
        for row in range(len(counts)):
            for marks, num, index in (
                (partial, step.blocks.kv_num_blocks, step.blocks.kv_indices),
                (full, step.blocks.full_kv_num_blocks, step.blocks.full_kv_indices),
            ):
                marks[row, index[0, 0, row, : num[0, 0, row]].numpy()] = 1
        assert (full == (counts == BLOCK * BLOCK)).all()
        assert (partial == ((counts > 0) & (counts < BLOCK * BLOCK))).all()
    assert (total == dense).all()


def test_rows_with_many_intervals_take_several_passes() -> None:
    table = SliceTable.from_columns(0, 50, np.arange(0, 60, 6), np.arange(3, 63, 6), -1000, 1000)
    assert len(make_passes(table, 50, 60, CPU)) == 3  # ten intervals, four a pass


def _masks(count: int) -> list[SliceTable]:
    """Different documents under one class of shapes: an interval a row, the same buckets."""
    rng = np.random.default_rng(0)
    tables = []
    for _ in range(count):
        cuts = np.sort(rng.choice(np.arange(1, 500), 4, replace=False))
        starts, ends = np.append(0, cuts), np.append(cuts, 500 + rng.integers(0, 12))
        tables.append(SliceTable.from_columns(starts, ends, starts, ends, -1000, 0))
    return tables


def test_200_masks_compile_once_on_the_runtime_path() -> None:
    """Counted where torch's compiler decides to compile; on CPU its back end is the uncompiled one."""
    torch._dynamo.reset()
    flex._compiled.cache_clear()
    before = counters["stats"]["unique_graphs"]
    backend = FlexBackend()
    for table in _masks(200):
        size = int(table.q1.max())
        q = torch.randn(size, 1, 16)
        work = backend.prepare(table, size, size, CPU)
        out, lse = torch.zeros(size, 1, 16), torch.full((size, 1), -torch.inf)
        backend.forward(Attending(q, out, lse), KeyRows(q, q), work, Scoring(0.25), fresh=True)
        assert torch.isfinite(lse).all()
    assert counters["stats"]["unique_graphs"] - before == 1


@pytest.mark.nightly
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_200_masks_compile_once_for_the_cpu_forward_without_lse() -> None:
    """Compiled for real; torch compiles no lse for the CPU."""
    torch._dynamo.reset()
    before = counters["stats"]["unique_graphs"]
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    q = torch.randn(1, 1, 512, 16)
    for number, table in enumerate(_masks(200)):
        (step,) = make_passes(table, 500, 500, CPU)
        out = compiled(q, q, q, block_mask=step.blocks, scale=0.25)
        if number % 50 == 0:
            visible = torch.from_numpy(table.to_dense(512, 512))
            truth, _ = attend(*(q[0].transpose(0, 1),) * 3, visible, 0.25)
            torch.testing.assert_close(out[0].transpose(0, 1)[:500], truth[:500], atol=1e-5, rtol=1e-5)
    assert counters["stats"]["unique_graphs"] - before == 1


def _alibi(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return score * 1.5 - 0.1 * (h + 1) * (q - k).abs()


def test_score_mod_takes_part_forward_and_backward() -> None:
    """Against autograd through the same function, rows in several blocks."""
    table = CASES["causal"].table
    size, heads, dim = 129, 2, 16
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(size, heads, dim, generator=generator).double().requires_grad_() for _ in range(3)]
    dout = torch.randn(size, heads, dim, generator=generator).double()
    at = torch.arange(size)
    scores = torch.einsum("qnd,knd->nqk", leaves[0], leaves[1]) * 0.3
    changed = _alibi(scores, at, torch.arange(heads)[:, None, None], at[:, None], at)
    visible = torch.from_numpy(table.to_dense(size, size))
    truth = torch.einsum("nqk,kne->qne", changed.masked_fill(~visible, -torch.inf).softmax(-1), leaves[2])
    grads = torch.autograd.grad(truth, leaves, dout)

    backend = FlexBackend(score_mod=_alibi)
    work = backend.prepare(table, size, size, CPU)
    q, k, v = (t.detach() for t in leaves)
    out, lse = torch.zeros_like(q), torch.full((size, heads), -torch.inf, dtype=torch.float64)
    keys, scoring = KeyRows(k, v), Scoring(0.3)
    backend.forward(Attending(q, out, lse), keys, work, scoring)
    mine = [torch.zeros_like(t) for t in (q, k, v)]
    backend.backward(Returning(dout, q, out, lse, mine[0]), keys, work, scoring, KeyRows(*mine[1:]))
    torch.testing.assert_close(out, truth.detach(), atol=1e-12, rtol=1e-12)
    for got, expected in zip(mine, grads, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-11, rtol=1e-11)


def _differentiable(q: Tensor, k: Tensor, v: Tensor, step: flex.Pass, scale: float, score_mod: Any) -> Any:
    """What the compiled function computes on CUDA, dense."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    at_q, at_k = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    scores = q @ k.transpose(-1, -2) * scale
    if score_mod is not None:
        scores = score_mod(scores, at_q, at_q, at_q, at_k)
    visible = step.blocks.mask_mod(at_q, at_q, at_q, at_k)
    scores = torch.where(visible, scores.float(), -1e30)
    seen = visible.any(-1)
    lse = torch.where(seen, scores.logsumexp(-1), -torch.inf)
    p = torch.exp(scores - torch.where(seen, lse, 0.0)[..., None]) * visible
    return (p @ v.float()).to(q.dtype), lse


@pytest.mark.parametrize(
    "name", ["random_0", "random_1", "grouped_heads", "shared_prefix", "narrow_values", "softcap", "window"]
)
def test_the_cuda_backward_is_exact_for_parts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients through out and lse of a part add up to those of the whole: the algebra, without a GPU."""
    monkeypatch.setattr(flex, "_call", _differentiable)
    monkeypatch.setattr(flex, "_forward_cpu", flex._forward_cuda)
    monkeypatch.setattr(flex, "_backward_cpu", flex._backward_cuda)
    check_backend(FlexBackend(), name, torch.float32, num_parts=3)


def test_the_cuda_backward_finds_autograd_below_a_custom_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.library switches autograd off underneath its operations; `attention` is one."""
    spec = AttnMaskSpec.sliding_window([70, 31], 20)
    inputs = make_inputs(spec, heads=(4, 2), head_dim=32)
    monkeypatch.setattr(flex, "_forward_cpu", flex._forward_cuda)
    monkeypatch.setattr(flex, "_call", _differentiable)
    monkeypatch.setattr(flex, "_backward_cpu", flex._backward_cuda)
    key = cpattn.make_key(spec, num_heads_q=4, num_heads_kv=2, head_dim=32, backend="flex")
    leaves = [t.requires_grad_() for t in inputs[:3]]
    out, lse = cpattn.attention(*leaves, key, return_lse=True)
    grads = torch.autograd.grad(out, leaves, inputs.dout)
    plain = inputs._replace(**{n: t.detach() for n, t in zip("qkv", leaves, strict=True)})
    assert_as_exact_as_sdpa(Results(out.detach(), lse, *grads), spec, plain)
