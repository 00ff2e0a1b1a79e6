"""Three real ranks train a step at a time, one of them meets with a fault, and the others say what they saw.

    python -m tests_dist.support.faults FAULT ...

The ranks are forked from one process that has imported torch and computed nothing. Prints a JSON line for each rank
that told something: fault, rank, error (its words, or null), seconds from the fault to the error, and whether it then
trained on in a new group, of the survivors.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # which the first call of a custom op imports
import torch.distributed as dist

import cpattn
from cpattn.backends.sdpa_cpu import CpuSdpaBackend
from cpattn.collectives import exchange
from cpattn.solver import relays

RANKS, FAULTY = 3, 1
# Of the group that trains, once it is there; to meet, ranks on a busy machine need longer.
TIMEOUT_S, MEETING_S = 6.0, 120.0
HEADS = {"num_heads_q": 2, "num_heads_kv": 1, "head_dim": 16}
# What all see is rank 0's, and goes on to others by those that have it.
SHARED = cpattn.AttnMaskSpec.prefix_tree([48, 20, 30, 25, 23], [[0, 1], [0, 2], [0, 3], [0, 4]])[0]


def join(store: Path, rank: int, size: int) -> dist.ProcessGroup:
    """All ranks meet; gives a group of theirs with a short timeout."""
    limit = timedelta(seconds=MEETING_S)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=limit)
    group = dist.new_group(timeout=timedelta(seconds=TIMEOUT_S))
    assert group is not None
    return group


def step(group: dist.ProcessGroup, length: int = 96, rows: int | None = None, passed_on: bool = False) -> None:
    """Forward and backward of a key made for it; rows: other than the key's; passed_on: rows travel on by rank 1."""
    spec, how = cpattn.AttnMaskSpec.causal(length), dict[str, Any]()
    if passed_on:
        spec, how = SHARED, {"layout": "contiguous", "chunk_size": 8, "relays": True}
    with mock.patch.object(relays, "_LEAST_PART", 1):  # rows are few
        key = cpattn.make_key(spec, **HEADS, cp_group=group, **how)
    assert not passed_on or key.plan.relays
    count = key.num_tokens if rows is None else rows
    q, k, v = (torch.randn(count, heads, 16, requires_grad=True) for heads in (2, 1, 1))
    cpattn.attention(q, k, v, key).sum().backward()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_kernel(group: dist.ProcessGroup, direction: str, act: Callable[[], None]) -> None:
    """A step in which a kernel call does something else."""

    def kernel(*args: Any, **options: Any) -> None:
        act()

    with mock.patch.object(CpuSdpaBackend, direction, kernel):
        step(group)


def on_the_way(group: dist.ProcessGroup, function: str) -> None:
    """A step in which rank 1 dies where it passes rows on, or adds up those that come back by it."""
    with mock.patch.object(exchange, function, side_effect=lambda *args: die()):
        step(group, passed_on=True)


def out_of_memory() -> None:
    raise MemoryError("no room for the kernel")


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def wrong_rows(group: dist.ProcessGroup) -> None:
    with contextlib.suppress(ValueError):
        step(group, rows=3)
    time.sleep(TIMEOUT_S + 8)  # alive, and nothing breaks its connections


# What the faulty rank does in place of its second step.
FAULTS: dict[str, Callable[[dist.ProcessGroup], None]] = {
    "killed between steps": lambda group: die(),
    "killed in forward": lambda group: in_kernel(group, "forward", die),
    "killed in backward": lambda group: in_kernel(group, "backward", die),
    "exception in a kernel": lambda group: in_kernel(group, "forward", out_of_memory),
    "exception before a step": lambda group: sys.exit(3),
    "input refused": wrong_rows,
    "stopped": lambda group: stop(),
    "stopped in forward": lambda group: in_kernel(group, "forward", stop),
    "another length": lambda group: step(group, 100),
    "planning takes too long": lambda group: time.sleep(TIMEOUT_S + 8),
    "killed while it passes rows on": lambda group: on_the_way(group, "_gather_relayed"),
    "killed while it adds rows up": lambda group: on_the_way(group, "_neutral_rows"),
}
PASSED_ON = ("killed while it passes rows on", "killed while it adds rows up")


def survive(rank: int, fault: str, folder: Path) -> dict[str, Any]:
    """A step that goes well, one in which the faulty rank does not, and one in a group of the survivors."""
    group = join(folder / "store", rank, RANKS)
    step(group)
    began = time.monotonic()
    error = None
    try:
        if rank == FAULTY:
            FAULTS[fault](group)
        else:
            step(group, passed_on=fault in PASSED_ON)
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}"
        if rank == FAULTY and not isinstance(caught, ValueError):
            raise
    seconds = time.monotonic() - began
    dist.destroy_process_group()
    if rank != FAULTY:
        others = [r for r in range(RANKS) if r != FAULTY]
        step(join(folder / "store of the survivors", others.index(rank), RANKS - 1))
        dist.destroy_process_group()
    return {"fault": fault, "rank": rank, "error": error, "seconds": round(seconds, 2), "trained on": rank != FAULTY}


def _run(fault: str) -> None:
    folder, pids = Path(tempfile.mkdtemp()), []  # no context manager: the ranks would leave it too
    for rank in range(RANKS):
        pid = os.fork()
        if pid == 0:
            told = survive(rank, fault, folder)
            (folder / f"rank{rank}.json").write_text(json.dumps(told))
            sys.exit()
        pids.append(pid)
    for rank, pid in enumerate(pids):
        if rank != FAULTY:
            os.waitpid(pid, 0)
    os.kill(pids[FAULTY], signal.SIGKILL)
    os.waitpid(pids[FAULTY], 0)
    for path in sorted(folder.glob("rank*.json")):
        print(path.read_text(), flush=True)
    shutil.rmtree(folder)


def main(faults: list[str]) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    for fault in faults:
        _run(fault)


if __name__ == "__main__":
    main(sys.argv[1:])
