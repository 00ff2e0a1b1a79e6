"""A stand-in for TransformerEngine that enforces its contract and computes with the dense reference.

It has the modules, signatures and enums that the adapter touches, in two versions, and refuses with an AssertionError
whatever the real one would refuse, misread or overrun. It says nothing about the kernels themselves: that takes a GPU.
"""

from __future__ import annotations

import enum
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from tests_dist.compat.te_ops.contract import (
    PADDED_LAYOUTS,
    PAGED_LAYOUTS,
    RAGGED_LAYOUTS,
    Case,
    Sequences,
    _from_rows,
    read,
    read_stats,
    reference,
)

NONE = object()


class FusedAttnBackend(enum.IntEnum):
    F16_max512_seqlen = 0
    F16_arbitrary_seqlen = 1
    FP8 = 2


TE_DTYPE = {torch.float16: "kFloat16", torch.bfloat16: "kBFloat16", torch.float32: "kFloat32"}


def install(monkeypatch: pytest.MonkeyPatch, version: str) -> list[str]:
    """Put the fake in sys.modules; returns the list in which it notes the functions that were called."""
    calls: list[str] = []

    def module(name: str, **content: Any) -> types.ModuleType:
        m = types.ModuleType(name)
        vars(m).update(content)
        m.__path__ = []  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, m)
        return m

    module("transformer_engine")
    module("transformer_engine.pytorch")
    module("transformer_engine.pytorch.constants", TE_DType=TE_DTYPE)
    module("transformer_engine.pytorch.cpp_extensions")
    functions = {"2.12": (fwd_2_12, bwd_2_12), "2.20": (fwd_2_20, bwd_2_20), "1.x": (fwd_1_x, bwd_2_12)}[version]
    module(
        "transformer_engine.pytorch.cpp_extensions.fused_attn",
        FusedAttnBackend=FusedAttnBackend,
        fused_attn_fwd=functions[0],
        fused_attn_bwd=functions[1],
    )
    formats = types.SimpleNamespace(NVTE_BSHD="BSHD", NVTE_SBHD="SBHD", NVTE_THD="THD")
    extension = module("transformer_engine_torch", NVTE_QKV_Format=formats)
    for name in ("convert_thd_to_bshd", "convert_bshd_to_thd", "copy_to_kv_cache", "fa_prepare_fwd", "fa_prepare_bwd"):
        setattr(extension, name, lambda *a, name=name: calls.append((name, a)))  # type: ignore[misc]
    monkeypatch.setattr("cpattn.te_ops.te_import._require_cuda", lambda x: None)
    return calls


def fwd_2_12(
    is_training: bool,
    max_seqlen_q: int,
    max_seqlen_kv: int,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fake_dtype: torch.dtype,
    fused_attention_backend: Any,
    attn_bias: Tensor | None = None,
    cu_seqlens_q_padded: Tensor | None = None,
    cu_seqlens_kv_padded: Tensor | None = None,
    page_table_k: Tensor | None = None,
    page_table_v: Tensor | None = None,
    s_quantizer: Any = None,
    o_quantizer: Any = None,
    attn_scale: float | None = None,
    dropout: float = 0.0,
    fast_zero_fill: bool = True,
    qkv_layout: str = "sbh3d",
    attn_bias_type: str = "no_bias",
    attn_mask_type: str = "padding",
    softmax_type: str = "vanilla",
    window_size: tuple[int, int] = (-1, -1),
    bottom_right_diagonal: bool | None = None,
    rng_gen: Any = None,
    softmax_offset: Tensor | None = None,
    return_max_logit: bool = False,
    cuda_graph: bool = False,
) -> tuple[Any, ...]:
    return _forward(locals(), "2.12")


def fwd_1_x(
    is_training: bool,
    max_seqlen_q: int,
    max_seqlen_kv: int,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fake_dtype: torch.dtype,
    fused_attention_backend: Any,
    attn_bias: Tensor | None = None,
    cu_seqlens_q_padded: Tensor | None = None,
    cu_seqlens_kv_padded: Tensor | None = None,
    s_quantizer: Any = None,
    o_quantizer: Any = None,
    attn_scale: float | None = None,
    dropout: float = 0.0,
    fast_zero_fill: bool = True,
    qkv_layout: str = "sbh3d",
    attn_bias_type: str = "no_bias",
    attn_mask_type: str = "padding",
    window_size: tuple[int, int] = (-1, -1),
    rng_gen: Any = None,
) -> tuple[Any, ...]:
    given = locals()
    defaults = {"page_table_k": None, "softmax_type": "vanilla", "softmax_offset": None, "return_max_logit": False}
    return _forward({**given, **defaults, "bottom_right_diagonal": None}, "1.x")


