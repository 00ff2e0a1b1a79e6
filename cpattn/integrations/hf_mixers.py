"""Layers of transformers models that mix tokens without softmax, served on a shard: convolutions and recurrences.

transformers writes such a layer around a few functions of its modeling module: `causal_conv1d_fn`, and the scan of its
family. Under a shard these are answered by `cpattn.mixers`, over the tokens of all ranks; everywhere else they are what
they were. How the shard gets there, also when activation checkpointing runs a layer again:

1. The modeling module's `create_recurrent_attention_mask` gives a `LayerMask` for a sharded batch.
2. A hook before the layer's forward takes the `LayerMask` out of its arguments and makes it the current one.
3. The functions look for a current mask (`current.answering`).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cpattn.mixers import causal_conv1d, linear_attention, mamba2

from .current import answering, watch_layer
from .shard import LayerMask

# Classes of layers whose forward is written around the functions below. By name, not by shape: what another class does
# around them (a state of its own, a shift) is not known.
SERVED_MIXERS = frozenset(
    {
        "BailingHybridDeltaAttention",
        "BambaMixer",
        "FalconH1Mixer",
        "GraniteMoeHybridMambaLayer",
        "KimiLinearDeltaAttention",
        "LaraMiniGatedDeltaNet",
        "Lfm2MoeShortConv",
        "Lfm2ShortConv",
        "Lfm3ShortConv",
        "Mamba2Mixer",
        "MiniMaxLightningAttention",
        "NemotronHMamba2Mixer",
        "OlmoHybridGatedDeltaNet",
        "Qwen3NextGatedDeltaNet",
        "Qwen3_5GatedDeltaNet",
        "Qwen3_5MoeGatedDeltaNet",
    }
)


def serve_mixers(decoder: nn.Module) -> list[str]:
    """Make the served layers of a decoder run on shards; idempotent.

    Returns:
        The names of those layers among the decoder's modules.
    """
    served = [(name, layer) for name, layer in decoder.named_modules() if _is_served(layer)]
    for _, layer in served:
        _serve_module(importlib.import_module(type(layer).__module__))
        watch_layer(layer, hands_on_mask=False)
        layer._cpattn_served = True  # type: ignore[assignment]
    return [name for name, _ in served]


def _is_served(layer: nn.Module) -> bool:
    """Whether it is of a class known here, in a version of transformers that writes it around those functions."""
    if type(layer).__name__ not in SERVED_MIXERS:
        return False
    module = importlib.import_module(type(layer).__module__)
    wanted = () if type(layer).__name__ == "MiniMaxLightningAttention" else ("causal_conv1d_fn",)
    return all(hasattr(module, name) for name in (*wanted, "create_recurrent_attention_mask"))


def _serve_module(module: ModuleType) -> None:
    """Put a function that knows of shards in the place of each that a modeling module's layers call."""
    for name, sharded in _SHARDED.items():
        if hasattr(module, name):
            setattr(module, name, answering(getattr(module, name), sharded))
    mask = module.create_recurrent_attention_mask
    if not hasattr(mask, "_cpattn_original"):
        module.create_recurrent_attention_mask = _recurrent_mask(mask)  # type: ignore[attr-defined]
    lightning = getattr(module, "MiniMaxLightningAttention", None)
    if lightning is not None:
        lightning.forward = answering(lightning.forward, _lightning_attention)


