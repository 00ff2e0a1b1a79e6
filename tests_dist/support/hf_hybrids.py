"""Tiny models whose layers mix tokens by recurrences and convolutions, and their single-process reference.

The reference is the transformers model itself in fp64, over each text alone. In fp32 it would not do: its gated delta
rule takes differences of cumulated decays, which leaves gradients of A_log off by up to 9e-4.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

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
    "kimi_linear": (
        "KimiLinearForCausalLM",
        "KimiLinearConfig",
        _TWO
        | _EXPERTS
        | {"linear_num_heads": 4, "linear_head_dim": 8, "linear_conv_kernel_dim": 4, "layer_types": _LINEAR}
        | {"kv_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4}
        | {"mlp_layer_types": ["dense", "sparse"], "moe_intermediate_size": 16},
    ),
    "minimax": (
        "MiniMaxForCausalLM",
        "MiniMaxConfig",
        _TWO | _EXPERTS | {"head_dim": 8, "block_size": 16, "layer_types": _LINEAR},
    ),
}


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


class _AllInFp64(TorchFunctionMode):
    """Makes fp64 of what a model asks to have in fp32 (norms, states, routers), so that none of it is rounded."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        wide = [torch.float64 if x is torch.float32 else x for x in args]
        return func(*wide, **{n: torch.float64 if x is torch.float32 else x for n, x in (kwargs or {}).items()})


def step_by_text(name: str, batch: dict[str, Tensor], dtype: torch.dtype = torch.float64) -> StepResult:
    """One forward and backward of the eager model in fp64 (or fp32) over each text alone, put together."""
    model = make_hybrid(name).to(dtype)
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._experts_implementation = "eager"  # type: ignore[union-attr]  # grouped products have no fp64
    ids, labels, texts = batch["input_ids"], batch["labels"], list(texts_of(batch))
    count = sum(int((labels[row, a + 1 : b] != IGNORE).sum()) for row, a, b in texts)
    logits, total = torch.zeros(*ids.shape, VOCAB, dtype=dtype), torch.zeros((), dtype=dtype)
    with _AllInFp64() if dtype == torch.float64 else contextlib.nullcontext():
        for row, a, b in texts:
            out = model(input_ids=ids[row : row + 1, a:b], use_cache=False).logits[0]
            assert out.dtype == dtype
            logits[row, a:b] = out.detach()
            if b - a > 1:
                targets = labels[row, a + 1 : b]
                loss = torch.nn.functional.cross_entropy(out[:-1], targets, ignore_index=IGNORE, reduction="sum")
                (loss / count).backward()
                total += loss.detach() / count
    return StepResult(logits, total, gradients(model))
