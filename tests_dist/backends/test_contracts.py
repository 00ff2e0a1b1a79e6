"""What real kernels, and torch, do that fakes once did not: a test for each fact, on the CPU, in one process.

The facts, with their sources, stand in `docs/backends.md` and beside the fakes.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import cpattn
from cpattn import AttnMaskSpec
from cpattn.backends import KERNEL_SCRATCH, Problem, choose_backend, installed
from cpattn.backends.base import Attending, KeyRows, Returning, Scoring, aligned
from cpattn.backends.cudnn import _LINEAR_SWITCH, CudnnBackend, _build, _graph_key
from cpattn.backends.ffa import FfaBackend
from cpattn.backends.flash_attn import FlashAttnBackend
from cpattn.backends.rows import add_rows
from cpattn.backends.sdpa_cuda import CudaSdpaBackend
from cpattn.backends.te import TeBackend
from cpattn.collectives import devices, packed_row_bytes, unpack_rows
from cpattn.runtime import execute
from cpattn.solver import SliceTable
from tests_dist.backends.test_adapters import Install, install
from tests_dist.support.backend_cases import CASES, check_backend
from tests_dist.support.fake_cuda import DEVICE, fake_cuda
from tests_dist.support.fakes import flash, ragged

__all__ = ["install"]  # a fixture

ROOT = Path(__file__).parents[2]

CPU = torch.device("cpu")
aten = torch.ops.aten


def test_each_fact_in_the_docs_has_its_test() -> None:
    page = (ROOT / "docs/backends.md").read_text()
    table = page[page.index("| fact |") : page.index("## How slices")]
    rows = re.findall(r"^\| .* \| (.*) \|$", table, re.MULTILINE)[1:]
    files = ("tests_dist/backends/test_contracts.py", "tests_dist/ranks/test_transports.py")
    written = set(re.findall(r"^def (test_\w+)", "".join((ROOT / f).read_text() for f in files), re.MULTILINE))
    assert len(rows) == 14
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row)
        assert named, row
        assert set(named) <= written


def _causal(tokens: int) -> SliceTable:
    return SliceTable.from_columns(0, tokens, 0, tokens, -tokens, 0)


def _hidden(rows: int, keys: int, left: int, right: int) -> Tensor:
    return ~flash.band(rows, keys, left, right)


def test_flash_attention_2_clamps_windows() -> None:
    """The rule by the lines of the C++, and that with our max_seqlen_k it changes no window of a call."""
    assert [flash.fa2_window(*w, 64) for w in [(-1, 0), (5, -1), (3, 64), (64, 9), (-1, 70)]] == [
        (64, 0),
        (5, 64),
        (3, 64),
        (64, 9),
        (-1, -1),
    ]
    changed = 0
    for name in ("inverse_causal_cropped", "random_1", "random_3"):
        for call in CudaSdpaBackend("cpu", None).prepare(CASES[name].table, 400, 400, CPU).flash.backward:
            for rows, keys in zip(call.cu_seqlens_q.diff().tolist(), call.cu_seqlens_k.diff().tolist(), strict=True):
                ours = flash.fa2_window(call.left, call.right, call.max_seqlen_k_for_fa2)
                plain = flash.fa2_window(call.left, call.right, call.max_seqlen_k)
                meant = _hidden(rows, keys, call.left, call.right)
                assert torch.equal(_hidden(rows, keys, *ours), meant)
                changed += not torch.equal(_hidden(rows, keys, *plain), meant)
    assert changed, "no case meets the clamp"


@pytest.mark.parametrize("heads", [(8, 8), (64, 8)])
def test_cudnn_workspace_is_linear_in_tokens(heads: tuple[int, int], install: Install) -> None:
    """One causal sequence of 33,000 tokens takes its dq, and for grouped heads dk and dv of all heads, in fp32."""
    tokens, dim = 33_000, 128
    install("cudnn", module := ragged.cudnn())
    backend = CudnnBackend("cpu")
    (call,) = backend.prepare(_causal(tokens), tokens, tokens, CPU).backward
    q, k = (torch.empty(tokens, h, dim, dtype=torch.bfloat16, device="meta") for h in heads)
    built = _build(module, None, _graph_key(call, q, k, 1.0, backward=True))
    needed = 4 * tokens * heads[0] * (dim + 1 + (2 * dim if heads[0] != heads[1] else 0))
    assert needed <= built.workspace_bytes <= 1.25 * needed


def test_cudnn_head_dims_are_those_whose_total_lengths_count(install: Install) -> None:
    """With a head dim that is no multiple of 16 the front end drops the total lengths."""
    install("cudnn", ragged.cudnn())
    backend = CudnnBackend("cpu")
    check_backend(backend, "narrow_values", torch.bfloat16)
    check_backend(backend, "odd_head_dim", torch.bfloat16)
    assert {key.head_dim for key in backend._graphs} == {32, 48}


def test_ffa_reads_both_of_its_results(install: Install) -> None:
    for meta in (False, True):
        module = ragged.ffa(meta=meta)
        install(module.__name__, module)
        check_backend(FfaBackend("cpu"), "head_dim_128", torch.bfloat16)


# ----------------------------------------------------------------------------------------------------
# CUDA tensors without data, and without a GPU.


def _memory(spec: AttnMaskSpec, dtype: torch.dtype) -> Any:
    key = cpattn.make_key(spec, num_heads_q=8, num_heads_kv=2, head_dim=64, backend="sdpa")
    with fake_cuda():
        return key.memory(dtype, DEVICE)


def test_memory_on_cuda_counts_what_kernels_allocate_inside() -> None:
    """FA2's backward: dq in fp32 with 128 rows more a sequence, a sum a row, dk and dv of all query heads."""
    tokens, heads, dim = 8192, 8, 64
    backward = _memory(AttnMaskSpec.causal(tokens), torch.bfloat16).backward
    inside = 4 * (tokens + 128) * heads * (dim + 1) + 2 * 2 * tokens * heads * dim
    q = torch.empty(tokens, heads, dim, dtype=torch.bfloat16, device="meta")
    k, ends = q[:, :2], torch.tensor([0, tokens])
    assert KERNEL_SCRATCH[aten._flash_attention_backward.default](q, q, k, k, q, None, ends, ends) == inside
    results = 2 * tokens * dim * (8 + 2 + 2)
    assert backward >= inside + results + 2 * 2 * tokens * dim * 2  # dk and dv are stored once more, dq is not


