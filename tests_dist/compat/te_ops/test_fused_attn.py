"""One process: fused attention, forward and backward, in every combination of the contract, against its dense form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cpattn.te_ops import fused_attn, fused_attn_bwd, fused_attn_fwd
from cpattn.te_ops.dense import dropout_keep
from tests_dist.compat.te_ops.contract import (
    Case,
    Placed,
    Results,
    Sequences,
    all_cases,
    features,
    make_sequences,
    place,
    read,
    read_stats,
    reference,
)
from tests_dist.support.profiles import few_of, pairs

CASES = all_cases()
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}


def test_there_are_at_least_400_cases():
    assert len({str(case) for case in CASES}) == len(CASES) >= 400


def run(case: Case, s: Sequences, placed: Placed, **options: Any) -> tuple[Results, dict[str, Tensor]]:
    """Forward and backward through the operation; results by sequence, and every row that belongs to none."""
    padded = {n: t for n, t in placed.arguments.items() if n.endswith("_padded")}
    shared = {
        n: t for n, t in placed.arguments.items() if not n.startswith(("page_table", "cu_seqlens_")) or n in padded
    }
    shared |= {n: placed.arguments[n] for n in ("cu_seqlens_q", "cu_seqlens_kv")}
    tables = {n: t for n, t in placed.arguments.items() if n.startswith("page_table")}
    forward: dict[str, Any] = {**shared, **tables, "attn_bias": s.bias, "softmax_offset": s.offset, **options}
    if options.get("impl") != "te":
        forward["rng_gen"] = torch.Generator().manual_seed(3)
        forward["return_max_logit"] = True
    out, aux, *maximum = fused_attn_fwd(True, q=placed.q, k=placed.k, v=placed.v, **forward)
    fmt_q, fmt_kv = case.formats
    assert out.dtype == placed.q.dtype
    outs, rest = read(out, fmt_q, placed.q_slots, case.lens_q)
    got = Results(outs, read_stats(aux[0], fmt_q, placed.q_slots, case.lens_q), maximum[0] if maximum else None)
    others = {"out": rest, "rng_state": aux[1]}
    if case.paged:
        return got, others
    dq, dk, dv, got.dbias, got.doffset = fused_attn_bwd(
        q=placed.q, k=placed.k, v=placed.v, o=out, d_o=placed.dout, aux_ctx_tensors=aux, **shared, **options
    )
    got.dq, others["dq"] = read(dq, fmt_q, placed.q_slots, case.lens_q)
    got.dk, others["dk"] = read(dk, fmt_kv, placed.kv_slots, case.lens_kv)
    got.dv, others["dv"] = read(dv, fmt_kv, placed.kv_slots, case.lens_kv)
    if case.interleaved:
        assert dk.untyped_storage().data_ptr() == dv.untyped_storage().data_ptr(), "dk and dv share a buffer"
    return got, others


def keep_masks(case: Case, rng_state: Tensor) -> list[Tensor] | None:
    if not case.dropout:
        return None
    heads = torch.arange(case.heads[0])
    return [
        dropout_keep(rng_state, case.dropout, b, heads, torch.arange(sq), torch.arange(sk))
        for b, (sq, sk) in enumerate(zip(case.lens_q, case.lens_kv, strict=True))
    ]


def compare(case: Case, got: Results, truth: Results, *, max_logit: bool = True) -> None:
    tolerance = TOLERANCE[case.dtype]
    names = ["out", "stats"] + ([] if case.paged else ["dq", "dk", "dv"])
    for name in names:
        for b, (mine, exact) in enumerate(zip(getattr(got, name), getattr(truth, name), strict=True)):
            assert mine.shape == exact.shape, f"{name} of sequence {b}"
            torch.testing.assert_close(
                mine.double(), exact, atol=tolerance, rtol=tolerance, msg=lambda m, n=name, b=b: f"{n}[{b}]: {m}"
            )
    if case.bias and not case.paged:
        torch.testing.assert_close(got.dbias.double(), truth.dbias, atol=4 * tolerance, rtol=tolerance)
    if case.softmax == "learnable" and not case.paged:
        torch.testing.assert_close(got.doffset.double(), truth.doffset, atol=4 * tolerance, rtol=tolerance)
    if max_logit and got.max_logit is not None:
        torch.testing.assert_close(got.max_logit.double(), truth.max_logit, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", few_of(CASES, lambda case: pairs(features(case))), ids=str)
def test_equals_the_contract(case):
    s = make_sequences(case)
    got, others = run(case, s, place(case, s))
    truth = reference(case, s, keep_masks(case, others.pop("rng_state")), backward=not case.paged)
    compare(case, got, truth)
    for name, rows in others.items():
        assert not rows.any(), f"{name}: rows outside all sequences are 0, though their inputs are NaN"


GRADCHECKS = [
    Case("bshd_bshd_bshd", "no_mask"),
    Case("sbhd_sbhd_sbhd", "causal_bottom_right", softmax="off-by-one"),
    Case("thd_thd_thd", "padding_causal", (2, 0), softmax="learnable"),
    Case("thd_thd_thd", "padding", (2, 1)),
    Case("bshd_bshd_bshd", "padding_causal_bottom_right", bias="1h"),
    Case("bshd_bshd_bshd", "causal", bias="b1", softmax="learnable", dropout=0.4),
    Case("bhsd_bhsd_bhsd", "padding", dropout=0.3),
    Case("thd_bshd_bshd", "padding_causal"),
]


@pytest.mark.parametrize("case", GRADCHECKS, ids=str)
def test_gradcheck_in_fp64(case):
    """Finite differences of the autograd wrapper, through every differentiable argument."""
    case = Case(
        **{**case.__dict__, "lens_q": (3, 2), "lens_kv": (4, 2), "room": (3, 4), "heads": (2, 1), "dims": (3, 2)}
    )
    case = Case(**{**case.valid().__dict__, "dtype": torch.float64})
    s = make_sequences(case)
    placed = place(case, s)
    options = {n: v for n, v in placed.arguments.items() if not n.startswith(("cu_seqlens_q_", "cu_seqlens_kv_"))}
    padded = {n: v for n, v in placed.arguments.items() if n.endswith("_padded")}
    tensors = [t.nan_to_num(0.5).requires_grad_() for t in (placed.q, placed.k, placed.v)]
    extras = [None if t is None else t.double().requires_grad_() for t in (s.bias, s.offset)]

    def call(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
        given = list(rest)
        bias = None if extras[0] is None else given.pop(0)
        offset = None if extras[1] is None else given.pop(0)
        generator = torch.Generator().manual_seed(5)
        return fused_attn(q, k, v, attn_bias=bias, softmax_offset=offset, rng_gen=generator, **options, **padded)

    inputs = [*tensors, *(t for t in extras if t is not None)]
    assert torch.autograd.gradcheck(call, inputs, eps=1e-6, atol=1e-7)


def test_parts_with_global_out_and_stats_add_up():
    """The backward of a part of the keys takes the whole's out and stats: the parts' gradients are the whole's."""
    case = Case("bshd_bshd_bshd", "no_mask", dtype=torch.float64).valid()
    s = make_sequences(case)
    placed = place(case, s)
    whole, _ = run(case, s, placed)
    out, aux = fused_attn_fwd(True, q=placed.q, k=placed.k, v=placed.v, **placed.arguments)
    total = torch.zeros_like(placed.q)
    for part in (slice(0, 4), slice(4, 9)):
        arguments = dict(placed.arguments) | {"max_seqlen_kv": part.stop - part.start}
        arguments["cu_seqlens_kv"] = torch.arange(4, dtype=torch.int32) * (part.stop - part.start)
        dq, *_ = fused_attn_bwd(
            q=placed.q,
            k=placed.k[:, part],
            v=placed.v[:, part],
            o=out,
            d_o=placed.dout,
            aux_ctx_tensors=aux,
            **arguments,
        )
        total += dq
    torch.testing.assert_close(total, torch.stack(whole.dq), atol=1e-13, rtol=0)


