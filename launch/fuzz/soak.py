"""What is left behind: after groups that were made and destroyed, and after ranks and whole runs that were killed.

Counted on Linux, from /proc: processes by a mark in their environment, file descriptors, threads, listening ports,
shared memory.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

import cpattn
from cpattn import AttnMaskSpec
from cpattn.keys.cache import clear_key_cache
from cpattn.testing.harness import RankError, fresh_group, run_on_ranks, shutdown_pools

from .report import Batch

RANKS = 3
# Groups made before anything is counted: the first ones make threads and buffers that stay.
WARM = 10
# Runs that are killed, for each group that is made and destroyed.
KILLED_SHARE = 0.5
# Of the killed runs one in so many is a whole run, from its start-up on; the others are ranks of a pool.
WHOLE_RUNS = 10
# Descriptors and threads that come and go.
SLACK = 2
# Folders that stay where a process is killed at start-up: the fork server's socket, and torch's cache of compiled code.
_OF_OTHERS = ("pymp-", "torchinductor_")
# For the processes of a killed run to end.
PATIENCE_S = 30.0
_MARK = "CPATTN_SOAK"


class Footing(NamedTuple):
    """What one process holds."""

    descriptors: int
    threads: int

    @classmethod
    def here(cls) -> Footing:
        gc.collect()
        return cls(len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")))


class Left(NamedTuple):
    """What is still there of runs that have ended."""

    processes: list[str]
    ports: list[str]
    shared_memory: list[str]
    files: list[str]

    def __str__(self) -> str:
        return ", ".join(f"{name} {some}" for name, some in zip(self._fields, self, strict=True) if some)


def shared_memory() -> set[str]:
    """What no living process has mapped: other programs' semaphores come and go meanwhile."""
    there = set(os.listdir("/dev/shm"))
    for maps in Path("/proc").glob("[0-9]*/maps") if there else ():
        with contextlib.suppress(OSError):
            there -= {line.rpartition("/dev/shm/")[2] for line in maps.read_text().splitlines() if "/dev/shm/" in line}
    return there


def batches(cases: int, seed: int, figures: dict[str, float]) -> Iterator[Batch]:
    """Calls: one that makes and destroys that many groups, then half as many that kill a run each.

    Raises:
        ValueError: there is no /proc to count in.
    """
    if not Path("/proc/self/fd").exists():
        raise ValueError("the soak sweep counts processes and descriptors in /proc, which this system does not have")
    yield partial(groups, cases, seed, figures)
    shutdown_pools()
    yield partial(killed_runs, round(cases * KILLED_SHARE), seed, figures)


def groups(count: int, seed: int, figures: dict[str, float]) -> tuple[int, list[tuple[int, str]]]:
    """Make groups with keys, train a step on each, and destroy them: descriptors and threads stay level."""
    before = shared_memory()
    failures = []
    footings = run_on_ranks(RANKS, use_groups, WARM, count, seed, timeout=60 + 2.0 * count)
    for rank, (first, last) in enumerate(footings):
        figures[f"descriptors of rank {rank}"] = last.descriptors
        figures[f"threads of rank {rank}"] = last.threads
        for name, was, now in zip(Footing._fields, first, last, strict=True):
            if now > was + SLACK:
                failures.append((seed, f"rank {rank} has {now} {name} after {count} groups, and had {was} before"))
    if shared_memory() - before:
        failures.append((seed, f"{count} groups left shared memory {sorted(shared_memory() - before)}"))
    return count, failures


def use_groups(warm: int, count: int, seed: int) -> tuple[Footing, Footing]:
    """On each rank: what it holds after the first groups, and after all."""
    for number in range(warm):
        _use_group(seed + number)
    first = Footing.here()
    for number in range(count):
        _use_group(seed + number)
    return first, Footing.here()


def _use_group(seed: int) -> None:
    group = dist.new_group(list(range(dist.get_world_size())))
    spec = AttnMaskSpec.varlen([5 + seed % 7, 40, seed % 3])
    key = cpattn.make_key(spec, num_heads_q=2, num_heads_kv=1, head_dim=8, cp_group=group)
    q, k, v = (torch.randn(key.num_tokens, heads, 8, requires_grad=True) for heads in (2, 1, 1))
    cpattn.attention(q, k, v, key).sum().backward()
    clear_key_cache()
    dist.destroy_process_group(group)


