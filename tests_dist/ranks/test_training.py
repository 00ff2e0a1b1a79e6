"""Runtime layer: attention inside training. DDP, FSDP2, autocast, checkpointing, backward more than once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import cpattn
from cpattn import AttnMaskSpec
from tests_dist.support.harness import run_on_ranks
from tests_dist.support.oracle import dense_attention, make_inputs

LENGTHS = [30, 1, 20, 7]
SPEC = AttnMaskSpec.varlen(LENGTHS)
VOCABULARY, WIDTH, HEADS, KV_HEADS, HEAD_DIM = 11, 16, 4, 2, 8


class Block(nn.Module):
    """Attention with a sink, over ranks with a key and dense without one."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, HEADS * HEAD_DIM)
        self.kv = nn.Linear(WIDTH, 2 * KV_HEADS * HEAD_DIM)
        self.o = nn.Linear(HEADS * HEAD_DIM, WIDTH)
        self.sink = nn.Parameter(torch.randn(HEADS))

    def forward(self, x: Tensor, key: cpattn.AttnKey | None) -> Tensor:
        q = self.q(x).unflatten(-1, (HEADS, HEAD_DIM))
        k, v = self.kv(x).unflatten(-1, (2 * KV_HEADS, HEAD_DIM)).chunk(2, dim=1)
        if key is None:
            out, _ = dense_attention(q, k, v, SPEC.to_dense(), scale=HEAD_DIM**-0.5, sink=self.sink)
        else:
            out = cpattn.attention(q, k, v, key, sink=self.sink)
        return x + self.o(out.flatten(1))


class Model(nn.Module):
    """Two blocks on embedded tokens and positions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(max(LENGTHS), WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor, positions: Tensor, key: cpattn.AttnKey | None) -> Tensor:
        x = self.tokens(tokens) + self.positions(positions)
        for block in self.blocks:
            x = block(x, key)
        return self.head(x)


def batch(sample: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, labels (-100 after the last of a document) and positions of one packed sample."""
    tokens = torch.randint(0, VOCABULARY, (sum(LENGTHS),), generator=torch.Generator().manual_seed(sample))
    labels = torch.cat([torch.cat([part[1:], torch.tensor([-100])]) for part in tokens.split(LENGTHS)])
    return tokens, labels, torch.cat([torch.arange(n) for n in LENGTHS])


def one_process(num_samples: int) -> tuple[dict[str, Tensor], float]:
    """Gradients of the mean loss over all labels of all samples."""
    model = Model().double()
    losses = []
    for sample in range(num_samples):
        tokens, labels, positions = batch(sample)
        losses.append(cross_entropy(model(tokens, positions, None), labels, reduction="sum"))
    loss = sum(losses) / (num_samples * (sum(LENGTHS) - len(LENGTHS)))
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}, loss.item()


def key_for(group: Any, **options: Any) -> cpattn.AttnKey:
    options = {"chunk_size": 4, **options}
    return cpattn.make_key(
        SPEC, num_heads_q=HEADS, num_heads_kv=KV_HEADS, head_dim=HEAD_DIM, cp_group=group, **options
    )


