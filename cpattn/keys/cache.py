"""Keys by their handles, and by what they were made for.

Custom ops take tensors and numbers, so a key travels as a number in a tensor, its handle.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from cpattn.runtime.fastest import forget_choices

Key = TypeVar("Key")


class _Cache(NamedTuple):
    """The keys of a group by what they were made for, oldest first."""

    group: dist.ProcessGroup | None
    keys: dict[Any, Any]


MAX_CACHED_KEYS = 64

_keys_by_handle: WeakValueDictionary[int, Any] = WeakValueDictionary()
# One for each group, by its id (its keys hold the group, so the id is not reused while they live). In a common
# one, keys of a group that only some ranks belong to would push out others on those ranks alone; a hit there and
# a miss here would leave ranks waiting in the comparison of a new key. For the same reason a hit changes nothing:
# keys go in the order in which they were made, which is the same on all ranks.
_caches: dict[int, _Cache] = {}
_cache_lock = threading.Lock()


def new_handle(key: Any) -> Tensor:
    """A tensor by which the key is found as long as it lives."""
    # Random, since graphs that are exported, compiled or saved hold the number: loaded elsewhere, they must find no key
    # rather than another one.
    number = secrets.randbits(63)
    # The key hangs on the tensor, so that it lives as long as an autograd graph that saved it.
    with torch.inference_mode(False):  # autograd saves it; the key may be made while evaluating
        handle = torch.tensor(number, device="cpu")
    handle.attn_key = key  # type: ignore[attr-defined]
    # What torch asks for the attributes that go into a file with a tensor: hooks that put saved tensors on disk save
    # the number, and the key is found by it.
    handle.__getstate__ = dict  # type: ignore[method-assign]
    _keys_by_handle[number] = key
    return handle


def find_by_handle(handle: Tensor) -> Any:
    """The live key with this handle."""
    number = int(handle)
    key = _keys_by_handle.get(number)
    if key is None:
        raise RuntimeError(
            f"attention key {number} does not exist here: keep a reference to the key until backward has run; a key "
            f"belongs to its process, so what torch.export saves runs only where and as long as its key lives"
        )
    return key


def cached(group: dist.ProcessGroup | None, identity: Any, make: Callable[[], Key]) -> Key:
    """The key of this identity in the group, made if it is not there."""
    with _cache_lock:
        _let_go_of_destroyed_groups()
        known = _caches.setdefault(id(group), _Cache(group, {})).keys
        key: Key | None = known.get(identity)
    if key is not None:
        return key
    key = make()
    with _cache_lock:
        known = _caches.setdefault(id(group), _Cache(group, {})).keys
        known[identity] = key
        while len(known) > MAX_CACHED_KEYS:
            del known[next(iter(known))]
    return key


def _let_go_of_destroyed_groups() -> None:
    """A group that was destroyed keeps sockets and threads as long as something holds it."""
    alive = dist.distributed_c10d._world.pg_map if dist.is_initialized() else {}
    for number, cache in list(_caches.items()):
        if cache.group is not None and cache.group not in alive:
            del _caches[number]


def clear_key_cache() -> None:
    """Forget all cached keys and what "fastest" chose, and let go of their groups; keys in use go on working.

    Call it on all ranks of a group, or on none: otherwise some would make a key anew, and the others find it here.
    Keys of a group that was destroyed are forgotten without it, when the next key is made.
    """
    with _cache_lock:
        _caches.clear()
    forget_choices()
