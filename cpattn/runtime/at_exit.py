"""Ranks that have done everything right end with status 0: gloo's threads come to rest before Python finalizes.

A thread of gloo's process group lets go of a collective's tensors a moment after `wait()` has returned. Tensors have
Python objects, so the thread asks for the GIL. A thread that asks for it while the interpreter finalizes is ended on
the spot (before Python 3.14), inside a C++ destructor: std::terminate, SIGABRT, exit status 134 after a run without a
fault. So the last thing before finalization is to let those threads run, without the GIL, until all of them sleep.

Only torch's own state and the kernel's are looked at; no collective is begun, none is waited for, and no group is
destroyed: a peer that has died cannot hold this process up, and its exit status stays what it is.

What comes after is Python's own: its last collection walks all objects, which with a large library is a second of CPU
time or more, minutes on a machine that is starved of it. gc.freeze() here would save it, but what waits for that
collection would be lost, such as what was written to a file that is part of a cycle.
"""

from __future__ import annotations

import atexit
import sys
import time
from pathlib import Path

GLOO_THREAD = "pt_gloo_runloop"  # torch's name for the threads that run collectives and drop their tensors
LOOK_S = 0.002
# Where the kernel says nothing about threads (no /proc): several times what the threads need on a busy machine.
BLIND_S = 0.1
# A thread may be in a collective that nobody has waited for: the interpreter ends without it.
LIMIT_S = 5.0


def rest_at_exit() -> None:
    """Have `let_gloo_rest` run when the interpreter ends; handlers registered later run before it."""
    atexit.register(let_gloo_rest)


def let_gloo_rest() -> None:
    """Sleep until gloo's threads have slept through two looks in a row: at most LIMIT_S, without them not at all."""
    if "torch.distributed" not in sys.modules:
        return
    deadline = time.monotonic() + LIMIT_S
    before = None
    while time.monotonic() < deadline:
        threads = _gloo_threads()
        if threads is None:
            time.sleep(BLIND_S)
            return
        # A thread that waits for the GIL sleeps too. It gets it while this one sleeps without, and has been switched.
        if not threads or (threads == before and all(state == "S" for state, _ in threads.values())):
            return
        before = threads
        time.sleep(LOOK_S)


def _gloo_threads() -> dict[str, tuple[str, str]] | None:
    """State and number of context switches of each of gloo's threads; None where the kernel does not say."""
    try:
        tasks = list(Path("/proc/self/task").iterdir())
    except OSError:
        return None
    found = {}
    for task in tasks:
        try:
            lines = (task / "status").read_text().splitlines()
        except OSError:  # the thread has ended meanwhile
            continue
        fields = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        if fields.get("Name") == GLOO_THREAD:
            found[task.name] = (fields["State"][:1], fields["voluntary_ctxt_switches"])
    return found
