"""The attention factory of model code that is written against several backends.

A layer makes its attention once and calls it through a pair of adapters:

    module, func = initialize_attn_module_and_func(impl, heads, dim, dim_v, scale, num_gqa_groups=groups)
    q, k, v, extra = preprocess_args_and_kwargs_for_attn(q, k, v, attention_mask, impl, **batch_facts)
    out = postprocess_output_for_attn(func(q, k, v, **extra), impl)

The layer's own layout, in and out, is [B, S, heads, dim], or [T, heads, dim] for packed tokens. The
same arguments mean the same mask under every `attn_impl`; what an implementation cannot do, it refuses.

Windows: `window_size=W` and `sliding_window=W` are W keys, the query's own included. `window_size=(left, right)` is as
Automodel documents it for each implementation: under "sdpa" and "fa4" left counts the query's own key too, elsewhere
left and right count the keys before and after it, as TransformerEngine does. -1: no limit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from cpattn.keys.key import AttnKey
from cpattn.masks.reading import Sides
from cpattn.masks.spec import AttnMaskSpec
from cpattn.ops.attention import attention

from .flex_attention import FlexAttention
from .local_masks import (
    NO_WINDOW,
    Segment,
    TensorMemo,
    attend,
    band_matrix,
    batch_segments,
    causal_left,
    causal_shift,
    document_segments,
    join_windows,
    normal_window,
    padding_facts,
    padding_segments,
    spec_of_matrix,
    spec_of_segments,
    visible_pairs,
)

ATTN_IMPLS = ("te", "sdpa", "fa4", "flex", "magi", "cpattn")

_CAUSAL_TYPES = ("causal", "padding_causal", "causal_bottom_right", "padding_causal_bottom_right", "block_causal")
_SDPA_OPTIONS = ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_DOCUMENT_NAMES = (
    "cu_seqlens",
    "cu_seqlens_q",
    "cu_seqlens_kv",
    "cu_seqlens_padded",
    "cu_seqlens_q_padded",
    "cu_seqlens_kv_padded",
)
# Arguments that change the numbers, and who serves them (windows and documents: everyone).
_SERVED_BY = {
    "softcap": ("fa4", "flex", "magi", "cpattn"),
    "sink_weights": ("flex", "magi", "cpattn"),
    "sinks": ("flex", "magi", "cpattn"),
    "learnable_sink": ("fa4",),
    "packed_token_indices": ("fa4",),
    "s_aux": ("magi",),
    "key": ("cpattn",),
    "mask": ("flex", "cpattn"),
    "magi_attn_spec": ("magi",),
    "dropout": (),
    "dropout_p": ("sdpa",),
    "attention_dropout": (),
    "position_bias": (),
    "alibi_slopes": (),
    "core_attention_bias": (),
}
_SINK_NAMES = ("sinks", "sink_weights")

_memo = TensorMemo()


def initialize_attn_module_and_func(
    attn_impl: str,
    num_attention_heads: int,
    num_qk_channels: int,
    num_v_channels: int,
    softmax_scale: float,
    attn_mask_type: str = "causal",
    qkv_format: str = "bshd",
    num_gqa_groups: int | None = None,
    **kwargs: Any,
) -> tuple[nn.Module | None, Callable[..., Tensor]]:
    """The attention module of an implementation, if it has one, and the function that computes.

    Args:
        attn_impl: "te" (TransformerEngine), "sdpa" (torch's), "flex" (`FlexAttention`), "cpattn" (this
            project's kernels, and with `key=` at the call its context parallelism), "magi" (the
            same through `magi_attn_utils` and its active group and mask) or "fa4" (this project's kernels,
            called as Automodel calls FlashAttention-4).
        num_attention_heads: query heads.
        num_qk_channels, num_v_channels: head dim of q and k, and of v; any, equal or not.
        softmax_scale: factor on the scores.
        attn_mask_type: "causal" or "no_mask"; the padding and bottom_right types of TransformerEngine;
            for "flex" also "block_causal".
        qkv_format: layout that "te" is made for.
        num_gqa_groups: key heads; None means as many as query heads.
        kwargs: "te": more arguments for `DotProductAttention`, and portable=True for
            `PortableDotProductAttention` in its place. "sdpa": defaults of `attn_mask`, `dropout_p`,
            `is_causal`, `scale`, `enable_gqa`. "flex": `fixed_block_size`. The others: none. Arguments
            at values that say nothing (attention_dropout=0, softmax_type="vanilla") are taken by all, and by
            "flex", "magi", "cpattn" and "fa4" softmax_type="learnable": then each call needs its sinks.

    Returns:
        (module or None, function of q, k, v in the layout of `preprocess_args_and_kwargs_for_attn`).

    Raises:
        ValueError: an unknown implementation or mask type, or a number that cannot be served.
        TypeError: an argument that the implementation does not have.
        ImportError: "te" without TransformerEngine and without portable=True.
    """
    if attn_impl == "te":
        module = _te_class(kwargs.pop("portable", False))(
            num_attention_heads=num_attention_heads,
            kv_channels=(num_qk_channels, num_v_channels),
            attn_mask_type=attn_mask_type,
            qkv_format=qkv_format,
            softmax_scale=softmax_scale,
            num_gqa_groups=num_gqa_groups,
            **kwargs,
        )
        return module, module.__call__
    if attn_impl not in ATTN_IMPLS:
        raise ValueError(
            f"Unsupported attention implementation: {attn_impl!r}; expected one of {', '.join(ATTN_IMPLS)}"
        )
    causal = _is_causal(attn_mask_type)
    if attn_impl == "sdpa":
        _refuse_unknown("SDPA", kwargs, _SDPA_OPTIONS)
        options = {
            "attn_mask": None,
            "dropout_p": 0.0,
            "is_causal": causal,
            "scale": softmax_scale,
            "enable_gqa": num_gqa_groups is not None,
        }
        return None, _SdpaFunc(causal, {**options, **kwargs})
    needs_sinks = kwargs.get("softmax_type") == "learnable"
    kwargs = _without_neutral(attn_impl, kwargs)
    if attn_impl == "flex":
        _refuse_unknown("flex", kwargs, ("fixed_block_size",))
        kind = attn_mask_type if attn_mask_type == "block_causal" else "causal" if causal else "no_mask"
        flex = FlexAttention(kind, kwargs.get("fixed_block_size"))
        return flex, _with_sinks(_FlexFunc(flex, softmax_scale, num_gqa_groups is not None), needs_sinks)
    _refuse_unknown(attn_impl, kwargs, ())
    if attn_impl == "fa4" and qkv_format != "bshd":
        raise ValueError(f"attn_impl 'fa4' takes [B, S, heads, dim]; qkv_format is {qkv_format!r}: use 'cpattn'")
    if attn_impl in ("cpattn", "fa4"):
        return None, _with_sinks(_CpattnFunc(causal, softmax_scale), needs_sinks)
    from .magi_attn_utils import make_magi_attn_func

    func = make_magi_attn_func(softmax_scale=softmax_scale)
    return None, _with_sinks(func if causal else partial(func, is_causal=False), needs_sinks)


def preprocess_args_and_kwargs_for_attn(
    q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, attn_impl: str, **kwargs: Any
) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """Tensors and keyword arguments in the form that an implementation's function takes.

    Args:
        q, k, v: [B, S, heads, dim], or [T, heads, dim] for packed tokens. Positions are applied.
        attention_mask: None; [B, S], 1 for tokens and 0 for padding (or the number of the document,
            from 1, that a token belongs to), also as [B, 1, 1, S], bool or additive; or a matrix
            [B, 1, S_q, S_k], bool (True for visible) or additive, which then says all there is to say,
            causality included.
        attn_impl: as in `initialize_attn_module_and_func`.
        kwargs: `window_size`, `sliding_window`: see the module. `cu_seqlens` (or `cu_seqlens_q` and
            `_kv`), `cu_seqlens_padded` (`_q_padded`, `_kv_padded`), `max_seqlen`: packed documents,
            int32 prefix sums; the padded ones are where documents start. `attn_mask_type`: as given
            to the layer, if that was not "causal". `sink_weights` [heads], `softcap`: "flex", "magi"
            and "cpattn". `key`: "cpattn", the `AttnKey` that the batch was dispatched with, which is its
            mask. `mask`: "flex" and "cpattn", an `AttnMaskSpec`. `magi_attn_spec`: "magi".
            Other facts of the batch are dropped.

    Returns:
        q, k, v and the keyword arguments. "sdpa" and "flex": [B, heads, S, dim] or [heads, T, dim],
        contiguous; the others: as they came.

    A token of a padded batch that sees nothing gives 0. With more keys than queries, causal masks
    and windows take the last query to stand at the last key.

    Raises:
        ValueError: an argument that changes the numbers and that the implementation does not serve;
            masks that say two different things.
    """
    if attn_impl not in ATTN_IMPLS:
        raise ValueError(f"attn_impl is {attn_impl!r}: expected one of {', '.join(ATTN_IMPLS)}")
    _refuse_unserved(attn_impl, kwargs)
    documents = {name: kwargs[name] for name in _DOCUMENT_NAMES if kwargs.get(name) is not None}
    if attention_mask is not None and (documents or q.dim() == 3):
        raise ValueError(
            f"attention_mask of shape {tuple(attention_mask.shape)} with "
            f"{', '.join(documents) or 'packed tokens [T, heads, dim]'}: packed documents are said by "
            f"cu_seqlens alone; pass attention_mask=None"
        )
    if attention_mask is not None:
        attention_mask = _padding_or_matrix(attention_mask, q.shape[1])
    if attn_impl == "te":
        return q, k, v, _te_arguments(q, k, attention_mask, documents, kwargs)
    if attn_impl == "magi":
        return q, k, v, _magi_arguments(q, k, attention_mask, kwargs)
    if attn_impl == "cpattn":
        return q, k, v, _mask_arguments(attention_mask, documents, kwargs)
    if attn_impl == "fa4":
        return q, k, v, _fa4_arguments(q, attention_mask, documents, kwargs)
    if attn_impl == "flex":
        arguments = _mask_arguments(attention_mask, documents, kwargs)
        arguments |= {name: kwargs[name] for name in ("scale", "enable_gqa") if name in kwargs}
    else:
        arguments = _sdpa_arguments(q, k, attention_mask, documents, kwargs)
    q, k, v = (_swap_heads(x) for x in (q, k, v))
    return q, k, v, arguments


def postprocess_output_for_attn(x: Tensor, attn_impl: str) -> Tensor:
    """An implementation's output in the layer's layout: [B, S, heads, dim] or [T, heads, dim].

    Args:
        x: "sdpa" and "flex": [B, heads, S, dim] or [heads, T, dim]; the others: returned as it is ("te"
            joins heads and dim).
    """
    return _swap_heads(x) if attn_impl in ("sdpa", "flex") else x


# ----------------------------------------------------------------------------------------------------
# Arguments.


def _padding_or_matrix(attention_mask: Tensor, num_q: int) -> Tensor:
    """A mask as [B, S] or as [B, heads, S_q, S_k]; one tensor for all layers.

    Raises:
        ValueError: another shape. Three dims could be [B, S_q, S_k] or [heads, S_q, S_k].
    """
    shape = tuple(attention_mask.shape)
    if len(shape) not in (2, 4):
        raise ValueError(f"attention_mask has shape {shape}: expected [B, S], [B, 1, 1, S] or [B, 1, S_q, S_k]")
    if len(shape) == 2 or shape[1:3] != (1, 1) or num_q == 1:
        return attention_mask
    return _memo.get(attention_mask, "padding", lambda: visible_pairs(attention_mask)[:, 0, 0])


def _is_causal(attn_mask_type: str) -> bool:
    if attn_mask_type in _CAUSAL_TYPES:
        return True
    if attn_mask_type in ("no_mask", "padding", "arbitrary"):
        return False
    raise ValueError(
        f"attn_mask_type is {attn_mask_type!r}: expected one of {', '.join(_CAUSAL_TYPES)}, no_mask, padding, "
        f"arbitrary"
    )


def _te_class(portable: bool) -> Callable[..., nn.Module]:
    if portable:
        from .portable_te import PortableDotProductAttention

        return PortableDotProductAttention
    try:
        from transformer_engine.pytorch.attention import DotProductAttention
    except ImportError as error:
        raise ImportError(
            "attn_impl 'te' needs TransformerEngine, which cannot be imported here: install it, use "
            "attn_impl='cpattn', or pass portable=True for a module of the same face on cpattn's kernels"
        ) from error
    return DotProductAttention  # type: ignore[no-any-return]


def _refuse_unknown(impl: str, kwargs: dict[str, Any], known: tuple[str, ...]) -> None:
    unknown = sorted(set(kwargs) - set(known))
    if unknown:
        raise TypeError(f"Unsupported {impl} attention kwargs: {unknown}")


def _with_sinks(func: Callable[..., Tensor], needed: bool) -> Callable[..., Tensor]:
    """The function; of a layer whose softmax has learnable sinks, one that does not forget them."""
    if not needed:
        return func

    def attend_with_sinks(q: Tensor, k: Tensor, v: Tensor, **call: Any) -> Tensor:
        if all(call.get(name) is None for name in (*_SINK_NAMES, "s_aux")):
            raise ValueError("the layer was made with softmax_type='learnable': each call needs sink_weights=")
        return func(q, k, v, **call)

    return attend_with_sinks


def _without_neutral(impl: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments less those at values that ask for nothing; those that ask for more are refused."""
    kwargs = dict(kwargs)
    softmax_type = kwargs.pop("softmax_type", "vanilla")
    if softmax_type not in ("vanilla", "learnable"):
        raise ValueError(
            f"softmax_type is {softmax_type!r} and attn_impl {impl!r}: sinks are given at the call, as "
            f"sink_weights=, to attn_impl 'flex', 'magi' or 'cpattn' (softmax_type='learnable')"
        )
    for name in ("attention_dropout", "dropout_p"):
        dropout = kwargs.pop(name, 0.0)
        if dropout:
            raise ValueError(f"{name} is {dropout} and attn_impl {impl!r} has no dropout: use 'sdpa'")
    return kwargs


