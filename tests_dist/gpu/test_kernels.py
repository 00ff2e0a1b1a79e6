"""Local kernels on a GPU: conformance of everything that is installed, compilations, determinism."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from cpattn import backends
from cpattn.backends import Backend, FlexBackend
from cpattn.backends.base import Attending, KeyRows, Returning, Scoring
from cpattn.solver import SliceTable
from tests_dist.support.backend_cases import CASES, LARGE, check_backend, run_backend

pytestmark = pytest.mark.gpu

KERNELS = {f"{b.name}: {b.kernel}": b for b in backends._backends}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# flex compiles for every shape class, which takes seconds: a few cases of each kind for it.
FOR_FLEX = {"causal", "random_2", "grouped_heads", "softcap"}


@pytest.mark.parametrize("name", [n for n in CASES if n not in LARGE])
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_is_as_exact_as_plain_attention(kernel: str, name: str) -> None:
    """All dtypes of a case in one test: the truth is computed on the CPU."""
    backend: Backend = KERNELS[kernel]
    if backend.name == "flex" and name not in FOR_FLEX:
        pytest.skip("compiling flex for every case would take minutes")
    refusals = {dtype: backend.refusal(CASES[name].problem(dtype, "cuda")) for dtype in DTYPES}
    served = [dtype for dtype, refusal in refusals.items() if refusal is None]
    if not served:
        pytest.skip(str(refusals[DTYPES[0]]))
    for dtype in served[:1] if backend.name == "flex" else served:
        check_backend(backend, name, dtype, device="cuda")
        check_backend(backend, name, dtype, num_parts=1, device="cuda")


@pytest.mark.parametrize("name", sorted(LARGE))
@pytest.mark.parametrize("kernel", [k for k in KERNELS if not k.startswith(("reference", "flex"))])
def test_large_cases(kernel: str, name: str) -> None:
    backend = KERNELS[kernel]
    refusal = backend.refusal(CASES[name].problem(torch.bfloat16, "cuda"))
    if refusal is not None:
        pytest.skip(refusal)
    check_backend(backend, name, torch.bfloat16, device="cuda")


def test_auto_serves_every_dtype_and_option() -> None:
    for dtype in DTYPES:
        for name in ("causal", "softcap", "wide_values", "head_dim_256"):
            assert backends.choose_backend(CASES[name].problem(dtype, "cuda")) is not None


@pytest.mark.parametrize("kernel", [k for k in KERNELS if k.startswith(("sdpa", "flash_attn"))])
def test_repeats_bit_for_bit_under_the_deterministic_flag(kernel: str) -> None:
    backend = KERNELS[kernel]
    case = CASES["random_2"]
    if (refusal := backend.refusal(case.problem(torch.bfloat16, "cuda"))) is not None:
        pytest.skip(refusal)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (run_backend(backend, case, torch.bfloat16, device="cuda") for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


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
