"""What a fused-attention call may not be: the contract's own refusals, and those of TransformerEngine alone."""

from __future__ import annotations

import math
from typing import Any

import torch

from .layouts import QKVLayout, parse_layout
from .quantizers import Fp8Tensor

MASK_TYPES = (
    "no_mask",
    "padding",
    "causal",
    "padding_causal",
    "causal_bottom_right",
    "padding_causal_bottom_right",
)
SOFTMAX_TYPES = ("vanilla", "off-by-one", "learnable")
BIAS_TYPES = ("no_bias", "post_scale_bias", "pre_scale_bias", "alibi")

# TransformerEngine's words, so that a search for them leads to its documentation.
RAGGED_NEEDS_PADDING = "Ragged QKV input requires padding or padding_causal mask!"
PAGED_NEEDS_PADDING = "Paged attention requires padding mask!"
ONLY_16_BIT = "Fused attention only supports FP8 and BF16/FP16 data types"
BIAS_IS_NONE = "attn_bias tensor cannot be None when attn_bias_type is not no_bias or alibi."
BIAS_DTYPE = "attn_bias tensor must be in the same dtype as q and kv."
DROPOUT_IN_INFERENCE = "dropout must be 0.0 if is_training is False"


def refuse_call(**a: Any) -> None:
    """Raise ValueError for a call that neither TransformerEngine nor this package can serve.

    Args:
        a: the arguments of `fused_attn_fwd` (those of `call.common_arguments`, and is_training).
    """
    layout = parse_layout(a["qkv_layout"])
    for check in (_types, _shapes, _bias, _softmax, _numbers):
        reason = check(layout, a)
        if reason is not None:
            raise ValueError(reason)


