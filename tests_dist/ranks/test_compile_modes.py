"""Layer 2: what torch.compile offers beside its defaults, on ranks with different numbers of rows, equal to eager."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch._functorch import config as functorch_config
from torch.utils.checkpoint import checkpoint

import cpattn
from cpattn import AttnMaskSpec
from tests_dist.support.harness import run_on_ranks

HEADS, DIM, WIDTH = (4, 2), 8, 16


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, (HEADS[0] + 2 * HEADS[1]) * DIM)
        self.out = nn.Linear(HEADS[0] * DIM, WIDTH)

    def forward(self, x: Tensor, key: cpattn.AttnKey) -> Tensor:
        q, k, v = self.qkv(x.tanh()).unflatten(-1, (-1, DIM)).split([HEADS[0], HEADS[1], HEADS[1]], 1)
        return x + self.out(cpattn.attention(q, k, v, key).flatten(1)).sin()


class Model(nn.Module):
    """Two layers, of which the second may be run again in backward."""

    def __init__(self, *, again: bool = False) -> None:
        super().__init__()
        self.layers, self.again = nn.ModuleList([Layer(), Layer()]), again

    def forward(self, x: Tensor, key: cpattn.AttnKey) -> Tensor:
        x = self.layers[0](x, key)
        if self.again:
            return checkpoint(self.layers[1], x, key, use_reentrant=False)  # type: ignore[no-any-return]
        return self.layers[1](x, key)  # type: ignore[no-any-return]


def step(forward: Callable[..., Tensor], model: nn.Module, spec: AttnMaskSpec, around: Any = None) -> list[Tensor]:
    """The output and all gradients, of this rank's rows."""
    heads = {"num_heads_q": HEADS[0], "num_heads_kv": HEADS[1], "head_dim": DIM}
    key = cpattn.make_key(spec, cp_group=dist.group.WORLD, chunk_size=16, **heads)
    whole = torch.randn(spec.total_seqlen, WIDTH, generator=torch.Generator().manual_seed(0))
    x = cpattn.dispatch(whole, key).requires_grad_()
    model.zero_grad()
    with around() if around else nullcontext():
        out = forward(x, key)
        out.square().sum().backward()
    grads = [x.grad, *(p.grad for p in model.parameters())]
    return [out.detach(), *(g.clone() for g in grads if g is not None)]


def check_equal_to_eager(how: dict[str, Any], around: Any = None, *, again: bool = False) -> None:
    """For several masks of other lengths, compiled once and again."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = Model(again=again)
    compiled = torch.compile(model, **how)
    for lengths in ([70, 31], [64, 1, 40]):
        spec = AttnMaskSpec.varlen(lengths)
        eager = step(model, model, spec)
        assert len(eager) == 2 + len(list(model.parameters()))
        for mine, right in zip(step(compiled, model, spec, around), eager, strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-5)


PARTITIONED = {"backend": "aot_eager_decomp_partition"}  # inductor's partitioner, without its code


def check_checkpoint_inside() -> None:
    check_equal_to_eager(PARTITIONED, again=True)


def check_memory_budget(budget: float) -> None:
    with functorch_config.patch(activation_memory_budget=budget):
        check_equal_to_eager(PARTITIONED)


def check_compiled_autograd() -> None:
    def around() -> AbstractContextManager[Any]:
        return compiled_autograd._enable(lambda graph: torch.compile(graph, backend="eager"))

    check_equal_to_eager({"backend": "aot_eager"}, around)


def check_mode(mode: str) -> None:
    check_equal_to_eager({"mode": mode})


class Towers(nn.Module):
    """Two calls that do not depend on one another."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Layer(), Layer()

    def forward(self, x_a: Tensor, x_b: Tensor, a: cpattn.AttnKey, b: cpattn.AttnKey) -> Tensor:
        return self.a(x_a, a).square().sum() + self.b(x_b, b).sin().sum()


def check_towers() -> list[int]:
    """A compiler that orders them by their rows here would order them otherwise on the other rank."""
    torch.manual_seed(0)
    model, heads = Towers(), {"num_heads_q": HEADS[0], "num_heads_kv": HEADS[1], "head_dim": DIM, "chunk_size": 64}
    keys = [
        cpattn.make_key(AttnMaskSpec.varlen(lengths), cp_group=dist.group.WORLD, schedule="keys", **heads)
        for lengths in ([36, 32, 105, 99, 124, 4], [83, 45, 76, 62, 134])
    ]
    rows = [cpattn.dispatch(torch.randn(400, WIDTH), key).requires_grad_() for key in keys]
    leaves = [*rows, *model.parameters()]
    eager, compiled = (torch.autograd.grad(f(*rows, *keys), leaves) for f in (model, torch.compile(model)))
    for mine, right in zip(compiled, eager, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-5)
    return [key.num_tokens for key in keys]


@pytest.mark.nightly
def test_independent_calls_keep_their_order_under_inductor():
    (a0, b0), (a1, b1) = run_on_ranks(2, check_towers, timeout=500)
    assert (a0 - a1) * (b0 - b1) < 0, "each rank has more rows in another tower"


def test_a_checkpoint_inside_a_compiled_graph():
    run_on_ranks(2, check_checkpoint_inside)


@pytest.mark.parametrize("budget", [0.5, pytest.param(0.0, marks=pytest.mark.nightly)])
def test_a_budget_for_activations(budget):
    run_on_ranks(2, check_memory_budget, budget)


@pytest.mark.nightly
def test_compiled_autograd():
    run_on_ranks(2, check_compiled_autograd)


@pytest.mark.nightly  # a C++ compiler's time
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_modes_of_inductor(mode):
    run_on_ranks(2, check_mode, mode, timeout=500)