def test_memory_on_cuda_is_stated_in_fp32() -> None:
    """torch's meta kernel of the efficient backward lacks an argument (2.11 to 2.13)."""
    assert _memory(AttnMaskSpec.varlen([500, 300, 192]), torch.float32).backward > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["causal", "window", "documents", "random_1", "narrow_values", "empty"])
def test_torch_operators_take_our_arguments_on_cuda(name: str, dtype: torch.dtype) -> None:
    """`sdpa` whole, both passes, under torch's own meta kernels: names, order, shapes, dtypes and devices."""
    case, scoring = CASES[name], Scoring(0.1)
    backend, inputs = CudaSdpaBackend(), case.inputs(dtype)
    with fake_cuda():
        q, k, v, dout = (torch.empty(t.shape, dtype=dtype, device=DEVICE) for t in inputs)
        work = backend.prepare(case.table, case.num_queries, case.num_keys, DEVICE)
        out, *grads = (torch.zeros(t.shape, device=DEVICE) for t in (dout, q, k, v))
        lse = torch.zeros(q.shape[:2], device=DEVICE)
        backend.forward(Attending(q, out, lse), KeyRows(k, v), work, scoring, fresh=True)
        queries = Returning(dout, q, out.to(dtype), lse, grads[0])
        backend.backward(queries, KeyRows(k, v), work, scoring, KeyRows(*grads[1:]))
        assert {t.device for t in (out, lse, *grads)} == {DEVICE}


def test_launches_make_the_device_of_their_tensors_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device, which need not be the rank's; so does a whole pass, for other packages."""
    entered: list[torch.device] = []
    ran: list[int] = []

    @contextmanager
    def device(which: torch.device) -> Iterator[None]:
        entered.append(which)
        yield

    with fake_cuda():
        x = torch.empty(3, 2, device="cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", device)
    devices._on_its_device(lambda *args: ran.append(len(entered)))(x, 1)
    devices._on_its_device(lambda *args: ran.append(len(entered)))([x, x], 1)
    execute._on_its_device(lambda *args: ran.append(len(entered)))(None, x)
    devices._on_its_device(lambda *args: ran.append(len(entered)))(torch.empty(2))
    assert entered == 3 * [torch.device("cuda", 1)]
    assert ran == [1, 2, 3, 3]


