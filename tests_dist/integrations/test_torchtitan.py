"""Layer 2: torchtitan's llama3 debug model and GPT-OSS's attention and masks, against the same modules on one process.

Flex attention has no backward on CPU: on one process dense attention under the same BlockMask takes its place.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F

pytest.importorskip("torchtitan", reason="tested with torchtitan (pip install cpattn[titan])")

from tests_dist.support.harness import run_on_ranks
from tests_dist.support.trainer_cases import IMPORTS_S, same_weights, three_steps

COLUMNS, VOCAB = 40, 2048


def dense(q: Tensor, k: Tensor, v: Tensor, *, block_mask: Any, scale: Any, **_: Any) -> tuple[Tensor, Any]:
    """[B, heads, S, dim] under the mask of a BlockMask, in fp64."""
    rows, columns = torch.meshgrid(torch.arange(q.shape[2]), torch.arange(k.shape[2]), indexing="ij")
    visible = torch.stack([block_mask.mask_mod(b, 0, rows, columns) for b in torch.arange(q.shape[0])])
    groups = q.shape[1] // k.shape[1]
    k, v = (t.double().repeat_interleave(groups, 1) for t in (k, v))
    scores = q.double() @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(~visible[:, None], -torch.inf)
    return (torch.softmax(scores, -1) @ v).to(q.dtype), SimpleNamespace(lse=torch.logsumexp(scores, -1).to(q.dtype))


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """torchtitan's masks made without a compiler, and its flex attention densely."""
    import torchtitan.models.common.attention as titan
    from torch.nn.attention.flex_attention import create_block_mask

    made = mock.patch.object(titan, "_compiled_create_block_mask", create_block_mask)
    with made, mock.patch.object(titan.FlexAttention, "compiled_flex_attn", staticmethod(dense)):
        yield


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Two rows of packed documents: tokens, labels (some missing) and positions."""
    g = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCAB, (2, COLUMNS), generator=g)
    labels = torch.randint(0, VOCAB, (2, COLUMNS), generator=g)
    labels[torch.rand(2, COLUMNS, generator=g) < 0.2] = -100
    cuts = [[0, 13, 14, COLUMNS], [0, 29, COLUMNS]]
    rows = [torch.cat([torch.arange(b - a) for a, b in itertools.pairwise(c)]) for c in cuts]
    return tokens, labels, torch.stack(rows)


def llama(backend: str) -> Any:
    from torchtitan.models.llama3 import llama3_configs

    torch.manual_seed(0)
    config = llama3_configs["debugmodel"](attn_backend=backend)
    config.layers = config.layers[:2]
    model = config.build()
    model.init_states(buffer_device=torch.device("cpu"))
    return model


def step(model: Any, tokens: Tensor, labels: Tensor, **inputs: Any) -> Tensor:
    """The summed loss, as torchtitan's trainer has it, and its backward."""
    logits = model(tokens, **inputs)
    loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum")
    loss.backward()
    return loss.detach()


def llama_on_rank(backend: str) -> None:
    from cpattn.integrations.torchtitan import use_cpattn

    use_cpattn()
    from torchtitan.distributed.context_parallel import apply_cp_to_forward, prepare_context_parallel_input

    tokens, labels, positions = batch()
    with on_cpu():
        whole, model = llama("flex"), llama(backend)
        want = step(whole, tokens, labels, positions=positions, attention_masks=whole.get_attention_masks(positions))
        masks = model.get_attention_masks(positions)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("cp",))
    apply_cp_to_forward([layer.attention.inner_attention for layer in model.layers.values()], mesh)
    extra = {"positions": positions, "attention_masks": masks}
    tokens, labels, extra = prepare_context_parallel_input(tokens, labels, extra, mesh, torch.device("cpu"), "ptrr")
    loss = step(model, tokens, labels, **extra)
    dist.all_reduce(loss)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-5)
    for (name, mine), theirs in zip(model.named_parameters(), whole.parameters(), strict=True):
        dist.all_reduce(mine.grad)
        error = float((mine.grad - theirs.grad).norm() / theirs.grad.norm())
        assert error < 1e-5, f"{name} is off by {error}"
    with on_cpu():
        inputs = {"positions": positions, "attention_masks": whole.get_attention_masks(positions)}
        want = three_steps(whole, 0.1, lambda number: step(whole, *batch()[:2], **inputs), lambda x: None)
    got = three_steps(model, 0.1, lambda number: step(model, tokens, labels, **extra), dist.all_reduce)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    same_weights(model, whole)


