"""What is made of a shard's hidden states: logits by token or by row, the router's loss, what the caller asked for."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .shard import Shard, ShareRows, sum_over, take_rows

HeadKind = Literal["causal", "token", "sequence"]
_POOLING = ("ForQuestionAnswering", "ForMultipleChoice", "ForNextSentencePrediction", "ForPreTraining")
_INSTEAD = (
    "take hidden states, with output_hidden_states=True, from a causal LM or a token classification head: they are "
    "whole on every rank"
)


def head_kind(root: nn.Module) -> HeadKind:
    """What a model's logits belong to: next tokens, tokens, or rows of the batch.

    Raises:
        ValueError: the head pools tokens in a way that is not known here.
    """
    name = type(root).__name__
    if name.endswith(("ForTokenClassification", "ForMaskedLM")):
        return "token"
    if name.endswith("ForSequenceClassification"):
        if not isinstance(getattr(root, "score", None), nn.Module):
            raise ValueError(
                f"{name} pools the tokens that it is given by a head of its own: cpattn serves the heads that take "
                f"`score` of each row's last token. Or {_INSTEAD}"
            )
        return "sequence"
    if name.endswith(_POOLING):
        raise ValueError(
            f"{name}: cpattn serves heads for causal and masked LM, token and sequence classification, not this one. "
            f"Or {_INSTEAD}"
        )
    return "causal"


def logits_of(root: nn.Module, outputs: Any) -> Tensor:
    """What a model's head returned. Raises ValueError where it has none."""
    logits = getattr(outputs, "logits", None)
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"{type(root).__name__} returned no logits ({type(outputs).__name__}): ContextParallel runs models with a "
            f"head, AutoModelForCausalLM for example, and not bare ones"
        )
    return logits


def refuse_outputs(asked: Mapping[str, Any], config: Any) -> None:
    """Raise where what is asked for, by the batch, by keyword or by the config, cannot be given."""
    for name in ("output_attentions",):
        if asked.get(name) or (name not in asked and getattr(config, name, False)):
            raise ValueError(f"{name}: there is no matrix of probabilities to return under context parallelism")
    if asked.get("return_dict") is False or (
        "return_dict" not in asked and getattr(config, "return_dict", True) is False
    ):
        raise ValueError("return_dict=False: cpattn reads what the model returns by name; leave it out")


# ----------------------------------------------------------------------------------------------------
# Logits of some places.


def kept_places(keep: int | Tensor, shard: Shard) -> Tensor:
    """Places row * columns + column of logits_to_keep, int64 [B * k]: the last so many columns, or those given.

    Raises:
        ValueError: a column is outside the batch.
    """
    rows, columns = shard.layout.rows, shard.layout.columns
    given = torch.arange(max(columns - keep, 0), columns) if isinstance(keep, int) else keep.detach().cpu().flatten()
    wrong = given[(given < -columns) | (given >= columns)]
    if len(wrong):
        raise ValueError(f"logits_to_keep: {int(wrong[0])} is no column of the batch's {columns}")
    starts = torch.arange(rows)[:, None] * columns
    return (starts + given % columns).flatten().to(shard.index.device)


def require_keeps_logits(root: nn.Module, has_targets: bool) -> None:
    """Raise where logits_to_keep cannot be served."""
    if has_targets:
        raise ValueError("logits_to_keep with labels: the loss needs the logits of all targets; pass one of them")
    if "logits_to_keep" not in inspect.signature(root.forward).parameters:
        raise ValueError(f"logits_to_keep: {type(root).__name__} does not take it")


# ----------------------------------------------------------------------------------------------------
# Heads that pool.


