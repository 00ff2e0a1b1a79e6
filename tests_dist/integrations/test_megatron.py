"""Layer 2: Megatron-Core's core_attention, cut as Megatron cuts batches, against dense attention in fp64."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

pytest.importorskip("megatron.core", reason="tested with megatron-core (pip install cpattn[megatron])")

from tests_dist.support.harness import run_on_ranks
from tests_dist.support.oracle import dense_attention
from tests_dist.support.trainer_cases import IMPORTS_S, same_weights, three_steps

HEADS, GROUPS, DIM = 4, 2, 8


def core(**changes: Any) -> Any:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.enums import AttnMaskType

    from cpattn.integrations.megatron import CoreAttention

    groups = ProcessGroupCollection(cp=dist.group.WORLD)
    config = config_of(dist.get_world_size(), **changes)
    return CoreAttention(config, 1, AttnMaskType.causal, "self", pg_collection=groups)


def config_of(cp_size: int, **changes: Any) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    sizes = {"num_layers": 2, "hidden_size": HEADS * DIM, "num_attention_heads": HEADS, "num_query_groups": GROUPS}
    sizes |= {"attention_dropout": 0.0, "context_parallel_size": cp_size}
    return TransformerConfig(**sizes, use_cpu_initialization=True, **changes)


def inputs(*shape: int) -> list[Tensor]:
    """q, k, v and the gradient of the output, [*shape, heads, dim]."""
    g = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, n, DIM, generator=g) for n in (HEADS, GROUPS, GROUPS, HEADS)]


def truth(tensors: list[Tensor], visible: np.ndarray, sink: Tensor | None = None) -> list[Tensor]:
    """out and dq, dk, dv of one sequence [s, heads, dim]."""
    q, k, v = (t.double().requires_grad_() for t in tensors[:3])
    out = dense_attention(q, k, v, visible, scale=DIM**-0.5, sink=None if sink is None else sink.double())[0]
    out.backward(tensors[3].double())
    return [out.detach(), q.grad, k.grad, v.grad]


def close(got: Tensor, want: Tensor, what: str) -> None:
    error = float((got.double() - want).norm() / want.norm())
    assert error < 1e-5, f"{what} is off by {error}"


def sbhd_on_rank(window: tuple[int, int] | None, softmax: str) -> None:
    from megatron.core.utils import get_batch_on_this_cp_rank

    length = 12 * dist.get_world_size()
    module = core(window_size=window, softmax_type=softmax)
    sink = None
    if softmax == "learnable":
        with torch.no_grad():
            module.softmax_offset.copy_(torch.linspace(-1, 1, HEADS))
        sink = module.softmax_offset.detach()
    tensors = inputs(2, length)
    band = np.subtract.outer(np.arange(length), np.arange(length))
    visible = (band >= 0) & ((band <= window[0]) if window else True)
    names = ("q", "k", "v", "dout")
    cut = get_batch_on_this_cp_rank(dict(zip(names, tensors, strict=True)), cp_group=dist.group.WORLD)
    q, k, v = (cut[name].transpose(0, 1).clone().requires_grad_() for name in names[:3])
    out = module(q, k, v, None)
    assert out.shape == (12, 2, HEADS * DIM)
    out.backward(cut["dout"].transpose(0, 1).flatten(2))
    for row in range(2):
        whole = truth([t[row] for t in tensors], visible, sink)
        local = get_batch_on_this_cp_rank(
            {name: t[None] for name, t in zip(("out", "dq", "dk", "dv"), whole, strict=True)}, cp_group=dist.group.WORLD
        )
        got = {"out": out[:, row].unflatten(1, (HEADS, DIM))}
        got |= {f"d{name}": t.grad[:, row] for name, t in (("q", q), ("k", k), ("v", v))}
        for name, mine in got.items():
            close(mine, local[name][0], name)


@pytest.mark.parametrize(("ranks", "window", "softmax"), [(2, None, "learnable"), (3, (7, 0), "vanilla")])
def test_sbhd(ranks, window, softmax):
    run_on_ranks(ranks, sbhd_on_rank, window, softmax, timeout=IMPORTS_S)


def partitioned(padded: list[int], rank: int, size: int) -> Tensor:
    """This rank's tokens of packed sequences, as TransformerEngine's thd_get_partitioned_indices has them."""
    own = []
    for start, end in itertools.pairwise(padded):
        chunk = (end - start) // (2 * size)
        for number in (rank, 2 * size - 1 - rank):
            own += range(start + number * chunk, start + (number + 1) * chunk)
    return torch.tensor(own)


def thd_on_rank(real: list[int], room: list[int]) -> None:
    from megatron.core.packed_seq_params import PackedSeqParams

    size = dist.get_world_size()
    sums, padded = ([0, *itertools.accumulate(n)] for n in (real, room))
    tensors = inputs(padded[-1])
    visible = np.zeros((padded[-1], padded[-1]), dtype=bool)
    for start, length in zip(padded, real, strict=False):
        visible[start : start + length, start : start + length] = np.tri(length, dtype=bool)
    whole = truth(tensors, visible)
    own = partitioned(padded, dist.get_rank(), size)
    q, k, v, dout = (t[own].clone().requires_grad_() for t in tensors)
    ints = [torch.tensor(n, dtype=torch.int32) for n in (sums, padded)]
    packed = PackedSeqParams("thd", ints[0], ints[0], ints[1], ints[1], max(room), max(room))
    module = core()
    for _ in range(2):  # the second layer of a step finds the key that the first has made
        q.grad = k.grad = v.grad = None
        out = module(q, k, v, None, packed_seq_params=packed)
        out.backward(dout.flatten(1))
    for name, got, want in zip(("out", "dq", "dk", "dv"), (out, q.grad, k.grad, v.grad), whole, strict=True):
        close(got.view(len(own), -1), want[own].flatten(1), name)


def test_thd_with_padding_between_sequences():
    run_on_ranks(2, thd_on_rank, [9, 4, 17, 0], [12, 4, 20, 4], timeout=IMPORTS_S)


COLUMNS, VOCAB = 24, 96


class Plain(torch.nn.Module):
    """What a core_attention computes, densely: Megatron's own draws from CUDA's generator, dropout or none."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.permute(2, 0, 1, 3).flatten(2)


