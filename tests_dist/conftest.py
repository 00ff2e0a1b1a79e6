"""Sizes the run (support/profiles.py), skips GPU tests without a GPU.

Tests marked nightly run only where -m names them; with them run all property tests, on the nightly profile. Without a
GPU, Triton's kernels run in its interpreter.
"""

from __future__ import annotations

import os
from pathlib import Path

# Tiny tensors: a second thread only waits, and spins on a core that ranks or another worker could use. Before torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# To be said before anything imports triton.
if not (Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists()):
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

from tests_dist.support.profiles import is_nightly, load_profile

pytest_plugins = ["cpattn.testing.plugin"]


def pytest_configure(config: pytest.Config) -> None:
    load_profile(config)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not is_nightly(config.option.markexpr):
        nightly = [item for item in items if item.get_closest_marker("nightly")]
        items[:] = [item for item in items if not item.get_closest_marker("nightly")]
        config.hook.pytest_deselected(items=nightly)
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu and os.environ.get("CPATTN_GPU_FAKES") != "1" and not _has_cuda():
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
