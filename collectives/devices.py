"""Which backend of a group serves which device, whatever the group was made with."""

from __future__ import annotations

import torch
import torch.distributed as dist


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
