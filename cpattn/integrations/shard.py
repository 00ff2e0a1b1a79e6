"""What travels through a model: this rank's part of a batch, on the mask in whose place it is handed on."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

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

    Planned when a layer first uses it: models ask for masks of every kind, also of those that none of their layers has.
    Not a dataclass: FSDP2 searches those that it finds among a layer's inputs for tensors.
    """

    __slots__ = ("_planned", "shard", "terms")

    def __init__(self, terms: tuple[MaskTerm, ...], shard: Shard) -> None:
        self.terms, self.shard = terms, shard
        self._planned: tuple[AttnKey, tuple[int | None, int | None] | None] | None = None

    @classmethod
    def over(cls, shard: Shard) -> LayerMask:
        """The shard's own key, for layers that take no mask but its documents."""
        mask = cls((), shard)
        mask._planned = shard.key, None
        return mask

    def _plan(self) -> tuple[AttnKey, tuple[int | None, int | None] | None]:
        if self._planned is None:
            spec, window = self.shard.layout.plan_of(self.terms)
            self._planned = self.shard.key.with_mask(spec, window=window), window
        return self._planned

    @property
    def key(self) -> AttnKey:
        """The key. Raises ValueError where the terms are none that cpattn can express."""
        return self._plan()[0]

    @property
    def window(self) -> tuple[int | None, int | None] | None:
        """(left, right) of the window, None where there is none."""
        return self._plan()[1]


Cut = Literal["inputs", "decoder", "layers"]


class Stage(NamedTuple):
    """A [rows, columns] batch of which `places` (int64 [L]) are this rank's."""

    rows: int
    columns: int
    places: Tensor


@dataclass(eq=False)
class Shard:
    """This rank's part of a batch. Made by `ContextParallel.shard`.

    Attributes:
        key: the key whose placement the shard has.
        layout: which tokens of the batch are in the sequence that is shared out.
        index: int64 [L], for each local token its place row * columns + column in the batch. A rank that
            got no token has one stand-in all the same (models cannot run on none), without a target; it
            takes no part in attention and in `gather`.
        cut: where the batch is cut down to this rank's tokens: at the model's inputs, where its decoder begins
            (towers of other modalities place features by token), or where the decoder's layers begin (for models
            whose positions cannot be passed in: their embeddings run over the whole batch).
        stage: the batch as the model gets it, where it is cut later than at the inputs.
        last_position: the largest position of the whole batch: some RoPE takes its frequencies from it.
        order: int64 [T], for the placement probe: the order in which a single rank has the tokens; else None.
        inputs: what to call the model with, under `active()`.
        targets: int64 [1, L], next-token targets of the local tokens (-100: none); None without labels.
    """

    key: AttnKey
    layout: BatchLayout
    index: Tensor
    inputs: dict[str, Any] = field(default_factory=dict)
    targets: Tensor | None = None
    decoder: nn.Module | None = None
    cut: Cut = "inputs"
    stage: Stage | None = None
    last_position: int = 0
    order: Tensor | None = None
    num_layers_run: int = 0
    _masks: dict[tuple[MaskTerm, ...], LayerMask] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """L: local tokens, at least one."""
        return self.index.numel()

    @property
    def positions(self) -> Tensor:
        """int64 [L], positions of the local tokens in their documents: columns, in a padded batch; 0 of stand-ins."""
        all_positions = torch.from_numpy(self.layout.positions()).to(self.index.device)
        local = all_positions[local_tokens(self.key, self.index.device, self.order)]
        return F.pad(local, (0, self.num_tokens - len(local)))

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
        return take_rows(x, self.index, dim)

    def gather(self, x_local: Tensor, fill_value: float = 0.0) -> Tensor:
        """The whole tensor on every rank, in the batch's own order; for evaluation and generation.

        Args:
            x_local: [1, L, ...], values of this rank's tokens (logits, losses). Hidden states of a call of
                ContextParallel are whole already, and come back as they are.
            fill_value: what padding gets.

        Returns:
            [B, S, ...]. Gradient: as of `cpattn.undispatch`.
        """
        if getattr(x_local, "_cpattn_whole", None) is self:
            return x_local.view_as(x_local)  # without the mark, which holds the shard: it can be sent on
        if x_local.shape[:2] != (1, self.num_tokens):
            raise ValueError(
                f"gather: the tensor has shape {tuple(x_local.shape)}, expected (1, {self.num_tokens}, ...): this "
                f"rank's tokens (logits under logits_to_keep are whole on every rank already)"
            )
        whole = undispatch(self.in_key_order(x_local[0, : self.key.num_tokens]), self.key)
        layout = self.layout
        out = whole.new_full((layout.rows * layout.columns, *whole.shape[1:]), fill_value)
        out = out.index_copy(0, layout.index_on(whole.device), whole)
        return out.unflatten(0, (layout.rows, layout.columns))

    def share(self, local: Tensor, weight: int) -> Tensor:
        """Rows of this rank's tokens, [L, ...], as [B, S, ...] on every rank; padding is zero.

        Gradient: for a loss that every rank of the group computes alike, of this rank's rows, times weight.
        """
        count, layout = self.key.num_tokens, self.layout
        places = self.index[:count].to(local.device)
        total = layout.rows * layout.columns
        whole: Tensor = ShareRows.apply(local[:count], places, total, self.key.cp_group, weight)
        return whole.unflatten(0, (layout.rows, layout.columns))

    def in_key_order(self, x: Tensor) -> Tensor:
        """[T, ...] rows of a shuffled shard as the key has them; others as they are."""
        return x if self.order is None else x.index_select(0, torch.argsort(self.order))

    def in_own_order(self, x: Tensor) -> Tensor:
        """The inverse of `in_key_order`."""
        return x if self.order is None else x.index_select(0, self.order)

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
        return self._masks.setdefault(terms, LayerMask(terms, self))

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
        refuse_cache(local)
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
        """What the model gets for a mask where it gets local tokens: all ones, with the shard on it."""
        return ShardedMask.of(self.index.new_ones(1, self.num_tokens), self)


