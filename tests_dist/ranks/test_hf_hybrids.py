"""Runtime layer: models with recurrent and convolution layers over ranks, against each text alone in fp64.

Logits at real tokens, loss and every gradient of the fp32 model within 1e-5 by norm.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

pytest.importorskip("transformers")

from cpattn.integrations.transformers import ContextParallel, register_attention
from cpattn.launch.benchmarks.tiny_models import make_lively
from tests_dist.support.harness import run_on_ranks
from tests_dist.support.hf_hybrids import HYBRIDS, make_hybrid, packed_texts, step_by_text, texts_of
from tests_dist.support.hf_models import StepResult, assert_same_step, gradients, text_batch

PACKED = (1, 7, 300, 12)  # one text of a token, one that is longer than a rank's share
LAYOUTS = ("contiguous", "zigzag", "balanced")


def parallel_hybrid(name: str, batch: dict[str, Any], layout: str, how: str = "") -> StepResult:
    """how: "checkpointing", "fsdp2" (with checkpointing), "compile", or nothing of these."""
    register_attention()
    model = make_hybrid(name, "cpattn")
    if how in ("checkpointing", "fsdp2"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if how == "fsdp2":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in (*model.get_decoder().layers, model):
            fully_shard(layer, mesh=mesh)
    if how == "compile":
        torch._dynamo.reset()
        for layer in model.get_decoder().layers:
            layer.compile(backend="aot_eager")
    reduction = "mean" if how == "fsdp2" else "sum"
    parallel = ContextParallel(model, dist.group.WORLD, layout=layout, max_chunk_size=8, grad_reduction=reduction)
    out = parallel(batch)
    out.loss.backward()
    if how != "fsdp2":
        parallel.reduce_gradients()
    whole = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in gradients(model).items()}
    return StepResult(out.shard.gather(out.logits).detach(), out.loss.detach(), whole)


def check(name: str, batch: dict[str, Any], cp_size: int, layout: str, truth: StepResult, how: str = "") -> None:
    got = run_on_ranks(cp_size, parallel_hybrid, name, batch, layout, how)
    real = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    for row, a, b in texts_of(batch):
        real[row, a:b] = True
    for result in got:
        assert_same_step(result, truth, real, f"{name} {layout} {how} cp {cp_size}", limit=1e-5)


@pytest.mark.parametrize("name", HYBRIDS)
def test_packed_texts_equal_each_text_alone(name: str) -> None:
    batch = packed_texts(PACKED)
    check(name, batch, 3, "zigzag", step_by_text(name, batch), "checkpointing")


@pytest.mark.parametrize("name", ["qwen3_5", "bamba", "lfm2"])
def test_padded_rows_equal_each_row_alone(name: str) -> None:
    batch = text_batch("left", rows=2)
    check(name, batch, 2, "balanced", step_by_text(name, batch))


@pytest.mark.parametrize("how", ["fsdp2", pytest.param("compile", marks=pytest.mark.nightly)])
def test_wrapped_models_equal_each_text_alone(how: str) -> None:
    batch = text_batch("packed", rows=2)
    check("qwen3_5", batch, 2, "zigzag", step_by_text("qwen3_5", batch), how)


def change_of_logits(name: str, batch: dict[str, Any], changed: dict[str, Any], layout: str) -> torch.Tensor:
    """By how much each row's logits change from one batch to the other, [S]."""
    register_attention()
    model = make_hybrid(name, "cpattn")
    make_lively(model)
    parallel = ContextParallel(model, dist.group.WORLD, layout=layout, max_chunk_size=8)
    outs = [parallel(each) for each in (batch, changed)]
    before, after = (out.shard.gather(out.logits).detach() for out in outs)
    return (after - before).abs().amax(-1)[0] / before.abs().max()


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_token_changes_the_later_ones_of_its_text_alone(name: str) -> None:
    """Through whole models, whose layers are of every kind; experts regroup rows, hence the rounding."""
    batch = packed_texts((5, 40, 1, 12))
    token, end = 19, 45
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][0, token] = 3 + (changed["input_ids"][0, token] - 2) % 80
    for change in run_on_ranks(3, change_of_logits, name, batch, changed, "zigzag"):
        assert (change > 1e-5).nonzero().flatten().tolist() == list(range(token, end))
        assert change[token:end].min() > 10 * change[:token].max().clamp(min=1e-6)


@pytest.mark.nightly
@pytest.mark.parametrize("name", HYBRIDS)
def test_every_layout_on_every_number_of_ranks(name: str) -> None:
    padded = text_batch("left", rows=2), text_batch("right", rows=3)
    for batch in (packed_texts(PACKED), text_batch("packed", rows=2), *padded):
        truth = step_by_text(name, batch)
        for cp_size in (2, 3, 4):
            for layout in LAYOUTS:
                check(name, batch, cp_size, layout, truth)


def test_layers_that_are_not_served_are_refused() -> None:
    import transformers as hf

    config = hf.JambaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_experts=2, mamba_d_state=8, mamba_d_conv=4, attn_layer_period=2,
        attn_layer_offset=1, use_mamba_kernels=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    register_attention()
    model = hf.JambaForCausalLM._from_config(config, attn_implementation="cpattn")
    with pytest.raises(ValueError, match="mixes tokens outside attention"):
        ContextParallel(model)


def test_a_served_model_is_what_it_was_without_a_shard() -> None:
    register_attention()
    batch = text_batch("plain", rows=2)
    plain = make_hybrid("qwen3_5")
    before = plain(input_ids=batch["input_ids"], use_cache=False).logits
    served = make_hybrid("qwen3_5", "cpattn")
    ContextParallel(served)
    torch.testing.assert_close(served(input_ids=batch["input_ids"], use_cache=False).logits, before)
    assert torch.equal(plain(input_ids=batch["input_ids"], use_cache=False).logits, before)
