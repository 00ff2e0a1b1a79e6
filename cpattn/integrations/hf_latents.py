"""DeepSeek's latent attention (MLA) on a shard: the latent travels, and is expanded where it is used.

transformers compresses what keys and values are made from into one row a token (512 + 64 numbers in DeepSeek-V3, where
keys and values are 128 heads of 192 and 128), and expands it in the layer's `expand_kv`, right before attention. Under
a shard the compressed rows that this rank's queries need are fetched there, and attention runs over what they become.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from cpattn.ops.fetch import fetch

from .current import answering, watch_layer
from .shard import LayerMask

# Classes whose forward is written around `expand_kv`.
SERVED_LATENTS = frozenset({"DeepseekV2Attention", "DeepseekV3Attention", "KimiLinearAttention"})


def serve_latents(decoder: nn.Module) -> dict[str, Any]:
    """Make a decoder's latent attention send latents; idempotent.

    Returns:
        What to make its keys with (`make_key`): heads and latents as they are; empty if no layer is served.
    """
    served = [layer for layer in decoder.modules() if is_latent(layer)]
    for layer in served:
        cls: Any = type(layer)
        if not hasattr(cls.expand_kv, "_cpattn_original"):
            cls.expand_kv = answering(cls.expand_kv, functools.partial(_expand_fetched, cls.expand_kv))
        watch_layer(layer, hands_on_mask=True)
    if not served:
        return {}
    first: Any = served[0]
    return {
        "num_heads_kv": first.num_heads,
        "head_dim": first.qk_nope_head_dim + first.qk_rope_head_dim,
        "head_dim_v": first.v_head_dim,
        "latent_dim": first.kv_lora_rank + first.qk_rope_head_dim,
        "schedule": "keys",
    }


def is_latent(layer: Any) -> bool:
    """Whether it is of a class known here, in a version of transformers that has `expand_kv`."""
    return type(layer).__name__ in SERVED_LATENTS and hasattr(layer, "expand_kv")


def sends_latents(layer: Any) -> bool:
    """Whether a layer's keys and values are of the rows that were fetched for it."""
    return is_latent(layer) and hasattr(layer, "_cpattn_watched")


def _expand_fetched(
    expand: Any, mask: LayerMask, layer: nn.Module, kv_nope: Tensor, k_rot: Tensor
) -> tuple[Tensor, Tensor]:
    """kv_nope [1, 1, L, rank] and k_rot [1, 1, L, rope dim] as keys and values of all rows that are needed here."""
    rows = mask.shard.in_key_order(torch.cat([kv_nope, k_rot], dim=-1)[0, 0, : mask.key.num_keys])
    needed = fetch(rows, mask.key)[None, None]
    return expand(layer, *needed.split([kv_nope.shape[-1], k_rot.shape[-1]], dim=-1))  # type: ignore[no-any-return]
