"""Run one function on several ranks of this machine, from any process: a test, a script, a notebook.

    def check_sum(seed: int) -> float:          # at module level: ranks import it by name
        x = torch.full((1,), float(dist.get_rank() + seed))
        dist.all_reduce(x)
        return x.item()

    def test_sum():
        assert run_on_ranks(4, check_sum, seed=1) == [10.0] * 4

Starting processes dominates such tests, so the ranks of a world size are a pool that lives until this process
ends: a case costs milliseconds. A case that fails, hangs or is interrupted takes its pool with it; the next
case starts a new one. The ranks are forked from a server that has imported torch and what else they need, and
computed nothing (forking from pytest itself can hang in OpenMP or find CUDA initialised), so a new pool costs
a fraction of a second. They die with the process that started them, however it ends.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import random
import re
import select
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import reduction
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import TCPStore

DEFAULT_TIMEOUT_S = 120.0
# Idle pools cost memory only, most of it shared with the fork server. 1 + 2 + 3 + 4 + 8 ranks fit.
MAX_POOLED_RANKS = 20
START_TIMEOUT_S = 60.0
# After the first failure, the others have this long to tell of an earlier one.
GRACE_S = 0.25
# Bytes of a rank's stack that are read.
_MOST_STACK = 1 << 20

# What a rank says when a peer has gone: an effect of a failure, never the cause to report.
_PEER_GONE = re.compile(
    r"connection (was )?(closed|reset|refused)|broken pipe|peer.*(closed|gone)|remote process exited|"
    r"socket.*(closed|timeout)|ncclRemoteError",
    re.IGNORECASE,
)
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


class RankError(Exception):
    """A case failed on `rank`; the message carries that rank's traceback (`details`), so `match=` sees it.

    `rank` is the first that failed. Failures of peers that merely lost their connection come second.
    """

    def __init__(self, rank: int, headline: str, details: str) -> None:
        super().__init__(f"{headline}\n{details}")
        self.rank = rank
        self.details = details


def run_on_ranks(
    world_size: int,
    fn: Callable[..., Any],
    *args: Any,
    timeout: float = DEFAULT_TIMEOUT_S,
    backend: str = "gloo",
    **kwargs: Any,
) -> list[Any]:
    """Run `fn(*args, **kwargs)` on `world_size` ranks; return what each returned, in rank order.

    Inside `fn` the default process group is that of all ranks, on `backend`; `fresh_group` makes others.
    Every case starts from the same seeds (0), one thread, fp32 default dtype. With CUDA, ranks may share a
    card over gloo; under nccl rank r takes device r. Arguments and results travel by pickle; return CPU
    tensors. `pytest.skip` inside `fn` skips the test.

    Args:
        fn: a module-level function.
        timeout: seconds until every rank is killed and its stack reported.
    Raises:
        RankError: a rank raised, died or did not answer in time. All ranks of the pool are gone then.
        ValueError: `fn` or an argument cannot be pickled.
    """
    try:
        case = pickle.dumps((fn, args, kwargs))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{fn!r} and its arguments must be picklable to reach the ranks ({error}): "
            f"use a module-level function and plain values"
        ) from error
    pool = _take_pool(world_size, backend)
    try:
        name = getattr(getattr(fn, "func", fn), "__qualname__", repr(fn))  # of a partial, what it calls
        return pool.run(case, timeout, name=name)
    except BaseException:  # KeyboardInterrupt too: a rank left in a collective can serve no other case
        _drop_pool(world_size, backend)
        raise


def fresh_group(ranks: Sequence[int] | None = None, timeout: float | None = None) -> dist.ProcessGroup:
    """Make a process group of `ranks` (default: all) that is destroyed when the case ends.

    For use inside a case. Like `dist.new_group`, every rank of the world calls it, members or not.
    """
    limit = None if timeout is None else timedelta(seconds=timeout)
    group = dist.new_group(None if ranks is None else list(ranks), timeout=limit)
    _fresh_groups.append(group)
    return group


def shutdown_pools() -> None:
    """Kill every pool. Runs by itself when pytest or the interpreter ends."""
    for key in list(_pools):
        _drop_pool(*key)


# ----------------------------------------------------------------------------------------------------
# The side of pytest: pools.

_pools: dict[tuple[int, str], _Pool] = {}  # least recently used first


def _take_pool(world_size: int, backend: str) -> _Pool:
    """Return a live pool; start one if needed, dropping the least recently used over the budget."""
    if world_size < 1:
        raise ValueError(f"world_size is {world_size}; it must be at least 1")
    pool = _pools.pop((world_size, backend), None)
    if pool is not None and not pool.alive():
        pool.kill()
        pool = None
    if pool is None:
        while _pools and world_size + sum(size for size, _ in _pools) > MAX_POOLED_RANKS:
            _drop_pool(*next(iter(_pools)))
        pool = _Pool(world_size, backend)
    _pools[world_size, backend] = pool
    return pool


def _drop_pool(world_size: int, backend: str) -> None:
    pool = _pools.pop((world_size, backend), None)
    if pool is not None:
        pool.kill()


atexit.register(shutdown_pools)  # registered after multiprocessing's own hook, hence run before it joins the ranks


class _Handed:
    """A descriptor that a starting process gets as a number of its own."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __reduce__(self) -> tuple[Any, ...]:
        return _take, (reduction.DupFd(self._descriptor),)


