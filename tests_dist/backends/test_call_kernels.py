"""Results of several calls taken in by one launch, under Triton's interpreter: the kernels, and adapters on them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from cpattn import AttnMaskSpec, backends
from cpattn.backends.base import Attending, KeyRows, Returning, Scoring, turns_of
from cpattn.backends.batches import rows_of_batches
from cpattn.backends.sdpa_cuda import CudaSdpaBackend
from cpattn.backends.trial import Sample, try_kernel
from cpattn.collectives import merge_partials, row_kernels
from cpattn.collectives.call_kernels import NONE, CallRows, merge_calls, sum_calls
from cpattn.solver import SliceTable
from tests_dist.support.backend_cases import CASES, Case, check_backend
from tests_dist.support.fakes.flash import FakeAten
from tests_dist.support.harness import run_on_ranks
from tests_dist.support.interpreter import needs_interpreter, quicken
from tests_dist.support.oracle import assert_as_exact_as_sdpa, dense_attention, make_inputs
from tests_dist.support.rank_cases import run_attention

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
    return rows_of_batches(num_rows, [rows], CPU)[0]


NIGHTLY = ["causal", "window", "blocks", "random_2"]
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
    merge_calls(out, lse, made, _rows(num_rows, rows), fresh=fresh)
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
    sum_calls(into, parts, _rows(11, q_rows), _rows(6, k_rows), fresh=(fresh_q, fresh_k))
    assert all(torch.equal(a, b) for a, b in zip(into, expected, strict=True))


@pytest.mark.parametrize("converts", [False, True])
def test_launches_of_one_work_follow_each_other(converts: bool) -> None:
    """Rows begin at their first entry, in whichever launch, in buffers that hold NaN; then out changes its dtype.

    The same bits as one launch of all calls gives, in the dtype that is stored last.
    """
    num_rows, made = 11, results(ROWS, 3, 5, 2)
    out, lse = torch.full((num_rows, 3, 5), torch.nan), torch.full((num_rows, 3), torch.nan)
    whole, whole_lse = (
        torch.full(out.shape, torch.nan, dtype=torch.bfloat16 if converts else torch.float32),
        lse.clone(),
    )
    merge_calls(whole, whole_lse, made, _rows(num_rows, ROWS), fresh=True)
    first, second = rows_of_batches(num_rows, [ROWS[:2], ROWS[2:]], CPU)
    merge_calls(out, lse, made[:2], first, fresh=True)
    target = torch.full_like(whole, torch.nan) if converts else out
    merge_calls(target, lse, made[2:], second, fresh=True, before=out if converts else None)
    assert torch.equal(target, whole)
    assert torch.equal(lse, whole_lse)


# One call has every row, others some of them; the second stage sees two more ranges of keys.
STAGES = Case(
    SliceTable.from_columns([0, 0, 5, 0], [30, 30, 30, 20], [0, 30, 40, 55], [30, 40, 55, 60], -99, [0, 99, 99, 99]),
    30,
    60,
)


@pytest.mark.parametrize(
    "case",
    [STAGES, CASES["one_query"], CASES["empty"], *(pytest.param(CASES[n], marks=pytest.mark.nightly) for n in NIGHTLY)],
    ids=["stages", "one_query", "empty", *NIGHTLY],
)
def test_results_stay_where_a_call_put_them(case: Case) -> None:
    """In parts as stages are, by a backend that places: as in place, up to a rounding; dq and out in q's dtype."""
    backend = CudaSdpaBackend("cpu", FakeAten())
    q, k, v, dout = case.inputs(torch.bfloat16)
    table, keys, scoring = case.table, KeyRows(k, v), Scoring(0.2)
    works = [backend.prepare(t, len(q), len(k), CPU) for t in (table.take(slice(0, 2)), table.take(slice(2, None)))]
    out, lse = torch.full(dout.shape, torch.nan), torch.full(q.shape[:2], torch.nan)
    grads = [torch.full(t.shape, torch.nan) for t in (q, k, v)]
    placed, dq, dkeys = Attending(q, q[:0], q[:0]), q[:0], KeyRows(torch.empty(k.shape), torch.empty(v.shape))
    for number, work in enumerate(works):
        backend.forward(Attending(q, out, lse), keys, work, scoring, fresh=number == 0)
        placed = backend.attend(placed, keys, work, scoring, fresh=number == 0, last=number == 1)
    for number, work in enumerate(works):
        queries, fresh = Returning(dout, q, out.to(q.dtype), lse, grads[0]), number == 0
        backend.backward(queries, keys, work, scoring, KeyRows(*grads[1:]), fresh_dq=fresh, fresh_dkv=fresh)
        dq = backend.differentiate(
            queries._replace(dq=dq), keys, work, scoring, dkeys, fresh=(fresh, fresh), last=number == 1
        )
    assert torch.equal(placed.lse, lse)
    assert all(torch.equal(a, b) for a, b in zip(dkeys, grads[1:], strict=True))
    if len(table) > 2:  # else the last part has no work, and who called casts
        assert placed.out.dtype == dq.dtype == q.dtype
    torch.testing.assert_close(placed.out.float(), out, rtol=2**-7, atol=2**-9)
    torch.testing.assert_close(dq.float(), grads[0], rtol=2**-7, atol=2**-9)


