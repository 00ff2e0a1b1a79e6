"""Runtime layer: torch.compile without graph breaks, and checkpointing that does not communicate again."""

from __future__ import annotations

from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import cpattn
from cpattn import AttnMaskSpec
from tests_dist.harness import run_on_ranks

HEADS, DIM = 2, 16


class Block(nn.Module):
    """One attention layer."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(HEADS * DIM, 3 * HEADS * DIM)

    def forward(self, x: Tensor, key: cpattn.AttnKey) -> Tensor:
        q, k, v = self.qkv(x).view(x.shape[0], 3, HEADS, DIM).unbind(1)
        return cpattn.attention(q, k, v, key).flatten(1)


def make_local(spec: AttnMaskSpec) -> tuple[cpattn.AttnKey, Tensor]:
    group = dist.group.WORLD
    key = cpattn.make_key(
        spec, num_heads_q=HEADS, num_heads_kv=HEADS, head_dim=DIM, cp_group=group, chunk_size=16
    )
    x = torch.randn(spec.total_seqlen, HEADS * DIM)
    return key, cpattn.dispatch(x, key).requires_grad_()


def compile_many_masks() -> int:
    """20 masks and lengths through one compiled model; returns how often it was compiled."""
    from torch._inductor.compile_fx import compile_fx

    compilations = 0

    def counting(graph, example_inputs):  # type: ignore[no-untyped-def]
        nonlocal compilations
        compilations += 1
        return compile_fx(graph, example_inputs)

    model = Block()
    compiled = torch.compile(model, fullgraph=True, backend=counting)
    for i in range(20):
        packed = AttnMaskSpec.varlen([100 + 3 * i, 57 + i])
        key, x = make_local(AttnMaskSpec.sliding_window(90 + i, 10 + i) if i % 2 else packed)
        results = []
        for forward in (compiled, model):
            out = forward(x, key)
            results.append((out, *torch.autograd.grad(out.square().sum(), (x, *model.parameters()))))
        for ours, eager in zip(*results, strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)
    return compilations


def test_fullgraph_compile_serves_many_masks():
    """No graph break (fullgraph raises on one), and a new mask is not a new compilation."""
    assert max(run_on_ranks(2, compile_many_masks, timeout=300)) <= 3


def checkpoint_counts(selective: bool) -> tuple[int, int]:
    """Exchanges in forward and in backward of a checkpointed block, and that gradients are right."""
    key, x = make_local(AttnMaskSpec.causal(120))
    model = Block()
    expected = torch.autograd.grad(model(x, key).square().sum(), (x, *model.parameters()))
    options = {"context_fn": cpattn.attention_checkpoint_contexts} if selective else {}
    with mock.patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single) as exchange:
        out = checkpoint(model, x, key, use_reentrant=False, **options)
        forward = exchange.call_count
        grads = torch.autograd.grad(out.square().sum(), (x, *model.parameters()))
        total = exchange.call_count
    for ours, plain in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, plain)
    return forward, total - forward


def test_selective_checkpoint_adds_no_exchange():
    """Plain checkpointing runs the forward exchanges again; the policy leaves backward's own."""
    forward, backward = run_on_ranks(2, checkpoint_counts, selective=True)[0]
    plain_forward, plain_backward = run_on_ranks(2, checkpoint_counts, selective=False)[0]
    assert forward == plain_forward > 0
    assert plain_backward == backward + forward
