"""TransformerEngine's attention operations in plain torch, on any device; TransformerEngine itself on request.

Every operation has the arguments and the contract of its original. `impl="te"` hands a call to TransformerEngine where
that is installed. See docs/te_ops.md.
"""

from .cache_copy import copy_to_kv_cache
from .convert import convert_bshd_to_thd, convert_thd_to_bshd, fa_prepare_bwd, fa_prepare_fwd, interleaved, mha_fill
from .fused import FusedAttention, fused_attn, fused_attn_bwd, fused_attn_fwd
from .layouts import LAYOUTS, QKVLayout, parse_layout
from .quantizers import (
    CurrentScalingQuantizer,
    DelayedScalingQuantizer,
    Fp8Tensor,
    MXFP8Quantizer,
    NoQuantizer,
    QuantizedBuffer,
    Quantizer,
    quantizer_helper,
)
from .refusals import MASK_TYPES, SOFTMAX_TYPES, te_refusal
from .te_import import te_installed

__all__ = [
    "LAYOUTS",
    "MASK_TYPES",
    "SOFTMAX_TYPES",
    "CurrentScalingQuantizer",
    "DelayedScalingQuantizer",
    "Fp8Tensor",
    "FusedAttention",
    "MXFP8Quantizer",
    "NoQuantizer",
    "QKVLayout",
    "QuantizedBuffer",
    "Quantizer",
    "convert_bshd_to_thd",
    "convert_thd_to_bshd",
    "copy_to_kv_cache",
    "fa_prepare_bwd",
    "fa_prepare_fwd",
    "fused_attn",
    "fused_attn_bwd",
    "fused_attn_fwd",
    "interleaved",
    "mha_fill",
    "parse_layout",
    "quantizer_helper",
    "te_installed",
    "te_refusal",
]