def test_dropout_drops_as_often_as_asked_and_repeats():
    """With v the identity, out shows the dropped probabilities themselves: 0, or p / (1 - dropout)."""
    keys = 64
    case = Case("bshd_bshd_bshd", "no_mask", heads=(8, 8), dims=(8, keys), lens_q=(keys,) * 3, lens_kv=(keys,) * 3)
    case = Case(**{**case.__dict__, "room": (keys, keys)})
    s = make_sequences(case)
    placed = place(case, s)
    placed.v = torch.eye(keys)[None, :, None, :].expand(3, keys, 8, keys).contiguous()
    arguments = {**placed.arguments, "q": placed.q, "k": placed.k, "v": placed.v}
    plain, _ = fused_attn_fwd(True, **arguments)
    arguments["dropout"] = 0.25
    generator = torch.Generator().manual_seed(1)
    first, aux = fused_attn_fwd(True, **arguments, rng_gen=generator)
    second, other = fused_attn_fwd(True, **arguments, rng_gen=generator)
    again, _ = fused_attn_fwd(True, **arguments, rng_gen=torch.Generator().manual_seed(1))
    assert torch.equal(first, again)
    assert not torch.equal(aux[1], other[1])
    kept = first != 0
    torch.testing.assert_close(first[kept], plain[kept] / 0.75)
    assert abs(kept.double().mean().item() - 0.75) < 0.005
    independent = ((first != 0) & (second != 0)).double().mean().item()
    assert abs(independent - 0.75**2) < 0.005
    per_head = kept.double().mean((0, 1, 3))
    per_key = kept.double().mean((0, 1, 2))
    assert (per_head - 0.75).abs().max() < 0.02
    assert (per_key - 0.75).abs().max() < 0.06


