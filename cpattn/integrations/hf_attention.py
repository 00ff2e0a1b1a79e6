"""What transformers calls: the mask and the attention of each layer, by `attn_implementation="cpattn"`.

`hf_register` tells transformers of them.
"""

from __future__ import annotations

import contextlib
import contextvars
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from cpattn.ops.attention import attention
from cpattn.ops.fetch import local_attention

from .hf_latents import sends_latents
from .hf_masks import terms_of
from .hf_model import attends_by_itself
from .rows import RowMask
from .shard import LayerMask, active_shard

# Tensors that layers are handed on the way and that say nothing about the mask.
_HARMLESS = {"position_ids", "position_embeddings", "cache_position", "num_items_in_batch", "input_ids"}
_ADDED = ("position_bias", "attn_bias", "attention_bias", "bias", "alibi")
_BIASES = (*_ADDED, "head_mask", "layer_head_mask", "cache")
PACKING_INPUTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


def cpattn_mask(*args: Any, mask_function: Any = None, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
    """Mask interface of transformers: a `LayerMask` for a sharded batch, else none where SDPA needs none, or eager's.

    Eager's, because it can be added to scores: some models do so besides handing it on, and a boolean one would be
    added as ones and zeros.

    Raises:
        ValueError: the batch is sharded and the mask is not one that cpattn can express.
    """
    from transformers.masking_utils import causal_mask_function, eager_mask, sdpa_mask

    mask_function = causal_mask_function if mask_function is None else mask_function
    shard = getattr(attention_mask, "shard", None)
    if shard is not None:
        return shard.mask(terms_of(mask_function))
    kwargs |= {"mask_function": mask_function, "attention_mask": attention_mask}
    if args or "dtype" not in kwargs:  # older transformers
        return sdpa_mask(*args, **kwargs)
    if attends_by_itself(kwargs.get("config")):  # none would be no mask at all
        return eager_mask(**kwargs)
    return None if sdpa_mask(**kwargs) is None else eager_mask(**kwargs)


def cpattn_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention interface of transformers.

    A layer whose mask is a `LayerMask` attends over the tokens of all ranks. Any other layer (a vision
    tower, a model used without a shard) attends over the tensors it is given, on this rank alone; one whose mask is a
    `RowMask` as the rows' caller says.

    Args:
        query, key, value: [B, heads, S, dim], of a sharded batch [1, heads, L, dim]; heads may be
            those of a tensor-parallel rank.

    Returns:
        ([B, S, heads, dim], None).

    Raises:
        ValueError: something that the layer asks for would be ignored; names the layer.
    """
    observer = _observer.get()
    if isinstance(attention_mask, RowMask):
        query = _with_true_temperature(module, query, attention_mask.shard.positions)
        return _row_attention(module, query, key, value, attention_mask, dropout, scaling, kwargs), None
    if isinstance(attention_mask, LayerMask):
        query = _with_true_temperature(module, query, attention_mask.shard.positions)
        out = _sharded_attention(module, query, key, value, attention_mask, dropout, scaling, kwargs)
    else:
        if observer is None or active_shard.get() is not None:
            _refuse_unsharded(module, attention_mask)
        out = _whole_attention(module, query, key, value, attention_mask, dropout, scaling, is_causal, kwargs)
    if observer is not None:
        if isinstance(attention_mask, LayerMask) and sends_latents(module):  # of rows as they were fetched
            key, value = (attention_mask.shard.in_own_order(t.transpose(0, 2)).transpose(0, 2) for t in (key, value))
        observer(module, query, key, value, out)
    return out, None


@contextlib.contextmanager
def observe_attention(observer: Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor], None]) -> Iterator[None]:
    """Hand module, query, key, value and output of every attention inside to the observer."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


_observer: contextvars.ContextVar[Any] = contextvars.ContextVar("cpattn_observer", default=None)


def _refuse_unsharded(module: nn.Module, mask: Any) -> None:
    """Raise where a layer runs without the shard's mask and should have it; warn once where it may be an oversight."""
    shard = active_shard.get()
    if shard is not None and shard.decoder is not None and _is_part(module, shard.decoder):
        raise ValueError(
            f"{_name(module)}: transformers made no sharded mask for it (it has {type(mask).__name__}), so it would "
            f"see this rank's tokens only"
        )
    _refuse_lost_shard(module)
    _warn_unsharded()


def _sharded_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: LayerMask,
    dropout: float,
    scaling: float | None,
    extra: Mapping[str, Any],
) -> Tensor:
    softcap, sink = extra.get("softcap"), extra.get("s_aux", extra.get("sinks"))
    refuse_what_would_be_ignored(module, dropout, softcap, sink, extra)
    _refuse_other_window(module, (mask.window or (None, None))[0], mask.shard.layout.longest_text, extra)
    tokens, fetched = mask.shard.num_tokens, sends_latents(module)
    if query.shape[0] != 1 or query.shape[2] != tokens or (key.shape[2] != tokens and not fetched):
        raise ValueError(
            f"{_name(module)}: query {tuple(query.shape)} and key {tuple(key.shape)} do not have this rank's "
            f"{tokens} tokens; a key-value cache or cross-attention is not supported"
        )
    shard = mask.shard
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    q = shard.in_key_order(q[: mask.key.num_tokens])
    if not fetched:
        k, v = (shard.in_key_order(t[: len(q)]) for t in (k, v))
    bound = mask.key.with_heads(q.shape[1], k.shape[1], q.shape[2], v.shape[2])
    mask.shard.num_layers_run += 1
    numbers: dict[str, Any] = {"softmax_scale": scaling, "softcap": softcap, "sink": sink}
    # Compiled layers share their code, which a number in it would keep them from.
    layer = None if torch.compiler.is_compiling() else getattr(module, "layer_idx", None)
    if fetched:
        out = local_attention(q, k, v, bound, **numbers)
    else:
        out = attention(q, k, v, bound, layer=layer, **numbers)
    assert isinstance(out, Tensor)
    out = shard.in_own_order(out)
    stand_in = tokens - mask.key.num_tokens
    return F.pad(out, (0, 0, 0, 0, 0, stand_in)).unsqueeze(0) if stand_in else out.unsqueeze(0)