def train_on_rank(wrap: str, dp_size: int, schedule: str) -> None:
    """One step over a dp x cp mesh; the model is wrapped over all ranks, whose mean it takes.

    The loss of a rank: the sum over its own labels, over the number of labels of all ranks, times the
    number of ranks (the mean divides by it).
    """
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (dp_size, world // dp_size), mesh_dim_names=("dp", "cp"))
    key = key_for(mesh, schedule=schedule)
    model = Model().double()
    if wrap == "ddp":
        model = DistributedDataParallel(model)
    else:
        flat = init_device_mesh("cpu", (world,))
        for block in model.blocks:
            fully_shard(block, mesh=flat)
        fully_shard(model, mesh=flat)
    tokens, labels, _ = batch(mesh.get_local_rank("dp"))
    local_tokens = cpattn.dispatch(tokens, key)
    local_labels = cpattn.roll(local_tokens, key)
    assert torch.equal(local_labels, cpattn.dispatch(labels, key))
    logits = model(local_tokens, cpattn.position_ids(key), key)
    count = (local_labels != -100).sum()
    dist.all_reduce(count)
    loss = cross_entropy(logits, local_labels, reduction="sum") / count
    (loss * world).backward()
    expected, whole = one_process(dp_size)
    dist.all_reduce(loss.detach())
    torch.testing.assert_close(loss.item(), whole, rtol=1e-12, atol=0)
    for name, parameter in model.named_parameters():
        grad = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        torch.testing.assert_close(grad, expected[name.removeprefix("module.")], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("wrap", ["ddp", "fsdp2"])
@pytest.mark.parametrize(
    ("dp_size", "cp_size", "schedule"), [(1, 2, "keys"), (1, 3, "tiles"), (2, 2, "keys")]
)
def test_gradients_of_one_process(wrap, dp_size, cp_size, schedule):
    """Every parameter, sinks among them, gets the gradient of the mean loss of one process."""
    run_on_ranks(dp_size * cp_size, train_on_rank, wrap, dp_size, schedule)


def fsdp_low_precision() -> None:
    """FSDP2's mixed precision hands bf16 parameters to the attention; sinks stay what they are given as."""
    key = key_for(dist.group.WORLD)
    model = Model()
    fully_shard(
        model, mesh=init_device_mesh("cpu", (2,)), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    )
    tokens, labels, _ = batch(0)
    logits = model(cpattn.dispatch(tokens, key), cpattn.position_ids(key), key)
    assert logits.dtype == torch.bfloat16
    local_labels = cpattn.dispatch(labels, key)
    (2 * cross_entropy(logits.float(), local_labels, reduction="sum") / 54).backward()
    expected, _ = one_process(1)
    for name, parameter in model.named_parameters():
        grad = parameter.grad.full_tensor().double()
        assert (grad - expected[name]).norm() < 0.03 * expected[name].norm() + 1e-3, name


def test_fsdp2_in_bf16():
    run_on_ranks(2, fsdp_low_precision)


# ----------------------------------------------------------------------------------------------------
# Autocast.


def autocast_on_rank() -> None:
    """fp32 tensors are computed in bf16, the same bits as if cast by hand, and get fp32 gradients."""
    key = key_for(dist.group.WORLD)
    inputs = make_inputs(SPEC, heads=(HEADS, KV_HEADS), head_dim=HEAD_DIM)
    *tensors, dout = (cpattn.dispatch(t, key) for t in inputs)
    leaves = [t.clone().requires_grad_() for t in tensors]
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = cpattn.attention(*leaves, key, return_lse=True)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    out.backward(dout.bfloat16())
    by_hand = [t.bfloat16().requires_grad_() for t in tensors]
    expected, expected_lse = cpattn.attention(*by_hand, key, return_lse=True)
    expected.backward(dout.bfloat16())
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)
    for mine, hand in zip(leaves, by_hand, strict=True):
        assert mine.grad.dtype == torch.float32
        assert torch.equal(mine.grad, hand.grad.float())
    with torch.autocast(
        "cpu", torch.bfloat16
    ):  # a model's mixture: rotary embeddings in fp32, v from a linear
        mixed = cpattn.attention(tensors[0], tensors[1].double().float(), tensors[2].bfloat16(), key)
        assert torch.equal(mixed, expected)
        assert cpattn.undispatch(cpattn.roll(mixed, key), key).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert cpattn.attention(*tensors, key).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):  # as torch's own attention does
        assert cpattn.attention(*(t.double() for t in tensors), key).dtype == torch.float64


def test_autocast():
    run_on_ranks(2, autocast_on_rank)


# ----------------------------------------------------------------------------------------------------
# Checkpointing, and backward more than once.


