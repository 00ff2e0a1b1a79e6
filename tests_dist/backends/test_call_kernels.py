"""Results of several calls taken in by one launch, under Triton's interpreter: the kernels, and adapters on them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from cpattn.backends.sdpa_cuda import CudaSdpaBackend
from cpattn.backends.trial import Sample, try_kernel
from cpattn.collectives import merge_partials, row_kernels
from cpattn.collectives.call_kernels import CallRows, merge_calls, sum_calls
from tests_dist.support.backend_cases import CASES, check_backend
from tests_dist.support.fakes.flash import FakeAten
from tests_dist.support.interpreter import needs_interpreter, quicken

pytestmark = needs_interpreter
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def on_the_cpu() -> Iterator[None]:
    quicken()
    with row_kernels.also_on("cpu"):
        yield


def results(rows: list[np.ndarray], heads: int, dim: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """out [R, H, D], padded and cut as a kernel gives it, and lse [H, R]."""
    g = torch.Generator().manual_seed(seed)
    made = []
    for r in rows:
        out = torch.randn(len(r), heads, dim + 3, generator=g).bfloat16()[..., :dim]
        made.append((out, torch.randn(heads, len(r), generator=g)))
    return made


def _rows(num_rows: int, rows: list[np.ndarray]) -> CallRows:
    return CallRows.of(num_rows, [torch.from_numpy(r) for r in rows], CPU)


ROWS = [np.arange(2, 9), np.array([8, 0, 3]), np.zeros(0, np.int64), np.array([3])]


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("count", [0, 1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merges(fresh: bool, count: int, dtype: torch.dtype) -> None:
    """As one after the other with torch's operators; a row that no call has is 0 and -inf, or as it was."""
    rows, (heads, dim), num_rows = ROWS[:count], (3, 5), 11
    made = results(rows, heads, dim, 0)
    out, lse = torch.randn(num_rows, heads, dim).to(dtype), torch.randn(num_rows, heads)
    expected, expected_lse = (out.float(), lse.clone()) if not fresh else (torch.zeros(out.shape), lse * 0 - torch.inf)
    for r, (part, part_lse) in zip(rows, made, strict=True):
        mine, mine_lse = expected[r], expected_lse[r]
        merge_partials(mine, mine_lse, part, part_lse.T)
        expected[r], expected_lse[r] = mine, mine_lse
    if fresh:
        out.fill_(torch.nan), lse.fill_(torch.nan)
    outs, lses = [m[0] for m in made], [m[1] for m in made]
    merge_calls(out, lse, outs, lses, _rows(num_rows, rows), fresh=fresh)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-6)
    # The interpreter cuts digits off where GPUs round.
    loose = {"rtol": 2**-7, "atol": 2**-9} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(out.float(), expected.to(dtype).float(), **loose)


@pytest.mark.parametrize(("fresh_q", "fresh_k"), [(True, True), (False, True), (False, False)])
def test_sums(fresh_q: bool, fresh_k: bool) -> None:
    """dq by rows of queries, dk and dv by rows of keys, which may occur twice in a call; the same bits as torch's."""
    q_rows, k_rows = ROWS[:3], [np.array([1, 1, 4]), np.arange(5), np.array([0])]
    shapes = [(11, 3, 5), (6, 2, 5), (6, 2, 4)]
    g = torch.Generator().manual_seed(1)
    into = [torch.randn(*shape, generator=g) for shape in shapes]
    of_calls = [(q, k, k) for q, k in zip(q_rows, k_rows, strict=True)]
    parts = [
        [torch.randn(len(r), *shape[1:], generator=g).bfloat16() for r, shape in zip(rows, shapes, strict=True)]
        for rows in of_calls
    ]
    expected = [torch.zeros_like(t) if f else t.clone() for t, f in zip(into, (fresh_q, fresh_k, fresh_k), strict=True)]
    for places, of_call in zip(of_calls, parts, strict=True):
        for total, rows, part in zip(expected, places, of_call, strict=True):
            total.index_add_(0, torch.from_numpy(rows), part.float())
    for t, f in zip(into, (fresh_q, fresh_k, fresh_k), strict=True):
        if f:
            t.fill_(torch.nan)
    sum_calls(into, parts, _rows(11, q_rows), _rows(6, k_rows), fresh_q=fresh_q, fresh_k=fresh_k)
    assert all(torch.equal(a, b) for a, b in zip(into, expected, strict=True))


@pytest.mark.parametrize(
    "name",
    ["window", "one_query", "empty"]
    + [pytest.param(name, marks=pytest.mark.nightly) for name in ("documents", "random_0", "shared_prefix")],
)
def test_a_packed_kernel_on_them(name: str) -> None:
    """Torch's FlashAttention 2: in parts and whole; accumulators that hold anything where it stores."""
    backend, case = CudaSdpaBackend("cpu", FakeAten()), CASES[name]
    check_backend(backend, name, torch.bfloat16)
    check_backend(backend, name, torch.bfloat16, num_parts=1)
    sample = Sample.of(case.problem(torch.bfloat16), case.table, case.num_queries, case.num_keys, CPU)
    assert try_kernel(backend, sample).fault == ""


def test_batches_are_bounded() -> None:
    """At most four calls, and no more results than twice the rows: what is kept until a launch takes it in."""
    case = CASES["blocks"]
    work = CudaSdpaBackend("cpu").prepare(case.table, case.num_queries, case.num_keys, CPU).flash
    for calls, batches in ((work.forward, work.merged), (work.backward, work.summed)):
        assert tuple(c for batch in batches for c in batch.calls) == calls
        for batch in batches:
            rows = len(batch.q_rows.order)
            assert len(batch.calls) <= 4
            assert len(batch.calls) == 1 or rows <= 2 * case.num_queries
