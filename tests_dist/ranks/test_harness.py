"""Layer 2: the rank harness itself. What it promises when ranks fail, hang, die, or pytest dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from cpattn.testing import harness
from tests_dist.support.harness import RankError, fresh_group, run_on_ranks

ROOT = Path(__file__).parents[2]


def sum_of_ranks(offset: int = 0) -> tuple[int, int]:
    x = torch.tensor([dist.get_rank() + offset])
    dist.all_reduce(x)
    return dist.get_rank(), int(x)


def own_pid() -> int:
    return os.getpid()


def fail_on(bad_rank: int) -> None:
    if dist.get_rank() == bad_rank:
        raise ValueError(f"planted on {bad_rank}")
    dist.barrier()  # the peers hang here


def exit_on(bad_rank: int) -> None:
    if dist.get_rank() == bad_rank:
        os._exit(3)
    dist.barrier()  # the peers lose their connection here


def kill_on(bad_rank: int) -> None:
    if dist.get_rank() == bad_rank:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def compare_with_three(x: int) -> None:
    y = x + 1
    assert y == 3


def hang_on(bad_rank: int) -> None:
    if dist.get_rank() == bad_rank:
        wait_for_ever()


def wait_for_ever() -> None:
    while True:
        time.sleep(0.1)


def write_pid_and_hang(folder: str) -> None:
    Path(folder, str(os.getpid())).touch()
    wait_for_ever()


def echo(value: object) -> object:
    return value


def return_a_generator() -> object:
    return (i for i in range(3))


def group_sizes() -> tuple[int, int]:
    everyone = fresh_group()
    evens = fresh_group([0, 2])
    x = torch.ones(1)
    dist.all_reduce(x, group=everyone)
    y = torch.ones(1)
    if dist.get_rank() in (0, 2):
        dist.all_reduce(y, group=evens)
    return int(x), int(y)


def leave_traces() -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.manual_seed(123 + dist.get_rank())


def draw() -> tuple[torch.Tensor, bool, int]:
    return torch.rand(3), torch.is_grad_enabled(), torch.get_num_threads()


def skip_here() -> None:
    pytest.skip("not on these ranks")


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_results_come_back_in_rank_order(world_size: int) -> None:
    total = sum(range(world_size)) + world_size * 10
    assert run_on_ranks(world_size, sum_of_ranks, offset=10) == [(r, total) for r in range(world_size)]


def test_tensors_travel_both_ways() -> None:
    x = torch.arange(200_000, dtype=torch.bfloat16).view(-1, 2)
    for y, array in run_on_ranks(2, echo, (x, x.float().numpy())):
        assert torch.equal(x, y)
        assert (x.float().numpy() == array).all()


def test_the_pool_is_reused() -> None:
    pids = run_on_ranks(2, own_pid)
    start = time.monotonic()
    for _ in range(50):
        assert run_on_ranks(2, own_pid) == pids
    assert time.monotonic() - start < 5.0  # 50 starts of two processes would take a minute


def test_pools_stay_within_the_budget_of_ranks() -> None:
    for world_size in (2, 3, 4, 5, 6, 7):
        run_on_ranks(world_size, own_pid)
    sizes = [size for size, _ in harness._pools]
    assert sum(sizes) <= harness.MAX_POOLED_RANKS
    assert sizes[-1] == 7


def test_cases_do_not_see_each_other() -> None:
    run_on_ranks(2, leave_traces)
    (x, x_grad, x_threads), (y, *_) = run_on_ranks(2, draw)
    assert x.dtype == torch.float32
    assert torch.equal(x, y)
    assert x_grad
    assert x_threads == 1


def test_fresh_groups() -> None:
    assert run_on_ranks(3, group_sizes) == [(3, 2), (3, 1), (3, 2)]


@pytest.mark.parametrize("bad_rank", [0, 2])
def test_the_failing_rank_is_reported_and_the_next_case_works(bad_rank: int) -> None:
    start = time.monotonic()
    with pytest.raises(RankError, match=f"ValueError: planted on {bad_rank}") as info:
        run_on_ranks(3, fail_on, bad_rank)
    assert time.monotonic() - start < 10.0  # the peers' barrier was not waited for
    assert info.value.rank == bad_rank
    assert "in fail_on" in str(info.value)
    assert "killed while still running" in str(info.value)
    assert run_on_ranks(3, sum_of_ranks) == [(0, 3), (1, 3), (2, 3)]


@pytest.mark.parametrize(("case", "code"), [(exit_on, "exit code 3"), (kill_on, "SIGKILL")])
@pytest.mark.parametrize("bad_rank", [0, 1])
def test_a_rank_that_dies_is_reported_before_its_peers(case: object, code: str, bad_rank: int) -> None:
    with pytest.raises(RankError, match=code) as info:
        run_on_ranks(3, case, bad_rank)  # type: ignore[arg-type]
    assert info.value.rank == bad_rank
    assert run_on_ranks(3, sum_of_ranks) == [(0, 3), (1, 3), (2, 3)]


def test_a_failed_assert_shows_its_values() -> None:
    with pytest.raises(RankError, match="y = 5"):
        run_on_ranks(2, compare_with_three, 4)


def test_a_lost_connection_never_outranks_its_cause() -> None:
    early = harness._Failure(0, 1.0, "RuntimeError", "[gloo/pair.cc:575] Connection closed by peer [127.0.0.1]:1")
    late = harness._Failure(1, 2.0, "ValueError", "wrong")
    died = harness._Failure(2, 3.0, "died", "exit code -9 (SIGKILL)")
    assert sorted([died, early, late], key=harness._Failure.order) == [late, died, early]


def test_a_hang_times_out_with_its_stack() -> None:
    with pytest.raises(RankError, match=r"no answer from ranks \[1\] within 1 s") as info:
        run_on_ranks(2, hang_on, 1, timeout=1)
    assert info.value.rank == 1
    assert "in wait_for_ever" in str(info.value)
    assert run_on_ranks(2, sum_of_ranks) == [(0, 1), (1, 1)]


def test_skip_inside_a_case_skips_the_test() -> None:
    with pytest.raises(pytest.skip.Exception, match="not on these ranks"):
        run_on_ranks(2, skip_here)


def test_what_cannot_travel_is_named() -> None:
    with pytest.raises(ValueError, match="module-level function"):
        run_on_ranks(2, lambda: None)
    with pytest.raises(RankError, match="cannot pickle 'generator'"):
        run_on_ranks(2, return_a_generator)
    with pytest.raises(ValueError, match="at least 1"):
        run_on_ranks(0, own_pid)


def running(pid: int) -> bool:
    """Whether the process exists and is no zombie (a container may have nobody to reap it)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition: object, limit_s: float = 20.0) -> bool:
    give_up = time.monotonic() + limit_s
    while time.monotonic() < give_up:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.05)
    return False


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")