def test_full_dropout_gives_zero():
    case = Case("bshd_bshd_bshd", "causal", dropout=1.0).valid()
    s = make_sequences(case)
    placed = place(case, s)
    got, _ = run(case, s, placed)
    assert not any(t.any() for t in (*got.out, *got.dq, *got.dk, *got.dv))


def test_large_magnitudes_stay_finite():
    case = Case("thd_thd_thd", "padding_causal", softmax="learnable").valid()
    s = make_sequences(case)
    s.q = [100 * t for t in s.q]
    got, _ = run(case, s, place(case, s))
    truth = reference(case, s)
    for name in ("out", "stats", "dq", "dk", "dv"):
        for mine, exact in zip(getattr(got, name), getattr(truth, name), strict=True):
            torch.testing.assert_close(mine.double(), exact, atol=1e-3, rtol=1e-4)


def test_largest_logit_where_all_are_negative():
    """A maximum that began at 0 would stay there; a head that sees nothing has none."""
    case = Case("thd_thd_thd", "padding_causal").valid()
    s = make_sequences(case)
    s.q, s.k = [t.abs() for t in s.q], [-t.abs() - 0.1 for t in s.k]
    got, _ = run(case, s, place(case, s))
    truth = reference(case, s)
    assert (truth.max_logit < 0).all()
    torch.testing.assert_close(got.max_logit.double(), truth.max_logit, atol=1e-5, rtol=1e-5)
    empty = Case("thd_thd_thd", "padding", lens_q=(0, 2), lens_kv=(3, 0))
    s = make_sequences(empty)
    got, _ = run(empty, s, place(empty, s))
    assert (got.max_logit == -torch.inf).all()


def test_meaning_of_max_seqlen_in_packed_layouts():
    """Only a bound there: a larger one changes nothing."""
    case = Case("thd_thd_thd", "padding_causal_bottom_right").valid()
    s = make_sequences(case)
    placed = place(case, s)
    first, _ = run(case, s, placed)
    placed.arguments |= {"max_seqlen_q": 100, "max_seqlen_kv": 200}
    second, _ = run(case, s, placed)
    assert all(torch.equal(a, b) for a, b in zip(first.out, second.out, strict=True))
