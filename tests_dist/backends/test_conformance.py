"""Every local kernel that runs on the CPU for real, against dense fp64 (one process)."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable
from typing import Any

import pytest
import torch

import cpattn
from cpattn import AttnMaskSpec
from cpattn.backends import sdpa_cpu
from cpattn.backends.flex import FlexBackend
from cpattn.backends.reference import ReferenceBackend
from cpattn.backends.sdpa_cpu import CpuSdpaBackend
from cpattn.masks.spec import lower_mask
from tests_dist.support.backend_cases import CASES, DTYPES, LARGE, check_backend
from tests_dist.support.masks import MASKS
from tests_dist.support.oracle import dense_attention, make_inputs
from tests_dist.support.profiles import each_once, few_of, pairs

BACKENDS = {"reference": ReferenceBackend(), "sdpa": CpuSdpaBackend(), "flex": FlexBackend()}
# Cases that every dtype and number of parts runs.
OFTEN = {"causal", "window", "documents", "random_2", "empty", "softcap"}


def worth_it(backend: str, name: str, dtype: torch.dtype) -> bool:
    """Large tables run in one wide and one narrow dtype; flex, traced anew for every shape and dtype, most in two."""
    both = dtype in (torch.float32, torch.bfloat16)
    return both or (name not in LARGE and (backend != "flex" or name in OFTEN))


GRID = [case for case in itertools.product(BACKENDS, CASES, DTYPES) if worth_it(*case)]
FLEX_OFTEN = OFTEN | {"bi_causal", "one_query", "grouped_heads", "narrow_values", "head_dim_256", "wide_window"}


def shows(case: tuple[str, str, torch.dtype]) -> Iterable[Hashable]:
    """Every pair; of flex, whose tracing takes most of the time, by default with some of the tables."""
    return () if case[0] == "flex" and case[1] not in FLEX_OFTEN else pairs(case)


@pytest.mark.parametrize(("backend", "name", "dtype"), few_of(GRID, shows))
def test_backend_is_as_exact_as_plain_attention(backend: str, name: str, dtype: torch.dtype) -> None:
    kernel = BACKENDS[backend]
    refusal = kernel.refusal(CASES[name].problem(dtype))
    if refusal is not None:
        pytest.skip(refusal)
    check_backend(kernel, name, dtype)
    if backend == "sdpa" or name in OFTEN:
        check_backend(kernel, name, dtype, num_parts=1)


@each_once(name=[name for name in CASES if name not in LARGE | {"softcap"}], threads=[1, 3])
def test_heads_called_one_by_one(name: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as there are threads, with copies of q, k and v: what large tiles get, here for all."""
    monkeypatch.setattr(sdpa_cpu, "_MANY_ROWS", 1)
    monkeypatch.setattr(sdpa_cpu, "_MANY_KEYS", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for dtype in (torch.float32, torch.bfloat16):
        check_backend(BACKENDS["sdpa"], name, dtype)


@pytest.mark.parametrize("name", ["causal", "window", "bi_causal", "grouped_heads"])
def test_tiles_cut_for_16_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long tiles are in backward, so that few sums are made in 16 bits; here short ones, too."""
    monkeypatch.setattr(sdpa_cpu, "_MAX_HALF_ROWS", 16)
    monkeypatch.setattr(sdpa_cpu, "_MAX_HALF_KEYS", 32)
    check_backend(BACKENDS["sdpa"], name, torch.bfloat16, num_parts=1)


def test_parts_of_a_tile_share_calls_and_keys() -> None:
    """Of the 136 squares of 2048 rows that 32K causal rows are."""
    table = lower_mask(AttnMaskSpec.causal(32768))
    work = CpuSdpaBackend().prepare(table, 32768, 32768, torch.device("cpu"))
    calls = work.calls(torch.bfloat16, backward=True)
    assert len(calls) <= 50
    assert max(max(call.num_rows, call.num_keys) for call in calls) <= 2048


def test_kernels_get_no_lse_of_minus_infinity(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that sees nothing has +inf in backward: exp(score - inf) is 0 for kernels that touch such rows, too."""
    seen = []
    backward = ReferenceBackend.backward

    def spy(self: ReferenceBackend, *operands: Any, **options: Any) -> None:
        seen.append(operands[0].lse)
        backward(self, *operands, **options)

    monkeypatch.setattr(ReferenceBackend, "backward", spy)
    inputs = make_inputs(MASKS["holes"], heads=(2, 1), head_dim=16)
    key = cpattn.make_key(MASKS["holes"], num_heads_q=2, num_heads_kv=1, head_dim=16, backend="reference")
    leaves = [t.requires_grad_() for t in inputs[:3]]
    torch.autograd.grad(cpattn.attention(*leaves, key), leaves, inputs.dout)
    (lse,) = seen
    assert (lse[50:70] == torch.inf).all()
    assert not (lse == -torch.inf).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sinks_and_softcap_through_attention(backend: str, softcap: float | None, dtype: torch.dtype) -> None:
    """A sink is folded in after the merge, so every backend has it; gradient of the sink too."""
    spec = AttnMaskSpec.sliding_window([70, 31], 20)
    inputs = make_inputs(spec, heads=(4, 2), head_dim=32, head_dim_v=16, dtype=dtype)
    key = cpattn.make_key(
        spec, num_heads_q=4, num_heads_kv=2, head_dim=32, head_dim_v=16, backend=backend
    )
    if softcap is not None and backend == "sdpa":
        with pytest.raises(ValueError, match="torch's CPU flash kernel has no softcap"):
            cpattn.attention(*inputs[:3], key, softcap=softcap)
        return
    sink = torch.tensor([0.3, -1.0, 2.0, 0.0])
    leaves = [t.clone().requires_grad_() for t in (*inputs[:3], sink)]
    out = cpattn.attention(*leaves[:3], key, sink=leaves[3], softcap=softcap)
    grads = torch.autograd.grad(out, leaves, inputs.dout)
    wide = [t.double().requires_grad_() for t in (*inputs[:3], sink)]
    scale = 32**-0.5
    truth, _ = dense_attention(*wide[:3], spec.to_dense(), scale=scale, softcap=softcap, sink=wide[3])
    expected = torch.autograd.grad(truth, wide, inputs.dout.double())
    tolerance = 2e-5 if dtype == torch.float32 else 4e-2
    for mine, exact in zip((out, *grads), (truth, *expected), strict=True):
        torch.testing.assert_close(mine.double(), exact, atol=tolerance, rtol=tolerance)