def fwd_2_20(
    is_training: bool,
    max_seqlen_q: int,
    max_seqlen_kv: int,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fake_dtype: torch.dtype,
    fused_attention_backend: Any,
    attn_bias: Tensor | None = None,
    cu_seqlens_q_padded: Tensor | None = None,
    cu_seqlens_kv_padded: Tensor | None = None,
    page_table_k: Tensor | None = None,
    page_table_v: Tensor | None = None,
    s_quantizer: Any = None,
    o_quantizer: Any = None,
    attn_scale: float | None = None,
    dropout: float = 0.0,
    fast_zero_fill: bool = True,
    qkv_layout: str = "sbh3d",
    o_format: str = "sbhd",
    attn_bias_type: str = "no_bias",
    attn_mask_type: str = "padding",
    softmax_type: str = "vanilla",
    window_size: tuple[int, int] = (-1, -1),
    bottom_right_diagonal: bool | None = None,
    rng_gen: Any = None,
    softmax_offset: Tensor | None = None,
    return_max_logit: bool = False,
    cuda_graph: bool = False,
    qkv_scale_inv_format: str | None = None,
) -> tuple[Any, ...]:
    return _forward(locals(), "2.20")


def bwd_2_12(
    max_seqlen_q: int,
    max_seqlen_kv: int,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    d_o: Tensor,
    fake_dtype: torch.dtype,
    dqkv_dtype: Any,
    aux_ctx_tensors: list[Tensor],
    fused_attention_backend: Any,
    cu_seqlens_q_padded: Tensor | None = None,
    cu_seqlens_kv_padded: Tensor | None = None,
    s_quantizer: Any = None,
    dp_quantizer: Any = None,
    dqkv_quantizer: Any = None,
    attn_scale: float | None = None,
    dropout: float = 0.0,
    fast_zero_fill: bool = True,
    qkv_layout: str = "sbh3d",
    attn_bias_type: str = "no_bias",
    attn_mask_type: str = "padding",
    softmax_type: str = "vanilla",
    window_size: tuple[int, int] = (-1, -1),
    bottom_right_diagonal: bool | None = None,
    deterministic: bool = False,
    cuda_graph: bool = False,
) -> list[Any]:
    assert dqkv_dtype == TE_DTYPE[q.dtype], "2.12 wants its own dtype enum for the gradients"
    return _backward(locals(), "2.12")


def bwd_2_20(
    max_seqlen_q: int,
    max_seqlen_kv: int,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    d_o: Tensor,
    fake_dtype: torch.dtype,
    aux_ctx_tensors: list[Tensor],
    fused_attention_backend: Any,
    cu_seqlens_q_padded: Tensor | None = None,
    cu_seqlens_kv_padded: Tensor | None = None,
    s_quantizer: Any = None,
    dp_quantizer: Any = None,
    dqkv_quantizer: Any = None,
    attn_scale: float | None = None,
    dropout: float = 0.0,
    fast_zero_fill: bool = True,
    qkv_layout: str = "sbh3d",
    o_format: str = "sbhd",
    do_format: str = "sbhd",
    dqkv_layout: str = "sbh3d",
    attn_bias_type: str = "no_bias",
    attn_mask_type: str = "padding",
    softmax_type: str = "vanilla",
    window_size: tuple[int, int] = (-1, -1),
    bottom_right_diagonal: bool | None = None,
    deterministic: bool = False,
    cuda_graph: bool = False,
) -> list[Any]:
    assert dqkv_layout == qkv_layout, "2.20's default of dqkv_layout is sbh3d"
    assert do_format == o_format
    return _backward(locals(), "2.20")


