"""Hugging Face models under context parallelism: `attn_implementation="cpattn"`.

    register_attention()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="cpattn")
    parallel = ContextParallel(model, mesh["cp"])
    for batch in loader:                    # the same whole batch on every rank of the group
        out = parallel(batch)               # shards it, runs the model, sums the loss over the ranks
        out.loss.backward()
        parallel.reduce_gradients()         # or leave it to DDP or FSDP2 (grad_reduction="mean")

A batch is sharded as one sequence of its real tokens (`batch_layout`). What each layer may see is not a
matrix but a key, and it travels through the model in the place of the mask: a layer that is run again
by activation checkpointing gets the key it had, whatever else is in flight. How it gets there:

1. The model is called with a 2-D attention mask that carries the shard (`ShardedMask`).
2. transformers asks `cpattn_mask` for the mask of each kind of layer; it answers with a `LayerMask`.
3. Each layer calls `cpattn_attention` with its `LayerMask`.

Models with images get the whole batch, since they place image features by token; there the shard is
taken where the language model begins, and the vision tower runs as it always does.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from cpattn.keys.key import AttnKey, make_key
from cpattn.masks.spec import AttnMaskSpec
from cpattn.ops.attention import attention
from cpattn.ops.layout import undispatch
from cpattn.planning.ready import LayerKind
from cpattn.runtime.agreement import require_agreement, tensor_digest

from .batch_layout import (
    IGNORE_INDEX,
    BatchLayout,
    MaskTerm,
    layout_of_batch,
    layout_of_spec,
    shifted_labels,
)
from .hf_masks import terms_of

logger = logging.getLogger(__name__)

# Tensors that layers are handed on the way and that say nothing about the mask.
_HARMLESS = {"position_ids", "position_embeddings", "cache_position", "num_items_in_batch", "input_ids"}
_BIASES = ("position_bias", "attn_bias", "attention_bias", "bias", "alibi", "head_mask", "layer_head_mask", "cache")
_TOKEN_MIXERS = {"linear_attention", "conv", "mamba", "recurrent", "hybrid", "hybrid_sliding", "ssm"}
_TEXT_INPUTS = {"input_ids", "inputs_embeds", "attention_mask", "position_ids"}
_PACKING_INPUTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


def register_attention(name: str = "cpattn") -> None:
    """Make `attn_implementation=name` known to transformers, for attention and for masks. Idempotent.

    The mask is registered too, because transformers makes no mask at all, not even for padding, for an
    attention that has none.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(name, cpattn_attention)
    AttentionMaskInterface.register(name, cpattn_mask)


# ----------------------------------------------------------------------------------------------------
# What travels through the model.


class ShardedMask(Tensor):
    """A 2-D attention mask that knows the shard it belongs to, and still does after `.to(...)`."""

    shard: Shard

    @classmethod
    def of(cls, mask: Tensor, shard: Shard) -> ShardedMask:
        """The mask with the shard attached; shares its memory."""
        wrapped = mask.as_subclass(cls)
        wrapped.shard = shard
        return wrapped

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(result, cls) and not hasattr(result, "shard"):
            sources = [a for a in args if isinstance(a, cls)]
            if sources and hasattr(sources[0], "shard"):
                result.shard = sources[0].shard
        return result


class LayerMask:
    """The mask of one kind of layer: a key over the shard's placement, and the shard.

    Not a dataclass: FSDP2 searches those that it finds among a layer's inputs for tensors.
    """

    __slots__ = ("key", "shard", "window")

    def __init__(self, key: AttnKey, window: tuple[int | None, int | None] | None, shard: Shard) -> None:
        self.key, self.window, self.shard = key, window, shard


