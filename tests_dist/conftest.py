"""Leaves nightly tests out unless -m names them, skips GPU tests without a GPU, stops the rank pools.

Without a GPU, Triton's kernels run in its interpreter, which has to be said before anything imports triton.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

if not (Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists()):
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "nightly" not in config.option.markexpr:
        nightly = [item for item in items if item.get_closest_marker("nightly")]
        items[:] = [item for item in items if not item.get_closest_marker("nightly")]
        config.hook.pytest_deselected(items=nightly)
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu and not _has_cuda():
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def pytest_unconfigure() -> None:
    harness = sys.modules.get("tests_dist.support.harness")  # not imported here: solver tests need no torch
    if harness is not None:
        harness.shutdown_pools()