def _check(a: dict[str, Any], version: str) -> Case:
    """What TransformerEngine demands of both directions; the case that the arguments describe."""
    layout, mask, q, k, v = (a[n] for n in ("qkv_layout", "attn_mask_type", "q", "k", "v"))
    known = (*PADDED_LAYOUTS, *RAGGED_LAYOUTS, *PAGED_LAYOUTS)
    assert layout in known
    assert layout != "bhsd_bhsd_bhsd" or version == "2.20", "bhsd came with 2.20"
    batch = len(a["cu_seqlens_q"]) - 1
    case = Case(layout, mask, lens_q=(1,) * batch)
    fmt_q, fmt_kv = case.formats
    assert all(t.dtype in (torch.float16, torch.bfloat16) for t in (q, k, v)), "only FP8 and BF16/FP16"
    assert a["fake_dtype"] == q.dtype
    assert a["fused_attention_backend"] is FusedAttnBackend.F16_arbitrary_seqlen
    assert case.interleaved or all(t.is_contiguous() for t in (q, k, v)), "contiguous q, k, v"
    assert "padding" in mask or "thd" not in (fmt_q, fmt_kv), "Ragged QKV input requires padding"
    assert "padding" in mask or not case.paged, "Paged attention requires padding mask!"
    assert k.shape[-1] % 8 == 0
    assert v.shape[-1] % 8 == 0
    for side, fmt, x in (("q", fmt_q, q), ("kv", fmt_kv, k)):
        cu = a[f"cu_seqlens_{side}"]
        assert cu.dtype == torch.int32
        if fmt == "thd":
            padded = a[f"cu_seqlens_{side}_padded"]
            assert padded is not None, "a null pointer in a kernel"
            assert padded.dtype == torch.int32
            lens = cu.diff()
            assert (padded[:-1] + lens)[lens > 0].max() <= x.shape[0], "out of bounds"
            assert padded[-1] <= x.shape[0]
        elif not case.paged or side == "q":
            room = {"bshd": (0, 1), "sbhd": (1, 0), "bhsd": (0, 2)}[fmt]
            assert (x.shape[room[0]], x.shape[room[1]]) == (batch, a[f"max_seqlen_{side}"])
    if case.paged:
        assert a["page_table_k"].dtype == a["page_table_v"].dtype == torch.int32
    windowed = (
        a["window_size"][0] >= 0 or a["window_size"][1] > 0 or ("causal" not in mask and a["window_size"][1] == 0)
    )
    if "causal" in mask:
        assert a["window_size"][1] == 0, "causal means (left, 0)"
    assert not (windowed and a["dropout"]), "no window with dropout"
    assert not (windowed and a["attn_bias_type"] != "no_bias"), "no window with bias"
    assert not (windowed and a["max_seqlen_q"] > a["max_seqlen_kv"])
    assert a["attn_bias_type"] in ("no_bias", "post_scale_bias")
    assert a["attn_bias_type"] == "no_bias" or "padding" not in mask, "no bias with padding masks"
    if version == "2.20":
        assert a["o_format"] == fmt_q, "2.20's default of o_format is sbhd"

    def lens(side: str, fmt: str) -> tuple[int, ...]:
        if "padding" in mask:
            return tuple(a[f"cu_seqlens_{side}"].diff().tolist())
        return (a[f"max_seqlen_{side}"],) * batch

    heads = tuple(t.shape[1 if f == "bhsd" else -2] for t, f in ((q, fmt_q), (k, fmt_kv)))
    return Case(
        layout,
        mask,
        tuple(a["window_size"]),
        a["softmax_type"],
        heads=heads,  # type: ignore[arg-type]
        dims=(k.shape[-1], v.shape[-1]),
        bottom_right=a["bottom_right_diagonal"],
        dtype=q.dtype,
        scale=a["attn_scale"],
        lens_q=lens("q", fmt_q),
        lens_kv=lens("kv", fmt_kv),
        room=(a["max_seqlen_q"], a["max_seqlen_kv"]),
    )


def _slots(a: dict[str, Any], case: Case) -> tuple[list[int], list[int]]:
    return tuple(
        a[f"cu_seqlens_{side}_padded"][:-1].tolist()
        if fmt == "thd"
        else [i * a[f"max_seqlen_{side}"] for i in range(len(case.lens_q))]
        for side, fmt in zip(("q", "kv"), case.formats, strict=True)
    )  # type: ignore[return-value]


def _sequences(a: dict[str, Any], case: Case, dout: list[Tensor] | None = None) -> Sequences:
    fmt_q, fmt_kv = case.formats
    q_slots, kv_slots = _slots(a, case)
    q, _ = read(a["q"], fmt_q, q_slots, case.lens_q)
    if case.paged:
        k, v = (_paged(a[n], a["page_table_k"], fmt_kv, case.lens_kv) for n in ("k", "v"))
    else:
        k, v = (read(a[n], fmt_kv, kv_slots, case.lens_kv)[0] for n in ("k", "v"))
    if dout is None:
        dout = [torch.zeros(*t.shape[:2], case.dims[1]) for t in q]
    return Sequences(q, k, v, dout, a.get("attn_bias"), a.get("softmax_offset"))


