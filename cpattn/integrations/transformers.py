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

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cpattn.keys.key import AttnKey
from cpattn.keys.make import make_key
from cpattn.masks.spec import AttnMaskSpec

from .batch_layout import IGNORE_INDEX, BatchLayout, shifted_labels
from .cuts import split_at_decoder, stage_inputs
from .group_losses import GroupLosses
from .hf_attention import (
    PACKING_INPUTS,
    cpattn_attention,
    cpattn_mask,
    refuse_what_would_be_ignored,
)
from .hf_batch import TEXT_INPUTS, compare_batch, device_of, last_position, layout_of, process_group, tokens_of
from .hf_heads import (
    gather_hidden_states,
    head_kind,
    kept_places,
    last_tokens,
    logits_of,
    pooled_logits,
    refuse_outputs,
    require_keeps_logits,
)
from .hf_latents import serve_latents
from .hf_mixers import serve_mixers
from .hf_model import (
    base_model,
    language_model,
    layer_kinds,
    read,
    refuse_encoders,
    refuse_indexers,
    refuse_other_mixers,
    takes,
    unwrapped,
)
from .hf_own_attention import serve_own_attention
from .hf_register import register_attention
from .placement_probe import LabelsOf, try_placement
from .shard import Cut, LayerMask, ParallelOutput, Shard, ShardedMask, ShareRows, local_tokens, refuse_cache, sum_over
from .weights import require_equal_weights

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
]

