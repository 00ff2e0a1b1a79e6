"""Local kernels on a GPU: conformance of everything that is installed, compilations, determinism.

`launch/gpu.sh` gives each backend a process of its own (CPATTN_GPU_BACKEND); with --fakes all of it runs on the CPU.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from cpattn import backends
from cpattn.backends import Backend, FlexBackend
from cpattn.backends.base import Attending, KeyRows, Returning, Scoring
from cpattn.solver import SliceTable
from tests_dist.support.backend_cases import CASES, LARGE, check_backend, run_backend
from tests_dist.support.fakes.installed import FAKES, GPU, use_fakes

pytestmark = pytest.mark.gpu

if FAKES:
    use_fakes()
ONLY = os.environ.get("CPATTN_GPU_BACKEND")
KERNELS = {f"{b.name}: {b.kernel}": b for b in backends._backends if ONLY in (None, b.name)}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# A few cases of each kind for flex, which compiles for every shape class, and for the interpreter of Triton.
FEW = {"causal", "random_2", "grouped_heads", "softcap"}
SLOW = ("flex", "triton") if FAKES else ("flex",)


@pytest.mark.parametrize("name", [n for n in CASES if n not in LARGE])
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_is_as_exact_as_plain_attention(kernel: str, name: str) -> None:
    """All dtypes of a case in one test: the truth is computed on the CPU."""
    backend: Backend = KERNELS[kernel]
    if backend.name in SLOW and name not in FEW:
        pytest.skip("every case would take minutes")
    refusals = {dtype: backend.refusal(CASES[name].problem(dtype, GPU)) for dtype in DTYPES}
    served = [dtype for dtype, refusal in refusals.items() if refusal is None]
    if not served:
        pytest.skip(str(refusals[DTYPES[0]]))
    for dtype in served[:1] if backend.name in SLOW else served:
        check_backend(backend, name, dtype, device=GPU)
        check_backend(backend, name, dtype, num_parts=1, device=GPU)


@pytest.mark.parametrize("name", sorted(LARGE))
@pytest.mark.parametrize("kernel", [k for k in KERNELS if not k.startswith(("reference", *SLOW))])
def test_large_cases(kernel: str, name: str) -> None:
    backend = KERNELS[kernel]
    refusal = backend.refusal(CASES[name].problem(torch.bfloat16, GPU))
    if refusal is not None:
        pytest.skip(refusal)
    check_backend(backend, name, torch.bfloat16, device=GPU)


@pytest.mark.skipif(ONLY not in (None, "sdpa"), reason="another backend's process")
@pytest.mark.skipif(FAKES, reason="auto is a choice among real kernels")
def test_auto_serves_every_dtype_and_option() -> None:
    for dtype in DTYPES:
        for name in ("causal", "softcap", "wide_values", "head_dim_256"):
            assert backends.choose_backend(CASES[name].problem(dtype, GPU)) is not None


@pytest.mark.parametrize("kernel", [k for k in KERNELS if k.startswith(("sdpa", "flash_attn"))])
def test_repeats_bit_for_bit_under_the_deterministic_flag(kernel: str) -> None:
    backend = KERNELS[kernel]
    case = CASES["random_2"]
    if (refusal := backend.refusal(case.problem(torch.bfloat16, GPU))) is not None:
        pytest.skip(refusal)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (run_backend(backend, case, torch.bfloat16, device=GPU) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.skipif(FAKES or ONLY not in (None, "flex"), reason="another backend's process, or none that compiles")
def test_flex_compiles_200_masks_of_one_shape_class_once() -> None:
    """The path of the runtime: forward with lse, and the forward and backward of the gradient."""
    rng = np.random.default_rng(0)
    backend = FlexBackend()
    torch._dynamo.reset()
    counts = []
    for _ in range(200):
        cuts = np.sort(rng.choice(np.arange(1, 500), 4, replace=False))
        starts, ends = np.append(0, cuts), np.append(cuts, 500 + rng.integers(0, 12))
        table, size = SliceTable.from_columns(starts, ends, starts, ends, -1000, 0), int(ends[-1])
        q = torch.randn(size, 2, 64, device="cuda", dtype=torch.bfloat16)
        work = backend.prepare(table, size, size, q.device)
        out, lse = torch.zeros_like(q), torch.full((size, 2), -torch.inf, device="cuda")
        keys, scoring = KeyRows(q, q), Scoring(0.125)
        backend.forward(Attending(q, out, lse), keys, work, scoring, fresh=True)
        grads = [torch.zeros(q.shape, device="cuda") for _ in range(3)]
        backend.backward(Returning(q, q, out, lse, grads[0]), keys, work, scoring, KeyRows(*grads[1:]))
        assert all(torch.isfinite(g).all() for g in grads)
        counts.append(counters["stats"]["unique_graphs"])
    assert counts[-1] == counts[0], "later masks compiled again"
