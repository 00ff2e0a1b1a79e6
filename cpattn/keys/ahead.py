"""Keys made, and bound to a device, before their turn."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch

from cpattn.masks.reading import read_int
from cpattn.planning.ready import ReadyPlan

from .key import AttnKey

Item = TypeVar("Item")


def keys_ahead(
    plans: Iterable[tuple[Item, ReadyPlan]],
    make: Callable[[Item, ReadyPlan], AttnKey],
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    depth: int = 1,
) -> Iterator[tuple[Item, AttnKey]]:
    """Items with their keys, `depth` items ahead made from their plans and bound to a device.

    In the caller's thread, when the next item is asked for: on CUDA the step before runs meanwhile, and what is bound
    travels by one copy that the host does not wait for. All ranks of the keys' group iterate alike.

    Args:
        plans: as `plan_ahead` yields them.
        make: the key of an item; `make_key` with `plan=` the plan.
        device, dtype: of the tensors that the keys will be used with; softcap is bound at the first call.
        depth: keys that are ready beside the one in use, at least 1.

    Raises:
        ValueError: depth is below 1; at once.
    """
    return _keys_ahead(iter(plans), make, torch.device(device), dtype, read_int("depth", depth))


def _keys_ahead(
    plans: Iterator[tuple[Item, ReadyPlan]],
    make: Callable[[Item, ReadyPlan], AttnKey],
    device: torch.device,
    dtype: torch.dtype,
    depth: int,
) -> Iterator[tuple[Item, AttnKey]]:
    waiting: deque[tuple[Item, AttnKey]] = deque()
    for item, ready in plans:
        key = make(item, ready)
        key.prepare(device, dtype)
        waiting.append((item, key))
        if len(waiting) > depth:
            yield waiting.popleft()
    yield from waiting
