"""What users test with: pytest's mark `ranks`, in a project of their own, alone and under torchrun."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import cpattn.testing

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "testing.md"

PROJECT = '''
import pytest, torch
import torch.distributed as dist

@pytest.fixture
def backend():  # a name that the harness knows too
    return 10

@pytest.mark.ranks(2)
@pytest.mark.parametrize("factor", [1, 3])
def test_sums(factor, backend):
    x = torch.tensor([factor * dist.get_rank() + backend])
    dist.all_reduce(x)
    assert x.item() == factor + 2 * backend

@pytest.mark.ranks(2, timeout=30)
def test_fails_on_one():
    mine = 7 + dist.get_rank()
    assert dist.get_rank() == 0, "planted"

@pytest.mark.ranks(3)
def test_of_three():
    assert dist.get_world_size() == 3

def test_without_ranks():
    assert not dist.is_initialized() or dist.get_world_size() == 2
'''


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """In the user's project, with the package of this checkout."""
    return subprocess.run(
        [sys.executable, *command, "-p", "cpattn.testing.plugin", "-p", "no:cacheprovider", "-q", "-rs", str(folder)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The tests above, and those of the page on testing."""
    (tmp_path / "test_mine.py").write_text(PROJECT)
    (block,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "test_model.py").write_text(block)
    return tmp_path


def test_the_body_runs_on_every_rank_and_its_failure_is_that_ranks(project):
    done = run(project, "-m", "pytest")
    assert "6 passed" in done.stdout, done.stdout + done.stderr
    assert "1 failed" in done.stdout
    assert "rank 1 of 2 raised AssertionError" in done.stdout
    assert "in test_fails_on_one" in done.stdout
    assert "mine = 8" in done.stdout
    assert "run_on_ranks" not in done.stdout, "the way to the ranks is of no interest"


def test_under_torchrun_the_body_runs_on_the_ranks_that_are_there(project):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "pytest")
    done = run(project, *torchrun, "-k", "not fails")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("3 passed, 3 skipped") == 2
    assert "a test of 3 ranks, and torchrun started 2" in done.stdout


def test_a_mark_that_cannot_be_read_says_how_to_write_it(tmp_path):
    (tmp_path / "test_mine.py").write_text(
        "import pytest\n@pytest.mark.ranks('4', backnd='nccl')\ndef test_a():\n    pass\n"
    )
    done = run(tmp_path, "-m", "pytest")
    assert "ranks('4', backnd='nccl'): write ranks(4), or with backend='nccl' or timeout=300" in done.stdout


def test_every_name_is_there():
    for name in cpattn.testing.__all__:
        assert callable(getattr(cpattn.testing, name)) or name == "MASKS"
    with pytest.raises(AttributeError, match="no attribute 'orcale'"):
        cpattn.testing.orcale  # noqa: B018
