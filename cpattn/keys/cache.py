"""Keys by their handles, and by what they were made for.

Custom ops take tensors and numbers, so a key travels as a number in a tensor, its handle.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor

Key = TypeVar("Key")

MAX_CACHED_KEYS = 64

_handles = itertools.count(1)
_keys_by_handle: WeakValueDictionary[int, Any] = WeakValueDictionary()
# One for each group, by its id (its keys hold the group, so the id is not reused while they live). In a common
# one, keys of a group that only some ranks belong to would push out others on those ranks alone; a hit there and
# a miss here would leave ranks waiting in the comparison of a new key.
_caches: dict[int, OrderedDict[Any, Any]] = {}
_cache_lock = threading.Lock()


def new_handle(key: Any) -> Tensor:
    """A tensor by which the key is found as long as it lives."""
    number = next(_handles)
    # The key hangs on the tensor, so that it lives as long as an autograd graph that saved it.
    with torch.inference_mode(False):  # autograd saves it; the key may be made while evaluating
        handle = torch.tensor(number, device="cpu")
    handle.attn_key = key  # type: ignore[attr-defined]
    _keys_by_handle[number] = key
    return handle


def find_by_handle(handle: Tensor) -> Any:
    """The live key with this handle."""
    number = int(handle)
    key = _keys_by_handle.get(number)
    if key is None:
        raise RuntimeError(
            f"attention key {number} no longer exists: keep a reference to the key until backward has run"
        )
    return key


def cached(group: dist.ProcessGroup | None, identity: Any, make: Callable[[], Key]) -> Key:
    """The key of this identity in the group, made if it is not there."""
    with _cache_lock:
        cache = _caches.setdefault(id(group), OrderedDict())
        key: Key | None = cache.get(identity)
        if key is not None:
            cache.move_to_end(identity)
            return key
    key = make()
    with _cache_lock:
        cache = _caches.setdefault(id(group), OrderedDict())
        cache[identity] = key
        while len(cache) > MAX_CACHED_KEYS:
            cache.popitem(last=False)
    return key


def clear_key_cache() -> None:
    """Forget all cached keys (those still referenced go on working)."""
    with _cache_lock:
        _caches.clear()
