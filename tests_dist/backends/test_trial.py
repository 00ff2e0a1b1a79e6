"""A kernel tried on slices: right ones agree with `reference`, and what the fakes break on purpose is found out."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from cpattn.backends import Backend
from cpattn.backends.reference import ReferenceBackend
from cpattn.backends.sdpa_cpu import CpuSdpaBackend
from cpattn.backends.trial import Sample, rows_that_see, sampled_runs, thinned, try_kernel
from cpattn.solver import SliceTable
from tests_dist.backends.test_adapters import ADAPTERS, Install, install
from tests_dist.support.backend_cases import CASES

__all__ = ["install"]  # a fixture

CPU = torch.device("cpu")


def _sample(name: str, dtype: torch.dtype) -> Sample:
    case = CASES[name]
    return Sample.of(case.problem(dtype), case.table, case.num_queries, case.num_keys, CPU)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_right_kernels_agree(dtype: torch.dtype) -> None:
    for name in ("causal", "window", "documents", "random_1", "softcap", "empty", "one_pair", "wide_values", "full"):
        sample = _sample(name, dtype)
        for backend in (ReferenceBackend(), CpuSdpaBackend()):
            if backend.refusal(sample.problem) is None:
                trial = try_kernel(backend, sample)
                assert (trial.fault, trial.seconds < torch.inf) == ("", True), (name, trial)


@pytest.mark.parametrize(
    ("adapter", "rule"), [(adapter, rule) for adapter, (_, rules) in ADAPTERS.items() for rule in rules]
)
def test_broken_kernels_do_not(adapter: str, rule: str, install: Install) -> None:
    backend = ADAPTERS[adapter][0](rule, install)
    names = ("causal_more_keys", "window", "documents", "random_0")
    assert any(try_kernel(backend, _sample(name, torch.bfloat16)).fault for name in names)


class OffByOne(ReferenceBackend):
    """Its band begins a key late."""

    def prepare(self, slices: SliceTable, *args):  # type: ignore[no-untyped-def, override]
        q0, q1, k0, k1, lo, hi = slices.data.T
        return super().prepare(SliceTable.from_columns(q0, q1, k0, k1, lo + 1, hi), *args)


class Failing(ReferenceBackend):
    def forward(self, *args, **options):  # type: ignore[no-untyped-def, override]
        raise RuntimeError("an illegal memory access was encountered\nand more")


@pytest.mark.parametrize("backend", [OffByOne(), Failing()], ids=lambda b: type(b).__name__)
def test_faults_are_said(backend: Backend) -> None:
    trial = try_kernel(backend, _sample("window", torch.bfloat16))
    assert trial.seconds == torch.inf
    words = {Failing: "RuntimeError: an illegal memory access was encountered", OffByOne: "lse is off by"}
    assert words[type(backend)] in trial.fault  # type: ignore[index]
    assert "\n" not in trial.fault


def test_what_is_sampled() -> None:
    """Rows at both ends of slices; blocks of a thinned table are spread over it; blind rows are known."""
    table = CASES["documents"].table
    runs = sampled_runs(table)
    assert runs[0] == (0, 3)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(runs))
    long = SliceTable.from_columns(0, 50_000, 0, 50_000, -50_000, 0)
    part = thinned(long, long.area() // 10)
    assert long.area() / 15 < part.area() < long.area() / 7
    assert part.q0.min() < 5_000
    assert part.q1.max() > 45_000
    for name in ("random_2", "empty", "one_query"):
        case = CASES[name]
        dense = case.table.to_dense(case.num_queries, case.num_keys).any(1)
        assert np.array_equal(rows_that_see(case.table, case.num_queries), dense)
