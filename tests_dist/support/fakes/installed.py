"""All fakes at once, in place of the packages: `launch/gpu.sh --fakes` runs on them what it runs on a GPU.

    CPATTN_GPU_FAKES=1 python -m tests_dist.support.fakes.installed MODULE [argument ...]      runs a module with them
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Callable
from types import ModuleType

from cpattn import backends
from cpattn.backends.cudnn import CudnnBackend
from cpattn.backends.ffa import FfaBackend
from cpattn.backends.flash_attn import FlashAttnBackend
from cpattn.backends.sdpa_cuda import CudaSdpaBackend
from cpattn.backends.te import TeBackend

from . import flash, ragged

FAKES = os.environ.get("CPATTN_GPU_FAKES") == "1"
GPU = "cpu" if FAKES else "cuda"  # where tests of GPUs put their tensors


def put_module(name: str, module: ModuleType, put: Callable[[str, ModuleType], None]) -> None:
    """A fake module, and its parents, where imports find it. put: stores into sys.modules."""
    parts = name.split(".")
    for depth in range(1, len(parts)):
        parent = ".".join(parts[:depth])
        if parent not in sys.modules:
            put(parent, ModuleType(parent))
    put(name, module)


def use_fakes() -> None:
    """Every kernel of the CUDA list on the CPU, those of packages by their fakes."""
    modules = [flash.flash_attn_2(), flash.flash_attn_3(), flash.flash_attn_4(), ragged.cudnn(), ragged.ffa()]
    modules += ragged.transformer_engine().values()
    for module in modules:
        put_module(module.__name__, module, sys.modules.__setitem__)
    ours = [b for b in backends._backends if b.name in ("flex", "reference", "triton")]
    flash_attn = (FlashAttnBackend(generation, "cpu") for generation in (3, 4, 2))
    packaged = (CudnnBackend("cpu"), TeBackend("cpu"), FfaBackend("cpu"))
    backends._backends[:] = [CudaSdpaBackend("cpu", flash.FakeAten()), *flash_attn, *packaged, *ours]


if __name__ == "__main__":
    use_fakes()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
