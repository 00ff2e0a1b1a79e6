"""Ranks compare what they are about to do, so that a difference is an error and not a hang."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cpattn.collectives import all_gather
from cpattn.collectives import control_device as control_device


def require_agreement(what: str, fields: Mapping[str, Any], group: dist.ProcessGroup | None) -> None:
    """Raise on every rank of the group if any field differs between ranks; one small all-gather.

    Args:
        what: what is being compared, for the message.
        fields: values with a faithful `repr`; the same names on all ranks.
        group: the ranks; None or a group of one compares nothing.

    Raises:
        ValueError: names the field, the ranks that differ from rank 0 of the group, and the value
            here.
    """
    if group is None or dist.get_world_size(group) == 1:
        return
    mine = torch.tensor([_digest(value) for value in fields.values()], dtype=torch.int64, device=control_device(group))
    everyone = all_gather(mine, group)
    differs = (everyone.view(-1, len(fields)) != everyone[: len(fields)]).cpu()
    for column, (name, value) in enumerate(fields.items()):
        ranks = differs[:, column].nonzero().flatten().tolist()
        if ranks:
            raise ValueError(
                f"{what}: {name} differs between ranks: ranks {ranks} of the group do not have what "
                f"rank 0 has; rank {dist.get_rank(group)} has {_shortened(value)}. All ranks of a "
                f"context-parallel group must pass the same {name}"
            )


def tensor_digest(tensor: Tensor) -> tuple[tuple[int, ...], str]:
    """Shape and a hash of the values: what ranks compare of data."""
    data = tensor.detach().cpu().contiguous().numpy().tobytes()
    return tuple(tensor.shape), hashlib.blake2b(data, digest_size=8).hexdigest()


def _digest(value: Any) -> int:
    digest = hashlib.blake2b(repr(value).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:197] + "..."