def _row_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: RowMask,
    dropout: float,
    scaling: float | None,
    extra: Mapping[str, Any],
) -> Tensor:
    softcap, sink = extra.get("softcap"), extra.get("s_aux", extra.get("sinks"))
    refuse_what_would_be_ignored(module, dropout, softcap, sink, extra)
    _refuse_other_window(module, mask.left, mask.shard.longest_text, extra)
    if key.shape[2] != query.shape[2]:
        raise ValueError(f"{_name(module)}: {key.shape[2]} keys for {query.shape[2]} tokens: no cross-attention here")
    return mask.attend(query, key, value, scaling, softcap, sink)


def _with_true_temperature(module: nn.Module, query: Tensor, positions: Tensor) -> Tensor:
    """Queries [1, heads, L, dim] whose layer scaled them by their place in the local tensor, by their position instead.

    Llama 4's layers without RoPE count places from 0 on: log1p(floor((place + 1) / floor_scale)) * attn_scale + 1.
    """
    if not getattr(module, "attn_temperature_tuning", False) or getattr(module, "use_rope", True):
        return query
    floor_scale, attn_scale = float(module.floor_scale), float(module.attn_scale)  # type: ignore[arg-type]
    places = torch.arange(query.shape[2], device=query.device)

    def scales(positions: Tensor) -> Tensor:
        return torch.log1p(torch.floor((positions.float() + 1.0) / floor_scale)) * attn_scale + 1.0

    ratio = scales(positions.to(query.device)) / scales(places)
    return (query * ratio[None, None, :, None]).to(query.dtype)