def _refuse_unserved(impl: str, kwargs: dict[str, Any]) -> None:
    for name, served_by in _SERVED_BY.items():
        value = kwargs.get(name)
        neutral = value is None or (isinstance(value, (int, float)) and value == 0)
        if not neutral and impl not in served_by:
            others = f"attn_impl {' or '.join(map(repr, served_by))} takes it" if served_by else "none takes it"
            raise ValueError(f"attn_impl {impl!r} would ignore {name}: {others}")


def _mask_arguments(
    attention_mask: Tensor | None, documents: dict[str, Any], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """What "flex" and "cpattn" resolve at the call."""
    arguments = dict(documents)
    names = ("window_size", "sliding_window", "attn_mask_type", "softcap", "key", "mask", *_SINK_NAMES)
    arguments |= {name: kwargs[name] for name in names if kwargs.get(name) is not None}
    if attention_mask is not None:
        arguments["attention_mask"] = attention_mask
    return arguments


def _fa4_arguments(
    q: Tensor, attention_mask: Tensor | None, documents: dict[str, Any], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Automodel's arguments for FlashAttention-4 as those of "cpattn".

    packed_token_indices are the places of the documents' tokens among the B * S; cu_seqlens counts these tokens only.
    """
    if q.dim() != 4 or kwargs.get("qkv_format") == "thd" or "cu_seqlens_padded" in documents:
        raise ValueError("attn_impl 'fa4' takes [B, S, heads, dim], and no documents that are padded: use 'cpattn'")
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError("attn_impl 'fa4' cannot consume a matrix as attention_mask: use 'sdpa' or 'cpattn'")
    places = kwargs.get("packed_token_indices")
    if places is not None and documents:
        sums, total = documents["cu_seqlens"], q.shape[:2].numel()
        starts = _memo.get(places, ("starts", total), lambda: _starts_of_documents(places, sums, total))
        documents = {"cu_seqlens": sums, "cu_seqlens_padded": starts}
    arguments = _mask_arguments(attention_mask, documents, {**kwargs, "window_size": _counted_window(kwargs, "fa4")})
    if kwargs.get("learnable_sink") is not None:
        arguments["sinks"] = kwargs["learnable_sink"]
    return arguments


def _starts_of_documents(places: Tensor, sums: Tensor, total: int) -> Tensor:
    """Where documents start among B * S places, as cu_seqlens_padded has it."""
    at, ends = places.detach().cpu().long(), sums.detach().cpu().long()
    inside = torch.ones(len(at), dtype=torch.bool)
    inside[ends[:-1][ends[:-1] < len(at)]] = False
    if ends[-1] != len(at) or bool((torch.diff(at, prepend=at[:1] - 1)[inside] != 1).any()):
        raise ValueError("packed_token_indices: each document of cu_seqlens must have neighbouring places")
    starts = torch.cat([at[ends[:-1].clamp(max=max(len(at) - 1, 0))], torch.tensor([total])])
    return starts.to(sums.device, sums.dtype)


def _counted_window(kwargs: dict[str, Any], impl: str) -> Any:
    """window_size whose left side counts the query's own key, as one that counts the keys before it."""
    window = kwargs.get("window_size")
    if not isinstance(window, (tuple, list)) or len(window) != 2 or not isinstance(window[0], int):
        return window
    left, right = window
    if left == 0:
        raise ValueError(f"window_size={tuple(window)} under attn_impl {impl!r}: left counts the query's own key")
    return (left - 1 if left > 0 else left, right)


def _te_arguments(
    q: Tensor, k: Tensor, attention_mask: Tensor | None, documents: dict[str, Any], kwargs: dict[str, Any]
) -> dict[str, Any]:
    causal = _is_causal(kwargs.get("attn_mask_type", "causal"))
    padding_type = "padding_causal" if causal else "padding"
    window_size = _te_window(kwargs, causal)
    if attention_mask is not None and attention_mask.dim() == 4:
        return _te_matrix(q, k, attention_mask, window_size)
    if attention_mask is not None:
        return {
            "window_size": window_size,
            "attn_mask_type": padding_type,
            "attention_mask": _te_padding(attention_mask),
        }
    arguments: dict[str, Any] = {"window_size": window_size}
    if not documents:
        if not causal:
            arguments["attn_mask_type"] = "no_mask"
        return arguments
    sums = _split_documents(documents)
    arguments |= {"qkv_format": "thd", "attn_mask_type": padding_type, **sums}
    if "cu_seqlens_q_padded" in sums or "cu_seqlens_kv_padded" in sums:
        arguments["pad_between_seqs"] = True
    for side in ("q", "kv"):
        longest = kwargs.get(f"max_seqlen_{side}", kwargs.get("max_seqlen"))
        if longest is not None:
            arguments[f"max_seqlen_{side}"] = longest
    return arguments


def _te_window(kwargs: dict[str, Any], causal: bool) -> tuple[int, int]:
    left, right = join_windows(kwargs.get("window_size"), kwargs.get("sliding_window"))
    if (left, right) == NO_WINDOW:
        return (-1, 0 if causal else -1)
    return (-1 if left is None else left, -1 if right is None else right)


def _te_padding(attention_mask: Tensor) -> Tensor:
    """TransformerEngine's padding mask [B, 1, 1, S], True for padding; one tensor for all layers."""
    if (
        attention_mask.dtype != torch.bool
        and not torch.compiler.is_compiling()
        and padding_facts(attention_mask).has_documents
    ):
        raise ValueError(
            "attention_mask has document numbers above 1: attn_impl 'te' takes documents as cu_seqlens"
        )
    return _memo.get(attention_mask, "te", lambda: attention_mask.logical_not()[:, None, None, :])


def _te_matrix(q: Tensor, k: Tensor, attention_mask: Tensor, window_size: tuple[int, int]) -> dict[str, Any]:
    """A matrix mask as the causal mask that it is, or as TransformerEngine's "arbitrary" (True: masked)."""
    left = causal_left(attention_mask)
    if left is not None:
        window = left if window_size[0] < 0 else min(left, window_size[0])
        window = -1 if window >= k.shape[1] - 1 else window
        return {"window_size": (window, 0), "attn_mask_type": "causal"}

    def make() -> Tensor:
        visible = visible_pairs(attention_mask)
        near = band_matrix(q.shape[1], k.shape[1], False, normal_window(window_size), q.device)
        return (visible if near is None else visible & near).logical_not()

    masked = _memo.get(attention_mask, ("te", window_size), make)
    return {"window_size": (-1, -1), "attn_mask_type": "arbitrary", "attention_mask": masked}


def _split_documents(documents: dict[str, Any]) -> dict[str, Any]:
    """Prefix sums under the names of both sides.

    Raises:
        ValueError: `cu_seqlens` beside the names of the sides, or one side only.
    """
    sides = {name for name in documents if name.startswith(("cu_seqlens_q", "cu_seqlens_kv"))}
    if "cu_seqlens" in documents:
        if sides:
            raise ValueError(f"cu_seqlens beside {', '.join(sorted(sides))}: give one for both sides, or both sides")
        both = {"": documents["cu_seqlens"], "_padded": documents.get("cu_seqlens_padded")}
        return {
            f"cu_seqlens_{side}{suffix}": value
            for suffix, value in both.items()
            for side in ("q", "kv")
            if value is not None
        }
    if "cu_seqlens_q" not in documents or "cu_seqlens_kv" not in documents:
        given = ", ".join(sorted(documents))
        raise ValueError(f"{given}: documents need cu_seqlens, or cu_seqlens_q and cu_seqlens_kv")
    return documents


def _segments_of(documents: dict[str, Any], num_tokens_q: int, num_tokens_kv: int) -> tuple[Segment, ...]:
    return document_segments(
        **_split_documents(documents), num_tokens_q=num_tokens_q, num_tokens_kv=num_tokens_kv
    )


def _magi_arguments(
    q: Tensor, k: Tensor, attention_mask: Tensor | None, kwargs: dict[str, Any]
) -> dict[str, Any]:
    causal = _is_causal(kwargs.get("attn_mask_type", "causal"))
    names = ("magi_attn_spec", "softcap", "s_aux", *_SINK_NAMES, *_DOCUMENT_NAMES)
    arguments = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
    window = join_windows(kwargs.get("window_size"), kwargs.get("sliding_window"))
    if window != NO_WINDOW:
        arguments["window_size"] = tuple(-1 if side is None else side for side in window)
    elif kwargs.get("window_size") is not None:
        arguments["window_size"] = kwargs["window_size"]
    if attention_mask is None or (attention_mask.dim() == 2 and padding_facts(attention_mask) == (False, False)):
        return arguments
    if "magi_attn_spec" in arguments:
        raise ValueError("attention_mask and magi_attn_spec are two masks: pass one")
    spec = _local_spec(
        (q.shape[0], q.shape[1], k.shape[1]),
        causal=causal,
        window=NO_WINDOW,
        attention_mask=attention_mask,
        documents={},
    )
    return {**arguments, "magi_attn_spec": spec}


def _local_spec(
    shape: tuple[int, int, int],
    *,
    causal: bool,
    window: Sides,
    attention_mask: Tensor | None,
    documents: dict[str, Any],
) -> AttnMaskSpec:
    """The mask of a batch of (batch size, queries, keys), over the stream of its rows."""
    batch_size, num_q, num_k = shape
    if attention_mask is not None and attention_mask.dim() != 2:
        return spec_of_matrix(attention_mask, batch_size, num_q, num_k, window)
    if documents:
        segments = _segments_of(documents, batch_size * num_q, batch_size * num_k)
    elif attention_mask is not None:
        segments = padding_segments(attention_mask, num_q, num_k)
    else:
        segments = batch_segments(batch_size, num_q, num_k)
    return spec_of_segments(segments, batch_size * num_q, batch_size * num_k, causal, window)


def _swap_heads(x: Tensor) -> Tensor:
    """Heads before tokens, or back."""
    return x.transpose(-3, -2).contiguous()


# ----------------------------------------------------------------------------------------------------
# sdpa.


class _BuiltMask(NamedTuple):
    """What is known of a mask made here.

    causal: it includes causality.
    seen: bool [B, 1, S_q, 1], queries that see a key; None: all of them.
    opened: the mask with the queries that see nothing seeing everything, so that no kernel makes NaN.
    """

    causal: bool
    seen: Tensor | None
    opened: Tensor


class _Packed(NamedTuple):
    """Packed documents for `_SdpaFunc`."""

    segments: tuple[Segment, ...]
    window: Sides


_built_masks: Any = WeakTensorKeyDictionary()


def _sdpa_arguments(
    q: Tensor, k: Tensor, attention_mask: Tensor | None, documents: dict[str, Any], kwargs: dict[str, Any]
) -> dict[str, Any]:
    causal = _is_causal(kwargs.get("attn_mask_type", "causal"))
    window = join_windows(_counted_window(kwargs, "sdpa"), kwargs.get("sliding_window"))
    arguments: dict[str, Any] = {"is_causal": causal}
    if kwargs.get("dropout_p"):
        arguments["dropout_p"] = kwargs["dropout_p"]
    num_q, num_k = q.shape[-3], k.shape[-3]
    if documents:
        rows_q, rows_k = (x.shape[:-2].numel() for x in (q, k))
        arguments["documents"] = _Packed(_segments_of(documents, rows_q, rows_k), window)
        return arguments
    mask: Tensor | None
    if attention_mask is None:
        mask = None if window == NO_WINDOW else _window_mask(num_q, num_k, causal, window, q.device)
    elif attention_mask.dim() == 2:
        mask = _memo.get(
            attention_mask,
            ("sdpa", num_q, num_k, causal, window, q.device),
            lambda: _padding_mask(attention_mask, num_q, num_k, causal, window, q.device),
        )
    else:
        mask = _memo.get(
            attention_mask,
            ("sdpa", num_q, num_k, window, q.device),
            lambda: _limited(attention_mask.to(q.device), num_q, num_k, window),
        )
    return arguments if mask is None else {**arguments, "attn_mask": mask, "is_causal": False}


def _window_mask(num_q: int, num_k: int, causal: bool, window: Sides, device: torch.device) -> Tensor:
    """The window as bool [num_q, num_k]; layers of one shape share it."""
    if torch.compiler.is_compiling():
        mask = band_matrix(num_q, num_k, causal, window, device)
        assert mask is not None
        return mask
    return _kept_window_mask(num_q, num_k, causal, window, device)


@lru_cache(maxsize=8)
def _kept_window_mask(num_q: int, num_k: int, causal: bool, window: Sides, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # it is kept, and may meet autograd later
        mask = band_matrix(num_q, num_k, causal, window, device)
    assert mask is not None
    blind = window[0] is not None and num_q > num_k + window[0]
    return _remember(mask, causal, blind)


def _padding_mask(
    attention_mask: Tensor, num_q: int, num_k: int, causal: bool, window: Sides, device: torch.device
) -> Tensor | None:
    """Padding (or documents), causality and window as bool [B, 1, S_q, S_k]; None if none is needed."""
    compiling = torch.compiler.is_compiling()
    has_padding, has_documents = (True, False) if compiling else padding_facts(attention_mask)
    if not has_padding and not has_documents:
        return None if window == NO_WINDOW else _window_mask(num_q, num_k, causal, window, device)
    ids = attention_mask.to(device)[:, None, None, -num_k:]
    mask = ids.to(torch.bool)
    if has_documents:
        query_ids = ids[..., causal_shift(num_q, num_k) :][..., :num_q].transpose(-1, -2)
        mask = mask & (ids == query_ids)
    near = band_matrix(num_q, num_k, causal, window, device)
    mask = mask.expand(-1, 1, num_q, num_k) if near is None else mask & near
    return mask if compiling else _remember(mask, causal, not bool(mask.any(-1).all()))


def _limited(mask: Tensor, num_q: int, num_k: int, window: Sides) -> Tensor:
    """A matrix mask with a window on top."""
    near = band_matrix(num_q, num_k, False, window, mask.device)
    if near is None:
        return mask
    return mask & near if mask.dtype == torch.bool else mask.masked_fill(~near, -torch.inf)


def _remember(mask: Tensor, causal: bool, blind: bool) -> Tensor:
    seen = mask.any(-1, keepdim=True) if blind else None
    _built_masks[mask] = _BuiltMask(causal, seen, mask if seen is None else mask | ~seen)
    return mask


class _SdpaFunc:
    """torch's SDPA as it is found at each call (context parallelism may have replaced it).

    Takes q, k, v [B, heads, S, dim] or [heads, T, dim], and the options of SDPA.
    """

    def __init__(self, causal: bool, defaults: dict[str, Any]) -> None:
        self.causal = causal
        self.defaults = defaults

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, documents: _Packed | None = None, **call: Any
    ) -> Tensor:
        _refuse_unknown("SDPA", call, _SDPA_OPTIONS)
        self._refuse_other_causality(call)
        options = {**self.defaults, **call}
        if documents is not None:
            return _packed_sdpa(q, k, v, documents, options)
        return _sdpa(q, k, v, **options)

    def _refuse_other_causality(self, call: dict[str, Any]) -> None:
        mask = call.get("attn_mask")
        built = None if mask is None else _built_masks.get(mask)
        causal = call.get("is_causal") if built is None else built.causal
        if causal and not self.causal:
            raise ValueError(
                "the layer was made with an attn_mask_type that is not causal, and the call is causal: pass "
                "attn_mask_type to preprocess_args_and_kwargs_for_attn too"
            )


def _sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    attn_mask: Tensor | None,
    is_causal: bool,
    enable_gqa: bool,
    **options: Any,
) -> Tensor:
    if q.dim() == 3:
        rows = (x.unsqueeze(0) for x in (q, k, v))
        return _sdpa(*rows, attn_mask=attn_mask, is_causal=is_causal, enable_gqa=enable_gqa, **options).squeeze(0)
    num_q, num_k = q.shape[-2], k.shape[-2]
    if attn_mask is None and is_causal and num_k > num_q:
        # SDPA's own flag would put the first query at the first key.
        attn_mask, is_causal = _window_mask(num_q, num_k, True, NO_WINDOW, q.device), False
    built = None if attn_mask is None else _built_masks.get(attn_mask)
    if attn_mask is not None and enable_gqa:
        groups = q.shape[-3] // k.shape[-3]
        k, v = (x.repeat_interleave(groups, dim=-3) for x in (k, v))
        enable_gqa = False
    out: Tensor = torch.nn.functional.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=attn_mask if built is None else built.opened,
        is_causal=is_causal,
        enable_gqa=enable_gqa,
        **options,
    )
    return out if built is None or built.seen is None else out.masked_fill(~built.seen, 0)


