"""What is read off a batch and a group of ranks, and compared between ranks, before a batch is shared out."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cpattn.masks.spec import AttnMaskSpec
from cpattn.runtime.agreement import require_agreement, tensor_digest

from .batch_layout import BatchLayout, layout_of_batch, layout_of_spec

TEXT_INPUTS = {"input_ids", "inputs_embeds", "attention_mask", "position_ids"}


def tokens_of(batch: Mapping[str, Any]) -> Tensor:
    """input_ids or inputs_embeds. Raises ValueError where the batch has neither, or an empty one."""
    tokens = batch.get("input_ids", batch.get("inputs_embeds"))
    if not isinstance(tokens, Tensor) or tokens.ndim < 2 or not tokens.shape[:2].numel():
        raise ValueError("the batch needs input_ids [B, S] (or inputs_embeds [B, S, hidden]), B and S at least 1")
    return tokens


def layout_of(
    batch: Mapping[str, Any], tokens: Tensor, spec: AttnMaskSpec | None, cu_seqlens: Tensor | None
) -> BatchLayout:
    """The layout of a batch by its mask, its positions, its prefix sums or its spec."""
    rows, columns = tokens.shape[:2]
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    if spec is not None:
        if mask is not None or cu_seqlens is not None:
            raise ValueError("spec is the whole mask: leave out attention_mask and cu_seq_lens_q")
        return layout_of_spec(rows, columns, spec)
    if positions is not None and positions.ndim == 3:  # multimodal: text positions come first of four
        positions = positions[0] if positions.shape[0] == 4 else None
    return layout_of_batch(rows, columns, attention_mask=mask, positions=positions, cu_seqlens=cu_seqlens)


def last_position(layout: BatchLayout, positions: Tensor | None, numbered_by_layout: bool) -> int:
    """The largest position that eager transformers would see, padding included."""
    if positions is not None:
        return int(positions.max())
    return int(layout.positions().max(initial=0)) if numbered_by_layout else layout.columns - 1


def compare_batch(batch: Mapping[str, Any], group: dist.ProcessGroup | None) -> None:
    """Raise on every rank if the ranks of the group have different batches."""
    if group is None:
        return
    known = (*sorted(TEXT_INPUTS), "labels", "shift_labels")
    fields: dict[str, Any] = {name: _digest(batch.get(name)) for name in known}
    others = sorted(name for name, value in batch.items() if name not in known and isinstance(value, Tensor))
    fields["other tensors"] = [(name, _digest(batch[name])) for name in others]
    require_agreement("the batch of a context-parallel group", fields, group)


def _digest(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return None if value is None else type(value).__name__
    if value.is_floating_point():  # embeddings may differ in the last bit and are large
        return tuple(value.shape)
    return tensor_digest(value)


def process_group(group: Any, flatten: bool = False) -> dist.ProcessGroup | None:
    """The group of a mesh axis (of all axes together with `flatten`); None for a single rank.

    Raises:
        ValueError: there is no process group at all, in one of several processes of torchrun: each would train alone.
            Or this rank is not in the group, or it is something else.
    """
    if group is None:
        if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                f"this is one of {os.environ['WORLD_SIZE']} processes (WORLD_SIZE) and no process group was made: each "
                f"would train alone. Call torch.distributed.init_process_group before ContextParallel"
            )
        return None
    if hasattr(group, "mesh_dim_names"):
        if group.ndim > 1 and flatten:
            whole_world = group.size() == dist.get_world_size()
            group = dist.group.WORLD if whole_world else group._flatten().get_group()
        else:
            group = (group["cp"] if group.ndim > 1 else group).get_group()
    if not isinstance(group, dist.ProcessGroup) or dist.get_rank(group) < 0:
        raise ValueError(
            f"the group is {group!r}, which this rank is not in: pass a ProcessGroup or a mesh's axis, as mesh['cp'], "
            f"that contains this rank, or None for one rank"
        )
    return group if dist.get_world_size(group) > 1 else None


def device_of(group: dist.ProcessGroup | None, model: nn.Module) -> torch.device:
    """Where tensors that the group's collectives take live; the model's device for None."""
    if group is not None and "nccl" in dist.get_backend(group):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu") if group is not None else next(model.parameters()).device
