"""Layer 1: launch/gpu.sh with a Python that is a shell script: what runs in which order, and what outlives what."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]

# Takes the place of Python: notes what it is asked, and does what a part may do at its worst.
PYTHON = """#!/usr/bin/env bash
echo "${CPATTN_GPU_BACKEND:-}|$PYTHONPATH|$*" >>"$NOTES"
case "$*" in
    *broken.whl) echo "not a wheel" && exit 1 ;;
    *"-m pip"*whole.whl) while [ "$1" != --target ]; do shift; done && mkdir -p "$2" && exit 0 ;;
    *"-m pytest"*) ;;
    *rates_* | *kernels*--backend*) echo "row" >>"$OUT/kernels.jsonl" && exit 0 ;;
    *) exit 0 ;;
esac
case "${CPATTN_GPU_BACKEND:-}" in
    sdpa) trap 'echo stubborn: SIGINT' INT && while :; do sleep 0.1; done ;;
    cudnn) trap 'echo "== 1 failed, 2 passed in 1.00s =="; exit 2' INT && while :; do sleep 0.1; done ;;
    te) kill -SEGV $$ ;;
    ffa) echo "== 9 skipped in 0.10s ==" ;;
    *) echo "== 3 passed in 0.10s ==" ;;
esac
"""
RUN = ["paths", "kernels_triton", "kernels_sdpa", "kernels_cudnn", "kernels_te", "kernels_ffa", "rates_triton"]


class Ran(NamedTuple):
    summary: dict[str, str]
    log: str
    asked: list[tuple[str, str, str]]
    files: set[str]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "checkout"
    for folder in ("cpattn", "solver", "collectives", "launch", "tests_dist", "docs", ".whl"):
        (root / folder).mkdir(parents=True)
    for file in ("pyproject.toml", "README.md", "LICENSE", ".whl/broken.whl", ".whl/whole.whl"):
        (root / file).touch()
    (root / "launch/gpu.sh").write_text((ROOT / "launch/gpu.sh").read_text())
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    return root


def _run(checkout: Path, *parts: str) -> Ran:
    out, notes = checkout.parent / "out", checkout.parent / "notes"
    given = {"PYTHON": str(checkout.parent / "python"), "OUT": str(out), "NOTES": str(notes), "TOTAL_S": "40"}
    done = subprocess.run(
        ["bash", str(checkout / "launch/gpu.sh"), *parts], env={**os.environ, **given}, capture_output=True, timeout=100
    )
    assert done.returncode == 1, done.stderr
    summary = dict(re.findall(r"^(\S+) +(.*)", (out / "summary.txt").read_text(), re.MULTILINE))
    asked = re.findall(r"^(\w*)\|(.*?)\|(.*)", notes.read_text(), re.MULTILINE)
    return Ran(summary, (out / "log.txt").read_text(), asked, set(os.listdir(out)))


def test_no_part_stops_another(checkout: Path) -> None:
    """One that ignores SIGINT, one that heeds it, one that crashes, a wheel that does not install."""
    ran = _run(checkout, *RUN)
    assert list(ran.summary) == RUN
    assert ran.summary["paths"].startswith("passed")
    assert ran.summary["kernels_sdpa"].startswith("out of time")
    assert "stubborn: SIGINT" in ran.log
    assert ran.summary["kernels_cudnn"].startswith("out of time")
    assert "1 failed, 2 passed" in ran.summary["kernels_cudnn"], "what pytest says at SIGINT is kept"
    assert ran.summary["kernels_te"].startswith("FAILED (exit status 139)")
    assert ran.summary["kernels_ffa"].startswith("refused")
    assert ran.summary["rates_triton"].startswith("passed")
    assert ran.files == {"summary.txt", "log.txt", "kernels.jsonl", "kernels.md"}
    assert "could not install broken.whl" in ran.log
    with_wheels = {backend: "/wheels/whole" in path for backend, path, command in ran.asked if "pytest" in command}
    assert with_wheels == {"": False, "triton": False, "sdpa": False, "cudnn": True, "te": True, "ffa": True}
    assert not any("/wheels/broken" in path for _, path, _ in ran.asked)
    installs = [command for _, _, command in ran.asked if "pip install" in command]
    assert len(installs) == 3
    assert all("--no-index --no-deps --no-build-isolation" in command for command in installs)


def test_what_it_would_run_fits_into_ten_minutes() -> None:
    """The whole path first, then every backend's tests, then rates; the limits together are less than the total."""
    done = subprocess.run(["bash", "launch/gpu.sh", "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=True)
    limits = re.findall(r"^(\w+) +at most +(\d+) s, +(\d+) s so far", done.stdout, re.MULTILINE)
    names = [name for name, _, _ in limits]
    assert names[:2] == ["install", "paths"]
    assert [n.split("_")[0] for n in names[2:]] == ["kernels"] * 8 + ["rates"] * 7
    assert sum(int(limit) for _, limit, _ in limits) == int(limits[-1][2]) < 570
    from cpattn.backends import backend_names

    assert {n.removeprefix("kernels_") for n in names if n.startswith("kernels_")} == set(backend_names())


@pytest.mark.nightly
def test_all_of_it_under_fakes(tmp_path: Path) -> None:
    """What a card would run, on the stand-ins: every part passes or refuses."""
    given = {"PYTHON": sys.executable, "OUT": str(tmp_path), "TOTAL_S": "3000", "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        ["bash", "launch/gpu.sh", "--fakes"], cwd=ROOT, env={**os.environ, **given}, capture_output=True, text=True
    )
    assert done.returncode == 0, (tmp_path / "summary.txt").read_text()