def _paged(pages: Tensor, table: Tensor, fmt: str, lens: tuple[int, ...]) -> list[Tensor]:
    pages = pages.transpose(0, 1) if fmt == "sbhd" else pages
    size = pages.shape[1]
    return [
        torch.cat([pages[table[i, p]] for p in range(-(-n // size))] or [pages[0][:0]])[:n] for i, n in enumerate(lens)
    ]


def _scatter(parts: list[Tensor], like: Tensor, fmt: str, slots: list[int]) -> Tensor:
    """Parts written into a zero tensor of a format; other rows are 0, as TransformerEngine's zero-fill leaves them."""
    total = like.shape[0] if fmt == "thd" else like.shape[0] * like.shape[1]
    total = like.shape[0] * like.shape[2] if fmt == "bhsd" else total
    rows = torch.zeros(total, *parts[0].shape[1:], dtype=like.dtype)
    for part, slot in zip(parts, slots, strict=True):
        rows[slot : slot + len(part)] = part.to(like.dtype)
    return _from_rows(rows, fmt, len(parts))


def _forward(a: dict[str, Any], version: str) -> tuple[Any, ...]:
    case = _check(a, version)
    if a["attn_bias_type"] != "no_bias":
        assert a["attn_bias"].dtype == a["q"].dtype
    assert a["is_training"] or not a["dropout"]
    assert (a["softmax_type"] == "learnable") == (a["softmax_offset"] is not None)
    result = reference(case, _sequences(a, case), backward=False)
    fmt_q, (q_slots, _) = case.formats[0], _slots(a, case)
    out = _scatter(result.out, a["q"], fmt_q, q_slots)
    batch, heads = len(case.lens_q), case.heads[0]
    if fmt_q == "thd":  # padding rows of the stats are garbage
        stats = torch.full((a["q"].shape[0], heads, 1), torch.nan)
        for slot, s in zip(q_slots, result.stats, strict=True):
            stats[slot : slot + len(s), :, 0] = s
    else:
        stats = torch.full((batch, heads, a["max_seqlen_q"], 1), torch.nan)
        for i, s in enumerate(result.stats):
            stats[i, :, : len(s), 0] = s.T
    aux = [stats, torch.zeros(2, dtype=torch.int64)]
    aux += [t for t in (a["attn_bias"], a["softmax_offset"]) if t is not None]
    return (out, aux, result.max_logit) if a["return_max_logit"] else (out, aux)


def _backward(a: dict[str, Any], version: str) -> list[Any]:
    case = _check(a, version)
    assert not case.paged, "paged attention has no backward"
    aux = list(a["aux_ctx_tensors"])
    bias = aux.pop(2) if a["attn_bias_type"] != "no_bias" else None
    offset = aux.pop(2) if a["softmax_type"] == "learnable" else None
    stats, rng_state = aux
    assert rng_state.shape == (2,)
    fmt_q, fmt_kv = case.formats
    q_slots, kv_slots = _slots(a, case)
    dout, _ = read(a["d_o"], fmt_q, q_slots, case.lens_q)
    s = _sequences({**a, "attn_bias": bias, "softmax_offset": offset}, case, dout)
    result = reference(case, s)
    for mine, given in zip(result.stats, read_stats(stats, fmt_q, q_slots, case.lens_q), strict=True):
        torch.testing.assert_close(given.double(), mine, atol=1e-3, rtol=1e-3, msg="the stats are not the forward's")
    parts = [
        _scatter(grads, like, fmt, slots)
        for grads, like, fmt, slots in (
            (result.dq, a["q"], fmt_q, q_slots),
            (result.dk, a["k"], fmt_kv, kv_slots),
            (result.dv, a["v"], fmt_kv, kv_slots),
        )
    ]
    if case.interleaved:
        dim = -3 if case.layout.endswith(f"{case.interleaved}hd") else -2
        joined = torch.stack(parts[-case.interleaved :], dim=dim).unbind(dim)
        parts[-case.interleaved :] = joined
    return [*parts, result.dbias, result.doffset]