def killed_runs(count: int, seed: int, figures: dict[str, float]) -> tuple[int, list[tuple[int, str]]]:
    """Kill ranks in the middle of attention, and whole runs at any time: nothing of them is left."""
    rng = random.Random(seed)
    failures: list[tuple[int, str]] = []
    for number in range(count):
        memory, mark, said = shared_memory(), uuid.uuid4().hex, ""
        with tempfile.TemporaryDirectory(prefix="cpattn-soak-") as folder:
            if number % WHOLE_RUNS == 0:
                _kill_whole_run(mark, folder, after_s=rng.uniform(0.0, 15.0))
            else:
                said = _kill_rank(rng.randrange(RANKS), rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGABRT]))
            left = _left_behind(mark, folder, memory)
        if said:
            failures.append((seed, said))
        if any(left):
            failures.append((seed, f"killed run {number} left {left}"))
    figures["whole runs killed"] = -(-count // WHOLE_RUNS)
    figures["ranks killed"] = count - figures["whole runs killed"]
    figures["descriptors at the end"] = Footing.here().descriptors
    return count, failures


def _kill_rank(rank: int, number: signal.Signals) -> str:
    """One rank of a pool ends in backward; what is wrong with what the harness says of it."""
    try:
        run_on_ranks(RANKS, die_in_backward, rank, int(number), timeout=60)
    except RankError as error:
        return "" if error.rank == rank else f"rank {rank} was killed, and the error names rank {error.rank}: {error}"
    return f"rank {rank} was killed, and nobody said so"


def die_in_backward(rank: int, number: int) -> None:
    key = cpattn.make_key(
        AttnMaskSpec.causal(60), num_heads_q=2, num_heads_kv=1, head_dim=8, cp_group=fresh_group(timeout=30)
    )
    q, k, v = (torch.randn(key.num_tokens, heads, 8, requires_grad=True) for heads in (2, 1, 1))
    out = cpattn.attention(q, k, v, key)
    if dist.get_rank() == rank:
        out.register_hook(lambda grad: os.kill(os.getpid(), number))
    out.sum().backward()


def _kill_whole_run(mark: str, folder: str, *, after_s: float) -> None:
    """A script that trains on ranks without end is killed while it imports, starts ranks, or works."""
    code = "from cpattn.launch.fuzz.soak import RANKS, work_for_ever, run_on_ranks; run_on_ranks(RANKS, work_for_ever)"
    environment = {**os.environ, _MARK: mark, "TMPDIR": folder}
    run = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL)
    time.sleep(after_s)
    run.kill()
    run.wait()


def work_for_ever() -> None:
    while True:
        _use_group(0)


def _left_behind(mark: str, folder: str, memory: set[str]) -> Left:
    """What is still there when patience ends; nothing as soon as nothing is."""
    give_up = time.monotonic() + PATIENCE_S
    while True:
        processes = [*_live(mark), *_ranks_of(os.getpid())]
        files = [path.name for path in Path(folder).iterdir() if not path.name.startswith(_OF_OTHERS)]
        left = Left(processes, _listening_here(), sorted(shared_memory() - memory), files)
        if not any(left) or time.monotonic() > give_up:
            return left
        time.sleep(0.1)


def _live(mark: str) -> list[str]:
    """Processes with the mark in their environment."""
    return [name for entry in Path("/proc").glob("[0-9]*") if (name := _named(entry, f"{_MARK}={mark}"))]


def _named(entry: Path, variable: str) -> str:
    with contextlib.suppress(OSError):
        if _state(entry) not in "ZX" and variable.encode() in (entry / "environ").read_bytes().split(b"\0"):
            return f"{entry.name} {(entry / 'cmdline').read_bytes()[:120]!r}"
    return ""


def _state(entry: Path) -> str:
    return (entry / "stat").read_text().rpartition(")")[2].split()[0]


def _ranks_of(pid: int) -> list[str]:
    """Live grandchildren: ranks hang on the fork server."""
    with contextlib.suppress(OSError):
        return [f"rank {grandchild}" for child in _children(pid) for grandchild in _children(child)]
    return []


def _children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return [child for child in found if _state(Path(f"/proc/{child}")) not in "ZX"]


def _listening_here() -> list[str]:
    """Ports that this process listens on."""
    mine = set()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            mine.add(os.readlink(entry))
    rows = [row.split() for row in Path("/proc/self/net/tcp").read_text().splitlines()[1:]]
    return [row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in mine]