def _packed_sdpa(q: Tensor, k: Tensor, v: Tensor, documents: _Packed, options: dict[str, Any]) -> Tensor:
    """SDPA document by document, so that causal ones need no mask; rows of no document give 0."""
    if options["attn_mask"] is not None:
        raise ValueError("attn_mask with packed documents: cu_seqlens is the mask")
    if q.dim() == 4:
        q_flat, k_flat, v_flat = (x.transpose(0, 1).flatten(1, 2) for x in (q, k, v))
        out = _packed_sdpa(q_flat, k_flat, v_flat, documents, options)
        return out.unflatten(1, (q.shape[0], q.shape[2])).transpose(0, 1)
    causal = options["is_causal"]
    parts, at = [], 0
    for q0, q1, k0, k1, _ in documents.segments:
        if q1 == q0 or k1 == k0:
            continue
        near = None
        if not _window_spares(documents.window, q1 - q0, k1 - k0):
            near = _window_mask(q1 - q0, k1 - k0, causal, documents.window, q.device)
        parts.append(_zeros(q, v, q0 - at))
        call = {**options, "attn_mask": near, "is_causal": causal and near is None}
        parts.append(_sdpa(q[:, q0:q1], k[:, k0:k1], v[:, k0:k1], **call))
        at = q1
    return torch.cat([*parts, _zeros(q, v, q.shape[1] - at)], dim=1)