class ContextParallel(GroupLosses):
    """Runs a transformers model with each batch spread over the ranks of a group.

    Causal LMs, and heads of token classification and sequence classification (reward and value models). A module whose
    parameters, `state_dict`, `train` and `eval` are the model's: the same names, without a prefix.

    Args:
        model: loaded with attn_implementation="cpattn"; may be wrapped by FSDP2, DDP or PEFT.
        cp_group: ProcessGroup or DeviceMesh of the ranks that share a batch, or None for one rank.
        loss_group: ProcessGroup or DeviceMesh of the ranks over whose targets the loss is averaged: the
            context-parallel ranks of all data-parallel replicas. None: cp_group.
        grad_reduction: what happens to gradients after backward: "sum" when they are summed over
            loss_group (`reduce_gradients`), "mean" when they are averaged over it (DDP, FSDP2).
        max_chunk_size: grain of placement: a sixteenth of a rank's tokens, at most this.
        layout, backend, search_effort, equal_shards: as in `make_key`.
        check_batch: compare the batch between the ranks of cp_group before it is used (one small
            all-gather): different data on two ranks would give wrong numbers without a word.
        check: try the model before it is trusted: a small batch runs in its natural order and in a shuffled one on
            this rank (two small forwards; all ranks together where the model is wrapped by FSDP2 or tensor
            parallelism), once for each configuration. False trusts it, and cuts at the inputs.
        broadcast: give every rank of loss_group the weights of its first; False compares them, once.

    Raises:
        ValueError: the model depends on where a token lies in the local tensor: names the first layer where it shows,
            and why it may; layers mix tokens in another way than by attention; or ranks have different weights.
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
        check: bool = True,
        broadcast: bool = False,
        equal_shards: bool = False,
    ) -> None:
        if grad_reduction not in ("sum", "mean"):
            raise ValueError(f"grad_reduction is {grad_reduction!r}: 'sum' or 'mean'")
        super().__init__(model)
        self.cp_group = process_group(cp_group)
        self.loss_group = self.cp_group if loss_group is None else process_group(loss_group, flatten=True)
        self.grad_reduction = grad_reduction
        self.max_chunk_size = max_chunk_size
        self.options: dict[str, Any] = {"layout": layout, "backend": backend, "search_effort": search_effort}
        self.options |= {"equal_shards": True} if equal_shards else {}
        self.check_batch = check_batch
        config = unwrapped(model).config
        self.text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
        self.has_other_modalities = self.text_config is not config
        # Not submodules: parts of the model have their names in it.
        self._parts = _Parts(language_model(model), base_model(model))
        self.head = head_kind(self.root)
        refuse_encoders(self.root)
        refuse_other_mixers(self.decoder, self.text_config, serve_mixers(self.decoder))
        self.latents = serve_latents(self.decoder)
        serve_own_attention(self.decoder, self.text_config)
        refuse_indexers(self.decoder, self.text_config)
        split_at_decoder(self.decoder)
        if not getattr(self.decoder, "_cpattn_weights_agree", False) or broadcast:
            require_equal_weights(model, self.loss_group, broadcast=broadcast)
            self.decoder._cpattn_weights_agree = True
        self.cut: Cut = "decoder" if self.has_other_modalities else "inputs"
        self.labels_of: LabelsOf = "next"
        self._unchecked = check
        if check and not any(p.is_meta for p in model.parameters()):
            self._check_placement()

    @property
    def decoder(self) -> Any:
        """The stack of decoder layers."""
        return self._parts.decoder

    @property
    def root(self) -> Any:
        """The transformers model inside wrappers and adapters."""
        return self._parts.root

    def forward(
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
                within each document; as they are for a token classification head and for models whose own loss
                does not shift them, such as Bart's; of a sequence classification head [B]) or shift_labels (shifted
                already), cu_seq_lens_q, pixel values and whatever else the model takes.
            spec: the mask of a batch of one row, in place of attention_mask: a prefix tree, for example.
            num_targets: what to divide the summed loss by; None is the number of this batch's targets
                over loss_group. Under gradient accumulation pass that of all micro-batches together
                (`count_targets`), and the losses and gradients add up to those of one large batch.
            model_kwargs: passed on to the model. logits_to_keep counts columns of the batch; with output_router_logits
                the balance loss is that of all ranks' tokens, times the model's coefficient (a mean over data-parallel
                replicas); hidden states are gathered.

        Returns:
            The loss has the value of the whole mean on every rank; its backward gives gradients whose
            sum (or mean, see `grad_reduction`) over loss_group is the gradient of that value.

        Raises:
            ValueError: something that is asked for cannot be given; says what.
        """
        if not isinstance(num_targets, Tensor) and num_targets is not None and num_targets < 0:
            raise ValueError(f"num_targets is {num_targets}: it is a count, at least 0")
        if self._unchecked and any(p.is_meta for p in self.model.parameters()):
            raise ValueError("the model's parameters are on the meta device: load or initialise them first")
        if self._unchecked:
            self._check_placement()
        batch = dict(batch)
        refuse_outputs({**batch, **model_kwargs}, self.text_config)
        keep, router = self._take_requests(batch, model_kwargs)
        rows = last_tokens(self.root, batch) if self.head == "sequence" else None
        labels = batch.pop("labels", None) if self.head == "sequence" else None
        shard = self.shard(batch, spec=spec)
        taken = sorted(({"labels", "shift_labels"} | set(shard.inputs)) & set(model_kwargs))
        if taken:
            raise ValueError(f"{', '.join(taken)} cannot be given as keywords: cpattn makes them from the batch")
        places = None
        if keep is not None:
            require_keeps_logits(self.root, shard.targets is not None)
            places = kept_places(keep, shard)
            which, model_kwargs["logits_to_keep"] = shard.local_rows(places)
        if router:
            model_kwargs["output_router_logits"] = True
        outputs, logits = self._run(self.model, shard, rows, model_kwargs)
        shard.inputs = {}  # pixel values need not live as long as the graph
        loss = None if shard.targets is None else self.mean_loss(logits, shard.targets, num_targets)
        if labels is not None:
            loss = self._row_loss(logits, labels, num_targets)
        if router:
            loss = self._add_router_loss(loss, outputs, shard)
        if places is not None:
            shared = ShareRows.apply(logits[0], which, len(places), self.cp_group, self._share_weight)
            logits = shared.unflatten(0, (shard.layout.rows, -1))
        gather_hidden_states(outputs, shard, self._share_weight)
        return ParallelOutput(loss, logits, outputs, shard)

    def _check_placement(self) -> None:
        self.cut, self.labels_of = try_placement(self)
        self._unchecked = False

    def _take_requests(self, batch: dict[str, Any], keywords: dict[str, Any]) -> tuple[int | Tensor | None, bool]:
        """logits_to_keep (None: all), and whether the router's loss is asked for; taken out of both."""
        asked = {**batch, **keywords}
        keep = asked.get("logits_to_keep")
        router = asked.get("output_router_logits")
        for holder in (batch, keywords):
            holder.pop("logits_to_keep", None)
            holder.pop("output_router_logits", None)
        if router is None:
            router = getattr(self.text_config, "output_router_logits", False)
        return None if isinstance(keep, int) and not keep else keep, bool(router)

    def _run(
        self, model: Callable[..., Any], shard: Shard, rows: Tensor | None, keywords: Mapping[str, Any]
    ) -> tuple[Any, Tensor]:
        """The model's outputs on a shard, and its logits: by local token, or [B, C] of a head that pools."""
        scores: list[Tensor] = []

        def note(module: nn.Module, args: Any, score: Tensor) -> Tensor | None:
            scores.append(score)
            stage = shard.stage  # what the model pools itself is not used, but must have the shape that it expects
            return None if stage is None else score.new_zeros(stage.rows, stage.columns, score.shape[-1])

        hook = None if rows is None else self.root.score.register_forward_hook(note)
        try:
            with shard.active():
                outputs = model(**shard.inputs, **keywords)
        finally:
            if hook is not None:
                hook.remove()
        if rows is not None:
            return outputs, pooled_logits(scores[-1], rows, shard, self._share_weight)
        return outputs, logits_of(self.root, outputs)

    def shard(self, batch: Mapping[str, Any], *, spec: AttnMaskSpec | None = None) -> Shard:
        """This rank's part of a batch, with what to call the model with. Arguments as for a call."""
        for name in ("logits_to_keep", "output_router_logits"):
            if isinstance(batch.get(name), Tensor) or batch.get(name):
                raise ValueError(f"{name} is served by a call of ContextParallel, not by shard(): leave it out")
        if self.check_batch:
            compare_batch(batch, self.cp_group)
        cut: Cut = self.cut if self.cut != "decoder" or self.has_other_modalities else "inputs"
        return self._shard(batch, spec, self.cp_group, cut)

    def _shard(
        self,
        batch: Mapping[str, Any],
        spec: AttnMaskSpec | None,
        cp_group: dist.ProcessGroup | None,
        cut: Cut,
        order: Tensor | None = None,
    ) -> Shard:
        inputs = dict(batch)
        refuse_cache(inputs)
        labels, targets = inputs.pop("labels", None), inputs.pop("shift_labels", None)
        packing = {name: inputs.pop(name, None) for name in PACKING_INPUTS}
        tokens, sums = tokens_of(inputs), packing["cu_seq_lens_q"]
        layout = layout_of(inputs, tokens, spec, sums)
        key = self._make_key(layout, cp_group)
        local = layout.index_on(tokens.device)[local_tokens(key, tokens.device, order)]
        if not len(local):
            local = local.new_zeros(1)
        last = last_position(layout, inputs.get("position_ids"), sums is not None or spec is not None)
        shard = Shard(key, layout, local, decoder=self.decoder, cut=cut, last_position=last, order=order)
        if targets is None and labels is not None:
            targets = self._targets(labels, layout)
        if targets is not None:
            shard.targets = shard.take(targets)
            shard.targets[:, key.num_tokens :] = IGNORE_INDEX
        shard.inputs = self._model_inputs(inputs, tokens, shard)
        return shard

    def _targets(self, labels: Tensor, layout: BatchLayout) -> Tensor:
        if self.head == "causal" and self.labels_of == "unknown":
            raise ValueError(
                f"{type(self.root).__name__} has a loss of its own, not the mean cross entropy of labels: pass "
                f"shift_labels (each token's target, -100 for none) for that mean, or leave labels out"
            )
        if self.head == "causal" and self.labels_of == "next":
            return shifted_labels(labels, layout)
        if self.head == "sequence" or tuple(labels.shape) != (layout.rows, layout.columns):
            raise ValueError(
                f"labels have shape {tuple(labels.shape)}, input_ids {(layout.rows, layout.columns)}: one label for "
                f"each token is needed (a sequence classification head takes its labels [B] by a call)"
            )
        return labels

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
            targets, tokens = batch.get("shift_labels"), tokens_of(batch)
            if targets is None:
                if batch.get("labels") is None:
                    raise ValueError("count_targets: a batch has neither labels nor shift_labels")
                targets = self._targets(batch["labels"], layout_of(batch, tokens, spec, batch.get("cu_seq_lens_q")))
            count += int((targets != IGNORE_INDEX).sum())
        cp_size = 1 if self.cp_group is None else dist.get_world_size(self.cp_group)
        total = torch.tensor(count, device=device_of(self.loss_group, self.model))
        # Every rank of a context-parallel group counts the same batches.
        return int(sum_over(total, self.loss_group)) // (cp_size if self.loss_group is not None else 1)

    def _make_key(self, layout: BatchLayout, cp_group: dist.ProcessGroup | None) -> AttnKey:
        config, cp_size = self.text_config, 1 if cp_group is None else dist.get_world_size(cp_group)
        first, *others = layer_kinds(config, layout)
        heads = int(read(config, "num_attention_heads", 1))
        assert first.spec is not None
        dims = {
            "num_heads_kv": int(read(config, "num_key_value_heads", heads)),
            "head_dim": int(read(config, "head_dim", max(config.hidden_size // heads, 1))),
        }
        return make_key(
            first.spec,
            num_heads_q=heads,
            **dims | self.latents,
            cp_group=cp_group,
            chunk_size=max(1, min(self.max_chunk_size, layout.num_tokens // (16 * cp_size))),
            window=first.window,
            num_layers=first.num_layers,
            also=others,
            **self.options,
        )

    def _model_inputs(self, inputs: dict[str, Any], tokens: Tensor, shard: Shard) -> dict[str, Any]:
        inputs["use_cache"] = False
        if shard.cut == "layers":
            pad = read(self.text_config, "pad_token_id", 0)
            takes_positions = takes(self.root, "position_ids")
            shard.stage, inputs = stage_inputs(inputs, shard, takes_positions=takes_positions, pad=pad)
            return inputs
        if shard.cut == "decoder":
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
            if name not in TEXT_INPUTS and isinstance(value, Tensor) and value.ndim:
                raise ValueError(
                    f"the batch has {name} of shape {tuple(value.shape)}: cpattn does not know how to shard it; "
                    f"leave it out, or pass it to the model by a keyword that is not a tensor"
                )
        inputs["position_ids"] = shard.positions[None] if positions is None else shard.local_positions(positions)
        inputs["attention_mask"] = shard.local_mask()
        return inputs


class _Parts(NamedTuple):
    """Modules that are found again in the model, kept out of the module's own list of children."""

    decoder: nn.Module
    root: Any