def gpt(size: int, groups: Any) -> Any:
    """A GPT of two layers."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel

    from cpattn.integrations.megatron import with_cpattn

    spec = with_cpattn(get_gpt_layer_local_spec())
    if size == 1:
        spec.submodules.self_attention.submodules.core_attention = Plain
    torch.manual_seed(0)
    positions = {"position_embedding_type": "learned_absolute", "max_sequence_length": COLUMNS}
    return GPTModel(config_of(size, hidden_dropout=0.0), spec, vocab_size=VOCAB, pg_collection=groups, **positions)


def learn(model: Any, cut: Any, sum_up: Any) -> list[Tensor]:
    """Losses, gradient norms, and a loss after them, of batches that are cut for this rank."""

    def backward(number: int) -> Tensor:
        g = torch.Generator().manual_seed(number)
        tokens, labels = (torch.randint(0, VOCAB, (2, COLUMNS), generator=g) for _ in range(2))
        batch = cut({"tokens": tokens, "labels": labels, "places": torch.arange(COLUMNS).repeat(2, 1)})
        loss = model(batch["tokens"], batch["places"], None, labels=batch["labels"]).sum() / tokens.numel()
        loss.backward()
        return loss.detach()

    return three_steps(model, 0.5, backward, sum_up)


def gpt_on_rank() -> None:
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.utils import get_batch_on_this_cp_rank

    size, rank = dist.get_world_size(), dist.get_rank()
    parallel_state.initialize_model_parallel(context_parallel_size=size)
    try:
        groups = ProcessGroupCollection.use_mpu_process_groups()
        model = gpt(size, groups)
        got = learn(model, lambda b: get_batch_on_this_cp_rank(b, cp_group=dist.group.WORLD), dist.all_reduce)
        groups.cp = groups.tp_cp = [dist.new_group([other]) for other in range(size)][rank]
        whole = gpt(1, groups)
        want = learn(whole, lambda b: b, lambda x: None)
    finally:
        parallel_state.destroy_model_parallel()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    same_weights(model, whole)


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.nightly)])
def test_a_gpt_learns_as_on_one_process(ranks):
    """Losses, gradient norms, weights after three steps and a loss after them."""
    run_on_ranks(ranks, gpt_on_rank, timeout=IMPORTS_S)


def refusals_on_rank() -> None:
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.enums import AttnMaskType

    module = core()
    q, k, v, _ = inputs(10)
    sums = torch.tensor([0, 10], dtype=torch.int32)
    packed = PackedSeqParams("thd", sums, sums, sums, sums, 10, 10)
    with pytest.raises(ValueError, match=r"10 tokens with padding: not a multiple of 2 \* cp = 4"):
        module(q, k, v, None, packed_seq_params=packed)
    with pytest.raises(ValueError, match="attention_bias: not supported"):
        module(q, k, v, None, attention_bias=torch.zeros(1))
    with pytest.raises(ValueError, match="attn_mask_type 'arbitrary'"):
        module(q, k, v, None, attn_mask_type=AttnMaskType.arbitrary)
    with pytest.raises(ValueError, match=r"window_size \(3, 0\) with packed sequences"):
        core(window_size=(3, 0))(q, k, v, None, packed_seq_params=packed)


def test_what_is_not_served_is_refused():
    run_on_ranks(2, refusals_on_rank, timeout=IMPORTS_S)


def test_a_layer_spec_takes_it():
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from cpattn.integrations.megatron import CoreAttention, with_cpattn

    spec = get_gpt_layer_local_spec()
    ours = with_cpattn(spec)
    assert ours.submodules.self_attention.submodules.core_attention is CoreAttention
    assert spec.submodules.self_attention.submodules.core_attention is not CoreAttention
