"""Where a model that gets the whole batch is cut down to this rank's tokens: at its decoder, or at its layers.

Most models get this rank's tokens and their positions at their inputs, and need none of this but the last part: what
depends on the whole batch's positions besides (`_with_longest`). The others:

- Towers of other modalities place features by token: the cut is where the decoder begins.
- Models that number their tokens themselves (learned positions without `position_ids`, positions counted from the
  mask): their embeddings run over the whole batch, and the cut is where the first layer begins.
"""

from __future__ import annotations

import contextvars
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .shard import LayerMask, Shard, ShardedMask, Stage, active_shard, local_tokens, shard_of, take_rows

_last_position: contextvars.ContextVar[int | None] = contextvars.ContextVar("cpattn_last_position", default=None)


def split_at_decoder(decoder: nn.Module) -> None:
    """Make a language model take its shard of what is of the whole batch. Idempotent.

    The hooks find the shard in the attention mask; inputs without one pass as they are.
    """
    if getattr(decoder, "_cpattn_splits", False):
        return
    decoder.register_forward_pre_hook(_enter_decoder, with_kwargs=True)
    decoder.register_forward_hook(_leave_decoder, always_call=True)
    for module in decoder.modules():
        if hasattr(module, "rope_type"):
            module.register_forward_pre_hook(_append_longest, with_kwargs=True)
            module.register_forward_hook(_drop_longest)
    for number, layer in enumerate(layers_of(decoder)):
        layer.register_forward_pre_hook(_first_layer_cut if number == 0 else _layer_cut, with_kwargs=True)
    decoder._cpattn_splits = True  # type: ignore[assignment]


def layers_of(decoder: nn.Module) -> list[nn.Module]:
    """The decoder's layers: its outermost list of modules with as many as the config says, or else the longest."""
    lists = [m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m)]
    depth = getattr(getattr(decoder, "config", None), "num_hidden_layers", 0)
    exact = [m for m in lists if len(m) == depth]
    return list(exact[0] if exact else max(lists, key=len, default=[]))