class ParallelOutput(NamedTuple):
    """What a call returns.

    loss: scalar, the same on all ranks; None without labels.
    logits: [1, L, V] of this rank's tokens; under logits_to_keep [B, k, V], of a sequence classification head [B, C],
    both whole on every rank.
    outputs: all that the model returned; hidden states that were asked for are whole, [B, S, hidden].
    shard: to gather with.
    """

    loss: Tensor | None
    logits: Tensor
    outputs: Any
    shard: Shard


def shard_of(mask: Any) -> Shard | None:
    """The shard that a mask (or a dict of masks) belongs to."""
    if isinstance(mask, dict):
        mask = next(iter(mask.values()), None)
    return getattr(mask, "shard", None)


active_shard: contextvars.ContextVar[Shard | None] = contextvars.ContextVar("cpattn_shard", default=None)


def local_tokens(key: AttnKey, device: torch.device, order: Tensor | None = None) -> Tensor:
    """int64, this rank's tokens of the sequence; in another order where one is given."""
    tokens = torch.from_numpy(key.q_placement.tokens_of(key.cp_rank)).to(device)
    return tokens if order is None else tokens[order.to(device)]


def refuse_cache(inputs: Mapping[str, Any]) -> None:
    """Raise where inputs hold a key-value cache, under either of the names that transformers has for it."""
    for name in ("past_key_values", "cache"):
        if inputs.get(name) is not None:
            raise ValueError(f"{name}: a key-value cache is not supported under context parallelism")


def sum_over(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum over the ranks of a group, in place; x itself for None."""
    if group is not None:
        dist.all_reduce(x, group=group)
    return x


class ShareRows(torch.autograd.Function):
    """Rows that each rank has some of, whole on every rank; each rank's gradient is that of its rows."""

    @staticmethod
    def forward(
        ctx: Any, local: Tensor, which: Tensor, total: int, group: dist.ProcessGroup | None, weight: int
    ) -> Tensor:
        """local [n, ...] are rows `which` of [total, ...]; weight multiplies the gradient."""
        ctx.save_for_backward(which)
        ctx.weight = weight
        return sum_over(local.new_zeros(total, *local.shape[1:]).index_copy(0, which, local), group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (which,) = ctx.saved_tensors
        return grad.index_select(0, which) * ctx.weight, None, None, None, None


def take_rows(x: Tensor, index: Tensor, dim: int = 0) -> Tensor:
    """[..., 1, L, ...]: places row * columns + column of the rows and columns at dims dim and dim + 1."""
    return x.flatten(dim, dim + 1).index_select(dim, index.to(x.device)).unsqueeze(dim)