@pytest.mark.parametrize(("ranks", "backend"), [(2, "flex"), (3, "varlen")])
def test_llama3_debug_model(ranks, backend):
    """Loss and all gradients over packed documents; torchtitan itself has no context parallelism for varlen."""
    run_on_ranks(ranks, llama_on_rank, backend, timeout=IMPORTS_S)


def gpt_oss_on_rank() -> None:
    from torchtitan.models.gpt_oss import gptoss_configs
    from torchtitan.models.gpt_oss.model import GptOssModel

    from cpattn.integrations.torchtitan import prepare_context_parallel_input

    tokens, labels, positions = batch()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("cp",))
    with on_cpu():
        config = gptoss_configs["debugmodel"](moe_comm_backend="standard", attn_backend="flex")
        for layer in config.layers:
            if layer.attention.sliding_window_size is not None:
                layer.attention.sliding_window_size = 6
        # Its experts need a GPU, so the model is not built: only what of it makes masks.
        model = SimpleNamespace(config=config)
        model._create_flex_attention_mask = GptOssModel._create_flex_attention_mask.__get__(model)
        masks = GptOssModel.get_attention_masks(model, positions)
        assert set(masks) == {"basic_mask", "sliding_window_mask"}
        extra = {"positions": positions, "attention_masks": masks}
        _, _, extra = prepare_context_parallel_input(tokens, labels, extra, mesh)
        x = torch.randn(2, COLUMNS, 256, generator=torch.Generator().manual_seed(2))
        shard = extra["attention_masks"]["basic_mask"].shard
        for number, name in enumerate(("sliding_window_mask", "basic_mask")):
            compare_layer(config.layers[number].attention, x, positions, masks[name], extra, name, shard, mesh)


def compare_layer(
    config: Any, x: Tensor, positions: Tensor, mask: Any, extra: dict[str, Any], name: str, shard: Any, mesh: Any
) -> None:
    """One attention layer with its sinks: output and gradients of input and parameters."""
    from cpattn.integrations.torchtitan import apply_cp_to_forward

    layers = []
    for _ in range(2):
        torch.manual_seed(4)
        layers.append(config.build())
        for parameter in layers[-1].parameters():
            torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim == 1 else 0.06)
    whole, cut = layers
    apply_cp_to_forward([cut.inner_attention], mesh)
    dout = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    x_whole, x_cut = x.clone().requires_grad_(), x.clone().requires_grad_()
    want = whole(x_whole, mask, positions)
    want.backward(dout)
    got = cut(shard.take(x_cut), extra["attention_masks"][name], extra["positions"])
    got.backward(shard.take(dout))
    torch.testing.assert_close(shard.gather(got.detach()), want.detach(), rtol=1e-4, atol=1e-5)
    assert float(whole.sinks.grad.norm()) > 1e-3
    pairs = zip([("x", x_cut), *cut.named_parameters()], [x_whole, *whole.parameters()], strict=True)
    for (what, mine), theirs in pairs:
        dist.all_reduce(mine.grad)
        error = float((mine.grad - theirs.grad).norm() / theirs.grad.norm())
        assert error < 1e-5, f"{name}: {what} is off by {error}"


def test_gpt_oss_masks_and_sinks():
    run_on_ranks(2, gpt_oss_on_rank, timeout=IMPORTS_S)


def test_masks_that_are_not_known_are_refused():
    from torch.nn.attention.flex_attention import and_masks, create_block_mask
    from torchtitan.models.common.attention import get_causal_mask_mod, get_fixed_block_mask_mod

    from cpattn.integrations.torchtitan import prepare_context_parallel_input

    tokens, labels, positions = batch()
    mods = {"fixed_block_size_8": and_masks(get_causal_mask_mod(), get_fixed_block_mask_mod(8))}
    mods["lambda"] = lambda b, h, q, k: q >= 0
    for name, mod in mods.items():
        mask = create_block_mask(mod, 1, None, COLUMNS, COLUMNS, device="cpu")
        extra = {"positions": positions, "attention_masks": mask}
        with pytest.raises(ValueError, match=name):
            prepare_context_parallel_input(tokens, labels, extra, SimpleNamespace(size=lambda: 1))
