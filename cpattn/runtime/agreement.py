"""Ranks compare what they are about to do, so that a difference is an error and not a hang."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .identity import Saying, calls_of


def require_agreement(what: str, fields: Mapping[str, Any], group: dist.ProcessGroup | None) -> None:
    """Raise on every rank of the group if any field differs between ranks; each tells the others once.

    Args:
        what: what is being compared, for the message.
        fields: values with a faithful `repr`; the same names on all ranks.
        group: the ranks; None or a group of one compares nothing.

    Raises:
        ValueError: names the field, the ranks that differ from rank 0 of the group, and both values.
        LostRankError: a rank did not come.
    """
    if group is not None and dist.get_world_size(group) > 1:
        with calls_of(group).passing(Saying.of(what, fields)):
            pass


def tensor_digest(tensor: Tensor) -> tuple[tuple[int, ...], str]:
    """Shape and a hash of the values: what ranks compare of data."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return tuple(tensor.shape), hashlib.blake2b(data.data, digest_size=8).hexdigest()
