"""Tiny, random models of every causal language model type of the installed transformers.

The type's own default config is shrunk by the names of its fields; what a type needs besides stands in `SPECIAL`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

HIDDEN, VOCAB, WINDOW = 64, 101, 6

# Fields by what they mean: whoever has one gets the small value.
SIZES: dict[str, Any] = {
    **dict.fromkeys(["vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"], VOCAB),
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "emb_dim", "embedding_size", "word_embed_proj_dim"], HIDDEN),
    **dict.fromkeys(["input_embedding_size", "output_embedding_size", "lru_width", "attention_hidden_size"], HIDDEN),
    **dict.fromkeys(["decoder_hidden_size", "embedding_dim", "moe_latent_size"], HIDDEN),
    **dict.fromkeys(["intermediate_size", "dff", "dim_ff", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim"], 96),
    **dict.fromkeys(["ffn_hidden_size", "d_inner", "intermediate_size_mlp", "feed_forward_size", "n_inner"], 96),
    **dict.fromkeys(["dense_intermediate_size", "shared_experts_intermediate_size", "decoder_ffn_size"], 96),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"], 32),
    **dict.fromkeys(["expert_ffn_hidden_size", "moe_shared_expert_intermediate_size"], 32),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"], 2),
    **dict.fromkeys(["num_decoder_layers", "num_encoder_layers", "num_blocks"], 2),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"], 4),
    **dict.fromkeys(["encoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"], 4),
    **dict.fromkeys(["swa_num_attention_heads"], 4),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"], 2),
    **dict.fromkeys(["head_dim", "d_head", "dim_head", "kv_channels", "swa_head_dim", "global_head_dim"], 16),
    **dict.fromkeys(["v_head_dim", "qk_nope_head_dim", "attention_head_dim", "kv_lora_rank", "q_lora_rank"], 16),
    **dict.fromkeys(["swa_v_head_dim", "linear_head_dim", "attention_head_size"], 16),
    **dict.fromkeys(["qk_rope_head_dim", "rotary_dim", "o_lora_rank", "adapter_rank", "laurel_rank"], 8),
    "qk_head_dim": 24,
    **dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "model_max_length"], 256),
    **dict.fromkeys(["max_target_positions", "max_source_positions", "context_length"], 256),
    **dict.fromkeys(["num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token"], 2),
    **dict.fromkeys(["n_group", "topk_group", "n_groups", "n_shared_experts", "num_expert_group"], 1),
    **dict.fromkeys(["first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"], 1),
    **dict.fromkeys(["sliding_window", "attention_window_size", "window_size", "sliding_window_size"], WINDOW),
    **dict.fromkeys(["index_head_dim", "index_n_heads"], 16),
    **dict.fromkeys(["hidden_size_per_layer_input", "mamba_n_heads"], 8),
    **dict.fromkeys(["mamba_d_state", "mamba_d_head"], 16),
    **dict.fromkeys(["mamba_d_ssm"], 2 * HIDDEN),
    **dict.fromkeys(["mamba_n_groups"], 1),
    **dict.fromkeys(["num_kv_shared_layers", "pad_token_id", "num_nextn_predict_layers"], 0),
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# What a type needs besides its sizes, and where its sizes depend on one another.
SPECIAL: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
            "full_attention": None,
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v32": {"index_topk": 4},
    "dory": {"n_input_layers": 1, "n_output_layers": 1, "num_hidden_layers": 3, "layer_types": None},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {"num_key_value_heads": 4},
    "glm_moe_dsa": {"index_topk": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"]},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2, "state_size": 16},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 16},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [32, 32], "axial_pos_shape": [16, 16]},
    "roc_bert": {"pronunciation_vocab_size": VOCAB, "shape_vocab_size": VOCAB},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 2 * HIDDEN,
        "attention_head_dim": 32,
    },
    "zamba2": {"attention_hidden_size": 2 * HIDDEN, "attention_head_dim": 32},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 32},
}

# Fields that list something for every layer: their kinds are kept, one layer of each.
PER_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type")
MODALITIES = {"text_config", "vision_config", "audio_config", "text_encoder", "patcher_config", "audio_encoder"}


def is_composite(model_type: str) -> bool:
    """Whether the type is a language model with towers of other modalities around it."""
    from transformers import CONFIG_MAPPING

    return bool(MODALITIES & set(CONFIG_MAPPING[model_type].sub_configs))


def tiny_config(model_type: str) -> Any:
    """The default config of a type with small sizes, no dropout, and special tokens 0, 1 and 2."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    default = kind().to_dict()
    fields = {n: v for n, v in SIZES.items() if isinstance(default.get(n), int) or _is_left_open(n, default)}
    fields |= {name: 0.0 for name, value in default.items() if _is_dropout(name, value)}
    fields |= {"is_decoder": True} if default.get("is_decoder") is False else {}
    if "qk_rope_head_dim" in default:  # latent attention: as many heads of keys, and the other widths follow
        fields = {name: value for name, value in fields.items() if name not in ("head_dim", "qk_head_dim")}
        fields |= {"num_key_value_heads": 4} if "num_key_value_heads" in default else {}
    lists = {name: list(dict.fromkeys(default[name])) for name in PER_LAYER if default.get(name)}
    depth = max([2, *map(len, lists.values())])
    fields |= {name: (kinds * depth)[:depth] for name, kinds in lists.items()}
    fields |= {n: depth for n in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") if n in fields}
    return kind(**fields | SPECIAL.get(model_type, {}))


def _is_left_open(name: str, default: dict[str, Any]) -> bool:
    """A field that is there and None, and that has a value in every model that uses it."""
    return name in default and default[name] is None and name in ("head_dim", "num_key_value_heads")


def _is_dropout(name: str, value: Any) -> bool:
    words = ("drop", "jitter", "layerdrop")
    return isinstance(value, float) and any(word in name for word in words)


def make_lively(model: nn.Module, seed: int = 1) -> None:
    """Random weights so large that masks and positions matter to every figure; in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim >= 2:
                weight.copy_(noise * (0.5 if "embed" in name else 1.5 / weight.shape[-1] ** 0.5))
            else:
                weight.add_(noise * 0.1)
