"""Layer 2: ranks that have done everything right end with status 0, whatever gloo's threads still hold."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cpattn.runtime import at_exit

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("num_runs", [3, pytest.param(100, marks=pytest.mark.nightly)])
def test_short_runs_end_well(num_runs):
    command = [sys.executable, "-m", "tests_dist.support.short_runs", str(num_runs)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3000)
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]


def test_importing_the_package_is_enough():
    """No torch is loaded, no key made: the hook is there, and does nothing before torch.distributed is in use."""
    script = (
        "import sys, atexit, cpattn\n"
        "from cpattn.runtime import at_exit\n"
        "at_exit._gloo_threads = lambda: print('looked') or {}\n"
        "assert 'torch' not in sys.modules\n"
        "if len(sys.argv) > 1: sys.modules['torch.distributed'] = sys\n"
        "sys.exit(3)\n"
    )
    for arguments, printed in (["in use"], "looked\n"), ([], ""):
        result = subprocess.run([sys.executable, "-c", script, *arguments], cwd=ROOT, capture_output=True, text=True)
        assert (result.returncode, result.stdout) == (3, printed), result.stderr


def test_waits_until_all_threads_sleep_through_a_look(monkeypatch):
    """Running, then waiting for the GIL (asleep, but switched since), then a second thread, then rest."""
    looks = [{"1": ("R", "7")}, {"1": ("S", "7")}, {"1": ("S", "8")}, {"1": ("S", "8"), "2": ("R", "1")}]
    looks += [{"1": ("S", "8"), "2": ("S", "2")}] * 2
    slept = []
    monkeypatch.setattr(at_exit, "_gloo_threads", lambda: looks[len(slept)])
    monkeypatch.setattr(at_exit.time, "sleep", slept.append)
    at_exit.let_gloo_rest()
    assert len(slept) == len(looks) - 1


def test_a_thread_that_never_rests_does_not_hold_the_process(monkeypatch):
    monkeypatch.setattr(at_exit, "_gloo_threads", lambda: {"1": ("R", "7")})
    monkeypatch.setattr(at_exit, "LIMIT_S", 0.05)
    at_exit.let_gloo_rest()
