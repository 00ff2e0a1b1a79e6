"""Short runs of two gloo ranks that do everything right and end as scripts do, by running off their end.

    python -m tests_dist.support.short_runs NUM_RUNS

The ranks are forked from one process that has imported torch and computed nothing, so a run costs milliseconds of work
and a whole interpreter's end. Prints the exit statuses of each run that did not end with 0, and how many there were.
"""

from __future__ import annotations

import gc
import os
import shutil
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import cpattn  # noqa: F401  as a rank that only imports it


def rank_of_a_run(rank: int, store: Path, destroy: bool) -> None:
    """Collectives whose tensors gloo's threads let go of last."""
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    for _ in range(5):
        works = [dist.all_to_all_single(torch.empty(4096), torch.randn(4096), async_op=True) for _ in range(6)]
        for work in works:
            work.wait()
        dist.all_reduce(torch.ones(256))
        dist.all_reduce(torch.ones(()))
    if destroy:
        dist.destroy_process_group()


def main(num_runs: int) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # or each rank would take this process's modules apart when it ends
    bad = 0
    folder = tempfile.mkdtemp()  # no context manager: the ranks would leave it too
    for run in range(num_runs):
        ranks = []
        for rank in range(2):
            pid = os.fork()
            if pid == 0:
                rank_of_a_run(rank, Path(folder, f"store{run}"), destroy=run % 2 == 0)
                sys.exit()
            ranks.append(pid)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks]
        if any(statuses):
            bad += 1
            print(f"run {run}: {statuses}", flush=True)
    shutil.rmtree(folder)
    print(f"{bad} of {num_runs} runs failed", flush=True)
    sys.exit(bad > 0)


if __name__ == "__main__":
    main(int(sys.argv[1]))