def _window_spares(window: Sides, num_q: int, num_k: int) -> bool:
    """Whether a document is too short for the window to hide anything."""
    return all(side is None or side >= max(num_q, num_k) - 1 for side in window)


def _zeros(q: Tensor, v: Tensor, rows: int) -> Tensor:
    return v.new_zeros(q.shape[0], rows, v.shape[-1])


# ----------------------------------------------------------------------------------------------------
# flex and cpattn.


class _FlexFunc:
    """`FlexAttention` with the layer's scale, taking the arguments of `preprocess_args_and_kwargs_for_attn`.

    Takes q, k, v [B, heads, S, dim] or [heads, T, dim].
    """

    def __init__(self, module: FlexAttention, softmax_scale: float, enable_gqa: bool) -> None:
        self.module = module
        self.softmax_scale = softmax_scale
        self.enable_gqa = enable_gqa

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        enable_gqa: bool | None = None,
        sink_weights: Tensor | None = None,
        sinks: Tensor | None = None,
        sliding_window: int | None = None,
        window_size: Any = None,
        attention_mask: Tensor | None = None,
        attn_mask_type: str | None = None,
        mask: AttnMaskSpec | None = None,
        softcap: float | None = None,
        **documents: Any,
    ) -> Tensor:
        _refuse_unknown("flex", documents, _DOCUMENT_NAMES)
        module, packed = self.module, q.dim() == 3
        if packed:
            q, k, v = (x.unsqueeze(0) for x in (q, k, v))
        window = join_windows(window_size, sliding_window)
        causal = module.attn_mask_type != "no_mask"
        if attn_mask_type is not None and _is_causal(attn_mask_type) != causal:
            raise ValueError(
                f"attn_mask_type is {attn_mask_type!r} and the layer was made with {module.attn_mask_type!r}"
            )
        if documents or attention_mask is not None or (not causal and window != NO_WINDOW):
            if mask is not None:
                raise ValueError("mask beside attention_mask, cu_seqlens or a window of a layer without mask: pass one")
            if module.fixed_block_size is not None:
                raise ValueError("fixed_block_size with padding, documents or a window without causality: pass mask=")
            shape = (q.shape[0], q.shape[2], k.shape[2])
            mask = _local_spec(
                shape, causal=causal, window=window, attention_mask=attention_mask, documents=documents
            )
            window = NO_WINDOW
        out = module(
            q,
            k,
            v,
            scale=self.softmax_scale if scale is None else scale,
            sink_weights=sinks if sink_weights is None else sink_weights,
            sliding_window=0 if window[0] is None else window[0] + 1,
            enable_gqa=self.enable_gqa if enable_gqa is None else enable_gqa,
            mask=mask,
            softcap=softcap,
        )
        return out.squeeze(0) if packed else out  # type: ignore[no-any-return]