def _refuse_other_window(module: nn.Module, left: int | None, longest: int, extra: Mapping[str, Any]) -> None:
    # A layer that passes None has none, whatever its attributes say.
    window = extra["sliding_window"] if "sliding_window" in extra else getattr(module, "sliding_window", None)
    if isinstance(window, int) and 0 < window < longest and left not in (window - 1, window):
        seen = "all keys" if left is None else f"{left} keys"
        raise ValueError(
            f"{_name(module)}: the layer has a sliding window of {window} and its mask shows {seen} before a query's "
            f"own: one of the two would be ignored"
        )


def refuse_what_would_be_ignored(
    module: nn.Module,
    dropout: float,
    softcap: float | None,
    sink: Tensor | None,
    extra: Mapping[str, Any],
) -> None:
    """Raise if a layer asks transformers' attention interface for more than scale, softcap and sink.

    Args:
        extra: the keyword arguments that the layer passes.
    """
    name = _name(module)
    if dropout:
        raise ValueError(f"{name}: attention dropout {dropout} is not supported: set attention_dropout=0")
    for bias in _BIASES:
        if extra.get(bias) is not None:
            raise ValueError(f"{name}: {bias} would be ignored: cpattn adds nothing to the scores")
    if extra.get("output_attentions"):
        raise ValueError(f"{name}: output_attentions: there is no matrix of probabilities to return")
    if softcap is None and getattr(module, "attn_logit_softcapping", None) is not None:
        raise ValueError(f"{name}: attn_logit_softcapping is set and the layer does not pass it on")
    if sink is None and isinstance(getattr(module, "sinks", None), Tensor):
        raise ValueError(f"{name}: the layer has sinks and does not pass them on")
    known = {*_HARMLESS, *_BIASES, "s_aux", "sinks", *PACKING_INPUTS}
    for argument, value in extra.items():
        if isinstance(value, Tensor) and argument not in known:
            raise ValueError(f"{name}: cpattn does not know the argument {argument} and would ignore it")


def _whole_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    is_causal: bool | None,
    extra: Mapping[str, Any],
) -> Tensor:
    """Attention over the tensors at hand: SDPA, or plainly where SDPA has no softcap, bias or sinks."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    softcap, sink = extra.get("softcap"), extra.get("s_aux", extra.get("sinks"))
    biases = [extra[name] for name in _ADDED if isinstance(extra.get(name), Tensor)]
    if softcap is None and sink is None and not biases:
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **extra
        )[0]
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if mask is None and query.shape[2] > 1 and is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    for bias in biases:
        scores = scores + bias
    if mask is not None:
        lowest = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    if sink is not None:
        sink = sink.view(1, -1, 1, 1) if sink.ndim == 1 else sink  # of each head, or of each query (Inkling)
        scores = torch.cat([scores, sink.to(scores.dtype).expand(*scores.shape[:3], 1)], -1)
    probabilities = torch.softmax(scores.float(), -1).to(query.dtype)[..., : key.shape[2]]
    return (F.dropout(probabilities, dropout) @ value).transpose(1, 2).contiguous()


def _refuse_lost_shard(module: nn.Module) -> None:
    """A layer that was told of its ranks (`magi_attn_utils`) must have been given the shard's mask."""
    group = getattr(module, "cp_group", None)
    if group is not None and dist.get_world_size(group) > 1:
        raise ValueError(
            f"{_name(module)} is prepared for {dist.get_world_size(group)} ranks and its mask is not the prepared "
            f"batch's: pass the prepared batch's attention_mask to the model (to use the model on one rank again, "
            f"take the group away with _set_cp_group_on_attention(model, None))"
        )


def _warn_unsharded() -> None:
    if active_shard.get() is None and dist.is_initialized() and dist.get_world_size() > 1 and not _warned:
        _warned.append(True)
        warnings.warn(
            'a model with attn_implementation="cpattn" runs outside a ContextParallel shard: each rank attends '
            "over the tensors it was given, alone",
            stacklevel=3,
        )


_warned: list[bool] = []


def _is_part(module: nn.Module, whole: nn.Module) -> bool:
    return any(m is module for m in whole.modules())


def _name(module: nn.Module) -> str:
    layer = getattr(module, "layer_idx", None)
    return type(module).__name__ + ("" if layer is None else f" of layer {layer}")
