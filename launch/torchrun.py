"""Start a module on several ranks of this machine with torchrun, and never leave one of them behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence

# Seconds that torchrun gets to stop its ranks before it is killed; they then die with it.
STOP_SECONDS = 15
PR_SET_PDEATHSIG = 1  # from <sys/prctl.h>
# Who starts processes leaves its number here: each can tell whether its parent is still the one that started it.
STARTED_BY = "CPATTN_STARTED_BY"


def num_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def run_on_ranks(module: str, args: Sequence[str], *, num_ranks: int, max_restarts: int = 0) -> None:
    """Run `python -m module args` as ranks 0 to num_ranks - 1 and wait for them.

    Each rank gets its share of the cores. If a rank fails, torchrun stops the others, and starts all of them again as
    often as `max_restarts`; a signal to this process (Ctrl-C included) and its death end them too.

    Raises:
        subprocess.CalledProcessError: a rank failed.
    """
    ranks = ["--standalone", "--nnodes=1", f"--nproc-per-node={num_ranks}", f"--max-restarts={max_restarts}"]
    torchrun = [*ranks, *rank_command(module), *args]
    run([sys.executable, "-m", "cpattn.launch.torchrun", *torchrun], num_processes=num_ranks)


def rank_command(module: str) -> list[str]:
    """What torchrun is told to start on each rank to run a module that dies with torchrun."""
    return ["-m", "cpattn.launch.rank", module]


def run(command: Sequence[str], *, num_processes: int = 1) -> None:
    """Run a command to its end; if this process is interrupted, stop the command first.

    Args:
        num_processes: the processes that will share the cores; OMP_NUM_THREADS follows from it, unless
            that is set already. Threads wait asleep: where others use the cores too, spinning would
            slow them and this several times over.

    Raises:
        subprocess.CalledProcessError: the command failed.
    """
    threads = str(max(1, num_cores() // num_processes))
    env = {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE", **os.environ, STARTED_BY: str(os.getpid())}
    process = subprocess.Popen(command, env=env)
    try:
        code = process.wait()
    except BaseException:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
        raise
    if code:
        raise subprocess.CalledProcessError(code, command)


def exit_on_sigterm() -> None:
    """Make SIGTERM and SIGHUP unwind this process as Ctrl-C does, so that `run` can clean up."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Have the kernel send this process a signal when its parent ends, however that ends (Linux).

    To be called before anything heavy is imported. A parent that has ended already sends nothing any more: where the
    environment names another process (STARTED_BY) than the one that is parent now, this one ends at once.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
    if os.environ.get(STARTED_BY, "") not in ("", str(os.getppid())):
        os._exit(1)


def join_ranks(backend: str) -> None:
    """`init_process_group` for ranks that torchrun may start again.

    torchrun keeps its store over a restart, with the addresses of the ranks before: a rank that comes early would
    connect to those. Here each start has keys of its own.
    """
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    store, rank, size = next(rendezvous("env://"))
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(backend, store=dist.PrefixStore(f"start {start}", store), rank=rank, world_size=size)


def main() -> None:
    """torchrun's own command line, without its traceback where a rank has already printed its own."""
    die_with_parent()  # nothing to stop yet
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    die_with_parent(signal.SIGTERM)
    os.environ[STARTED_BY] = str(os.getpid())
    try:
        torchrun()
    except ChildFailedError as error:
        sys.exit(str(error))
    except SignalException as stopped:
        sys.exit(128 + stopped.sigval)


if __name__ == "__main__":
    main()
