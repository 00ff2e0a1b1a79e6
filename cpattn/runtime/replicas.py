"""Tensors that every rank of a group should have alike, bit for bit: compared by one digest each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from cpattn.collectives import all_gather

from .agreement import require_agreement

_CHUNK = 1 << 24


class Difference(NamedTuple):
    """Names of the tensors that differ, in their order, and the ranks of the group that do not have rank 0's."""

    names: list[str]
    ranks: list[int]


def require_replicated(tensors: Mapping[str, Tensor], cp_group: dist.ProcessGroup | None) -> None:
    """Check that tensors that should be the same on all ranks of a group are, bit for bit: sinks, weights, buffers.

    Reads every value, so it is for the start of a run, or now and then; call it on all ranks. For a model:
    `require_replicated(dict(model.named_parameters()), group)`.

    Args:
        tensors: by name; on any device.
        cp_group: None or a group of one compares nothing.

    Raises:
        ValueError: names the first that differs, and the ranks; or names, shapes or dtypes differ.
    """
    names, ranks = differing("require_replicated", {name: tensors[name] for name in sorted(tensors)}, cp_group)
    if names:
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        raise ValueError(
            f"require_replicated: {names[0]} differs between ranks{more}: ranks {ranks} of the group do not have rank "
            f"0's values"
        )


def differing(what: str, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> Difference:
    """Which tensors differ between the ranks of a group; all ranks get the same answer.

    Args:
        what: what is compared, for the message.

    Raises:
        ValueError: names, order, shapes or dtypes differ.
    """
    if group is None or dist.get_world_size(group) == 1:
        return Difference([], [])
    shapes = [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in tensors.items()]
    require_agreement(what, {"names and shapes of the tensors": shapes}, group)
    if not tensors:
        return Difference([], [])
    device = torch.device("cuda") if "nccl" in dist.get_backend(group) else torch.device("cpu")
    mine = torch.stack([_digest(tensor.detach()).to(device) for tensor in tensors.values()])
    everyone = all_gather(mine, group).view(-1, len(tensors))
    differs = (everyone != everyone[0]).cpu()
    names = [name for name, differ in zip(tensors, differs.any(0).tolist(), strict=True) if differ]
    return Difference(names, differs.any(1).nonzero().flatten().tolist())


def _digest(tensor: Tensor) -> Tensor:
    """int64 scalar: the tensor's bytes as words, each times an odd number of its place, summed modulo 2**64."""
    flat = tensor.contiguous().flatten().view(torch.uint8)
    words = flat.view(torch.int32) if flat.numel() % 4 == 0 else flat
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, words.numel(), _CHUNK):
        part = words[start : start + _CHUNK].to(torch.int64)
        places = torch.arange(start, start + part.numel(), device=tensor.device)
        total += (part * (places * 0x9E3779B1 | 1)).sum()
    return total