def _enter_decoder(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    shard = shard_of(kwargs.get("attention_mask"))
    _last_position.set(None if shard is None or shard.cut == "layers" else shard.last_position)
    if shard is None or shard.cut != "decoder":
        return None
    if args:
        raise ValueError(f"{type(decoder).__name__} was called with positional arguments: names are needed")
    return (), shard.decoder_inputs(decoder, kwargs)


def _leave_decoder(decoder: nn.Module, args: Any, output: Any) -> None:
    _last_position.set(None)


# ----------------------------------------------------------------------------------------------------
# RoPE whose frequencies follow the longest position ("dynamic", "longrope"): that of the whole batch.


def _append_longest(rope: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Append the largest position to those at hand: transformers takes the frequencies from their maximum."""
    last = _last_position.get()
    rope._cpattn_appended = last is not None and _follows_longest(rope)  # type: ignore[assignment]
    if not rope._cpattn_appended:
        return None
    named = "position_ids" in kwargs
    positions = kwargs["position_ids"] if named else args[1]
    longer = torch.cat([positions, positions.new_full((*positions.shape[:-1], 1), last)], -1)
    if named:
        return args, {**kwargs, "position_ids": longer}
    return (args[0], longer, *args[2:]), kwargs


def _drop_longest(rope: nn.Module, args: Any, output: Any) -> Any:
    if not rope._cpattn_appended:
        return None
    if isinstance(output, Tensor):
        return output[..., :-1, :]
    return tuple(part[..., :-1, :] for part in output)


def _follows_longest(rope: nn.Module) -> bool:
    kind: Any = rope.rope_type
    kinds = kind.values() if isinstance(kind, Mapping) else [kind]
    return any("dynamic" in str(k) or "longrope" in str(k) for k in kinds)


# ----------------------------------------------------------------------------------------------------
# The cut at the layers.


def _first_layer_cut(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    shard = _layer_shard(args, kwargs)
    if shard is None:
        return None
    return tuple(_cut(a, shard) for a in args), {name: _cut(value, shard) for name, value in kwargs.items()}


def _layer_cut(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """As the first layer's, but for the hidden states, which are this rank's by now."""
    shard = _layer_shard(args, kwargs)
    if shard is None:
        return None
    named = {name: value if name == "hidden_states" else _cut(value, shard) for name, value in kwargs.items()}
    return (*args[:1], *(_cut(a, shard) for a in args[1:])), named


def _layer_shard(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Shard | None:
    """The shard that a layer's inputs are to be cut to; None where they are not."""
    masks = [value for value in (*args, *kwargs.values()) if isinstance(value, (LayerMask, dict))]
    found = next(filter(None, map(shard_of, masks)), None) or active_shard.get()
    return found if found is not None and found.cut == "layers" else None


def _cut(value: Any, shard: Shard) -> Any:
    """This rank's tokens of a tensor [B or 1, S, ...], also within tuples; anything else as it is."""
    stage = shard.stage
    assert stage is not None
    if isinstance(value, tuple):
        return tuple(_cut(part, shard) for part in value)
    if not isinstance(value, Tensor) or value.ndim < 2 or value.shape[1] != stage.columns:
        return value
    if value.shape[0] not in (1, stage.rows):
        return value
    return take_rows(value.expand(stage.rows, *value.shape[1:]), stage.places)


def stage_inputs(
    inputs: dict[str, Any], shard: Shard, *, takes_positions: bool, pad: int
) -> tuple[Stage, dict[str, Any]]:
    """The whole batch as a model gets it whose cut is at the layers, and where this rank's tokens are in it.

    A model that takes no positions gets packed documents one to a row, as it would number them by themselves.

    Raises:
        ValueError: the positions are those of a tree, and the model takes none.
    """
    layout, device = shard.layout, shard.index.device
    inputs = dict(inputs)
    positions = inputs.pop("position_ids", None)
    real = torch.zeros(layout.rows * layout.columns, dtype=torch.long, device=device)
    real[layout.index_on(device)] = 1
    packed = len(layout.texts) > layout.rows or layout.explicit
    if packed and not takes_positions:
        if layout.explicit:
            raise ValueError("the model numbers its tokens itself: it takes no mask that is given whole, nor a spec")
        return _one_document_a_row(inputs, shard, pad)
    if positions is not None and takes_positions:
        inputs["position_ids"] = positions
    elif packed:
        numbers = torch.zeros_like(real).index_copy(
            0, layout.index_on(device), torch.from_numpy(layout.positions()).to(device)
        )
        inputs["position_ids"] = numbers.view(layout.rows, layout.columns)
    mask = inputs.get("attention_mask")
    whole = real.view(layout.rows, layout.columns) if mask is None or mask.ndim != 2 else mask
    inputs["attention_mask"] = ShardedMask.of(whole, shard)
    return Stage(layout.rows, layout.columns, shard.index), inputs


def _one_document_a_row(inputs: dict[str, Any], shard: Shard, pad: int) -> tuple[Stage, dict[str, Any]]:
    layout, device = shard.layout, shard.index.device
    starts = np.array([start for start, _ in layout.texts], dtype=np.int64)
    lengths = np.diff([*starts.tolist(), layout.num_tokens])
    row = np.repeat(np.arange(len(starts)), lengths)
    column = layout.index - layout.index[starts][row]
    columns = int(column.max(initial=0)) + 1
    places = torch.from_numpy(row * columns + column).to(device)
    for name, fill in (("input_ids", pad), ("inputs_embeds", 0)):
        if inputs.get(name) is not None:
            flat = inputs[name].flatten(0, 1)
            rows = flat.new_full((len(starts) * columns, *flat.shape[1:]), fill)
            taken = flat.index_select(0, layout.index_on(device))
            inputs[name] = rows.index_copy(0, places, taken).unflatten(0, (len(starts), columns))
    mask = torch.zeros(len(starts) * columns, dtype=torch.long, device=device).index_fill(0, places, 1)
    inputs["attention_mask"] = ShardedMask.of(mask.view(len(starts), columns), shard)
    tokens = local_tokens(shard.key, device, shard.order)
    index = places[tokens] if len(tokens) else places.new_zeros(1)
    return Stage(len(starts), columns, index), inputs