def last_tokens(root: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """int64 [B], each row's column that a sequence classification head reads: its last that is not padding.

    Raises:
        ValueError: there are several rows and no padding token, as the model itself says.
    """
    config: Any = root.config
    pad = (config.get_text_config() if hasattr(config, "get_text_config") else config).pad_token_id
    ids = batch.get("input_ids")
    rows, columns = (batch["inputs_embeds"] if ids is None else ids).shape[:2]
    if pad is None and rows != 1:
        raise ValueError(f"{type(root).__name__}: a batch of {rows} rows needs config.pad_token_id, to find their ends")
    if pad is None or ids is None:
        return torch.full((rows,), columns - 1, device=None if ids is None else ids.device)
    return (torch.arange(columns, device=ids.device) * (ids != pad)).argmax(-1)


def pooled_logits(scores: Tensor, columns: Tensor, shard: Shard, weight: int) -> Tensor:
    """[B, C] on every rank: the scores [1, L, C] of the local tokens, at each row's column."""
    places = torch.arange(len(columns), device=columns.device) * shard.layout.columns + columns
    real = torch.isin(places, shard.layout.index_on(places.device))
    if not bool(real.all()):
        row = int((~real).nonzero()[0])
        raise ValueError(
            f"row {row}: its last token that is not pad_token_id is padding by attention_mask, so it has no score"
        )
    which, rows = shard.local_rows(places)
    local = scores[0].index_select(0, rows.to(scores.device))
    return ShareRows.apply(local, which.to(scores.device), len(places), shard.key.cp_group, weight)  # type: ignore[no-any-return]


def classification_loss(pooled: Tensor, labels: Tensor, config: Any) -> Tensor:
    """transformers' own loss of a sequence classification head."""
    from transformers.loss.loss_utils import ForSequenceClassificationLoss

    return ForSequenceClassificationLoss(labels, pooled, config)  # type: ignore[no-any-return]


# ----------------------------------------------------------------------------------------------------
# The router's balance loss (Switch Transformer, arXiv:2101.03961, eq. 4 to 6), over the tokens of all ranks.


def router_loss_share(root: Any, outputs: Any, shard: Shard) -> Tensor | None:
    """This rank's share of the balance loss of the whole batch; None where the model returned none.

    num_experts * sum over experts of (share of assignments) * (mean probability): the first is counted over all
    ranks, and the loss is linear in the second, so the shares of the ranks add up, and so do their gradients.

    Raises:
        ValueError: over this rank's tokens alone the formula does not give what the model's own gave: another loss.
    """
    own = getattr(outputs, "aux_loss", None)
    logits = [gate for gate in getattr(outputs, "router_logits", None) or () if isinstance(gate, Tensor)]
    if not isinstance(own, Tensor) or not logits:
        return None
    top_k = _top_k(root)
    counts, weights, rows = _router_sums(logits, top_k, None)
    experts = logits[0].shape[-1]
    alone = experts * (counts @ weights) / rows**2
    if not torch.allclose(alone, own.detach().to(alone), rtol=1e-3, atol=1e-5):
        raise ValueError(
            f"{type(root).__name__} has a router loss of its own ({float(own):.6g} over this rank's tokens, where the "
            f"balance loss is {float(alone):.6g}): it would be of these tokens only; set output_router_logits=False"
        )
    counts, weights, rows = _router_sums(logits, top_k, shard.key.num_tokens)
    group = shard.key.cp_group
    total = sum_over(torch.cat([counts, counts.new_tensor([rows])]), group)
    return experts * (total[:-1] @ weights) / total[-1] ** 2


def _router_sums(logits: list[Tensor], top_k: int, num_tokens: int | None) -> tuple[Tensor, Tensor, float]:
    """(assignments by expert [E], probabilities by expert [E], rows), summed over layers and this rank's tokens."""
    rows = 0.0
    counts, weights = (torch.zeros(logits[0].shape[-1], device=logits[0].device) for _ in range(2))
    for gate in logits:
        probabilities = torch.softmax(gate.flatten(0, -2)[:num_tokens], -1)
        chosen = torch.topk(probabilities, top_k, -1).indices.flatten()
        counts = counts + torch.bincount(chosen, minlength=gate.shape[-1]).float()
        weights = weights + probabilities.float().sum(0)
        rows += probabilities.shape[0]
    return counts, weights, rows


def _top_k(root: Any) -> int:
    config = root.config.get_text_config() if hasattr(root.config, "get_text_config") else root.config
    for holder in (root, config):
        for name in ("num_experts_per_tok", "top_k", "moe_topk", "moe_k"):
            if isinstance(getattr(holder, name, None), int):
                return int(getattr(holder, name))
    raise ValueError(f"{type(root).__name__}: cpattn finds no number of experts per token for its router loss")


def router_coefficient(root: Any) -> float:
    """What the model multiplies the balance loss by."""
    own = getattr(root, "router_aux_loss_coef", None)
    return float(getattr(root.config, "router_aux_loss_coef", 0.0) if own is None else own)


# ----------------------------------------------------------------------------------------------------
# Hidden states.


def gather_hidden_states(outputs: Any, shard: Shard, weight: int) -> None:
    """Bring the hidden states that were asked for together, each [B, S, hidden] on every rank; in place.

    Gradient: for a loss that every rank of the group computes alike, of this rank's tokens, times weight.

    Raises:
        ValueError: one has a shape that is not of the local tokens.
    """
    states = getattr(outputs, "hidden_states", None)
    if isinstance(states, tuple):
        outputs.hidden_states = tuple(_whole(state, shard, weight, number) for number, state in enumerate(states))


def _whole(state: Tensor, shard: Shard, weight: int, number: int) -> Tensor:
    stage = shard.stage
    if stage is not None and tuple(state.shape[:2]) == (stage.rows, stage.columns):
        state = take_rows(state, stage.places)
    if tuple(state.shape[:2]) != (1, shard.num_tokens):
        raise ValueError(
            f"hidden state {number} has shape {tuple(state.shape)}, not of this rank's {shard.num_tokens} tokens"
        )
    whole = shard.share(state[0], weight)
    whole._cpattn_whole = shard  # type: ignore[attr-defined]
    return whole
