"""Runtime layer: keys and values that forward fetched, kept for backward."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

import cpattn
from cpattn import AttnMaskSpec
from tests_dist.support.compile_cases import CountingCompiler
from tests_dist.support.harness import run_on_ranks
from tests_dist.support.oracle import make_inputs
from tests_dist.support.profiles import grid

HEADS, DIM = (4, 2), 16


def keys_for(spec: AttnMaskSpec, options: dict[str, Any]) -> tuple[cpattn.AttnKey, cpattn.AttnKey]:
    """A key that fetches again in backward and one that keeps."""
    shape = {"num_heads_q": HEADS[0], "num_heads_kv": HEADS[1], "head_dim": DIM}
    plain, keeping = (
        cpattn.make_key(spec, **shape, cp_group=dist.group.WORLD, chunk_size=8, keep_kv=keep, **options)
        for keep in (False, True)
    )
    return plain, keeping


def counted(function: Any, *args: Any, **options: Any) -> tuple[Any, int]:
    """The result, and the exchanges that it took."""
    with mock.patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single) as exchange:
        result = function(*args, **options)
    return result, exchange.call_count


def keep_on_rank(spec: AttnMaskSpec, options: dict[str, Any], dtype: torch.dtype) -> list[int]:
    """Exchanges in backward without and with keeping; the results are the same bits."""
    counts, results = [], []
    for key in keys_for(spec, options):
        q, k, v, dout = (cpattn.dispatch(t, key) for t in make_inputs(spec, heads=HEADS, head_dim=DIM, dtype=dtype))
        leaves = [t.requires_grad_() for t in (q, k, v)]
        out, lse = cpattn.attention(*leaves, key, return_lse=True)
        grads, count = counted(torch.autograd.grad, out, leaves, dout)
        counts.append(count)
        results.append((out, lse, *grads))
    for plain, keeping in zip(*results, strict=True):
        assert torch.equal(plain, keeping)
    return counts


@grid(num_stages=[1, 3], dtype=[torch.float32, torch.bfloat16], wire=[None, "e4m3"])
def test_backward_fetches_no_keys_again(num_stages, dtype, wire):
    """Backward without keeping: keys and their gradients; with it the gradients alone."""
    options = {"num_stages": num_stages, "schedule": "keys", "wire": wire}
    for counts in run_on_ranks(3, keep_on_rank, AttnMaskSpec.causal(301), options, dtype):
        assert counts == [2 * num_stages, num_stages]


def test_where_queries_travel_they_travel_again():
    """Queries go out with dout and dq comes home, whether keys are kept or not."""
    options = {"num_stages": 2, "schedule": "tiles"}
    for counts in run_on_ranks(4, keep_on_rank, AttnMaskSpec.causal(301), options, torch.float32):
        assert counts == [2 * 2 + 2, 2 + 2]


def test_two_levels():
    """A row crosses in two hops; none of them runs again."""
    options = {"num_stages": 2, "schedule": "keys", "ranks_per_node": 2}
    for plain, keeping in run_on_ranks(4, keep_on_rank, AttnMaskSpec.causal(301), options, torch.float32):
        assert plain == 2 * keeping > 0


def test_with_head_sharding():
    """The attention between the exchanges of heads keeps its keys."""
    options = {"num_stages": 1, "schedule": "keys", "head_degree": 2}
    for plain, keeping in run_on_ranks(4, keep_on_rank, AttnMaskSpec.causal(301), options, torch.float32):
        assert plain - keeping == 1


@pytest.mark.parametrize("lengths", [[16, 16, 16], [40, 1, 3], [2]])
def test_ranks_that_fetch_nothing(lengths):
    """What a rank has to keep differs between ranks; which exchanges run does not."""
    run_on_ranks(3, keep_on_rank, AttnMaskSpec.varlen(lengths), {}, torch.float32)


def checkpoint_on_rank() -> tuple[int, int]:
    """Exchanges of forward, and of backward with its recomputation, under the checkpoint policy."""
    spec = AttnMaskSpec.causal(200)
    _, key = keys_for(spec, {"num_stages": 2, "schedule": "keys"})
    q, k, v = (cpattn.dispatch(t, key).requires_grad_() for t in make_inputs(spec, heads=HEADS, head_dim=DIM)[:3])

    def block(q: torch.Tensor) -> torch.Tensor:
        return cpattn.attention(q * 2, k, v, key).sin()

    expected = torch.autograd.grad(block(q).sum(), (q, k, v))
    out, forward = counted(
        checkpoint, block, q, use_reentrant=False, context_fn=cpattn.attention_checkpoint_contexts
    )
    grads, backward = counted(torch.autograd.grad, out.sum(), (q, k, v))
    for mine, plain in zip(grads, expected, strict=True):
        assert torch.equal(mine, plain)
    return forward, backward


def test_checkpointing_keeps_them_too():
    assert run_on_ranks(2, checkpoint_on_rank) == [(2, 2)] * 2


def compile_on_rank() -> tuple[int, list[int]]:
    """Compilations of one function over several masks, and exchanges of each compiled backward."""
    compiler, exchanges = CountingCompiler(), []

    def layer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key: cpattn.AttnKey) -> torch.Tensor:
        return cpattn.attention(q.sin(), k, v, key).cos()

    compiled = torch.compile(layer, fullgraph=True, backend=compiler)
    for n in range(8):
        spec = AttnMaskSpec.causal(90 + 7 * n) if n % 2 else AttnMaskSpec.varlen([60 + n, 11 * n])
        _, key = keys_for(spec, {"num_stages": 1 + n % 3, "schedule": "keys"})
        inputs = make_inputs(spec, heads=HEADS, head_dim=DIM)
        leaves = [cpattn.dispatch(t, key).requires_grad_() for t in inputs[:3]]
        eager = torch.autograd.grad(layer(*leaves, key).sum(), leaves)
        out = compiled(*leaves, key).sum()
        grads, count = counted(torch.autograd.grad, out, leaves)
        exchanges.append(count - len(np.unique(key.plan.kv_routes.stages)))  # a stage may have no row
        for mine, plain in zip(grads, eager, strict=True):
            torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-4)
    return compiler.compilations, exchanges


def test_compiled_once_for_many_masks():
    """The kept rows are an output whose size no graph is specialised to."""
    for compilations, exchanges in run_on_ranks(2, compile_on_rank, timeout=300):
        assert compilations <= 3
        assert exchanges == [0] * 8