def test_rows_that_kernels_read_begin_at_16_bytes() -> None:
    """Also keys beside values of another width in a received buffer, and rows of a caller's wider tensor."""
    like = [torch.empty(0, 1, 64, dtype=torch.bfloat16), torch.empty(0, 1, 20, dtype=torch.bfloat16)]
    packed = torch.empty(3, packed_row_bytes(like), dtype=torch.uint8)
    assert all(aligned(t) is t for t in unpack_rows(packed, like)), "received rows are copied"
    assert not aligned(packed[:, 8:].view(torch.bfloat16).unflatten(1, (-1, 4))).storage_offset()
    q, k, v, dout = CASES["causal"].inputs(torch.bfloat16)
    wide = torch.zeros(len(q), q.shape[1] * q.shape[2] + 4, dtype=q.dtype)
    odd = wide[:, : q[0].numel()].unflatten(1, q.shape[1:])
    odd.copy_(q)
    case, backend = CASES["causal"], CudaSdpaBackend("cpu", flash.FakeAten())
    work = backend.prepare(case.table, case.num_queries, case.num_keys, CPU)
    results = []
    for rows in (q, odd):
        out, lse = torch.zeros(dout.shape), torch.zeros(q.shape[:2])
        backend.forward(Attending(rows, out, lse), KeyRows(k, v), work, Scoring(0.2), fresh=True)
        results.append(out)
    assert torch.equal(*results)


# ----------------------------------------------------------------------------------------------------
# Accumulators.


def test_packed_documents_are_stored_once_in_half_precision() -> None:
    """Whatever the fp32 kernel would need: there the accumulator has the dtype of q anyway."""
    backend, case = CudaSdpaBackend("cpu", flash.FakeAten()), CASES["documents"]
    work = backend.prepare(case.table, case.num_queries, case.num_keys, CPU)
    assert len(work.pieces) > 1
    assert backend.writes_once(work)
    for dtype in (torch.bfloat16, torch.float32):
        check_backend(backend, "documents", dtype, num_parts=1)
        check_backend(backend, "random_2", dtype, num_parts=1)


