"""What ranks run in tests of torch.compile and of checkpointing, for any model of one attention layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch.utils.checkpoint import checkpoint

import cpattn
from cpattn import AttnMaskSpec


class CountingCompiler:
    """Backend for torch.compile, and how often it was asked.

    name: one of torch's; by default all but the code that inductor would write, which takes a C++ compiler's time.
    """

    def __init__(self, name: str = "aot_eager") -> None:
        self.compilations = 0
        self._compile = torch._dynamo.lookup_backend(name)

    def __call__(self, graph: Any, example_inputs: Any) -> Any:
        self.compilations += 1
        return self._compile(graph, example_inputs)


COMPILERS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.nightly)]


def compile_many_masks(
    model: nn.Module, make_local: Callable[[AttnMaskSpec], tuple[cpattn.AttnKey, Tensor]], num_masks: int, name: str
) -> int:
    """That many masks and lengths through one compiled model, equal to eager; how often it was compiled."""
    compiler = CountingCompiler(name)
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    for i in range(num_masks):
        packed = AttnMaskSpec.varlen([100 + 3 * i, 57 + i])
        key, x = make_local(AttnMaskSpec.sliding_window(90 + i, 10 + i) if i % 2 else packed)
        results = []
        for forward in (compiled, model):
            out = forward(x, key)
            results.append((out, *torch.autograd.grad(out.square().sum(), (x, *model.parameters()))))
        for ours, eager in zip(*results, strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)
    return compiler.compilations


def compile_where_ranks_have_no_rows(
    model: nn.Module, make_local: Callable[[AttnMaskSpec], tuple[cpattn.AttnKey, Tensor]]
) -> list[tuple[int, int]]:
    """Fewer tokens than ranks through a model that inductor compiled, equal to eager; exchanges, eager and compiled.

    Compiled afresh: what inductor finds on disk may come from another version of the ops.
    """
    key, x = make_local(AttnMaskSpec.causal(2))
    results, counts = [], []
    with inductor_config.patch(force_disable_caches=True):
        for forward in (model, torch.compile(model, fullgraph=True)):
            with mock.patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single) as exchange:
                out = forward(x, key)
                before = exchange.call_count
                results.append((out, *torch.autograd.grad(out.square().sum(), (x, *model.parameters()))))
                counts.append((before, exchange.call_count - before))
    for eager, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)
    return counts


def checkpoint_counts(
    model: nn.Module, key: cpattn.AttnKey, x: Tensor, context_fn: Callable[..., Any] | None
) -> tuple[int, int]:
    """Exchanges in forward and in backward of the checkpointed model, whose gradients are right."""
    expected = torch.autograd.grad(model(x, key).square().sum(), (x, *model.parameters()))
    options = {} if context_fn is None else {"context_fn": context_fn}
    with mock.patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single) as exchange:
        out = checkpoint(model, x, key, use_reentrant=False, **options)
        forward = exchange.call_count
        grads = torch.autograd.grad(out.square().sum(), (x, *model.parameters()))
        total = exchange.call_count
    for ours, plain in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, plain)
    return forward, total - forward
