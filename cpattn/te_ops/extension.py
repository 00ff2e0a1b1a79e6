"""The functions under their names and argument orders in the compiled module `transformer_engine_torch`, 2.12 and 2.20.

For code that calls the extension itself: `from cpattn.te_ops import extension as tex`. The arithmetic is that of
`fused_attn_fwd` and its kin one level up, which have defaults and names and are the better choice elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import cache_copy, fused
from .convert import convert_bshd_to_thd, convert_thd_to_bshd, fa_prepare_bwd, fa_prepare_fwd, mha_fill
from .layouts import LAYOUTS
from .orders import FORMATS, either_order
from .quantizers import Fp8Tensor, Quantizer, quantizer_helper
from .refusals import BIAS_TYPES, MASK_TYPES, SOFTMAX_TYPES

__all__ = [
    "convert_bshd_to_thd",
    "convert_thd_to_bshd",
    "copy_to_kv_cache",
    "fa_prepare_bwd",
    "fa_prepare_fwd",
    "fused_attn_bwd",
    "fused_attn_fwd",
    "mha_fill",
    "quantizer_helper",
]


@either_order(after="qkv_layout", added=("o_format", "qkv_scale_inv_format"), dropped=None, told_by="bias_type")
def fused_attn_fwd(
    max_seqlen_q: int,
    max_seqlen_kv: int,
    is_training: bool,
    attn_scale: float,
    p_dropout: float,
    set_zero: bool,
    qkv_layout: Any,
    bias_type: Any,
    attn_mask_type: Any,
    softmax_type: Any,
    window_size: Sequence[int],
    bottom_right_diagonal: bool | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    q: Tensor | Fp8Tensor,
    k: Tensor | Fp8Tensor,
    v: Tensor | Fp8Tensor,
    fake_dtype: torch.dtype | None = None,
    cu_seqlens_q_padded: Tensor | None = None,
    cu_seqlens_kv_padded: Tensor | None = None,
    page_table_k: Tensor | None = None,
    page_table_v: Tensor | None = None,
    s_quantizer: Quantizer | None = None,
    o_quantizer: Quantizer | None = None,
    bias: Tensor | None = None,
    softmax_offset: Tensor | None = None,
    rng_gen: torch.Generator | None = None,
    rng_elts_per_thread: int = 0,
    return_max_logit: bool = False,
    cuda_graph: bool = False,
    *,
    o_format: Any = None,
    qkv_scale_inv_format: Any = None,
) -> list[Any]:
    """`te_ops.fused_attn_fwd`: [out, stats, rng_state, (bias), (softmax_offset)], with max_logit [N] last if asked.

    Args:
        qkv_layout, bias_type, attn_mask_type, softmax_type: names, or enum members of TransformerEngine.
        set_zero, rng_elts_per_thread: without effect.

    Raises:
        ValueError: as there.
    """
    out, aux, *maximum = fused.fused_attn_fwd(
        is_training,
        max_seqlen_q,
        max_seqlen_kv,
        cu_seqlens_q,
        cu_seqlens_kv,
        q,
        k,
        v,
        fake_dtype,
        attn_bias=bias,
        cu_seqlens_q_padded=cu_seqlens_q_padded,
        cu_seqlens_kv_padded=cu_seqlens_kv_padded,
        page_table_k=page_table_k,
        page_table_v=page_table_v,
        s_quantizer=s_quantizer,
        o_quantizer=o_quantizer,
        attn_scale=attn_scale,
        dropout=p_dropout,
        rng_gen=rng_gen,
        softmax_offset=softmax_offset,
        return_max_logit=return_max_logit,
        cuda_graph=cuda_graph,
        o_format=_format(o_format),
        **_names(qkv_layout, bias_type, attn_mask_type, softmax_type, window_size, bottom_right_diagonal),
    )
    return [out, *aux, *maximum]


@either_order(
    after="qkv_layout",
    added=("o_format", "do_format", "dqkv_layout", "qkv_scale_inv_format", "do_scale_inv_format"),
    dropped="dqkv_type",
    told_by="bias_type",
)
def fused_attn_bwd(
    max_seqlen_q: int,
    max_seqlen_kv: int,
    attn_scale: float,
    p_dropout: float,
    set_zero: bool,
    qkv_layout: Any,
    bias_type: Any,
    attn_mask_type: Any,
    softmax_type: Any,
    window_size: Sequence[int],
    bottom_right_diagonal: bool | None,
    deterministic: bool,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    q: Tensor | Fp8Tensor,
    k: Tensor | Fp8Tensor,
    v: Tensor | Fp8Tensor,
    o: Tensor | Fp8Tensor,
    d_o: Tensor | Fp8Tensor,
    fake_dtype: torch.dtype | None,
    dqkv_type: Any = None,
    aux_ctx_tensors: Sequence[Tensor] = (),
    cu_seqlens_q_padded: Tensor | None = None,
    cu_seqlens_kv_padded: Tensor | None = None,
    s_quantizer: Quantizer | None = None,
    dp_quantizer: Quantizer | None = None,
    dqkv_quantizer: Quantizer | None = None,
    cuda_graph: bool = False,
    *,
    o_format: Any = None,
    do_format: Any = None,
    dqkv_layout: Any = None,
    qkv_scale_inv_format: Any = None,
    do_scale_inv_format: Any = None,
) -> list[Any]:
    """`te_ops.fused_attn_bwd`: [dq, dk, dv, dbias or None, dsoftmax_offset or None].

    Raises:
        ValueError: as there.
    """
    return list(
        fused.fused_attn_bwd(
            max_seqlen_q,
            max_seqlen_kv,
            cu_seqlens_q,
            cu_seqlens_kv,
            q,
            k,
            v,
            o,
            d_o,
            fake_dtype,
            dqkv_type,
            aux_ctx_tensors,
            cu_seqlens_q_padded=cu_seqlens_q_padded,
            cu_seqlens_kv_padded=cu_seqlens_kv_padded,
            s_quantizer=s_quantizer,
            dp_quantizer=dp_quantizer,
            dqkv_quantizer=dqkv_quantizer,
            attn_scale=attn_scale,
            dropout=p_dropout,
            deterministic=deterministic,
            cuda_graph=cuda_graph,
            o_format=_format(o_format),
            do_format=_format(do_format),
            dqkv_layout=None if dqkv_layout is None else enum_name(dqkv_layout, tuple(LAYOUTS)),
            **_names(qkv_layout, bias_type, attn_mask_type, softmax_type, window_size, bottom_right_diagonal),
        )
    )


def copy_to_kv_cache(
    new_k: Tensor,
    new_v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    cu_new_lens: Tensor,
    cu_cached_lens: Tensor,
    kv_format: Any,
    b: int,
    max_ctx_len: int,
    max_seq_len: int,
    max_pages_per_seq: int,
    is_non_paged: bool,
) -> None:
    """`te_ops.copy_to_kv_cache`; kv_format may be an enum member of TransformerEngine."""
    tensors = (new_k, new_v, k_cache, v_cache, page_table, cu_new_lens, cu_cached_lens)
    numbers = (b, max_ctx_len, max_seq_len, max_pages_per_seq, is_non_paged)
    cache_copy.copy_to_kv_cache(*tensors, enum_name(kv_format, ("bshd", "sbhd", "thd")), *numbers)


def enum_name(value: Any, known: Sequence[str]) -> str:
    """The name of a TransformerEngine enum member among `known`: NVTE_PADDING_CAUSAL_MASK is padding_causal.

    Raises:
        ValueError: it is none of them.
    """
    if isinstance(value, str) and value in known:
        return value
    name = value if isinstance(value, str) else getattr(value, "name", str(value))
    bare = name.rsplit(".", 1)[-1].removeprefix("NVTE_").lower().replace("off_by_one", "off-by-one")
    for candidate in (bare, bare.removesuffix("_mask"), bare.removesuffix("_softmax")):
        if candidate in known:
            return candidate
    raise ValueError(f"{name!r} is none of {', '.join(known)}")


def _format(value: Any) -> str | None:
    return None if value is None else enum_name(value, FORMATS)


def _names(
    layout: Any, bias: Any, mask: Any, softmax: Any, window: Sequence[int], bottom_right: bool | None
) -> dict[str, Any]:
    return {
        "qkv_layout": enum_name(layout, tuple(LAYOUTS)),
        "attn_bias_type": enum_name(bias, BIAS_TYPES),
        "attn_mask_type": enum_name(mask, MASK_TYPES),
        "softmax_type": enum_name(softmax, SOFTMAX_TYPES),
        "window_size": (int(window[0]), int(window[1])),
        "bottom_right_diagonal": bottom_right,
    }