def _take(handed: Any) -> int:
    return int(handed.detach())


def _preload() -> list[str]:
    """Modules that the server imports before it forks, so that no rank does.

    Those of cpattn and transformers are what this process has by now, as tests that are collected import what they use;
    not what `torch.compile` brings, as that starts processes and threads.
    """
    loaded = [name for name in [*sys.modules] if name.partition(".")[0] in ("cpattn", "transformers")]
    return ["torch", "torch.distributed", "torch._dynamo", "numpy", "pytest", "hypothesis", *loaded]


@dataclass(frozen=True, slots=True)
class _Failure:
    rank: int
    when: float  # time.monotonic() of the failing rank, one clock for all processes of a machine
    kind: str  # the exception's class name, or "died"
    details: str

    def order(self) -> tuple[bool, float]:
        """Sort key: causes before lost connections, then by time."""
        return (self.kind != "died" and _PEER_GONE.search(self.details) is not None, self.when)


class _Pool:
    """The processes of one world size, each at the far end of a pipe."""

    def __init__(self, world_size: int, backend: str) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_preload())
        self._stacks: list[Any] = []  # files without a name, so that none is left however this process ends
        self._conns: list[Connection] = []
        self._processes: list[Any] = []
        try:
            for rank in range(world_size):
                self._start_rank(context, rank, world_size, backend)
            # Rank 0 hosts the store on a port that the system chose, so concurrent test runs cannot collide.
            ports = self._collect({0}, time.monotonic() + START_TIMEOUT_S, name="start-up")
            for conn in self._conns[1:]:
                conn.send_bytes(pickle.dumps(ports[0]))
            self._collect(set(range(world_size)), time.monotonic() + START_TIMEOUT_S, name="start-up")
        except BaseException:
            self.kill()
            raise

    def _start_rank(self, context: Any, rank: int, world_size: int, backend: str) -> None:
        ours, theirs = context.Pipe()
        # Not daemonic: a case may start processes of its own (a DataLoader's workers).
        process = context.Process(
            target=_rank_main,
            args=(rank, world_size, backend, theirs, _Handed(self._new_stack())),
            name=f"rank-{rank}-of-{world_size}",
            daemon=False,
        )
        with mock.patch.dict(os.environ, _ONE_THREAD):  # the first start launches the server, which inherits it
            process.start()
        theirs.close()
        self._conns.append(ours)
        self._processes.append(process)

    def _new_stack(self) -> int:
        self._stacks.append(tempfile.TemporaryFile())  # noqa: SIM115  (closed in kill)
        return int(self._stacks[-1].fileno())

    def alive(self) -> bool:
        return all(process.is_alive() for process in self._processes)

    def run(self, case: bytes, timeout: float, name: str) -> list[Any]:
        """Send one pickled case to every rank and return their results in rank order."""
        deadline = time.monotonic() + timeout
        for conn in self._conns:
            with contextlib.suppress(OSError):  # that rank is gone; _collect meets the end of its pipe
                conn.send_bytes(case)
        results = self._collect(set(range(len(self._conns))), deadline, name=name, timeout=timeout)
        return [results[rank] for rank in range(len(self._conns))]

    def _collect(
        self, pending: set[int], deadline: float, *, name: str, timeout: float = START_TIMEOUT_S
    ) -> dict[int, Any]:
        """Read one answer from each rank of `pending`; raise for the first that failed."""
        answers: dict[int, Any] = {}
        failures: list[_Failure] = []
        skips: list[str] = []
        while pending:
            by_conn = {self._conns[rank]: rank for rank in sorted(pending)}
            ready = wait(list(by_conn), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for conn in ready:
                rank = by_conn[conn]  # type: ignore[index]
                pending.discard(rank)
                status, value = self._receive(rank)
                if status == "ok":
                    answers[rank] = value
                elif status == "skip":
                    skips.append(value)
                else:
                    failures.append(value)
            if failures:
                deadline = min(deadline, time.monotonic() + GRACE_S)
        if failures:
            raise self._failure(name, failures, pending)
        if pending:
            raise self._timeout(name, pending, timeout)
        if skips:
            import pytest

            pytest.skip(skips[0])
        return answers

    def _receive(self, rank: int) -> tuple[str, Any]:
        try:
            answer: tuple[str, Any] = pickle.loads(self._conns[rank].recv_bytes())
            return answer
        except (EOFError, OSError):
            when = time.monotonic()
            self._processes[rank].join(timeout=5)
            details = f"exit code {_exit_name(self._processes[rank].exitcode)}\n{self._read_stack(rank)}"
            return "error", _Failure(rank, when, "died", details)

    def _failure(self, name: str, failures: list[_Failure], hanging: set[int]) -> RankError:
        """The error that tells of the first failure in full and of the others in a line each."""
        first, *others = sorted(failures, key=_Failure.order)
        headline = f"{name}: rank {first.rank} of {len(self._conns)} " + (
            "died" if first.kind == "died" else f"raised {first.kind}"
        )
        lines = [first.details.rstrip()]
        for other in others:
            last_line = other.details.strip().splitlines()[-1] if other.details.strip() else ""
            lines.append(f"then rank {other.rank}: {other.kind}: {last_line[:200]}")
        if hanging:
            lines.append(f"killed while still running: ranks {sorted(hanging)}")
        return RankError(first.rank, headline, "\n".join(lines))

    def _timeout(self, name: str, pending: set[int], timeout: float) -> RankError:
        """Ask the ranks that have not answered for their stacks, and tell where each one hangs."""
        for rank in pending:
            os.kill(self._processes[rank].pid, signal.SIGUSR1)
        give_up = time.monotonic() + 2.0
        while time.monotonic() < give_up and not all(self._read_stack(rank) for rank in pending):
            time.sleep(0.02)
        time.sleep(0.05)  # the dump is written line by line
        stacks = [f"rank {rank} was at:\n{self._read_stack(rank) or '(no answer)'}" for rank in sorted(pending)]
        done = sorted(set(range(len(self._conns))) - pending)
        headline = f"{name}: no answer from ranks {sorted(pending)} within {timeout:g} s (finished: {done})"
        return RankError(min(pending), headline, "\n".join(stacks))

    def _read_stack(self, rank: int) -> str:
        """What faulthandler wrote for this rank, less the thread that watches the pipe."""
        text = os.pread(self._stacks[rank].fileno(), _MOST_STACK, 0).decode(errors="replace")
        threads = text.split("\n\n")
        return "\n\n".join(thread for thread in threads if _exit_with_parent.__name__ not in thread)

    def kill(self) -> None:
        """Kill every rank and wait for its end."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join(timeout=10)
        for conn in self._conns:
            conn.close()
        for stack in self._stacks:
            stack.close()


def _exit_name(code: int | None) -> str:
    if code is None or code >= 0:
        return str(code)
    try:
        return f"{code} ({signal.Signals(-code).name})"
    except ValueError:
        return str(code)


# ----------------------------------------------------------------------------------------------------
# The side of the ranks.

_fresh_groups: list[Any] = []


def _rank_main(rank: int, world_size: int, backend: str, conn: Connection, stack: int) -> None:
    """Join the world, then run cases until the pipe closes. stack: descriptor of the file for stacks."""
    _exit_with_parent(conn.fileno())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; pytest decides
    with os.fdopen(stack, "w") as stack_file:
        faulthandler.enable(stack_file)
        faulthandler.register(signal.SIGUSR1, stack_file, all_threads=True)
        try:
            store = _join_world(rank, world_size, backend, conn)
            conn.send_bytes(pickle.dumps(("ok", None)))
        except BaseException as error:
            conn.send_bytes(pickle.dumps(("error", _describe(rank, error, time.monotonic()))))
            raise
        while True:
            try:
                case = conn.recv_bytes()
            except (EOFError, OSError):
                del store
                os._exit(0)  # skips destructors that would wait for peers
            conn.send_bytes(_run_case(rank, case))


def _join_world(rank: int, world_size: int, backend: str, conn: Connection) -> TCPStore:
    os.environ.update(_ONE_THREAD)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    limit = timedelta(seconds=START_TIMEOUT_S)
    if rank == 0:
        store = TCPStore("127.0.0.1", 0, world_size, True, limit, wait_for_workers=False)
        conn.send_bytes(pickle.dumps(("ok", store.port)))
    else:
        store = TCPStore("127.0.0.1", pickle.loads(conn.recv_bytes()), world_size, False, limit)
    if backend == "nccl":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    return store


def _run_case(rank: int, case: bytes) -> bytes:
    """Run one pickled case; return the pickled answer: ok, skip or error."""
    _reset_state()
    try:
        fn, args, kwargs = pickle.loads(case)
        value = fn(*args, **kwargs)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # a kernel's fault belongs to the case that launched it
        answer = pickle.dumps(("ok", value))
        assert dist.is_initialized(), "the case destroyed the default process group; use fresh_group()"
        while _fresh_groups:
            group = _fresh_groups.pop()
            if isinstance(group, dist.ProcessGroup):  # not so on ranks outside the group
                dist.destroy_process_group(group)
        return answer
    except BaseException as error:
        when = time.monotonic()
        if type(error).__name__ == "Skipped":
            return pickle.dumps(("skip", str(error)))
        return pickle.dumps(("error", _describe(rank, error, when)))


def _reset_state() -> None:
    """Undo what an earlier case may have left, so that the order of cases cannot matter."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    if torch.are_deterministic_algorithms_enabled():  # the setter imports torch._inductor: a second per rank
        torch.use_deterministic_algorithms(False)


def _describe(rank: int, error: BaseException, when: float) -> _Failure:
    """The failure with its traceback, and with the locals of the frame that raised in the case's own file.

    pytest's rewritten asserts do not exist on the ranks; the locals stand in for them.
    """
    frames = error.__traceback__
    if frames is not None and frames.tb_next is not None:
        frames = frames.tb_next  # without the harness's own frame
    text = "".join(traceback.format_exception(type(error), error, frames))
    values = _locals_of_last_test_frame(frames)
    if values:
        text += "\nwhere " + "\n      ".join(values)
    return _Failure(rank, when, type(error).__name__, text)


def _locals_of_last_test_frame(frames: TracebackType | None) -> list[str]:
    """Of the last frame that lies beside the case's own file, or in a folder there."""
    values: list[str] = []
    folder = None if frames is None else os.path.dirname(frames.tb_frame.f_code.co_filename)
    while frames is not None and folder is not None:
        if frames.tb_frame.f_code.co_filename.startswith(folder):
            values = [f"{name} = {_short(value)}" for name, value in frames.tb_frame.f_locals.items()]
        frames = frames.tb_next
    return values


def _short(value: object) -> str:
    if isinstance(value, torch.Tensor) and value.numel() > 8:
        return f"tensor{tuple(value.shape)} {value.dtype} on {value.device}"
    try:
        text = " ".join(repr(value).split())
    except Exception as error:
        text = f"<repr failed: {type(error).__name__}>"
    return text if len(text) <= 160 else text[:157] + "..."


def _exit_with_parent(fd: int) -> None:
    """End this process once the far end of its pipe has closed, as it does however pytest ends.

    A thread, since a rank in the middle of a case does not read its pipe. (PR_SET_PDEATHSIG does not serve
    here: a rank's parent is the fork server, and that one lives as long as any rank.)
    """

    def watch() -> None:
        poll = select.poll()
        poll.register(fd, 0)  # no event asked for: only the hang-up, which always is reported
        poll.poll()
        os._exit(0)

    threading.Thread(target=watch, name="exit-with-parent", daemon=True).start()
