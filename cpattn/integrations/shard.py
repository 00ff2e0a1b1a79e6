"""What travels through a model: this rank's part of a batch, on the mask in whose place it is handed on."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cpattn.keys.key import AttnKey
from cpattn.ops.layout import undispatch

from .batch_layout import BatchLayout, MaskTerm
from .hf_model import layers_that_mix


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
        local = all_positions[local_tokens(self.key, self.index.device)]
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
        token = active_shard.set(self)
        self.num_layers_run = 0
        try:
            yield self
        finally:
            active_shard.reset(token)
        expected = 1 if self.decoder is None else layers_that_mix(self.decoder)
        if self.num_layers_run < expected:
            raise RuntimeError(
                f"{self.num_layers_run} of {expected} layers that mix tokens ran under context parallelism: the "
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
                local[name] = self.local_positions(value)
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
            local["attention_mask"] = self.local_mask()
        elif not all(isinstance(m, LayerMask) for m in (mask.values() if isinstance(mask, dict) else [mask])):
            raise ValueError(f"{type(decoder).__name__} gets masks that cpattn did not make: {mask!r}")
        if visual is not None:
            local["visual_pos_masks"] = self.take(visual)
            number = (visual.flatten().cumsum(0) - 1)[self.index.to(visual.device)]
            mine = number[local["visual_pos_masks"][0]]
            local["deepstack_visual_embeds"] = [e.index_select(0, mine) for e in deepstack or []] or deepstack
        return local

    def local_positions(self, positions: Tensor) -> Tensor:
        """[B, S], [1, S] or [3 or 4, B, S] positions of the local tokens."""
        rows, columns = self.layout.rows, self.layout.columns
        return self.take(positions.expand(*positions.shape[:-2], rows, columns), positions.ndim - 2)

    def local_mask(self) -> ShardedMask:
        return ShardedMask.of(self.index.new_ones(1, self.num_tokens), self)


def split_at_decoder(decoder: nn.Module) -> None:
    """Make a language model take its shard of inputs that are those of a whole batch. Idempotent.

    The hook finds the shard in the attention mask; inputs without one pass as they are.
    """
    if not getattr(decoder, "_cpattn_splits", False):
        decoder.register_forward_pre_hook(_split_decoder_inputs, with_kwargs=True)
        decoder._cpattn_splits = True  # type: ignore[assignment]


def _split_decoder_inputs(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    shard = shard_of(kwargs.get("attention_mask"))
    if shard is None or not shard.splits_embeddings:
        return None
    if args:
        raise ValueError(f"{type(decoder).__name__} was called with positional arguments: names are needed")
    return (), shard.decoder_inputs(decoder, kwargs)


def shard_of(mask: Any) -> Shard | None:
    if isinstance(mask, dict):
        mask = next(iter(mask.values()), None)
    return getattr(mask, "shard", None)


active_shard: contextvars.ContextVar[Shard | None] = contextvars.ContextVar("cpattn_shard", default=None)


def local_tokens(key: AttnKey, device: torch.device) -> Tensor:
    return torch.from_numpy(key.q_placement.tokens_of(key.cp_rank)).to(device)
