"""Runtime layer: torch.compile without graph breaks, and checkpointing that does not communicate again."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import cpattn
from cpattn import AttnMaskSpec
from tests_dist.support.compile_cases import (
    COMPILERS,
    checkpoint_counts,
    compile_many_masks,
    compile_where_ranks_have_no_rows,
)
from tests_dist.support.harness import run_on_ranks

HEADS, DIM = 2, 16


class Block(nn.Module):
    """One attention layer."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(HEADS * DIM, 3 * HEADS * DIM)

    def forward(self, x: Tensor, key: cpattn.AttnKey) -> Tensor:
        q, k, v = self.qkv(x).view(x.shape[0], 3, HEADS, DIM).unbind(1)
        return cpattn.attention(q, k, v, key).flatten(1)


def make_local(spec: AttnMaskSpec, chunk_size: int = 16) -> tuple[cpattn.AttnKey, Tensor]:
    group = dist.group.WORLD
    key = cpattn.make_key(
        spec, num_heads_q=HEADS, num_heads_kv=HEADS, head_dim=DIM, cp_group=group, chunk_size=chunk_size
    )
    x = torch.randn(spec.total_seqlen, HEADS * DIM)
    return key, cpattn.dispatch(x, key).requires_grad_()


def compilations_on_rank(compiler: str) -> int:
    return compile_many_masks(Block(), make_local, 5, compiler)


@pytest.mark.parametrize("compiler", COMPILERS)
def test_fullgraph_compile_serves_many_masks(compiler: str) -> None:
    """No graph break (fullgraph raises on one), and a new mask is not a new compilation."""
    assert max(run_on_ranks(2, compilations_on_rank, compiler, timeout=300)) <= 3


OPS = ["attention_forward", "attention_backward", "shard_heads", "gather_rows", "fetch_rows", "fetch_rows_backward"]
OPS += ["undispatch_rows", "undispatch_rows_backward", "roll_rows"]


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("suffix", ["", "_in_order"])
def test_compilers_may_not_drop_what_exchanges_rows(name: str, suffix: str) -> None:
    """As inductor does where nothing is made of the results, on ranks without rows; the nightly test shows it there."""
    assert cpattn.attention  # loads what torch.ops then has
    assert cpattn.fetch
    graph = torch.fx.Graph()
    graph.call_function(getattr(torch.ops.cpattn, name + suffix).default)
    graph.output(None)
    graph.eliminate_dead_code()
    assert [node.op for node in graph.nodes] == ["call_function", "output"]


def moved(x: Tensor, key: cpattn.AttnKey, dim: int) -> Tensor:
    """Rows to the next tokens' places, and all ranks' together."""
    return cpattn.undispatch(cpattn.roll(x * 2, key, dim=dim), key, dim)


def rows_moved_in_a_graph() -> int:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(moved, backend=counter, fullgraph=True)
    for number, length in enumerate((64, 96, 77, 50)):
        key, x_local = make_local(AttnMaskSpec.varlen([length, number + 3]))
        for dim in (0, 1):
            leaves = [x_local.detach().movedim(0, dim).clone().requires_grad_() for _ in range(2)]
            mine, right = compiled(leaves[0], key, dim), moved(leaves[1], key, dim)
            weight = torch.randn(right.shape)
            pairs = zip((mine, right), leaves, strict=True)
            grads = [torch.autograd.grad((out * weight).sum(), x)[0] for out, x in pairs]
            assert torch.equal(mine, right)
            assert torch.equal(*grads)
    return counter.frame_count


def test_rows_move_in_a_graph_as_they_do_without_and_one_graph_serves_many_masks():
    """For each of two dims: a graph of fixed lengths, and one of any."""
    assert max(run_on_ranks(2, rows_moved_in_a_graph, timeout=300)) <= 4


def few_tokens_on_rank() -> list[tuple[int, int]]:
    return compile_where_ranks_have_no_rows(Block(), functools.partial(make_local, chunk_size=1))


@pytest.mark.nightly
def test_compiled_ranks_without_rows_take_part():
    """Nothing is made of what the ops return there, and the other ranks wait in them all the same."""
    counts = run_on_ranks(3, few_tokens_on_rank)
    assert counts == [[counts[0][0]] * 2] * 3
    assert min(counts[0][0]) > 0


def exchanges_on_rank(selective: bool) -> tuple[int, int]:
    key, x = make_local(AttnMaskSpec.causal(120))
    return checkpoint_counts(Block(), key, x, cpattn.attention_checkpoint_contexts if selective else None)


def test_selective_checkpoint_adds_no_exchange():
    """Plain checkpointing runs the forward exchanges again; the policy leaves backward's own."""
    forward, backward = run_on_ranks(2, exchanges_on_rank, selective=True)[0]
    plain_forward, plain_backward = run_on_ranks(2, exchanges_on_rank, selective=False)[0]
    assert forward == plain_forward > 0
    assert plain_backward == backward + forward