@needs_proc
@pytest.mark.parametrize(
    "sig", [signal.SIGKILL, *(pytest.param(sig, marks=pytest.mark.nightly) for sig in (signal.SIGINT, signal.SIGTERM))]
)
def test_no_orphans_when_the_parent_is_killed_in_a_case(tmp_path: Path, sig: signal.Signals) -> None:
    code = (
        "from tests_dist.support.harness import run_on_ranks\n"
        "from tests_dist.ranks.test_harness import write_pid_and_hang\n"
        f"run_on_ranks(3, write_pid_and_hang, {str(tmp_path)!r})\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
        # A job in a shell's background ignores SIGINT, and what it starts inherits that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert wait_until(lambda: len(list(tmp_path.iterdir())) == 3, limit_s=60)
    finally:
        parent.send_signal(sig)
        parent.wait(timeout=30)
    pids = [int(path.name) for path in tmp_path.iterdir()]
    assert wait_until(lambda: not any(running(pid) for pid in pids))


@needs_proc
def test_no_orphans_when_the_parent_ends(tmp_path: Path) -> None:
    code = (
        "from tests_dist.support.harness import run_on_ranks\n"
        "from tests_dist.ranks.test_harness import own_pid\n"
        "print(*run_on_ranks(3, own_pid), *run_on_ranks(2, own_pid))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 5
    assert wait_until(lambda: not any(running(pid) for pid in pids))
    assert done.stderr == ""
