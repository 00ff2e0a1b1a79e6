"""A transformers model that is called as ever, with whole batches, and computes this rank's part of them.

Frameworks call models themselves and read what they return. `serve_whole_batches` changes one method of the model, its
forward: on every rank of a context-parallel group it takes the same whole batch, runs over this rank's tokens, and
returns what one process would have: the loss over the whole batch, whole logits, or the per-token fields of TRL's fused
head. So a group of ranks is to its caller what one rank was: a replica.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutput

from .batch_layout import shifted_labels
from .hf_batch import layout_of, tokens_of
from .hf_model import base_model
from .prefix_tree import fold_samples
from .shard import Shard, ShareRows, active_shard
from .transformers import ContextParallel, ParallelOutput

# What a model returns about the local tokens only, or not at all under a shard.
_NOT_WHOLE = ("loss", "logits", "router_logits", "past_key_values", "attentions")


class WholeBatches(ContextParallel):
    """A `ContextParallel` behind the model's own forward. Made by `serve_whole_batches`.

    Attributes:
        keep_logits: whether a call with labels returns logits too, gathered; None: where gradients are off.
        prefix_trees: whether rows that begin alike share their beginning under TRL's fused head.
    """

    keep_logits: bool | None = None
    _whole: Callable[..., Any]

    def __init__(self, model: nn.Module, cp_group: Any, *, prefix_trees: bool = False, **options: Any) -> None:
        self.__dict__["_whole"] = model.forward  # before the model is tried
        super().__init__(model, cp_group, **{"grad_reduction": "mean", **options})
        self.prefix_trees = prefix_trees

    def _run(
        self, model: Callable[..., Any], shard: Shard, rows: Tensor | None, keywords: Mapping[str, Any]
    ) -> tuple[Any, Tensor]:
        # Not through the module's call: it is in it, and its hooks (those of FSDP among them) would run twice.
        return super()._run(self._whole if model is self.model else model, shard, rows, keywords)

    def serves(self, inputs: Mapping[str, Any]) -> bool:
        """Whether a call with these inputs is shared out; one with a cache (decoding) runs whole on each rank."""
        given = any(isinstance(inputs.get(name), Tensor) for name in ("input_ids", "inputs_embeds"))
        cached = any(inputs.get(name) is not None for name in ("past_key_values", "cache"))
        return given and not cached and self.cp_group is not None and active_shard.get() is None

    def run_whole(self, inputs: dict[str, Any]) -> Any:
        """What the model's forward would return for the whole batch."""
        inputs.pop("use_cache", None)
        if inputs.pop("fused_lm_head", False):
            return self._fused(inputs)
        num_items = inputs.pop("num_items_in_batch", None)
        out = self(inputs, num_targets=None if self.head == "sequence" else num_items)
        return self._returned(out, kept=bool(inputs.get("logits_to_keep") is not None))

    def _returned(self, out: ParallelOutput, kept: bool) -> Any:
        keep = not torch.is_grad_enabled() if self.keep_logits is None else self.keep_logits
        logits: Tensor | None = out.logits
        if out.loss is not None and not keep:
            logits = None
        elif self.head != "sequence" and out.logits.shape[:2] == (1, out.shard.num_tokens) and not kept:
            logits = self.share(out.logits[0], out.shard)
        rest = {name: value for name, value in out.outputs.items() if name not in _NOT_WHOLE}
        return type(out.outputs)(loss=out.loss, logits=logits, **rest)

    def share(self, local: Tensor, shard: Shard) -> Tensor:
        """Rows of this rank's tokens, [L, ...], as [B, S, ...] on every rank; padding is zero.

        Gradient: for a loss that every rank of the group computes alike, of this rank's rows.
        """
        return shard.share(local, self._share_weight)

    def _fused(self, inputs: dict[str, Any]) -> Any:
        """TRL's fused head: per-token fields brought together, [B, S - 1], with shift_labels [B, S].

        Raises:
            ValueError: the router's loss is asked for, which that head computes over the tokens at hand.
        """
        num_items, shifted = inputs.pop("num_items_in_batch", None), inputs.get("shift_labels") is not None
        asked = inputs.pop("output_router_logits", None)
        if getattr(self.text_config, "output_router_logits", False) if asked is None else asked:
            raise ValueError(
                f"{type(self.root).__name__} with TRL's fused head: its router loss would be of this rank's tokens "
                f"only. Set output_router_logits=False in its config and router_aux_loss_coef=0 in the arguments"
            )
        folded = self.prefix_trees and not shifted and isinstance(inputs.get("attention_mask"), Tensor)
        out, local, together = self._scored_tree(inputs) if folded else self._scored(inputs)
        together = together if shifted else together[:, :-1]
        whole = {
            name: together[..., n].bool() if value.dtype == torch.bool else together[..., n]
            for n, (name, value) in enumerate(local.items())
        }
        count = whole["label_mask"].sum().clamp(min=1) if num_items is None else num_items
        return type(out)(loss=-whole["log_probs"].sum() / count, **whole)

    def _scored(self, inputs: dict[str, Any]) -> tuple[Any, dict[str, Tensor], Tensor]:
        """(the head's output on this rank, its fields by token, these of all ranks stacked, [B, S, fields])."""
        shard = self.shard(inputs)
        with shard.active():
            out = self._whole(fused_lm_head=True, shift_labels=shard.targets, **shard.inputs)
        local = _by_token(out)
        return out, local, self.share(_stacked(local), shard)

    def _scored_tree(self, inputs: dict[str, Any]) -> tuple[Any, dict[str, Tensor], Tensor]:
        """As `_scored`, of rows that share their common beginnings: a place may predict several tokens."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
        known = ("input_ids", "attention_mask", "labels")
        others = [name for name, value in inputs.items() if isinstance(value, Tensor) and name not in known]
        if others:
            raise ValueError(f"prefix_trees: rows with {', '.join(others)} cannot share their beginnings; leave it off")
        tree = fold_samples([row[real] for row, real in zip(ids, mask, strict=True)])
        places, _, samples = (t.to(ids.device) for t in tree.targets())
        # The column before each sample's token: where unfolded rows have what predicts it.
        columns = torch.cat([real.nonzero().flatten()[1:] for real in mask]) - 1
        shard = self.shard({"input_ids": tree.input_ids.to(ids.device)}, spec=tree.spec)
        with shard.active():
            hidden = self.root.base_model(**shard.inputs).last_hidden_state
        which, rows = shard.local_rows(places)
        labels = inputs["labels"][samples, columns + 1].where(mask[samples, columns], -100)[which]
        # One place more, without a label: a rank may have none of these tokens.
        chosen = hidden[:, torch.cat([rows, rows.new_zeros(1)])]
        states = BaseModelOutput(last_hidden_state=chosen)
        with mock.patch.object(self.root.base_model, "forward", return_value=states):
            out = self._whole(fused_lm_head=True, shift_labels=F.pad(labels, (0, 1), value=-100)[None])
        local = _by_token(out)
        pairs: Tensor = ShareRows.apply(_stacked(local)[:-1], which, len(places), self.cp_group, self._share_weight)
        together = pairs.new_zeros(*ids.shape, pairs.shape[-1]).index_put((samples, columns), pairs)
        return out, local, together

    def next_token_targets(self, batch: Mapping[str, Any]) -> Tensor:
        """[B, S]: what the model is trained on at each place of a batch with labels; -100 where nothing."""
        if batch.get("shift_labels") is not None:
            return batch["shift_labels"]
        layout = layout_of(batch, tokens_of(batch), None, batch.get("cu_seq_lens_q"))
        return shifted_labels(batch["labels"], layout)


def _by_token(out: Any) -> dict[str, Tensor]:
    return {name: value for name, value in out.items() if isinstance(value, Tensor) and value.ndim}


def _stacked(local: dict[str, Tensor]) -> Tensor:
    """[L, fields], in the log-probabilities' dtype."""
    return torch.stack([value[0].to(local["log_probs"].dtype) for value in local.values()], -1)


