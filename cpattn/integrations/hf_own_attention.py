"""Models that compute softmax attention in their layers themselves, without transformers' interface for it.

Their layers ask for a mask like all others, so a sharded one reaches them. A layer that gets one makes its queries,
keys and values as it always does, and attends by `cpattn_attention`; any other mask goes through the layer's own code.
What is written here of a layer is what the placement probe compares with the layer itself, whenever such a model is
wrapped.

ALiBi adds slope * position to the score of a key. That is one more number of the key, times a one of the query, so the
heads get wider and nothing is added.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .hf_attention import cpattn_attention
from .hf_model import OWN_ATTENTION, attends_by_itself
from .rows import RowMask
from .shard import LayerMask

# How much wider heads get for the position of a key: kernels like multiples of 8.
_POSITION_DIMS = 8


def _separate(layer: Any, mask: Any, given: Mapping[str, Any]) -> tuple[Tensor, None]:
    """Bart's old form: q_proj, k_proj, v_proj and out_proj."""
    if given.get("key_value_states") is not None or given.get("attn_prompt") is not None:
        raise ValueError(f"{type(layer).__name__}: keys from elsewhere are not supported under context parallelism")
    x = given["hidden_states"]
    q, k, v = (_by_head(p(x), layer.head_dim) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    dropout = layer.dropout if layer.training else 0.0
    return layer.out_proj(_attend(layer, q, k, v, mask, dropout, layer.scaling)), None


def _bert(layer: Any, mask: Any, given: Mapping[str, Any]) -> tuple[Tensor, None]:
    """query, key and value; RoFormer rotates them by the positions of the batch."""
    if given.get("encoder_hidden_states") is not None:
        raise ValueError(f"{type(layer).__name__}: keys from elsewhere are not supported under context parallelism")
    x, dim = given["hidden_states"], layer.attention_head_size
    q, k, v = (_by_head(p(x), dim) for p in (layer.query, layer.key, layer.value))
    if given.get("sinusoidal_pos") is not None:  # of as many places as the local tensor has
        table = layer._cpattn_angles.weight
        angles = table[mask.shard.positions.to(table.device)][None, None]
        if layer.rotary_value:
            q, k, v = layer.apply_rotary_position_embeddings(angles, q, k, v)
        else:
            q, k = layer.apply_rotary_position_embeddings(angles, q, k)
    dropout = layer.dropout.p if layer.training else 0.0
    return _attend(layer, q, k, v, mask, dropout, dim**-0.5), None


def _bloom(layer: Any, mask: Any, given: Mapping[str, Any]) -> tuple[Tensor, None]:
    """One projection of all three, ALiBi, and the residual added within the layer."""
    module = importlib.import_module(type(layer).__module__)
    q, k, v = layer._reshape(layer.query_key_value(given["hidden_states"]))
    slopes = module._get_alibi_slopes(layer.num_heads, k.device) / layer.inv_norm_factor
    bias = (slopes[:, None] * mask.shard.positions.to(k.device)).to(k.dtype)
    q = torch.cat([q, q.new_ones(*q.shape[:-1], 1), q.new_zeros(*q.shape[:-1], _POSITION_DIMS - 1)], -1)
    k = torch.cat([k, bias[None, :, :, None], k.new_zeros(*k.shape[:-1], _POSITION_DIMS - 1)], -1)
    dropout = layer.attention_dropout.p if layer.training else 0.0
    out = layer.dense(_attend(layer, q, k, v, mask, dropout, layer.inv_norm_factor))
    return module.dropout_add(out, given["residual"], layer.hidden_dropout, layer.training), None


# By model type: the class of its layers' attention, and what it does on a shard.
_SERVED: dict[str, tuple[str, Callable[..., Any]]] = {
    "bloom": ("BloomAttention", _bloom),
    "megatron-bert": ("MegatronBertSelfAttention", _bert),
    "mvp": ("MvpAttention", _separate),
    "rembert": ("RemBertSelfAttention", _bert),
    "roformer": ("RoFormerSelfAttention", _bert),
    "trocr": ("TrOCRAttention", _separate),
    "xglm": ("XGLMAttention", _separate),
}
assert set(_SERVED) == OWN_ATTENTION


def serve_own_attention(decoder: nn.Module, config: Any) -> None:
    """Make a decoder's layers attend over a shard where their mask is one; idempotent."""
    if not attends_by_itself(config):
        return
    name, sharded = _SERVED[config.model_type]
    tables = [m for m in decoder.modules() if type(m).__name__ == "RoFormerSinusoidalPositionalEmbedding"]
    for layer in decoder.modules():
        if type(layer).__name__ != name:
            continue
        cls: Any = type(layer)
        if not hasattr(cls.forward, "_cpattn_original"):
            cls.forward = _dispatching(cls.forward, sharded)
        if tables:
            object.__setattr__(layer, "_cpattn_angles", tables[0])  # not a submodule of each layer


def _dispatching(original: Callable[..., Any], sharded: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        mask = given.get("attention_mask")
        if not isinstance(mask, (LayerMask, RowMask)):
            return original(*args, **kwargs)
        return sharded(args[0], mask, given)

    forward._cpattn_original = original  # type: ignore[attr-defined]
    return forward


def _by_head(x: Tensor, dim: int) -> Tensor:
    """[1, L, heads * dim] as [1, heads, L, dim]."""
    return x.unflatten(-1, (-1, dim)).transpose(1, 2)


def _attend(layer: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, dropout: float, scale: float) -> Tensor:
    """[1, L, heads * dim]."""
    return cpattn_attention(layer, q, k, v, mask, dropout=dropout, scaling=scale)[0].flatten(2)
