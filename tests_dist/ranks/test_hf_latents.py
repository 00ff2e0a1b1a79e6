"""Runtime layer: DeepSeek's latent attention over ranks against eager in one process, and what travels for it."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers")

from cpattn.integrations.transformers import ContextParallel, register_attention
from tests_dist.support.harness import run_on_ranks
from tests_dist.support.hf_models import StepResult, assert_same_step, gradients, real_tokens, text_batch

_SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 12, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8, "v_head_dim": 6, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "attention_dropout": 0.0,
}  # fmt: skip


def make_model(name: str, attention: str) -> Any:
    import transformers as hf

    torch.manual_seed(0)
    config = getattr(hf, f"{name}Config")(**_SIZES)
    return getattr(hf, f"{name}ForCausalLM")._from_config(config, attn_implementation=attention).float().train()


def parallel_step(name: str, batch: dict[str, Any], checkpointing: bool) -> tuple[StepResult, int]:
    """The step, and bytes that the ranks exchanged as rows of attention in the first forward."""
    register_attention()
    model = make_model(name, "cpattn")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    parallel = ContextParallel(model, dist.group.WORLD, layout="zigzag", max_chunk_size=4)
    sent = 0
    all_to_all = dist.all_to_all_single

    def counted(received: Any, send: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal sent
        sent += received.nbytes
        return all_to_all(received, send, *args, **kwargs)

    with mock.patch.object(dist, "all_to_all_single", counted):
        out = parallel(batch)
    out.loss.backward()
    parallel.reduce_gradients()
    whole = out.shard.gather(out.logits).detach()
    return StepResult(whole, out.loss.detach(), gradients(model)), sent


@pytest.mark.shows("MLA")
@pytest.mark.parametrize("name", ["DeepseekV2", "DeepseekV3"])
@pytest.mark.parametrize(("cp_size", "layout"), [(2, "left"), (3, "packed")])
def test_equals_eager_and_sends_latents(name: str, cp_size: int, layout: str) -> None:
    batch = text_batch(layout, rows=2 if layout == "left" else 1)
    eager = make_model(name, "eager")
    out = eager(**batch, use_cache=False)
    out.loss.backward()
    truth = StepResult(out.logits.detach(), out.loss.detach(), gradients(eager))
    results = run_on_ranks(cp_size, parallel_step, name, batch, layout == "packed")
    for got, _ in results:
        assert_same_step(got, truth, real_tokens(batch), f"{name} {layout} cp {cp_size}")
    # At most every row of the others, of 8 + 4 numbers, for each of two layers.
    tokens = int(real_tokens(batch).sum())
    assert 0 < sum(sent for _, sent in results) <= 2 * (cp_size - 1) * tokens * 12 * 4