class _CpattnFunc:
    """This project's attention: over a dispatched batch with `key`, over a batch held whole without.

    Takes q, k, v [B, S, heads, dim] or [T, heads, dim], and gives the same layout.
    """

    def __init__(self, causal: bool, softmax_scale: float) -> None:
        self.causal = causal
        self.softmax_scale = softmax_scale

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        key: AttnKey | None = None,
        mask: AttnMaskSpec | None = None,
        attention_mask: Tensor | None = None,
        attn_mask_type: str | None = None,
        window_size: Any = None,
        sliding_window: int | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        sink_weights: Tensor | None = None,
        sinks: Tensor | None = None,
        **documents: Any,
    ) -> Tensor:
        _refuse_unknown("cpattn", documents, _DOCUMENT_NAMES)
        masks = [
            name
            for name, given in (
                ("key", key is not None),
                ("mask", mask is not None),
                ("attention_mask", attention_mask is not None),
                (", ".join(documents), bool(documents)),
            )
            if given
        ]
        if len(masks) > 1:
            raise ValueError(f"{' and '.join(masks)} are {len(masks)} masks: pass one")
        causal = self.causal if attn_mask_type is None else _is_causal(attn_mask_type)
        window = join_windows(window_size, sliding_window)
        numbers: dict[str, Any] = {
            "softmax_scale": self.softmax_scale if scale is None else scale,
            "softcap": softcap,
            "sink": sinks if sink_weights is None else sink_weights,
        }
        q_TND, k_TGD, v_TGE = (x if x.dim() == 3 else x.flatten(0, 1) for x in (q, k, v))
        # On top of a given mask, a window says nothing of causality: right 0 is how callers write "causal".
        limit = None if window == NO_WINDOW else (window[0], window[1] or None)
        if key is not None:
            key = key if limit is None else _limited_key(key, limit)
            out = attention(q_TND, k_TGD, v_TGE, key, **numbers)
        elif mask is not None:
            out = attend(q_TND, k_TGD, v_TGE, mask, window=limit, **numbers)
        else:
            shape = (1, len(q), len(k)) if q.dim() == 3 else (q.shape[0], q.shape[1], k.shape[1])
            spec = _local_spec(
                shape, causal=causal, window=window, attention_mask=attention_mask, documents=documents
            )
            out = attend(q_TND, k_TGD, v_TGE, spec, **numbers)
        assert isinstance(out, Tensor)
        return out if q.dim() == 3 else out.unflatten(0, q.shape[:2])


@torch.compiler.disable
def _limited_key(key: AttnKey, window: Sides) -> AttnKey:
    """A key with a window on top, over the same placement."""
    limited: AttnKey = key.with_mask(key.spec, window=window)
    return limited
