"""Our Triton kernels in the interpreter against dense fp64, and their launches counted (one process, and two ranks)."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import cpattn
from cpattn import AttnMaskSpec
from cpattn.backends import Problem, choose_backend
from cpattn.backends import triton as backend_module
from cpattn.backends.base import Attending, KeyRows, Returning, Scoring
from cpattn.backends.triton import TritonBackend
from cpattn.collectives import row_kernels
from cpattn.solver import SliceTable
from tests_dist.support.backend_cases import CASES, LARGE, Case, check_backend, run_backend
from tests_dist.support.harness import run_on_ranks
from tests_dist.support.interpreter import needs_interpreter, quicken
from tests_dist.support.oracle import dense_attention, make_inputs

BACKEND = TritonBackend()
SMALL = [name for name in CASES if name not in LARGE]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module", autouse=True)
def _quick() -> None:
    if BACKEND.refusal(Problem("cpu", torch.float32, 1, 1, 16, 16)) is None:
        quicken()


@needs_interpreter
@pytest.mark.parametrize("number", range(len(SMALL)), ids=SMALL)
def test_kernels_are_as_exact_as_plain_attention(number: int) -> None:
    """One dtype and number of parts each, in turn; the nightly sweep has them all."""
    check_backend(BACKEND, SMALL[number], DTYPES[number % 3], num_parts=1 + number % 2)


@needs_interpreter
@pytest.mark.nightly
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_every_dtype_and_large_cases(name: str, dtype: torch.dtype) -> None:
    for num_parts in (1, 2):
        check_backend(BACKEND, name, dtype, num_parts=num_parts)


class _Launches(TorchDispatchMode):
    """Counts operators that launch a kernel: all but those that only make or view tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if not (func.is_view or name.startswith("prim::") or "empty" in name):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CASES)
def test_one_launch_for_forward_and_two_for_backward_whatever_the_mask(name: str) -> None:
    """On tensors without data: strided as the runtime's are, accumulators in place, nothing besides the kernels."""
    case = CASES[name]
    work = BACKEND.prepare(case.table, case.num_queries, case.num_keys, torch.device("cpu"))
    scoring = Scoring(1.0, case.softcap)
    with FakeTensorMode(allow_non_fake_inputs=True):
        q, k, v, dout = (torch.empty(t.shape, dtype=torch.bfloat16) for t in case.inputs(torch.bfloat16))
        out, lse = torch.empty(dout.shape), torch.empty(q.shape[:2])
        grads = [torch.empty(t.shape) for t in (q, k, v)]
        with _Launches() as forward:
            BACKEND.forward(Attending(q, out, lse), KeyRows(k, v), work, scoring)
        with _Launches() as backward:
            queries = Returning(dout, q, dout, lse, grads[0])
            BACKEND.backward(queries, KeyRows(k, v), work, scoring, KeyRows(*grads[1:]))
    any_work = min(len(case.table), 1)
    assert forward.counts == Counter({"cpattn::triton_forward": any_work})
    assert backward.counts == Counter({"cpattn::triton_dq": any_work, "cpattn::triton_dkv": any_work})


def _two_documents(mixed: bool) -> Case:
    """Rows 0 to 39 and 40 to 69; mixed: one block holds rows of both."""
    rows = [(0, 40, 0, 40, -99, 0), (40, 70, 40, 70, -99, 0)]
    if mixed:  # a third slice that the first rows of both see, and many more such edges
        rows += [(i, i + 5, 70, 75, -99, 99) for i in range(0, 70, 5)]
    return Case(SliceTable.from_columns(*np.array(rows).T), 70, 75 if mixed else 70)


