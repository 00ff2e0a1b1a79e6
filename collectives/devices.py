"""Which backend of a group serves which device, and how small arrays get there without the host waiting."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def backend_of(group: dist.ProcessGroup, device_type: str) -> str:
    """The backend that moves tensors of a device type, such as "nccl"; "" where the group has none.

    `dist.get_backend` does not tell: it says "undefined" after `init_process_group()` without a backend, and the whole
    of "cpu:gloo,cuda:nccl" after that.
    """
    pairs = (entry.split(":", 1) for entry in dist.get_backend_config(group).split(","))
    return dict(pair for pair in pairs if len(pair) == 2).get(device_type, "")


def control_device(group: dist.ProcessGroup) -> torch.device:
    """Where ranks put the few numbers that they compare: the CPU if the group serves it, else the current GPU."""
    if backend_of(group, "cpu"):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def current_device(device: torch.device) -> AbstractContextManager[object]:
    """The device as CUDA's current one: Triton, cuDNN and TransformerEngine launch there, wherever tensors are."""
    if device.type != "cuda" or not torch.cuda.is_available():  # or tensors without data
        return nullcontext()
    return torch.cuda.device(device)


def define_launches(launches: Iterable[tuple[str, str, Callable[..., None]]]) -> torch.library.Library:
    """Operators `cpattn::name(arguments) -> ()` that launch a kernel and nothing else; the library must be kept.

    The first argument is a tensor of the device that it runs on, or several. Nothing happens on tensors without data.
    """
    library = torch.library.Library("cpattn", "FRAGMENT")
    for name, arguments, launch in launches:
        library.define(f"{name}({arguments}) -> ()")
        for device in ("CPU", "CUDA"):
            library.impl(name, _on_its_device(launch), device)
        library.impl(name, lambda *_: None, "Meta")
    return library


def _on_its_device(launch: Callable[..., None]) -> Callable[..., None]:
    @wraps(launch)
    def launch_there(*args: Any) -> None:
        first: Tensor = args[0] if isinstance(args[0], Tensor) else args[0][0]
        with current_device(first.device):
            launch(*args)

    return launch_there


class _Under(threading.local):
    """What `put_on` has given out in this thread and `one_copy` has yet to fill: pairs (host, device)."""

    pairs: list[tuple[Tensor, Tensor]] | None = None


_under = _Under()
_ALIGN = 16


def put_on(device: torch.device, host: Tensor) -> Tensor:
    """A CPU tensor on a device; the host does not wait. Inside `one_copy` it is filled when that ends."""
    if device.type != "cuda":
        return host.to(device)
    if _under.pairs is None:
        return _pinned(host.nbytes, host).to(device, non_blocking=True)
    target = torch.empty(host.shape, dtype=host.dtype, device=device)
    _under.pairs.append((host, target))
    return target


@contextmanager
def one_copy(device: torch.device) -> Iterator[None]:
    """Fill all that `put_on` gives out within by one copy from pinned memory, then one launch that hands it out.

    Until the end it holds anything, so nothing may be computed of it within.
    """
    if device.type != "cuda" or _under.pairs is not None:
        yield
        return
    pairs: list[tuple[Tensor, Tensor]] = []
    _under.pairs = pairs
    try:
        yield
    finally:
        _under.pairs = None
    pairs = [(host.contiguous(), target) for host, target in pairs if host.numel()]
    if pairs:
        sizes = [-(-host.nbytes // _ALIGN) * _ALIGN for host, _ in pairs]
        packed = _pinned(sum(sizes), *(host for host, _ in pairs)).to(device, non_blocking=True).split(sizes)
        parts = [part[: host.nbytes] for part, (host, _) in zip(packed, pairs, strict=True)]
        torch._foreach_copy_([_bytes_of(target) for _, target in pairs], parts)


def _pinned(num_bytes: int, *hosts: Tensor) -> Tensor:
    """Host tensors in pinned memory: one as it is, several as uint8 [num_bytes], each at a multiple of 16 bytes."""
    pin = torch.cuda.is_available()  # tensors without data are put on CUDA where there is none
    if len(hosts) == 1 and num_bytes == hosts[0].nbytes:
        return hosts[0].pin_memory() if pin else hosts[0]
    packed, at = torch.empty(num_bytes, dtype=torch.uint8, device="cpu", pin_memory=pin), 0
    for host in hosts:
        packed[at : at + host.nbytes].copy_(_bytes_of(host))
        at += -(-host.nbytes // _ALIGN) * _ALIGN
    return packed


def _bytes_of(x: Tensor) -> Tensor:
    return x.reshape(-1).view(torch.uint8)
