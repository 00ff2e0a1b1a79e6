"""Kernels compiled for GPUs that are not at hand, and the committed table of what the compiler said."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cpattn.backends.triton_tiles import Tile, choose_tiles
from cpattn.launch.benchmarks.triton_compile import SHARED_LIMIT

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "launch" / "benchmarks" / "results" / "triton_compile_2026-11-30.json"
MATRIX = {"sm80": "mma", "sm90": "wgmma", "sm100": "tcgen05", "gfx942": "mfma"}
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


def check(kernel: dict[str, Any]) -> None:
    said = f"{kernel['kernel']} on {kernel['arch']} at head dim {kernel['head_dim']}"
    assert kernel["spills"] == 0, f"{said} spills {kernel['spills']} bytes"
    assert kernel["shared"] <= SHARED_LIMIT[kernel["arch"]], said
    # The small tiles of head dim 256 are multiplied by the older instructions.
    assert kernel["matrix"] == MATRIX[kernel["arch"]] or (kernel["head_dim"] > 128 and kernel["matrix"] == "mma"), said


def _compile(out: Path, *options: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "cpattn.launch.benchmarks.triton_compile", "--out", str(out), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def compiled(out: Path, *options: str) -> list[dict[str, Any]]:
    _compile(out, *options)
    kernels: list[dict[str, Any]] = json.loads((out / "triton_compile.json").read_text())["kernels"]
    return kernels


@needs_triton
def test_forward_compiles_for_hopper(tmp_path: Path) -> None:
    """One kernel here; the nightly run has all."""
    (kernel,) = compiled(tmp_path, "--arch", "sm90", "--head-dim", "64", "--kernel", "forward")
    check(kernel)


@needs_triton
def test_row_kernels_that_take_several_tensors_compile(tmp_path: Path) -> None:
    _compile(tmp_path, "--rows", "--arch", "sm90")
    made = json.loads((tmp_path / "row_kernels.json").read_text())["sm90"]
    assert set(made) == {"merge_calls", "sum_calls", "pack"}
    assert all(spills == 0 for _, spills in made.values()), made


@needs_triton
@pytest.mark.nightly
@pytest.mark.parametrize("arch", MATRIX)
def test_every_kernel_compiles(arch: str, tmp_path: Path) -> None:
    for kernel in compiled(tmp_path, "--arch", arch):
        check(kernel)


def test_committed_table_is_of_the_tiles_in_use() -> None:
    """Whoever changes a tile compiles again."""
    kernels = json.loads(TABLE.read_text())["kernels"]
    assert {(k["arch"], k["head_dim"], k["kernel"]) for k in kernels} == {
        (arch, head_dim, kernel)
        for arch in MATRIX
        for head_dim in ((64, 128) if arch == "gfx942" else (16, 32, 64, 128, 256))
        for kernel in ("forward", "dq", "dkv")
    }
    for kernel in kernels:
        check(kernel)
        tiles = choose_tiles(kernel["arch"], 2, kernel["head_dim"])
        assert Tile(*kernel["tile"]) == getattr(tiles, kernel["kernel"]), kernel