def leaves_of(key: cpattn.AttnKey) -> tuple[list[Tensor], Tensor]:
    inputs = make_inputs(SPEC, heads=(HEADS, KV_HEADS), head_dim=HEAD_DIM)
    *tensors, dout = (cpattn.dispatch(t, key) for t in inputs)
    return [t.requires_grad_() for t in tensors], dout


def checkpointed_on_rank(schedule: str, mode: dict[str, Any]) -> None:
    key = key_for(dist.group.WORLD, num_stages=2, schedule=schedule)
    (q, k, v), dout = leaves_of(key)
    sink = torch.randn(HEADS, requires_grad=True)

    def layer(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
        return cpattn.roll(cpattn.attention(q.sin(), k.cos(), v.exp(), key, sink=sink), key).tanh()

    expected = torch.autograd.grad(layer(q, k, v, sink), (q, k, v, sink), dout)
    checkpoint(layer, q, k, v, sink, **mode).backward(dout)
    for leaf, truth in zip((q, k, v, sink), expected, strict=True):
        assert torch.equal(leaf.grad, truth)


@pytest.mark.parametrize("schedule", ["keys", "tiles"])
@pytest.mark.parametrize("mode", ["recompute", "reentrant", "keep attention"])
def test_activation_checkpointing(mode, schedule):
    """The gradients of the plain layer, bit for bit."""
    modes: dict[str, dict[str, Any]] = {
        "recompute": {"use_reentrant": False},
        "reentrant": {"use_reentrant": True},
        "keep attention": {"use_reentrant": False, "context_fn": cpattn.attention_checkpoint_contexts},
    }
    run_on_ranks(3, checkpointed_on_rank, schedule, modes[mode])


def offloaded_on_rank() -> None:
    """Saved tensors go through hooks and come back as copies."""
    key = key_for(dist.group.WORLD)
    leaves, dout = leaves_of(key)
    expected = torch.autograd.grad(cpattn.attention(*leaves, key), leaves, dout)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        out = cpattn.attention(*leaves, key)
    for mine, truth in zip(torch.autograd.grad(out, leaves, dout), expected, strict=True):
        assert torch.equal(mine, truth)


def test_offloaded_activations():
    run_on_ranks(2, offloaded_on_rank)


def backward_twice_on_rank(schedule: str) -> None:
    key = key_for(dist.group.WORLD, num_stages=2, schedule=schedule)
    leaves, dout = leaves_of(key)
    out = cpattn.attention(*leaves, key)
    first = torch.autograd.grad(out, leaves, dout, retain_graph=True)
    second = torch.autograd.grad(out, leaves, dout)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(out, leaves, dout)


@pytest.mark.parametrize("schedule", ["keys", "tiles"])
def test_backward_twice(schedule):
    """With retain_graph the same bits; without it torch's own error."""
    run_on_ranks(2, backward_twice_on_rank, schedule)


def double_backward_on_rank() -> None:
    key = key_for(dist.group.WORLD)
    leaves, _ = leaves_of(key)
    out = cpattn.attention(*leaves, key)
    (dq,) = torch.autograd.grad(out.square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="attention has no second derivative"):
        dq.sum().backward()


def test_gradient_of_gradient_is_refused():
    run_on_ranks(2, double_backward_on_rank)


def two_calls_on_rank() -> None:
    """Weights shared by two calls, and one key by many layers: gradients add up as in one process."""
    key = key_for(dist.group.WORLD)
    (q, k, v), dout = leaves_of(key)
    alone = torch.autograd.grad(cpattn.attention(q, k, v, key), (q, k, v), dout)
    out = cpattn.attention(q, k, v, key) + cpattn.attention(q, k, v, key)
    for one, two in zip(alone, torch.autograd.grad(out, (q, k, v), dout), strict=True):
        torch.testing.assert_close(two, 2 * one)


def test_one_key_for_many_calls():
    run_on_ranks(2, two_calls_on_rank)
