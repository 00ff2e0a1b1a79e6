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

from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from cpattn.keys.key import AttnKey
from cpattn.keys.make import make_key
from cpattn.masks.spec import AttnMaskSpec
from cpattn.runtime.agreement import control_device, require_agreement, tensor_digest

from .batch_layout import IGNORE_INDEX, BatchLayout, layout_of_batch, layout_of_spec, shifted_labels
from .hf_attention import (
    PACKING_INPUTS,
    cpattn_attention,
    cpattn_mask,
    refuse_what_would_be_ignored,
    register_attention,
)
from .hf_latents import serve_latents
from .hf_mixers import serve_mixers
from .hf_model import language_model, layer_kinds, refuse_other_mixers, refuse_router_loss, unwrapped
from .shard import LayerMask, Shard, ShardedMask, local_tokens, split_at_decoder

__all__ = [
    "ContextParallel",
    "LayerMask",
    "ParallelOutput",
    "Shard",
    "ShardedMask",
    "cpattn_attention",
    "cpattn_mask",
    "language_model",
    "layer_kinds",
    "refuse_other_mixers",
    "refuse_what_would_be_ignored",
    "register_attention",
    "split_at_decoder",
]

_TEXT_INPUTS = {"input_ids", "inputs_embeds", "attention_mask", "position_ids"}


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
        config = unwrapped(model).config
        self.text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
        self.has_other_modalities = self.text_config is not config
        refuse_other_mixers(self.decoder, self.text_config, serve_mixers(self.decoder))
        self.latents = serve_latents(self.decoder)
        refuse_router_loss(self.text_config)
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
        packing = {name: inputs.pop(name, None) for name in PACKING_INPUTS}
        tokens = _tokens_of(inputs)
        if self.check_batch:
            self._compare_ranks({**inputs, "labels": labels, "shift_labels": targets})
        layout = _layout(inputs, tokens, spec, packing["cu_seq_lens_q"])
        key = self._make_key(layout)
        local = layout.index_on(tokens.device)[local_tokens(key, tokens.device)]
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
        dims = {
            "num_heads_kv": int(getattr(config, "num_key_value_heads", None) or heads),
            "head_dim": int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        }
        return make_key(
            first.spec,
            num_heads_q=heads,
            **dims | self.latents,
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
            inputs["position_ids"] = shard.local_positions(positions)
        else:
            inputs["position_ids"] = shard.positions[None]
        inputs["attention_mask"] = shard.local_mask()
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
    return control_device(group) if group is not None else next(model.parameters()).device
