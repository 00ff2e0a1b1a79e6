"""Tiny models whose layers mix tokens by recurrences and convolutions, and their single-process reference.

The reference runs each text alone. Where a model has the gated delta rule, its scan is replaced by the recurrence
itself in fp64: transformers' own takes differences of cumulated decays in fp32, so its gradients of A_log are off by
up to 2e-3.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from tests_dist.mixers.references import recurrence
from tests_dist.support.hf_models import IGNORE, VOCAB, StepResult, gradients

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_dropout": 0.0,
}
_DELTA: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
}
_MAMBA: dict[str, Any] = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 2,
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
}
_EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
_TWO = {"num_hidden_layers": 2}
_LINEAR, _CONV = ["linear_attention", "full_attention"], ["conv", "full_attention"]

# Model name, then the names of its class and config and what is set in the config beside the sizes.
HYBRIDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3_next": (
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        _TWO
        | _DELTA
        | {"head_dim": 8, "layer_types": _LINEAR, "num_experts": 4, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    ),
    "qwen3_5": (
        "Qwen3_5ForCausalLM",
        "Qwen3_5TextConfig",
        _TWO | _DELTA | {"head_dim": 8, "layer_types": _LINEAR},
    ),
    "olmo_hybrid": ("OlmoHybridForCausalLM", "OlmoHybridConfig", _TWO | _DELTA | {"layer_types": _LINEAR}),
    "lfm2": ("Lfm2ForCausalLM", "Lfm2Config", _TWO | {"conv_L_cache": 3, "layer_types": _CONV}),
    "bamba": ("BambaForCausalLM", "BambaConfig", _TWO | _MAMBA | {"attn_layer_indices": [1]}),
    "falcon_h1": ("FalconH1ForCausalLM", "FalconH1Config", _TWO | _MAMBA | {"mamba_d_ssm": 64, "head_dim": 8}),
    "granite4": (
        "GraniteMoeHybridForCausalLM",
        "GraniteMoeHybridConfig",
        _TWO | _MAMBA | _EXPERTS | {"shared_intermediate_size": 32, "layer_types": ["mamba", "attention"]},
    ),
    "nemotron_h": (
        "NemotronHForCausalLM",
        "NemotronHConfig",
        {"head_dim": 8, "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 8}
        | {"conv_kernel": 4, "chunk_size": 16, "layers_block_type": ["mamba", "mlp", "attention", "mamba"]},
    ),
    "minimax": (
        "MiniMaxForCausalLM",
        "MiniMaxConfig",
        _TWO | _EXPERTS | {"head_dim": 8, "block_size": 16, "layer_types": _LINEAR},
    ),
}
WITH_DELTA_RULE = ("qwen3_next", "qwen3_5", "olmo_hybrid")


def make_hybrid(name: str, attention: str = "eager", seed: int = 0) -> nn.Module:
    """A tiny model in fp32 and training mode, the same weights wherever it is made."""
    import transformers as hf

    model_name, config_name, settings = HYBRIDS[name]
    config = getattr(hf, config_name)(**{**_SIZES, **settings})
    torch.manual_seed(seed)
    model = getattr(hf, model_name)._from_config(config, attn_implementation=attention)
    return model.float().train()  # type: ignore[no-any-return]


def packed_texts(lengths: tuple[int, ...], seed: int = 0) -> dict[str, Tensor]:
    """One row of texts of these lengths, each token with a label but the first of a text."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 90, (1, sum(lengths)), generator=generator)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return {"input_ids": ids, "position_ids": positions, "labels": ids.masked_fill(positions == 0, IGNORE)}


def texts_of(batch: dict[str, Tensor]) -> Iterator[tuple[int, int, int]]:
    """Row, begin and end of each text of a packed or padded batch."""
    positions, mask = batch.get("position_ids"), batch.get("attention_mask")
    for row, ids in enumerate(batch["input_ids"]):
        if positions is not None:
            starts = [*(positions[row] == 0).nonzero().flatten().tolist(), len(ids)]
            yield from ((row, a, b) for a, b in itertools.pairwise(starts))
        else:
            real = torch.arange(len(ids)) if mask is None else mask[row].nonzero().flatten()
            yield row, int(real[0]), int(real[-1]) + 1


def step_by_text(name: str, batch: dict[str, Tensor]) -> StepResult:
    """One forward and backward of the eager model over each text alone, put together."""
    model = make_hybrid(name)
    ids, labels, texts = batch["input_ids"], batch["labels"], list(texts_of(batch))
    count = sum(int((labels[row, a + 1 : b] != IGNORE).sum()) for row, a, b in texts)
    logits, total = torch.zeros(*ids.shape, VOCAB), torch.zeros(())
    modeling = importlib.import_module(type(model).__module__)
    exact = mock.patch.object(modeling, "torch_chunk_gated_delta_rule", _exact_delta_rule)
    with exact if name in WITH_DELTA_RULE else contextlib.nullcontext():
        for row, a, b in texts:
            out = model(input_ids=ids[row : row + 1, a:b], use_cache=False).logits[0]
            logits[row, a:b] = out.detach()
            if b - a > 1:
                targets = labels[row, a + 1 : b]
                loss = torch.nn.functional.cross_entropy(out[:-1], targets, ignore_index=IGNORE, reduction="sum")
                (loss / count).backward()
                total += loss.detach() / count
    return StepResult(logits, total, gradients(model))


def _exact_delta_rule(query: Any, key: Any, value: Any, g: Any, beta: Any, **options: Any) -> tuple[Tensor, None]:
    """transformers' `torch_chunk_gated_delta_rule` of one text, token by token in fp64."""
    q, k = (x[0].double() * torch.rsqrt((x[0].double() ** 2).sum(-1, keepdim=True) + 1e-6) for x in (query, key))
    q = q * query.shape[-1] ** -0.5
    out = recurrence(q, k, value[0].double(), g[0].double(), beta[0].double(), [query.shape[1]])
    return out[None].to(query.dtype), None