# Rows 0 to 5 in two parts, 6 to 9 in the second alone, 15 to 19 in the last alone, 20 to 23 in none.
PASS = ([(0, 6, 0, 9)], [(3, 10, 9, 20)], [], [(10, 15, 20, 26), (0, 2, 26, 30), (15, 20, 0, 4)])


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (2, 3, 0, 1)], ids=["first_has_rows", "first_has_none"])
def test_a_row_of_dq_is_stored_by_the_first_part_that_has_it(order: tuple[int, ...]) -> None:
    """No part fills what a later one stores, and none reads what is not there: the same bits, out of NaN."""
    backend, num_rows, num_keys = CudaSdpaBackend("cpu", FakeAten()), 24, 30
    parts = [SliceTable.from_columns(*np.array(PASS[n]).reshape(-1, 4).T, -99, 99) for n in order]
    turns = turns_of(parts, num_rows)
    assert [np.flatnonzero(turn.never).tolist() for turn in turns] == [[20, 21, 22, 23], [], [], []]
    g = torch.Generator().manual_seed(3)
    q, out, dout = (torch.randn(num_rows, 4, 16, generator=g).bfloat16() for _ in range(3))
    keys = KeyRows(*(torch.randn(num_keys, 2, 16, generator=g).bfloat16() for _ in range(2)))
    queries = Returning(dout, q, out, torch.randn(num_rows, 4, generator=g) + 4, q[:0])

    def gradients(told: bool) -> Returning:
        rows, dkeys = queries, KeyRows(*(torch.zeros(t.shape) for t in keys))
        for number, (part, turn) in enumerate(zip(parts, turns, strict=True)):
            work = backend.prepare(part, num_rows, num_keys, CPU, turn if told else None)
            last = number == len(parts) - 1
            dq = backend.differentiate(rows, keys, work, Scoring(0.2), dkeys, fresh=(number == 0, False), last=last)
            rows = rows._replace(dq=dq)
        return rows

    torch.use_deterministic_algorithms(True)  # then there is NaN in what `empty` gives
    try:
        mine, plain = gradients(told=True).dq, gradients(told=False).dq
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(mine, plain)
    assert not mine[20:].any()
    assert not mine.isnan().any()


@pytest.mark.parametrize(
    "name",
    ["one_query", "empty"]
    + [pytest.param(name, marks=pytest.mark.nightly) for name in ("window", "documents", "random_0", "shared_prefix")],
)
def test_a_packed_kernel_on_them(name: str) -> None:
    """Torch's FlashAttention 2: in parts and whole; accumulators that hold anything where it stores."""
    backend, case = CudaSdpaBackend("cpu", FakeAten()), CASES[name]
    check_backend(backend, name, torch.bfloat16)
    check_backend(backend, name, torch.bfloat16, num_parts=1)
    sample = Sample.of(case.problem(torch.bfloat16), case.table, case.num_queries, case.num_keys, CPU)
    assert try_kernel(backend, sample).fault == ""


def test_batches_are_bounded() -> None:
    """At most eight calls, and no more results than twice the rows: what is kept until a launch takes it in."""
    case = CASES["blocks"]
    work = CudaSdpaBackend("cpu").prepare(case.table, case.num_queries, case.num_keys, CPU).flash
    for calls, batches in ((work.forward, work.merged), (work.backward, work.summed)):
        assert tuple(c for batch in batches for c in batch.calls) == calls
        for batch in batches:
            rows = int((batch.q_rows.order & NONE != NONE).sum())
            assert len(batch.calls) <= 8
            assert len(batch.calls) == 1 or rows <= 2 * case.num_queries


def test_ranks_whose_kernel_says_where_results_lie() -> None:
    """Through `attention` on two ranks: own results are taken over, and those of fetched keys merged into them."""
    run_on_ranks(2, _check_on_ranks, timeout=250)


def _check_on_ranks() -> None:
    quicken()
    backends.register_backend(replace(CudaSdpaBackend("cpu", FakeAten()), name="placing"))
    spec = AttnMaskSpec.sliding_window([25, 9], 12)
    inputs = make_inputs(spec, heads=(4, 2), head_dim=32, dtype=torch.bfloat16)
    options = {"backend": "placing", "chunk_size": 8, "num_stages": 2, "schedule": "keys"}
    sink = torch.tensor([0.3, -1.0, 2.0, -torch.inf])
    try:
        with row_kernels.also_on("cpu"):
            results = run_attention(spec, inputs, key_options=options)
            with_sink = run_attention(spec, inputs, key_options=options, sink=sink)
    finally:
        backends._backends.pop()
    assert_as_exact_as_sdpa(results, spec, inputs, "placing")
    wide = [t.double() for t in inputs[:3]]
    truth, lse = dense_attention(*wide, spec.to_dense(), scale=32**-0.5, sink=sink.double())
    torch.testing.assert_close(with_sink.out.double(), truth, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(with_sink.lse.double(), lse, atol=2e-2, rtol=2e-2)
