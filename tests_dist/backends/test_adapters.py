"""Adapters of GPU kernels against fakes that enforce the real contract (CPU, one process)."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from cpattn.backends import Backend
from cpattn.backends.cudnn import CudnnBackend
from cpattn.backends.ffa import FfaBackend
from cpattn.backends.flash_attn import FlashAttnBackend
from cpattn.backends.sdpa_cuda import CudaSdpaBackend
from cpattn.backends.te import TeBackend
from cpattn.backends.varlen import plan_varlen, writes_once
from tests_dist.support.backend_cases import CASES, DTYPES, LARGE, check_backend
from tests_dist.support.fakes import flash, ragged
from tests_dist.support.fakes.dense import ContractError
from tests_dist.support.fakes.installed import put_module
from tests_dist.support.profiles import few_of

Install = Callable[[str, ModuleType], None]


def _sdpa(broken: str | None, install: Install) -> Backend:
    return CudaSdpaBackend("cpu", flash.FakeAten(broken))


def _flash(generation: int) -> Callable[[str | None, Install], Backend]:
    make = {2: flash.flash_attn_2, 3: flash.flash_attn_3, 4: flash.flash_attn_4}[generation]

    def build(broken: str | None, install: Install) -> Backend:
        module = make(broken)
        install(module.__name__, module)
        return FlashAttnBackend(generation, "cpu")

    return build


def _te(version: str) -> Callable[[str | None, Install], Backend]:
    def build(broken: str | None, install: Install) -> Backend:
        for name, module in ragged.transformer_engine(broken, version=version).items():
            install(name, module)
        return TeBackend("cpu")

    return build


def _cudnn(broken: str | None, install: Install) -> Backend:
    install("cudnn", ragged.cudnn(broken))
    return CudnnBackend("cpu")


def _ffa(token_major: bool, meta: bool) -> Callable[[str | None, Install], Backend]:
    def build(broken: str | None, install: Install) -> Backend:
        module = ragged.ffa(broken, token_major=token_major, meta=meta)
        install(module.__name__, module)
        return FfaBackend("cpu")

    return build


ADAPTERS: dict[str, tuple[Callable[[str | None, Install], Backend], tuple[str, ...]]] = {
    "sdpa_cuda": (_sdpa, flash.BREAKABLE),
    "flash_attn_2": (_flash(2), flash.BREAKABLE),
    "flash_attn_3": (_flash(3), flash.BREAKABLE),
    "flash_attn_4": (_flash(4), flash.BREAKABLE),
    "te_2.12": (_te("2.12"), ragged.BREAKABLE),
    "te_2.20": (_te("2.20"), ragged.BREAKABLE),
    "cudnn": (_cudnn, ragged.BREAKABLE),
    "ffa_1.1": (_ffa(True, True), flash.BREAKABLE),
    "ffa_1.0.5": (_ffa(True, False), flash.BREAKABLE),
    "ffa_before_sinks": (_ffa(False, False), flash.BREAKABLE),
}


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Puts a fake module, and its parents, where imports find it."""

    def put(name: str, module: ModuleType) -> None:
        put_module(name, module, lambda n, m: monkeypatch.setitem(sys.modules, n, m))

    return put


GRID = [
    (adapter, name, dtype)
    for adapter, name, dtype in itertools.product(ADAPTERS, (name for name in CASES if name not in LARGE), DTYPES)
    if dtype.itemsize == 2 or (adapter, dtype) == ("sdpa_cuda", torch.float32)
]
OFTEN = ("causal_more_keys", "window", "documents", "random_0")


def shows(case: tuple[str, str, torch.dtype]) -> Iterator[tuple[Any, ...]]:
    """Every table on every kernel, a few on every version of it; every dtype on both."""
    adapter, name, dtype = case
    yield re.sub(r"_\d.*|_before.*", "", adapter), name
    yield from [(adapter, dtype), (name, dtype)]
    if name in OFTEN:
        yield adapter, name


@pytest.mark.parametrize(("adapter", "name", "dtype"), few_of(GRID, shows))
def test_adapter_conforms(adapter: str, name: str, dtype: torch.dtype, install: Install) -> None:
    backend = ADAPTERS[adapter][0](None, install)
    refusal = backend.refusal(CASES[name].problem(dtype))
    if refusal is not None:
        pytest.skip(refusal)
    check_backend(backend, name, dtype)
    check_backend(backend, name, dtype, num_parts=1)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapter_refuses_dtypes_in_words(adapter: str, install: Install) -> None:
    backend = ADAPTERS[adapter][0](None, install)
    assert "dtype float64 is not one of" in str(backend.refusal(CASES["causal"].problem(torch.float64)))
    assert "the tensors are on" in str(backend.refusal(CASES["causal"].problem(torch.bfloat16, "cuda")))


# Thresholds that send the small tables of the suite down the paths of large ones.
EXTREMES: dict[str, list[tuple[str, int]]] = {
    "no gathering": [("varlen.GATHER_BELOW_ROWS", 0)],
    "little gathering": [("varlen.GATHER_BELOW_ROWS", 120), ("varlen.MAX_GATHERED_ROWS", 200)],
    "any window": [("varlen.MAX_WINDOWS", 1000), ("offsets.MAX_WINDOWS", 1000)],
    "no window": [("varlen.MAX_WINDOWS", 0), ("offsets.MAX_WINDOWS", 0)],
}


@pytest.mark.parametrize("extreme", EXTREMES)
@pytest.mark.parametrize("adapter", ["sdpa_cuda", "te_2.12", "cudnn"])
def test_adapter_conforms_at_extremes(
    adapter: str, extreme: str, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in EXTREMES[extreme]:
        monkeypatch.setattr(f"cpattn.backends.{name}", value)
    backend = ADAPTERS[adapter][0](None, install)
    for name in ("window", "documents", "two_windows", "shared_prefix", "random_0", "random_2", "random_3"):
        check_backend(backend, name, torch.bfloat16, num_parts=1)
        check_backend(backend, name, torch.bfloat16, num_parts=3)


def test_documents_take_one_call_without_a_copy() -> None:
    """Neighbours in both buffers are a batch on views, whatever their lengths."""
    work = plan_varlen(CASES["documents"].table, torch.device("cpu"))
    assert len(work.forward) == len(work.backward) == 1
    call = work.forward[0]
    assert (call.q_rows, call.k_rows, call.left, call.right) == (slice(0, 259), slice(0, 259), -1, 0)
    assert writes_once(work)


def test_graphs_are_built_once_for_a_class_of_sizes(install: Install) -> None:
    backend = _cudnn(None, install)
    assert isinstance(backend, CudnnBackend)
    for name in ("documents", "causal", "causal_more_keys"):
        check_backend(backend, name, torch.bfloat16, num_parts=1)
    # Heads differ between the three, and forward and backward are two graphs.
    built = len(backend._graphs)
    check_backend(backend, "documents", torch.bfloat16, num_parts=1)
    assert len(backend._graphs) == built <= 6


@pytest.mark.parametrize(
    ("adapter", "rule"), [(adapter, rule) for adapter, (_, rules) in ADAPTERS.items() for rule in rules]
)
def test_a_kernel_that_breaks_a_rule_is_found_out(adapter: str, rule: str, install: Install) -> None:
    backend = ADAPTERS[adapter][0](rule, install)
    failed = []
    for name in ("causal_more_keys", "window", "documents", "random_0"):
        try:
            check_backend(backend, name, torch.bfloat16)
        except (AssertionError, ContractError):
            failed.append(name)
    assert failed, f"the suite passes on a kernel that breaks {rule}"
