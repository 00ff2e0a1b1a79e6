"""Rows of several sequences through a transformers model, attending by a function of the caller's.

For generation: the model gets all rows as one row of a batch. Each attention layer hands its q, k and v, with what it
asks for, to the function; which of its keys a query sees is what transformers says of the layer's mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .batch_layout import MaskTerm
from .hf_model import base_model, language_model, layers_that_mix, takes
from .shard import Cut, ShardedMask, active_shard


class Attended(NamedTuple):
    """A layer's call of attention.

    query [n, heads, dim], key and value [n, kv heads, dim] of the n rows; terms: the layer's mask.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    terms: tuple[MaskTerm, ...]
    softmax_scale: float | None
    softcap: float | None
    sink: Tensor | None


RowFunction = Callable[[Attended], Tensor]


class RowMask:
    """The mask of one kind of layer, over rows."""

    __slots__ = ("shard", "terms")

    def __init__(self, terms: tuple[MaskTerm, ...], shard: RowShard) -> None:
        self.terms, self.shard = terms, shard

    @property
    def left(self) -> int | None:
        """Keys that a query sees before its own; None: all."""
        return self.terms[0].left if len(self.terms) == 1 else None

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, softcap: float | None, sink: Any
    ) -> Tensor:
        """Tensors [1, heads, rows, dim] as transformers has them; the output is [1, rows, heads, dim]."""
        rows, n = self.shard, self.shard.num_rows
        q, k, v = (t[0].transpose(0, 1)[:n] for t in (query, key, value))
        rows.num_layers_run += 1
        out = rows.function(Attended(q, k, v, self.terms, scale, softcap, sink))
        stand_in = query.shape[2] - n
        return torch.cat([out, out.new_zeros(stand_in, *out.shape[1:])]).unsqueeze(0)


class RowShard:
    """What stands in the place of a `Shard` while rows run through a model.

    Attributes:
        positions: int64 [rows, at least 1]: the stand-in's where there is no row, since models cannot run on none.
        last_position: the largest position of the whole batch, on whatever rank.
        longest_text: tokens of the longest sequence so far.
    """

    cut: Cut = "inputs"

    def __init__(self, decoder: nn.Module, positions: Tensor, last_position: int, function: RowFunction) -> None:
        self.decoder, self.function = decoder, function
        self.num_rows, self.num_layers_run = len(positions), 0
        self.positions = positions if len(positions) else positions.new_zeros(1)
        self.last_position, self.longest_text = last_position, last_position + 1

    def mask(self, terms: tuple[MaskTerm, ...]) -> RowMask:
        """The mask of a kind of layer."""
        return RowMask(terms, self)


def run_rows(
    model: nn.Module,
    tokens: Tensor,
    positions: Tensor,
    function: RowFunction,
    *,
    last_position: int,
    keep: Tensor | None = None,
) -> Tensor:
    """Logits [rows, vocab] of tokens at positions, int64 [rows] each; with keep, int64 [n], of those rows only.

    Raises:
        RuntimeError: layers that mix tokens did not attend through transformers' interface.
    """
    root = base_model(model)
    rows = RowShard(language_model(model), positions, last_position, function)
    given = tokens if len(tokens) else tokens.new_zeros(1)
    mask = ShardedMask.of(torch.ones(1, len(given), dtype=torch.long, device=given.device), rows)  # type: ignore[arg-type]
    kept: dict[str, Any] = {"logits_to_keep": keep} if keep is not None and takes(root, "logits_to_keep") else {}
    token = active_shard.set(rows)  # type: ignore[arg-type]
    try:
        inputs = {"input_ids": given[None], "position_ids": rows.positions[None], "attention_mask": mask}
        logits = model(**inputs, use_cache=False, **kept).logits
    finally:
        active_shard.reset(token)
    expected = layers_that_mix(rows.decoder)
    if rows.num_layers_run < expected:
        raise RuntimeError(f"{rows.num_layers_run} of {expected} layers attended through transformers' interface")
    logits = logits.full_tensor() if hasattr(logits, "full_tensor") else logits
    logits = logits[0] if kept else logits[0, : rows.num_rows]
    return logits if keep is None or kept else logits[keep]  # type: ignore[no-any-return]