@needs_interpreter
@pytest.mark.parametrize("mixed", [False, True])
def test_nan_stays_in_its_document(mixed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In q, k, v and dout of the second; keys that both see get NaN from it, and pass none on."""
    case = _two_documents(mixed)
    if mixed:
        lists = BACKEND.prepare(case.table, 70, 75, torch.device("cpu")).by_query(
            backend_module.choose_tiles("cpu", 4, 16).forward
        )
        assert lists.mixed
    clean = run_backend(BACKEND, case, torch.float32)
    inputs = case.inputs(torch.float32)
    for t in inputs:
        t[50:70] = torch.nan
    monkeypatch.setattr(Case, "inputs", lambda *_: inputs)
    spoilt = run_backend(BACKEND, case, torch.float32)
    for field, mine, other in zip(clean._fields, spoilt, clean, strict=True):
        assert torch.equal(mine[:40], other[:40]), field
        assert mine[50:70].isnan().any(), f"{field} of the second document has no NaN"


@needs_interpreter
def test_strided_rows_and_results_stored_in_the_dtype_of_q() -> None:
    """q, k and v as columns of packed rows, heads as the outer dimension; a fresh out in bf16."""
    case = CASES["grouped_heads"]
    q, k, v, _ = case.inputs(torch.bfloat16)
    work = BACKEND.prepare(case.table, case.num_queries, case.num_keys, q.device)

    def run(q_: Tensor, *keys: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = torch.zeros(q.shape, dtype=q.dtype), torch.full(q.shape[:2], -torch.inf)
        BACKEND.forward(Attending(q_, out, lse), KeyRows(*keys), work, Scoring(0.2), fresh=True)
        return out, lse

    packed = torch.cat([k, v], dim=-1)
    strided = run(q.transpose(0, 1).contiguous().transpose(0, 1), packed[..., :32], packed[..., 32:])
    assert all(torch.equal(a, b) for a, b in zip(strided, run(q, k, v), strict=True))
    columns = run(q.transpose(1, 2).contiguous().transpose(1, 2), k, v)  # the last dimension is strided: copied
    assert torch.equal(columns[0], strided[0])


@needs_interpreter
def test_what_comes_first_is_stored_in_every_row() -> None:
    """Into accumulators that hold NaN, rows that see nothing too (lse -inf); then as if zeros had been added to."""
    case = CASES["random_2"]
    q, k, v, dout = case.inputs(torch.float32)
    work = BACKEND.prepare(case.table, case.num_queries, case.num_keys, q.device)
    keys, scoring = KeyRows(k, v), Scoring(0.25)
    out, lse = torch.full(dout.shape, torch.nan), torch.full(q.shape[:2], torch.nan)
    BACKEND.forward(Attending(q, out, lse), keys, work, scoring, fresh=True)
    blind = ~torch.from_numpy(case.table.to_dense(case.num_queries, case.num_keys).any(1))
    assert blind.any()
    assert torch.equal(lse == -torch.inf, blind[:, None].expand_as(lse))
    assert not out[blind].any()
    stored, added = [torch.full(t.shape, torch.nan) for t in (q, k, v)], [torch.zeros(t.shape) for t in (q, k, v)]
    for grads, fresh in ((stored, True), (added, False)):
        queries = Returning(dout, q, out, lse, grads[0])
        BACKEND.backward(queries, keys, work, scoring, KeyRows(*grads[1:]), fresh_dq=fresh, fresh_dkv=fresh)
    assert all(torch.equal(a, b) for a, b in zip(stored, added, strict=True))


@needs_interpreter
@pytest.mark.parametrize("schedule", ["keys", "tiles"])
def test_two_ranks_with_row_kernels(schedule: str) -> None:
    """Through `attention`: stages merge, gradients travel, and rows are packed and summed by our kernels."""
    run_on_ranks(2, _check_on_ranks, schedule, timeout=250)


def _check_on_ranks(schedule: str) -> None:
    quicken()
    spec = AttnMaskSpec.sliding_window([70, 31], 20)
    inputs = make_inputs(spec, heads=(4, 2), head_dim=32, head_dim_v=16, dtype=torch.float32)
    heads = {"num_heads_q": 4, "num_heads_kv": 2, "head_dim": 32, "head_dim_v": 16}
    row_kernels._DEVICES.add("cpu")
    try:
        group = torch.distributed.group.WORLD
        key = cpattn.make_key(spec, cp_group=group, **heads, backend="triton", chunk_size=16, schedule=schedule)
        sink = torch.tensor([0.3, -1.0, 2.0, 0.0], requires_grad=True)
        leaves = [cpattn.dispatch(t, key).requires_grad_() for t in inputs[:3]]
        out = cpattn.attention(*leaves, key, sink=sink, softcap=3.0)
        grads = torch.autograd.grad(out, leaves, cpattn.dispatch(inputs.dout, key))
    finally:
        row_kernels._DEVICES.discard("cpu")
    wide = [t.double().requires_grad_() for t in (*inputs[:3], sink)]
    truth, _ = dense_attention(*wide[:3], spec.to_dense(), scale=32**-0.5, softcap=3.0, sink=wide[3])
    expected = torch.autograd.grad(truth, wide[:3], inputs.dout.double())
    for mine, exact in zip((out, *grads), (truth, *expected), strict=True):
        torch.testing.assert_close(cpattn.undispatch(mine, key).double(), exact, atol=2e-5, rtol=2e-5)


def test_what_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    problem = Problem("cpu", torch.float32, 2, 2, 16, 16)
    with pytest.raises(ValueError, match="set TRITON_INTERPRET=1 before triton is imported"):
        choose_backend(problem, "triton")
    on_card = Problem("cuda", torch.float64, 2, 2, 16, 16)
    monkeypatch.setattr(backend_module, "missing_package", lambda *_: None)
    assert "float64 is not one of bfloat16, float16, float32" in str(BACKEND.refusal(on_card))
    assert "head_dim 320 is more than its tiles hold" in str(
        BACKEND.refusal(Problem("cuda", torch.float16, 2, 2, 320, 16))
    )
    monkeypatch.undo()
    monkeypatch.setattr(backend_module, "missing_package", lambda *_: "the package triton is not installed")
    assert BACKEND.refusal(Problem("cuda", torch.float16, 2, 2, 64, 64)) == "the package triton is not installed"