class _Operators(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_adding_to_rows_is_one_kernel() -> None:
    """`x[rows] += values` stores the view into itself once more."""
    total, values = torch.zeros(8, 4, 6)[..., :4], torch.ones(3, 4, 4, dtype=torch.bfloat16)
    with _Operators() as ran:
        add_rows(total, slice(2, 5), values)
    assert ran.names == ["slice", "add_"]
    assert total.sum() == 48


# ----------------------------------------------------------------------------------------------------
# Refusals.


def _problem(head_dim: int = 64, device: str = "cpu") -> Problem:
    return Problem(device, torch.bfloat16, 8, 2, head_dim, head_dim)


@pytest.mark.parametrize(("capability", "limit"), [((9, 0), 256), ((10, 0), 128)])
def test_flash_attention_4_takes_head_dims_by_generation(
    capability: tuple[int, int], limit: int, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = flash.flash_attn_4()
    install(module.__name__, module)
    monkeypatch.setattr("cpattn.backends.flash_attn.device_capability", lambda device_type: capability)
    assert FlashAttnBackend(4, "cpu").refusal(_problem(limit)) is None
    assert f"takes here ({limit})" in str(FlashAttnBackend(4, "cpu").refusal(_problem(limit + 8)))


def test_a_package_that_cannot_be_imported_is_refused_in_words(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not an error in the first forward; and "auto" goes on to the next, importing no more than it must."""
    tried = []

    def broken(module: str) -> Any:
        tried.append(module)
        raise ImportError("No module named 'cutlass'\nmore")

    for module in (flash.flash_attn_4(), *ragged.transformer_engine().values(), ragged.ffa()):
        install(module.__name__, module)
    install("cudnn", ragged.cudnn())
    monkeypatch.setattr(importlib, "import_module", broken)
    installed.failing_import.cache_clear()
    try:
        for backend in (FlashAttnBackend(4, "cpu"), CudnnBackend("cpu"), TeBackend("cpu"), FfaBackend("cpu")):
            assert "cannot be imported (ImportError: No module named 'cutlass')" in str(backend.refusal(_problem()))
        tried.clear()
        assert choose_backend(_problem()).name == "sdpa"
        assert tried == []
    finally:
        installed.failing_import.cache_clear()


@pytest.mark.parametrize(
    ("capability", "version", "switch", "refused"),
    [
        ((9, 0), 91900, "0", "quadratic in tokens before cuDNN 9.25"),
        ((9, 0), 92500, None, f"unless {_LINEAR_SWITCH}=0"),
        ((9, 0), 92500, "0", None),
        ((10, 0), 91700, None, "needs cuDNN 9.18"),
        ((10, 0), 91800, None, None),
        ((12, 0), 92500, None, "needs sm90 or sm100"),
    ],
)
def test_cudnn_repeats_where_it_can(
    capability: tuple[int, int],
    version: int,
    switch: str | None,
    refused: str | None,
    install: Install,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install("cudnn", ragged.cudnn(version=version))
    for module in ("cudnn", "offsets"):
        monkeypatch.setattr(f"cpattn.backends.{module}.device_capability", lambda device_type: capability)
    monkeypatch.delenv(_LINEAR_SWITCH, raising=False)
    if switch is not None:
        monkeypatch.setenv(_LINEAR_SWITCH, switch)
    backend = CudnnBackend("cpu")
    torch.use_deterministic_algorithms(True)
    try:
        refusal = backend.refusal(_problem())
        assert refused in str(refusal) if refused else refusal is None
        if refused is None:
            check_backend(backend, "causal", torch.bfloat16)
    finally:
        torch.use_deterministic_algorithms(False)
    assert {key.deterministic for key in backend._graphs if key.backward} == (set() if refused else {True})


# ----------------------------------------------------------------------------------------------------
# cuDNN's front end itself: `pip install cpattn[gpu-contracts]`, no GPU needed.


def _front_end() -> Any:
    """The real module with graphs that can be validated for a GPU that is not here, and no further."""
    cudnn = pytest.importorskip("cudnn", reason="needs nvidia-cudnn-frontend")
    try:
        cudnn.backend_version()
    except RuntimeError as error:
        pytest.skip(f"needs cuDNN's own library: {error}")
    graphs = getattr(getattr(cudnn, "_compiled_module", cudnn), "backend_graph", cudnn.pygraph)

    class Validated:
        def __init__(self, **options: Any) -> None:
            self._graph = graphs(**{k: v for k, v in options.items() if k != "handle"}, sm_version=90)

        def __getattr__(self, name: str) -> Any:
            if name in ("build_operation_graph", "create_execution_plans", "check_support", "build_plans"):
                return lambda *args: None
            return (lambda: 0) if name == "get_workspace_size" else getattr(self._graph, name)

    class Module:
        data_type, diagonal_alignment, heur_mode = cudnn.data_type, cudnn.diagonal_alignment, cudnn.heur_mode
        pygraph = Validated

    return Module


@pytest.mark.parametrize("head_dim", [16, 64, 128, 256])
@pytest.mark.parametrize("heads", [(4, 4), (8, 1)])
def test_cudnn_front_end_validates_our_graphs(heads: tuple[int, int], head_dim: int) -> None:
    front_end, dtype = _front_end(), torch.bfloat16
    tables = [CASES[n].table for n in ("causal", "inverse_causal", "full", "window", "documents", "random_2")]
    for table in tables:
        work = CudnnBackend().prepare(table, 259, 259, CPU)
        q, k = (torch.empty(259, h, head_dim, dtype=dtype, device="meta") for h in heads)
        for calls, backward in ((work.forward, False), (work.backward, True)):
            for call in calls:
                _build(front_end, None, _graph_key(call, q[call.q_span], k[call.k_span], 0.1, backward=backward))
    wrong = q[..., : head_dim - 3]
    with pytest.raises(Exception, match="multiple of 8"):
        _build(front_end, None, _graph_key(call, wrong, k[..., : head_dim - 3], 0.1, backward=False))