def serve_whole_batches(model: nn.Module, cp_group: Any, **options: Any) -> WholeBatches:
    """Let a model's forward take whole batches and share them over the ranks of a group. Idempotent for one group.

    Gradients are those that an average over the replicas needs when all ranks, those of the context-parallel groups
    included, are averaged over (DDP, FSDP): each group counts as one replica.

    Args:
        model: a transformers model, bare or in PEFT's; what it holds is changed in place, and loaded with, or switched
            to, attn_implementation="cpattn". Serve it before DDP or FSDP wrap it, and after TRL added its fused head.
        cp_group: ProcessGroup or DeviceMesh of the ranks that share each batch.
        options: as for `ContextParallel`; and prefix_trees=True, with which rows that begin alike (GRPO's groups, DPO's
            pairs) compute their beginning once under TRL's fused head.

    Raises:
        ValueError: the model cannot be sharded, or has prompts that PEFT learns.
    """
    refuse_learned_prompts(model)
    root = base_model(model)
    served = served_by(root)
    if served is not None:
        return served
    if getattr(root.config, "_attn_implementation", None) != "cpattn":
        root.set_attn_implementation("cpattn")
    parallel = WholeBatches(root, cp_group, **options)
    root.forward = types.MethodType(_forward(root.forward, parallel), root)
    return parallel


def served_by(model: nn.Module | None) -> WholeBatches | None:
    """What serves a model (bare, or in PEFT's, DDP's or FSDP's wrappers); None where nothing does."""
    for forward in () if model is None else _forwards(base_model(model)):
        parallel = getattr(forward, "_cpattn_parallel", None)
        if parallel is not None:
            return parallel  # type: ignore[no-any-return]
    return None


def _forwards(root: nn.Module) -> Iterator[Any]:
    """The model's forward and what it wraps: accelerate puts mixed precision around ours."""
    forward: Any = root.__dict__.get("forward")
    while forward is not None:
        yield forward
        forward = getattr(forward, "__wrapped__", None)


def _forward(original: Callable[..., Any], parallel: WholeBatches) -> Callable[..., Any]:
    names = list(inspect.signature(original).parameters)

    @functools.wraps(getattr(original, "__func__", original))
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = dict(zip(names, args, strict=False)) | kwargs
        return parallel.run_whole(inputs) if parallel.serves(inputs) else original(*args, **kwargs)

    forward._cpattn_parallel = parallel  # type: ignore[attr-defined]
    return forward


def refuse_learned_prompts(model: nn.Module) -> None:
    """Raise where PEFT puts learned tokens or keys before the batch's: they are of no rank's part of it."""
    holders = [m for m in model.modules() if isinstance(getattr(m, "peft_config", None), dict)]
    for holder in holders:
        configs: Any = holder.peft_config
        for adapter, config in configs.items():
            if getattr(config, "is_prompt_learning", False):
                kind = getattr(config.peft_type, "value", config.peft_type)
                raise ValueError(
                    f"PEFT's {kind} (adapter {adapter!r}) puts learned tokens or keys before the batch's: they would "
                    f"be no rank's part of it. Use adapters of weights (LoRA and its kin) under context parallelism"
                )