def te_refusal(**a: Any) -> str | None:
    """Why TransformerEngine refuses a call of `fused_attn_fwd` or `fused_attn_bwd`, or None; given by name.

    What depends on the GPU and the cuDNN version is left to TransformerEngine's own selector.
    """
    layout = parse_layout(a["qkv_layout"])
    q, k, v = a["q"], a["k"], a["v"]
    mask, window = a["attn_mask_type"], a["window_size"]
    has_bias = a["attn_bias_type"] != "no_bias"
    fp8 = not isinstance(q, torch.Tensor) or isinstance(q, Fp8Tensor)
    ragged = "thd" in (layout.q_format, layout.kv_format)
    windowed = window[0] >= 0 or (window[1] >= 0 and "causal" not in mask) or window[1] > 0
    reasons = {
        ONLY_16_BIT: not fp8 and q.dtype not in (torch.float16, torch.bfloat16),
        RAGGED_NEEDS_PADDING: ragged and "padding" not in mask,
        PAGED_NEEDS_PADDING: layout.paged and "padding" not in mask,
        "FP8 attention does not take thd": fp8 and ragged,
        "FP8 attention takes no bias": fp8 and has_bias,
        "FP8 attention gives no max_logit": fp8 and bool(a.get("return_max_logit")),
        "attention bias does not go with padding masks": has_bias and "padding" in mask,
        "sliding windows do not go with dropout": windowed and a["dropout"] > 0,
        "sliding windows do not go with an attention bias": windowed and has_bias,
        "sliding windows need max_seqlen_q <= max_seqlen_kv": windowed and a["max_seqlen_q"] > a["max_seqlen_kv"],
        "head dims must be multiples of 8": bool(k.shape[-1] % 8 or v.shape[-1] % 8),
        "head dims must be at most 256": max(k.shape[-1], v.shape[-1]) > 256,
        "q, k and v must be contiguous in this layout": not (fp8 or layout.interleave)
        and not all(t.is_contiguous() for t in (q, k, v)),
        DROPOUT_IN_INFERENCE: not a.get("is_training", True) and a["dropout"] > 0,
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def _types(layout: QKVLayout, a: dict[str, Any]) -> str | None:
    mask = a["attn_mask_type"]
    for name, value, known in (
        ("attn_mask_type", mask, MASK_TYPES),
        ("softmax_type", a["softmax_type"], SOFTMAX_TYPES),
        ("attn_bias_type", a["attn_bias_type"], BIAS_TYPES),
    ):
        if value not in known:
            return f"{name} is {value!r}: use one of {', '.join(known)}"
    if layout.paged and "padding" not in mask:
        return f"{PAGED_NEEDS_PADDING} attn_mask_type is {mask!r}"
    if "thd" in (layout.q_format, layout.kv_format) and "padding" not in mask:
        return f"{RAGGED_NEEDS_PADDING} attn_mask_type is {mask!r} and qkv_layout {layout.name!r}"
    if layout.paged != (a["page_table_k"] is not None) and a["page_table_k"] is not None:
        return f"page_table_k is given with qkv_layout {layout.name!r}: page tables belong to paged_kv_* layouts"
    if layout.paged and a["page_table_k"] is None:
        return f"qkv_layout {layout.name!r} needs page_table_k"
    return None


def _shapes(layout: QKVLayout, a: dict[str, Any]) -> str | None:
    q, k, v = a["q"], a["k"], a["v"]
    if not (q.dtype == k.dtype == v.dtype and q.dtype.is_floating_point and q.dtype.itemsize > 1):
        return f"{ONLY_16_BIT}, and here FP32 and FP64; q, k and v are {q.dtype}, {k.dtype} and {v.dtype}"
    for name, t, fmt in (("q", q, layout.q_format), ("k", k, layout.kv_format), ("v", v, layout.kv_format)):
        if t.ndim != (3 if fmt == "thd" else 4):
            return f"{name} has shape {tuple(t.shape)}: format {fmt} has {3 if fmt == 'thd' else 4} dimensions"
    heads = [t.shape[1 if fmt == "bhsd" else -2] for t, fmt in ((q, layout.q_format), (k, layout.kv_format))]
    if k.shape[:-1] != v.shape[:-1] or heads[1] == 0 or heads[0] % heads[1]:
        return (
            f"q has {heads[0]} heads, k has shape {tuple(k.shape)} and v {tuple(v.shape)}: k and v must agree, and "
            f"query heads be a multiple of key heads"
        )
    if q.shape[-1] != k.shape[-1]:
        return f"q has head dim {q.shape[-1]} and k {k.shape[-1]}: they must agree"
    if v.shape[-1] != k.shape[-1] and layout.interleave:
        return f"v has head dim {v.shape[-1]} and k {k.shape[-1]}: qkv_layout {layout.name!r} stores them together"
    return None


def _bias(layout: QKVLayout, a: dict[str, Any]) -> str | None:
    kind, bias, q = a["attn_bias_type"], a["attn_bias"], a["q"]
    if kind == "no_bias":
        return "attn_bias is given with attn_bias_type 'no_bias'" if bias is not None else None
    if kind != "post_scale_bias":
        return f"attn_bias_type {kind!r} is not served (pre_scale_bias by no kernel); pass it as 'post_scale_bias'"
    if bias is None:
        return BIAS_IS_NONE
    if bias.dtype != q.dtype:
        return f"{BIAS_DTYPE} It is {bias.dtype} and q is {q.dtype}"
    batch, heads = len(a["cu_seqlens_q"]) - 1, q.shape[1 if layout.q_format == "bhsd" else -2]
    size = (a["max_seqlen_q"], a["max_seqlen_kv"])
    fits = bias.ndim == 4 and bias.shape[0] in (1, batch) and bias.shape[1] in (1, heads)
    if not fits or bias.shape[2] not in (1, size[0]) or bias.shape[3] != size[1]:
        expected = f"[1 or {batch}, 1 or {heads}, 1 or {size[0]}, {size[1]}]"
        return f"attn_bias has shape {tuple(bias.shape)}: expected {expected}"
    return None


def _softmax(layout: QKVLayout, a: dict[str, Any]) -> str | None:
    offset, heads = a["softmax_offset"], a["q"].shape[1 if layout.q_format == "bhsd" else -2]
    if a["softmax_type"] != "learnable":
        return None
    if offset is None or tuple(offset.shape) != (1, heads, 1, 1) or offset.dtype not in (torch.float32, torch.float64):
        shape = None if offset is None else (tuple(offset.shape), offset.dtype)
        return f"softmax_offset is {shape}: softmax_type 'learnable' needs fp32 [1, {heads}, 1, 1]"
    return None


def _numbers(layout: QKVLayout, a: dict[str, Any]) -> str | None:
    if a["attn_scale"] is not None and not math.isfinite(a["attn_scale"]):
        return f"attn_scale is {a['attn_scale']}: it must be a finite number, or None for 1 / sqrt(head_dim)"
    if not 0 <= a["dropout"] <= 1:
        return f"dropout is {a['dropout']}: it is a probability"
    if a["dropout"] and not a["is_training"]:
        return DROPOUT_IN_INFERENCE
    if len(a["window_size"]) != 2 or min(a["window_size"]) < -1:
        return f"window_size is {a['window_size']}: give (left, right), each -1 (unbounded) or more"
    if a["cuda_graph"]:
        return "cuda_graph: the portable operation reads sequence lengths on the host, which a graph cannot capture"
    return None