def _recurrent_mask(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def mask(*args: Any, **kwargs: Any) -> Any:
        given = kwargs.get("attention_mask", args[2] if len(args) > 2 else None)
        shard = getattr(given, "shard", None)
        return original(*args, **kwargs) if shard is None else LayerMask.over(shard)

    mask._cpattn_original = original  # type: ignore[attr-defined]
    return mask


def _rows(x: Tensor, mask: LayerMask) -> Tensor:
    """[1, L, ...] as this rank's rows: without the stand-in of a rank that has none."""
    return mask.shard.in_key_order(x[0, : mask.key.num_tokens])


def _layers_view(rows: Tensor, like: Tensor, mask: LayerMask) -> Tensor:
    """Rows as [1, L, ...], with a stand-in where `like` has one."""
    rows = mask.shard.in_own_order(rows)
    missing = like.shape[1] - rows.shape[0]
    return (torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows).unsqueeze(0)


def _causal_conv1d(
    mask: LayerMask,
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    **kwargs: Any,
) -> Tensor:
    """hidden_states [1, C, L], weight [C, W]; by the layers' own reckoning the result has hidden_states' dtype."""
    key, by_row = mask.key, hidden_states.transpose(1, 2)
    x = _rows(by_row, mask).to(weight.dtype)
    out = causal_conv1d(x, weight, key, bias_C=bias, activation=activation)  # type: ignore[arg-type]
    return _layers_view(out.to(hidden_states.dtype), by_row, mask).transpose(1, 2)


def _gated_delta_rule(
    mask: LayerMask,
    query: Tensor,
    keys: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query, keys [1, L, G, K], value [1, L, H, V], g [1, L, H] or [1, L, H, K], beta [1, L, H]."""
    _refuse_state(initial_state, output_final_state)
    key = mask.key
    q, k = (_rows(x, mask).to(torch.promote_types(x.dtype, torch.float32)) for x in (query, keys))
    if use_qk_l2norm_in_kernel:
        q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    out = linear_attention(
        q, k, _rows(value, mask), key, decay=_rows(g, mask), beta_TH=_rows(beta, mask), scale=query.shape[-1] ** -0.5
    )
    return _layers_view(out.to(query.dtype), value, mask), None


def _mamba2_scan(
    mask: LayerMask,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    z: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """hidden_states [1, L, H, P], dt [1, L, H], A [H], B, C [1, L, G, N], D [H]."""
    _refuse_state(initial_states, return_final_states)
    if z is not None:
        raise ValueError("mamba2: z in the scan is not supported under context parallelism: gate after it")
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    if dt_softplus:
        dt = F.softplus(dt)
    rows = [_rows(t, mask) for t in (hidden_states, dt.clamp(*dt_limit), B, C)]
    out = mamba2(rows[0], rows[1], A, rows[2], rows[3], mask.key, D=D)
    return _layers_view(out, hidden_states, mask)


def _lightning_attention(
    mask: LayerMask,
    layer: Any,
    hidden_states: Tensor,
    position_embeddings: Any = None,
    attention_mask: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The whole layer of MiniMax, which is written in one piece: q, k and v by head, one constant decay a head."""
    key = mask.key
    qkv = layer.act_fn(layer.qkv_proj(hidden_states)).unflatten(-1, (layer.num_attention_heads, -1))
    q, k, v = (_rows(x, mask) for x in qkv.split(layer.head_dim, dim=-1))
    decay = -layer.slope_rate.flatten().expand(len(q), -1)
    mixed = linear_attention(q, k, v, key, decay=decay).flatten(1)
    out = layer.norm(_layers_view(mixed, hidden_states, mask))
    return layer.out_proj(F.sigmoid(layer.output_gate(hidden_states)) * out), None


def _refuse_state(initial: Tensor | None, wants_final: bool) -> None:
    if initial is not None or wants_final:
        raise ValueError("a recurrent state from before the batch, or after it, is not supported under a shard")


def _no_fused_layer(mask: LayerMask, *args: Any, **kwargs: Any) -> None:
    """None, which tells a layer to go through convolution and scan one by one."""


_SHARDED: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": _causal_conv1d,
    "torch_chunk_gated_delta_rule": _gated_delta_rule,
    "chunk_kimi_delta_attention": _gated_delta_rule,
    "mamba2_chunk_scan": _mamba2_scan,
    "mamba2_split_conv1d_scan_combined": _no_fused_layer,
}
