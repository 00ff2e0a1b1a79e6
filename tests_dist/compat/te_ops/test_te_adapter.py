"""One process: `impl="te"` against a fake TransformerEngine that enforces its contract, and refusals with its reasons.

TransformerEngine itself needs a GPU and is not installed in CI: what is tested is that our calls satisfy its contract
in two of its versions, and that what it would refuse is refused before the call.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cpattn.te_ops import (
    convert_bshd_to_thd,
    convert_thd_to_bshd,
    copy_to_kv_cache,
    fused_attn_fwd,
    te_installed,
    te_refusal,
)
from cpattn.te_ops.te_import import call_te
from tests_dist.compat.te_ops import fake_te
from tests_dist.compat.te_ops.contract import Case, all_cases, features, make_sequences, place, reference
from tests_dist.compat.te_ops.test_fused_attn import compare, run
from tests_dist.support.profiles import covering, pairs

# The combinations as 16-bit ones, which is all that TransformerEngine takes. Its dropout has its own stream.
CASES = list(
    dict.fromkeys(
        replace(case, dtype=torch.float16 if case.dtype == torch.float16 else torch.bfloat16)
        for case in all_cases()
        if not case.dropout
    )
)


def refusal(case: Case) -> str | None:
    s = make_sequences(case)
    placed = place(case, s)
    return te_refusal(**{**placed.arguments, "q": placed.q, "k": placed.k, "v": placed.v})


REFUSED = {case for case in CASES if refusal(case) is not None}
SERVED = [case for case in CASES if case not in REFUSED]
FEW = [SERVED[number] for number in covering([frozenset(pairs(features(case))) for case in SERVED])]


@pytest.mark.parametrize("served", [FEW, pytest.param(SERVED, marks=pytest.mark.nightly)], ids=["few", "all"])
@pytest.mark.parametrize("version", ["2.12", "2.20"])
def test_what_te_serves_passes_its_contract_and_gives_the_same(version, served, monkeypatch):
    """Served combinations; two of three versions of one case differ in a digit at most."""
    fake_te.install(monkeypatch, version)
    assert te_installed()
    assert len(SERVED) >= 400
    for case in served:
        if version == "2.12" and case.layout == "bhsd_bhsd_bhsd":
            continue
        s = make_sequences(case)
        got, others = run(case, s, place(case, s), impl="te")
        others.pop("rng_state")
        compare(case, got, reference(case, s, backward=not case.paged))
        assert not any(rows.any() for rows in others.values()), str(case)


def test_what_te_refuses_is_refused_before_the_call(monkeypatch):
    calls = fake_te.install(monkeypatch, "2.20")
    assert len(REFUSED) >= 50
    for case in REFUSED:
        s = make_sequences(case)
        placed = place(case, s)
        arguments = {**placed.arguments, "q": placed.q, "k": placed.k, "v": placed.v}
        arguments |= {"attn_bias": s.bias, "softmax_offset": s.offset}
        with pytest.raises(ValueError, match="TransformerEngine refuses this call"):
            fused_attn_fwd(True, **arguments, impl="te")
        # The fake, which knows the contract and not our list, refuses the same.
        absent = dict.fromkeys(("fake_dtype", "cu_seqlens_q_padded", "cu_seqlens_kv_padded"))
        arguments = {"is_training": True, "return_max_logit": False, **absent, **arguments}
        with pytest.raises(AssertionError):
            call_te(fused_attn_fwd, arguments)
    assert calls == []


def test_old_versions_without_an_argument_are_named(monkeypatch):
    fake_te.install(monkeypatch, "1.x")
    case = Case("bshd_bshd_bshd", "causal", softmax="learnable", dtype=torch.bfloat16).valid()
    s = make_sequences(case)
    with pytest.raises(ValueError, match=r"installed TransformerEngine's fused_attn_fwd has no argument softmax_"):
        run(case, s, place(case, s), impl="te")


def test_without_te_the_error_names_the_way_out():
    case = Case("bshd_bshd_bshd", "causal", dtype=torch.bfloat16).valid()
    s = make_sequences(case)
    if te_installed():
        pytest.skip("TransformerEngine is installed")
    with pytest.raises(ValueError, match="impl='te' needs CUDA tensors"):
        run(case, s, place(case, s), impl="te")


def test_missing_te_is_a_clear_error(monkeypatch):
    if te_installed():
        pytest.skip("TransformerEngine is installed")
    monkeypatch.setattr("cpattn.te_ops.te_import._require_cuda", lambda x: None)
    case = Case("bshd_bshd_bshd", "causal", dtype=torch.bfloat16).valid()
    s = make_sequences(case)
    with pytest.raises(RuntimeError, match=r"needs TransformerEngine, and importing .* failed"):
        run(case, s, place(case, s), impl="te")


def test_extension_functions_get_their_arguments_in_order(monkeypatch):
    calls = fake_te.install(monkeypatch, "2.12")
    cu = torch.tensor([0, 2, 3], dtype=torch.int32)
    x = torch.zeros(3, 1, 8)
    convert_thd_to_bshd(x, cu, 2, 4, impl="te")
    convert_bshd_to_thd(torch.zeros(2, 4, 1, 8), cu, 3, impl="te")
    cache = torch.zeros(4, 2, 1, 8)
    table = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
    copy_to_kv_cache(x, x, cache, cache, table, cu, cu, "thd", 2, 2, 4, 2, False, impl="te")
    assert [name for name, _ in calls] == ["convert_thd_to_bshd", "convert_bshd_to_thd", "copy_to_kv_cache"]
    assert calls[0][1][2:] == (2, 4)
    assert calls[1][1][2:] == (3,)
    assert calls[2][1][7:] == ("THD", 2, 2, 4, 2, False)
