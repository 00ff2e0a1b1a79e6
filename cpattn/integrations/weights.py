"""Ranks that share a batch must have the same weights: compared once, by digests, or made equal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from cpattn.runtime.agreement import require_agreement
from cpattn.runtime.replicas import differing


def require_equal_weights(model: nn.Module, group: dist.ProcessGroup | None, *, broadcast: bool = False) -> None:
    """Compare the parameters and buffers over the group, or give every rank those of its rank 0.

    Sharded ones (DTensors over ranks of the group, flat parameters of FSDP1) and those on the meta device are left out:
    they are parts of one whole, or have no values yet.

    Raises:
        ValueError: names the tensors that differ, and the ranks.
    """
    if group is None or dist.get_world_size(group) == 1:
        return
    held = dict(_replicated(model, group))
    if broadcast:
        shapes = [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in held.items()]
        require_agreement("the model of a context-parallel group", {"names and shapes of its weights": shapes}, group)
        for tensor in held.values():
            dist.broadcast(tensor, dist.get_global_rank(group, 0), group=group)
        return
    names, ranks = differing("the model of a context-parallel group", held, group)
    if names:
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise ValueError(
            f"ranks {ranks} of the group do not have rank 0's weights: {len(names)} of {len(held)} differ ({shown}). "
            f"Build the model with one seed on all ranks, load the same checkpoint, or pass broadcast=True to take "
            f"rank 0's"
        )


def _replicated(model: nn.Module, group: dist.ProcessGroup) -> Iterator[tuple[str, Tensor]]:
    """Tensors of which every rank of the group has all, or the same part."""
    ranks = set(dist.get_process_group_ranks(group))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        values: Any = tensor.detach()
        if tensor.is_meta or type(tensor).__name__ == "FlatParameter":
            continue
        if hasattr(values, "device_mesh"):
            if len(ranks & set(values.device_mesh.mesh.flatten().tolist())) > 1:
                continue
            values = values.to_local()
        yield name, values