@dataclass(eq=False)
class Shard:
    """This rank's part of a batch. Made by `ContextParallel.shard`.

    Attributes:
        key: the key whose placement the shard has.
        layout: which tokens of the batch are in the sequence that is shared out.
        index: int64 [L], for each local token its place row * columns + column in the batch. A rank that
            got no token has one stand-in all the same (models cannot run on none), without a target; it
            takes no part in attention and in `gather`.
        inputs: what to call the model with, under `active()`.
        targets: int64 [1, L], next-token targets of the local tokens (-100: none); None without labels.
    """

    key: AttnKey
    layout: BatchLayout
    index: Tensor
    inputs: dict[str, Any] = field(default_factory=dict)
    targets: Tensor | None = None
    decoder: nn.Module | None = None
    splits_embeddings: bool = False
    num_layers_run: int = 0
    _masks: dict[tuple[MaskTerm, ...], LayerMask] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """L: local tokens, at least one."""
        return self.index.numel()

    @property
    def positions(self) -> Tensor:
        """int64 [L], positions of the local tokens in their documents: columns, in a padded batch."""
        all_positions = torch.from_numpy(self.layout.positions()).to(self.index.device)
        local = all_positions[_local_tokens(self.key, self.index.device)]
        return local if len(local) else local.new_zeros(1)

    def take(self, x: Tensor, dim: int = 0) -> Tensor:
        """This rank's tokens of a tensor of the whole batch.

        Args:
            x: [..., B, S, ...], B at `dim`; the same on all ranks of the group.
            dim: where B is.

        Returns:
            [..., 1, L, ...]. Gradient: of this rank's tokens; sum it over the ranks for the whole.
        """
        if tuple(x.shape[dim : dim + 2]) != (self.layout.rows, self.layout.columns):
            raise ValueError(
                f"take: the tensor has shape {tuple(x.shape)}, expected {(self.layout.rows, self.layout.columns)} "
                f"at dims {dim} and {dim + 1}, the shape of the batch"
            )
        return x.flatten(dim, dim + 1).index_select(dim, self.index.to(x.device)).unsqueeze(dim)

    def gather(self, x_local: Tensor, fill_value: float = 0.0) -> Tensor:
        """The whole tensor on every rank, in the batch's own order; for evaluation and generation.

        Args:
            x_local: [1, L, ...], values of this rank's tokens (logits, hidden states, losses).
            fill_value: what padding gets.

        Returns:
            [B, S, ...]. Gradient: as of `cpattn.undispatch`.
        """
        whole = undispatch(x_local[0, : self.key.num_tokens], self.key)
        layout = self.layout
        out = whole.new_full((layout.rows * layout.columns, *whole.shape[1:]), fill_value)
        out = out.index_copy(0, layout.index_on(whole.device), whole)
        return out.unflatten(0, (layout.rows, layout.columns))

    def local_rows(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Where tokens of the batch lie on this rank.

        Args:
            tokens: int64 [N], places row * columns + column in the batch; repeats are allowed.

        Returns:
            (which, rows): int64; tokens[which] are this rank's, and lie at rows of its L.
        """
        local = self.index[: self.key.num_tokens].to(tokens.device)
        order = torch.argsort(local)
        at = torch.searchsorted(local[order], tokens).clamp(max=max(len(local) - 1, 0))
        mine = local[order][at] == tokens if len(local) else torch.zeros_like(tokens, dtype=torch.bool)
        which = mine.nonzero().flatten()
        return which, order[at[which]] if len(local) else which

    def mask(self, terms: tuple[MaskTerm, ...]) -> LayerMask:
        """The mask of a kind of layer, as a key over this shard's placement."""
        if terms not in self._masks:
            spec, window = self.layout.plan_of(terms)
            self._masks[terms] = LayerMask(self.key.with_mask(spec, window=window), window, self)
        return self._masks[terms]

    @contextlib.contextmanager
    def active(self) -> Iterator[Shard]:
        """Run the model inside: `with shard.active(): model(**shard.inputs)`.

        Raises:
            RuntimeError: at the end, when fewer attention layers ran sharded than the model has; the
                others did without the tokens of the other ranks.
        """
        token = _active.set(self)
        self.num_layers_run = 0
        try:
            yield self
        finally:
            _active.reset(token)
        expected = getattr(getattr(self.decoder, "config", None), "num_hidden_layers", 1)
        if self.num_layers_run < expected:
            raise RuntimeError(
                f"{self.num_layers_run} of {expected} attention layers ran under context parallelism: the "
                f"others do not go through transformers' attention interface (or the model was not loaded "
                f'with attn_implementation="cpattn") and saw this rank\'s tokens only'
            )

    def decoder_inputs(self, decoder: nn.Module, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The language model's inputs of the whole batch, cut down to this rank's tokens."""
        rows, columns = self.layout.rows, self.layout.columns
        local: dict[str, Any] = dict(kwargs)
        visual = local.pop("visual_pos_masks", None)
        deepstack = local.pop("deepstack_visual_embeds", None)
        for name, value in local.items():
            if not isinstance(value, Tensor) or value.ndim == 0 or isinstance(value, ShardedMask):
                continue
            if name == "position_ids":
                local[name] = self._local_positions(value)
            elif tuple(value.shape[:2]) == (rows, columns):
                local[name] = self.take(value)
            else:
                raise ValueError(
                    f"{type(decoder).__name__} gets {name} of shape {tuple(value.shape)}: not of the batch's "
                    f"{(rows, columns)} tokens, so cpattn does not know how to shard it"
                )
        if local.get("past_key_values") is not None:
            raise ValueError("past_key_values: a key-value cache is not supported under context parallelism")
        if local.get("position_ids") is None:
            local["position_ids"] = self.positions[None]
        mask = local.get("attention_mask")
        if not isinstance(mask, (dict, LayerMask)):
            local["attention_mask"] = self._local_mask()
        elif not all(isinstance(m, LayerMask) for m in (mask.values() if isinstance(mask, dict) else [mask])):
            raise ValueError(f"{type(decoder).__name__} gets masks that cpattn did not make: {mask!r}")
        if visual is not None:
            local["visual_pos_masks"] = self.take(visual)
            number = (visual.flatten().cumsum(0) - 1)[self.index.to(visual.device)]
            mine = number[local["visual_pos_masks"][0]]
            local["deepstack_visual_embeds"] = [e.index_select(0, mine) for e in deepstack or []] or deepstack
        return local

    def _local_positions(self, positions: Tensor) -> Tensor:
        """[B, S], [1, S] or [3 or 4, B, S] positions of the local tokens."""
        rows, columns = self.layout.rows, self.layout.columns
        return self.take(positions.expand(*positions.shape[:-2], rows, columns), positions.ndim - 2)

    def _local_mask(self) -> ShardedMask:
        return ShardedMask.of(self.index.new_ones(1, self.num_tokens), self)


def split_at_decoder(decoder: nn.Module) -> None:
    """Make a language model take its shard of inputs that are those of a whole batch. Idempotent.

    The hook finds the shard in the attention mask; inputs without one pass as they are.
    """
    if not getattr(decoder, "_cpattn_splits", False):
        decoder.register_forward_pre_hook(_split_decoder_inputs, with_kwargs=True)
        decoder._cpattn_splits = True  # type: ignore[assignment]


def _split_decoder_inputs(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    shard = _shard_of(kwargs.get("attention_mask"))
    if shard is None or not shard.splits_embeddings:
        return None
    if args:
        raise ValueError(f"{type(decoder).__name__} was called with positional arguments: names are needed")
    return (), shard.decoder_inputs(decoder, kwargs)


def _shard_of(mask: Any) -> Shard | None:
    if isinstance(mask, dict):
        mask = next(iter(mask.values()), None)
    return getattr(mask, "shard", None)


_active: contextvars.ContextVar[Shard | None] = contextvars.ContextVar("cpattn_shard", default=None)


# ----------------------------------------------------------------------------------------------------
# What transformers calls.


def cpattn_mask(*args: Any, mask_function: Any = None, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
    """Mask interface of transformers: a `LayerMask` for a sharded batch, else SDPA's mask.

    Raises:
        ValueError: the batch is sharded and the mask is not one that cpattn can express.
    """
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    mask_function = causal_mask_function if mask_function is None else mask_function
    shard = getattr(attention_mask, "shard", None)
    if shard is None:
        kwargs |= {"mask_function": mask_function, "attention_mask": attention_mask}
        return sdpa_mask(*args, **kwargs)
    return shard.mask(terms_of(mask_function))


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
    tower, a model used without a shard) attends over the tensors it is given, on this rank alone.

    Args:
        query, key, value: [B, heads, S, dim], of a sharded batch [1, heads, L, dim]; heads may be
            those of a tensor-parallel rank.

    Returns:
        ([B, S, heads, dim], None).

    Raises:
        ValueError: something that the layer asks for would be ignored; names the layer.
    """
    if isinstance(attention_mask, LayerMask):
        out = _sharded_attention(module, query, key, value, attention_mask, dropout, scaling, kwargs)
        return out, None
    shard = _active.get()
    if shard is not None and shard.decoder is not None and _is_part(module, shard.decoder):
        raise ValueError(
            f"{_name(module)}: transformers made no sharded mask for it (it has "
            f"{type(attention_mask).__name__}), so it would see this rank's tokens only"
        )
    _refuse_lost_shard(module)
    _warn_unsharded()
    return _whole_attention(module, query, key, value, attention_mask, dropout, scaling, is_causal, kwargs), None


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
    _refuse_other_window(module, mask, extra)
    tokens = mask.shard.num_tokens
    if query.shape[0] != 1 or query.shape[2] != tokens or key.shape[2] != tokens:
        raise ValueError(
            f"{_name(module)}: query {tuple(query.shape)} and key {tuple(key.shape)} do not have this rank's "
            f"{tokens} tokens; a key-value cache or cross-attention is not supported"
        )
    q, k, v = (t[0].transpose(0, 1)[: mask.key.num_tokens] for t in (query, key, value))
    bound = mask.key.with_heads(q.shape[1], k.shape[1], q.shape[2], v.shape[2])
    mask.shard.num_layers_run += 1
    out = attention(q, k, v, bound, softmax_scale=scaling, softcap=softcap, sink=sink)
    assert isinstance(out, Tensor)
    stand_in = tokens - mask.key.num_tokens
    return F.pad(out, (0, 0, 0, 0, 0, stand_in)).unsqueeze(0) if stand_in else out.unsqueeze(0)


def _refuse_other_window(module: nn.Module, mask: LayerMask, extra: Mapping[str, Any]) -> None:
    window = extra.get("sliding_window") or getattr(module, "sliding_window", None)
    left = (mask.window or (None, None))[0]
    if isinstance(window, int) and window < mask.shard.layout.longest_text and left not in (window - 1, window):
        raise ValueError(
            f"{_name(module)}: the layer has a sliding window of {window} and its mask has the window {mask.window}: "
            f"one of the two would be ignored"
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
    known = {*_HARMLESS, *_BIASES, "s_aux", "sinks", *_PACKING_INPUTS}
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
    """Attention over the tensors at hand: SDPA, or plainly where SDPA has no softcap or sinks."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    softcap, sink = extra.get("softcap"), extra.get("s_aux", extra.get("sinks"))
    if softcap is None and sink is None:
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
    if mask is not None:
        lowest = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    if sink is not None:
        scores = torch.cat([scores, sink.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
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
    if _active.get() is None and dist.is_initialized() and dist.get_world_size() > 1 and not _warned:
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


# ----------------------------------------------------------------------------------------------------
# What training calls.


class ParallelOutput(NamedTuple):
    """loss: scalar, the same on all ranks; None without labels. logits: [1, L, V] of this rank's tokens.
    outputs: all that the model returned. shard: to gather with."""

    loss: Tensor | None
    logits: Tensor
    outputs: Any
    shard: Shard


class ContextParallel:
    """Runs a transformers causal language model with each batch spread over the ranks of a group.

    Args:
        model: loaded with attn_implementation="cpattn"; may be wrapped by FSDP2, DDP or PEFT.
        cp_group: ProcessGroup or DeviceMesh of the ranks that share a batch, or None for one rank.
        loss_group: ProcessGroup or DeviceMesh of the ranks over whose targets the loss is averaged: the
            context-parallel ranks of all data-parallel replicas. None: cp_group.
        grad_reduction: what happens to gradients after backward: "sum" when they are summed over
            loss_group (`reduce_gradients`), "mean" when they are averaged over it (DDP, FSDP2).
        max_chunk_size: grain of placement: a sixteenth of a rank's tokens, at most this.
        layout, backend, search_effort: as in `make_key`.
        check_batch: compare the batch between the ranks of cp_group before it is used (one small
            all-gather): different data on two ranks would give wrong numbers without a word.

    Raises:
        ValueError: the model has layers that mix tokens in another way than by attention.
    """

    def __init__(
        self,
        model: nn.Module,
        cp_group: Any = None,
        *,
        loss_group: Any = None,
        grad_reduction: Literal["sum", "mean"] = "sum",
        max_chunk_size: int = 512,
        layout: Literal["balanced", "contiguous", "zigzag"] = "balanced",
        backend: str = "auto",
        search_effort: int = 0,
        check_batch: bool = True,
    ) -> None:
        if grad_reduction not in ("sum", "mean"):
            raise ValueError(f"grad_reduction is {grad_reduction!r}: 'sum' or 'mean'")
        self.model = model
        self.cp_group = _process_group(cp_group)
        self.loss_group = self.cp_group if loss_group is None else _process_group(loss_group, flatten=True)
        self.grad_reduction = grad_reduction
        self.max_chunk_size = max_chunk_size
        self.options: dict[str, Any] = {"layout": layout, "backend": backend, "search_effort": search_effort}
        self.check_batch = check_batch
        self.decoder = language_model(model)
        config = _unwrapped(model).config
        self.text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
        self.has_other_modalities = self.text_config is not config
        refuse_other_mixers(self.decoder, self.text_config)
        _refuse_router_loss(self.text_config)
        if self.has_other_modalities:
            split_at_decoder(self.decoder)

    def __call__(
        self,
        batch: Mapping[str, Any],
        *,
        spec: AttnMaskSpec | None = None,
        num_targets: int | Tensor | None = None,
        **model_kwargs: Any,
    ) -> ParallelOutput:
        """Shard a batch, run the model on it, and take the mean loss over all ranks' targets.

        Args:
            batch: as for the model, whole, the same on all ranks of cp_group: input_ids [B, S] and,
                where there are, attention_mask ([B, S], or 4-D), position_ids, labels (shifted here,
                within each document) or shift_labels (shifted already), cu_seq_lens_q, pixel values and
                whatever else the model takes.
            spec: the mask of a batch of one row, in place of attention_mask: a prefix tree, for example.
            num_targets: what to divide the summed loss by; None is the number of this batch's targets
                over loss_group. Under gradient accumulation pass that of all micro-batches together
                (`count_targets`), and the losses and gradients add up to those of one large batch.
            model_kwargs: passed on to the model.

        Returns:
            The loss has the value of the whole mean on every rank; its backward gives gradients whose
            sum (or mean, see `grad_reduction`) over loss_group is the gradient of that value.
        """
        if not isinstance(num_targets, Tensor) and num_targets is not None and num_targets < 0:
            raise ValueError(f"num_targets is {num_targets}: it is a count, at least 0")
        shard = self.shard(batch, spec=spec)
        taken = sorted(({"labels", "shift_labels"} | set(shard.inputs)) & set(model_kwargs))
        if taken:
            raise ValueError(f"{', '.join(taken)} cannot be given as keywords: cpattn makes them from the batch")
        with shard.active():
            outputs = self.model(**shard.inputs, **model_kwargs)
        shard.inputs = {}  # pixel values need not live as long as the graph
        loss = None if shard.targets is None else self.mean_loss(outputs.logits, shard.targets, num_targets)
        return ParallelOutput(loss, outputs.logits, outputs, shard)

    def shard(self, batch: Mapping[str, Any], *, spec: AttnMaskSpec | None = None) -> Shard:
        """This rank's part of a batch, with what to call the model with. Arguments as for `__call__`."""
        inputs = dict(batch)
        if inputs.get("past_key_values") is not None:
            raise ValueError("past_key_values: a key-value cache is not supported under context parallelism")
        labels, targets = inputs.pop("labels", None), inputs.pop("shift_labels", None)
        packing = {name: inputs.pop(name, None) for name in _PACKING_INPUTS}
        tokens = _tokens_of(inputs)
        if self.check_batch:
            self._compare_ranks({**inputs, "labels": labels, "shift_labels": targets})
        layout = _layout(inputs, tokens, spec, packing["cu_seq_lens_q"])
        key = self._make_key(layout)
        local = layout.index_on(tokens.device)[_local_tokens(key, tokens.device)]
        if not len(local):
            local = local.new_zeros(1)
        shard = Shard(key, layout, local, decoder=self.decoder, splits_embeddings=self.has_other_modalities)
        if targets is None and labels is not None:
            targets = shifted_labels(labels, layout)
        if targets is not None:
            shard.targets = shard.take(targets)
            shard.targets[:, key.num_tokens :] = IGNORE_INDEX
        shard.inputs = self._model_inputs(inputs, tokens, shard)
        return shard

    def count_targets(
        self, batches: Iterable[Mapping[str, Any]], *, specs: Iterable[AttnMaskSpec | None] | None = None
    ) -> int:
        """Targets of several micro-batches over loss_group: what to pass as `num_targets` for each.

        Args:
            batches: each with labels or shift_labels, as they will be passed to this object.
            specs: the `spec` that will be passed with each, where there is one.

        Raises:
            ValueError: a batch has no labels, or there are not as many specs as batches.
        """
        if isinstance(batches, Mapping):
            raise ValueError("count_targets takes the micro-batches in a list: this is a single batch")
        batches = list(batches)
        specs = [None] * len(batches) if specs is None else list(specs)
        if len(specs) != len(batches):
            raise ValueError(f"count_targets got {len(batches)} batches and {len(specs)} specs: one for each, or none")
        count = 0
        for batch, spec in zip(batches, specs, strict=True):
            targets, tokens = batch.get("shift_labels"), _tokens_of(batch)
            if targets is None:
                if batch.get("labels") is None:
                    raise ValueError("count_targets: a batch has neither labels nor shift_labels")
                targets = shifted_labels(batch["labels"], _layout(batch, tokens, spec, batch.get("cu_seq_lens_q")))
            count += int((targets != IGNORE_INDEX).sum())
        cp_size = 1 if self.cp_group is None else dist.get_world_size(self.cp_group)
        total = torch.tensor(count, device=_device(self.loss_group, self.model))
        # Every rank of a context-parallel group counts the same batches.
        return int(_sum_over(total, self.loss_group)) // (cp_size if self.loss_group is not None else 1)

    def mean_loss(
        self, logits: Tensor, targets: Tensor, num_targets: int | Tensor | None = None
    ) -> Tensor:
        """Cross entropy of this rank's tokens, as its share of the mean over loss_group.

        Args:
            logits: [1, L, V]; computed on in fp32 (fp64 for fp64).
            targets: [1, L], -100 where there is none.
            num_targets: what to divide by; None counts the targets of all ranks. None anywhere: loss 0.
        """
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        flat = logits.flatten(0, 1).to(dtype), targets.flatten().to(logits.device)
        total = F.cross_entropy(*flat, ignore_index=IGNORE_INDEX, reduction="sum")
        if num_targets is None:
            num_targets = _sum_over((targets != IGNORE_INDEX).sum().to(logits.device), self.loss_group)
        divisor = torch.as_tensor(num_targets, device=logits.device).clamp(min=1)
        return self.replicate(total / divisor)

    def token_logprobs(self, out: ParallelOutput, places: Tensor, tokens: Tensor) -> Tensor:
        """Log-probabilities of tokens, on every rank: what policy-gradient losses are made from.

        Args:
            out: of a call of this object.
            places: int64 [N], where in the batch (row * columns + column) the logits are that predict; the same on
                all ranks of cp_group, as tokens are.
            tokens: int64 [N], the tokens whose log-probabilities are wanted.

        Returns:
            [N], fp32 (fp64 for fp64 logits), the same on all ranks of cp_group. Gradient: for a loss
            that every rank computes alike from it; it need not be divided by the number of ranks.

        Raises:
            ValueError: the ranks pass different ones, there is no such place or token, or a place is padding.
        """
        self._check_wanted(out, places, tokens)
        which, rows = out.shard.local_rows(places.to(out.logits.device))
        logits = out.logits[0].index_select(0, rows)
        logprobs = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
        local = logprobs.gather(1, tokens.to(logits.device)[which, None]).squeeze(1)
        size = 1 if self.loss_group is None else dist.get_world_size(self.loss_group)
        weight = size if self.grad_reduction == "mean" else 1
        return _ShareRows.apply(local, which, len(places), self.cp_group, weight)  # type: ignore[no-any-return]

    def _check_wanted(self, out: ParallelOutput, places: Tensor, tokens: Tensor) -> None:
        layout, vocab = out.shard.layout, out.logits.shape[-1]
        if places.ndim != 1 or places.shape != tokens.shape or {places.dtype, tokens.dtype} != {torch.int64}:
            raise ValueError(
                f"token_logprobs: places is {places.dtype} {tuple(places.shape)} and tokens {tokens.dtype} "
                f"{tuple(tokens.shape)}: both are int64 [N]"
            )
        if self.check_batch:
            fields = {"places": tensor_digest(places), "tokens": tensor_digest(tokens)}
            require_agreement("token_logprobs", fields, self.cp_group)
        wanted = places.cpu().numpy()
        wrong = wanted[~np.isin(wanted, layout.index)]
        if len(wrong):
            raise ValueError(
                f"token_logprobs: place {wrong[0]} holds no token of the batch: it has {layout.rows} x "
                f"{layout.columns} places (row * columns + column), and those of padding have no logits"
            )
        outside = tokens[(tokens < 0) | (tokens >= vocab)]
        if len(outside):
            raise ValueError(f"token_logprobs: token {int(outside[0])} is not among the model's {vocab}")

    def replicate(self, local: Tensor) -> Tensor:
        """A local loss as the sum over loss_group: that value on all ranks, the local gradient on each.

        For losses of your own: pass this rank's share (already divided as it should be).
        """
        size = 1 if self.loss_group is None else dist.get_world_size(self.loss_group)
        own = local * (size if self.grad_reduction == "mean" else 1)
        return own + (_sum_over(local.detach().clone(), self.loss_group) - own.detach())

    def reduce_gradients(self) -> None:
        """Sum the gradients of all parameters over loss_group, where no wrapper does (grad_reduction "sum").

        Parameters that got no gradient on this rank take part with zeros.
        """
        if self.grad_reduction != "sum":
            raise ValueError("reduce_gradients with grad_reduction='mean': the wrapper of the model reduces them")
        for parameter in self.model.parameters():
            if parameter.requires_grad and self.loss_group is not None:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                grad: Any = parameter.grad
                # The share of a tensor-parallel rank: its peers in loss_group have the same share.
                dist.all_reduce(grad.to_local() if hasattr(grad, "to_local") else grad, group=self.loss_group)

    def _make_key(self, layout: BatchLayout) -> AttnKey:
        config, cp_size = self.text_config, 1 if self.cp_group is None else dist.get_world_size(self.cp_group)
        first, *others = layer_kinds(config, layout)
        heads = int(getattr(config, "num_attention_heads", 1))
        assert first.spec is not None
        return make_key(
            first.spec,
            num_heads_q=heads,
            num_heads_kv=int(getattr(config, "num_key_value_heads", None) or heads),
            head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
            cp_group=self.cp_group,
            chunk_size=max(1, min(self.max_chunk_size, layout.num_tokens // (16 * cp_size))),
            window=first.window,
            num_layers=first.num_layers,
            also=others,
            **self.options,
        )

    def _model_inputs(self, inputs: dict[str, Any], tokens: Tensor, shard: Shard) -> dict[str, Any]:
        inputs["use_cache"] = False
        if shard.splits_embeddings:
            mask = inputs.get("attention_mask")
            if mask is None or mask.ndim != 2:
                mask = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
            inputs["attention_mask"] = ShardedMask.of(mask, shard)
            return inputs
        positions = inputs.get("position_ids")
        for name in ("input_ids", "inputs_embeds"):
            if inputs.get(name) is not None:
                inputs[name] = shard.take(inputs[name])
        for name, value in inputs.items():
            if name not in _TEXT_INPUTS and isinstance(value, Tensor) and value.ndim:
                raise ValueError(
                    f"the batch has {name} of shape {tuple(value.shape)}: cpattn does not know how to shard it; "
                    f"leave it out, or pass it to the model by a keyword that is not a tensor"
                )
        if positions is not None:
            inputs["position_ids"] = shard._local_positions(positions)
        else:
            inputs["position_ids"] = shard.positions[None]
        inputs["attention_mask"] = shard._local_mask()
        return inputs

    def _compare_ranks(self, batch: Mapping[str, Any]) -> None:
        if self.cp_group is None:
            return
        fields = {name: _digest(batch.get(name)) for name in (*sorted(_TEXT_INPUTS), "labels", "shift_labels")}
        require_agreement("the batch of a context-parallel group", fields, self.cp_group)


class _ShareRows(torch.autograd.Function):
    """Rows that each rank has some of, whole on every rank; each rank's gradient is that of its rows."""

    @staticmethod
    def forward(
        ctx: Any, local: Tensor, which: Tensor, total: int, group: dist.ProcessGroup | None, weight: int
    ) -> Tensor:
        ctx.save_for_backward(which)
        ctx.weight = weight
        return _sum_over(local.new_zeros(total).index_copy(0, which, local), group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (which,) = ctx.saved_tensors
        return grad.index_select(0, which) * ctx.weight, None, None, None, None


def language_model(model: nn.Module) -> nn.Module:
    """The stack of decoder layers, without head and without vision tower."""
    root = _unwrapped(model)
    return root.get_decoder() if hasattr(root, "get_decoder") else root  # type: ignore[no-any-return]


def refuse_other_mixers(decoder: nn.Module, config: Any) -> None:
    """Raise if tokens meet outside attention: such layers would run over a shuffled shard."""
    kinds = set(getattr(config, "layer_types", None) or ()) & _TOKEN_MIXERS
    convolutions = [name for name, m in decoder.named_modules() if isinstance(m, nn.Conv1d)]
    if kinds or convolutions:
        raise ValueError(
            f"{type(decoder).__name__} mixes tokens outside attention ({', '.join(sorted(kinds) + convolutions[:3])}): "
            f"a shard holds tokens out of order, so such layers cannot run on it"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{type(decoder).__name__} belongs to an encoder-decoder model: not supported")


def _refuse_router_loss(config: Any) -> None:
    if getattr(config, "output_router_logits", False):
        raise ValueError(
            "output_router_logits: the router's balance loss is over the whole batch and would be left out; "
            "set output_router_logits=False and add a balance loss of your own"
        )


def _unwrapped(model: nn.Module) -> Any:
    while not hasattr(model, "config") and isinstance(getattr(model, "module", None), nn.Module):
        model = model.module  # type: ignore[assignment]
    return model


def _tokens_of(batch: Mapping[str, Any]) -> Tensor:
    tokens = batch.get("input_ids", batch.get("inputs_embeds"))
    if not isinstance(tokens, Tensor) or tokens.ndim < 2 or not tokens.shape[:2].numel():
        raise ValueError("the batch needs input_ids [B, S] (or inputs_embeds [B, S, hidden]), B and S at least 1")
    return tokens


def _layout(
    batch: Mapping[str, Any], tokens: Tensor, spec: AttnMaskSpec | None, cu_seqlens: Tensor | None
) -> BatchLayout:
    rows, columns = tokens.shape[:2]
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    if spec is not None:
        if mask is not None or cu_seqlens is not None:
            raise ValueError("spec is the whole mask: leave out attention_mask and cu_seq_lens_q")
        return layout_of_spec(rows, columns, spec)
    if positions is not None and positions.ndim == 3:  # multimodal: text positions come first of four
        positions = positions[0] if positions.shape[0] == 4 else None
    return layout_of_batch(rows, columns, attention_mask=mask, positions=positions, cu_seqlens=cu_seqlens)


def layer_kinds(config: Any, layout: BatchLayout) -> list[LayerKind]:
    """The masks of a model's kinds of layers, with how many layers have each, as far as its config tells.

    Tokens are placed by them. What a layer really sees is up to the mask that transformers asks for (image
    blocks, for example, are not in the config): where that is another one, it is planned over this placement.
    """
    names = getattr(config, "layer_types", None) or [_kind_of_all_layers(config)]
    counts: dict[MaskTerm, int] = {}
    for name in names:
        term = _term_of(name, config, layout)
        counts[term] = counts.get(term, 0) + 1
    return [LayerKind(*layout.plan_of([term]), num_layers=count) for term, count in counts.items()]


def _kind_of_all_layers(config: Any) -> str:
    sliding = isinstance(getattr(config, "sliding_window", None), int) and getattr(config, "use_sliding_window", True)
    return "sliding_attention" if sliding else "full_attention"


def _term_of(kind: str, config: Any, layout: BatchLayout) -> MaskTerm:
    """The mask of one of transformers' kinds of layers; a limit that is wider than all texts is left out."""
    window, chunk = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    if getattr(config, "is_causal", True) is False:
        return MaskTerm(causal=layout.explicit)
    if kind == "sliding_attention" and isinstance(window, int) and window < layout.longest_text:
        return MaskTerm(causal=True, left=window - 1)
    if kind == "chunked_attention" and isinstance(chunk, int) and chunk < layout.longest_text and not layout.explicit:
        return MaskTerm(causal=True, chunk=chunk)
    return MaskTerm(causal=True)


def _local_tokens(key: AttnKey, device: torch.device) -> Tensor:
    return torch.from_numpy(key.q_placement.tokens_of(key.cp_rank)).to(device)


def _digest(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return None if value is None else type(value).__name__
    if value.is_floating_point():  # embeddings may differ in the last bit and are large
        return tuple(value.shape)
    return tensor_digest(value)


def _process_group(group: Any, flatten: bool = False) -> dist.ProcessGroup | None:
    """The group of a mesh axis (of all axes together with `flatten`); None for a single rank."""
    if group is None:
        return None
    if hasattr(group, "mesh_dim_names"):
        if group.ndim > 1 and flatten:
            whole_world = group.size() == dist.get_world_size()
            group = dist.group.WORLD if whole_world else group._flatten().get_group()
        else:
            group = (group["cp"] if group.ndim > 1 else group).get_group()
    return group if dist.get_world_size(group) > 1 else None


def _sum_over(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if group is not None:
        dist.all_reduce(x, group=group)
    return x


def _device(group: dist.ProcessGroup | None, model: nn.Module) -> torch.device:
    if group is not None and "nccl" in dist.get_backend(group):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu") if group is not None else next(model.parameters()).device
