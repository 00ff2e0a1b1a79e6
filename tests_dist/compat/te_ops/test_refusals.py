"""One process: calls that break the contract raise, with TransformerEngine's reason where it has one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cpattn.te_ops import fused_attn_bwd, fused_attn_fwd, parse_layout
from tests_dist.compat.te_ops.contract import Case, make_sequences, place


def call(layout: str = "bshd_bshd_bshd", mask: str = "padding", **changes: Any) -> Any:
    case = Case(layout, mask).valid()
    s = make_sequences(case)
    placed = place(case, s)
    arguments = {"is_training": True, "q": placed.q, "k": placed.k, "v": placed.v, **placed.arguments}
    for name, change in changes.items():
        arguments[name] = change(arguments) if callable(change) else change
    return fused_attn_fwd(**arguments)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


REFUSED = {
    "ragged without padding": (
        {"layout": "thd_thd_thd", "attn_mask_type": "causal"},
        "Ragged QKV input requires padding or padding_causal mask!",
    ),
    "paged without padding": (
        {"layout": "paged_kv_bshd_bshd_bshd", "attn_mask_type": "no_mask"},
        "Paged attention requires padding mask!",
    ),
    "bias missing": (
        {"attn_bias_type": "post_scale_bias"},
        "attn_bias tensor cannot be None when attn_bias_type is not no_bias or alibi.",
    ),
    "bias dtype": (
        {"attn_bias_type": "post_scale_bias", "attn_bias": torch.zeros(1, 4, 7, 9, dtype=torch.float64)},
        "attn_bias tensor must be in the same dtype as q and kv.",
    ),
    "bias shape": (
        {"attn_bias_type": "post_scale_bias", "attn_bias": torch.zeros(2, 4, 7, 9)},
        r"attn_bias has shape \(2, 4, 7, 9\): expected \[1 or 3, 1 or 4, 1 or 7, 9\]",
    ),
    "bias not asked for": ({"attn_bias": torch.zeros(1, 4, 7, 9)}, "attn_bias is given with attn_bias_type 'no_bias'"),
    "pre-scale bias": ({"attn_bias_type": "pre_scale_bias"}, "pre_scale_bias by no kernel"),
    "integers": (
        {"q": lambda a: a["q"].nan_to_num().int()},
        "Fused attention only supports FP8 and BF16/FP16 data types",
    ),
    "mixed dtypes": ({"k": lambda a: a["k"].double()}, "q, k and v are torch.float32, torch.float64"),
    "dropout in inference": ({"is_training": False, "dropout": 0.1}, "dropout must be 0.0 if is_training is False"),
    "dropout range": ({"dropout": 1.5}, "dropout is 1.5: it is a probability"),
    "heads": (
        {"k": lambda a: a["k"].repeat(1, 1, 2, 1)[:, :, :3], "v": lambda a: a["v"].repeat(1, 1, 2, 1)[:, :, :3]},
        "query heads be a multiple of key heads",
    ),
    "head dims": ({"k": lambda a: a["k"][..., :4]}, "q has head dim 8 and k 4"),
    "interleaved dims": (
        {"layout": "bshd_bs2hd", "v": lambda a: a["v"][..., :4]},
        "qkv_layout 'bshd_bs2hd' stores them together",
    ),
    "layout": ({"qkv_layout": "bhsd_thd"}, "qkv_layout 'bhsd_thd' is unknown"),
    "mask": ({"attn_mask_type": "arbitrary"}, "attn_mask_type is 'arbitrary'"),
    "softmax": ({"softmax_type": "sigmoid"}, "softmax_type is 'sigmoid'"),
    "sink": ({"softmax_type": "learnable"}, "softmax_type 'learnable' needs fp32"),
    "window": ({"window_size": (-2, 0)}, "window_size is"),
    "graph": ({"cuda_graph": True}, "reads sequence lengths on the host"),
    "length beyond max_seqlen": ({"cu_seqlens_q": ints(0, 8, 8, 9)}, "a q sequence has 8 tokens: max_seqlen_q is 7"),
    "prefix sums of 64 bits": ({"cu_seqlens_q": lambda a: a["cu_seqlens_q"].long()}, "expected int32 prefix sums"),
    "prefix sums decrease": ({"cu_seqlens_kv": ints(0, 6, 5, 9)}, "cu_seqlens_kv decreases at entry 2"),
    "padded length": ({"max_seqlen_q": 6, "cu_seqlens_q": ints(0, 5, 5, 10)}, "q has batch and sequence length"),
    "batches differ": ({"cu_seqlens_q": ints(0, 5, 5)}, "q has batch and sequence length"),
    "out of bounds": (
        {"layout": "thd_thd_thd", "cu_seqlens_kv_padded": ints(20, 0, 8, 30)},
        "check cu_seqlens_kv_padded",
    ),
    "slots overlap": (
        {"layout": "thd_thd_thd", "cu_seqlens_q_padded": ints(0, 5, 3, 16)},
        "out: rows 3 to 5 belong to two sequences",
    ),
    "no page table": ({"layout": "paged_kv_bshd_bshd_bshd", "page_table_k": None}, "needs page_table_k"),
    "page table without pages": ({"page_table_k": ints(0)}, "page tables belong to paged_kv"),
    "page out of range": (
        {"layout": "paged_kv_thd_bshd_bshd", "page_table_k": lambda a: a["page_table_k"] + 1},
        r"the page table names page 9: the container has pages 0 to 8",
    ),
    "room of pages": (
        {"layout": "paged_kv_thd_bshd_bshd", "max_seqlen_kv": 16},
        "max_seqlen_kv is 16: the page table's 3 pages of 4 hold 12",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_forward_refuses(name):
    changes, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call(**changes)


def test_paged_has_no_backward():
    x = torch.zeros(2, 4, 1, 8)
    cu = ints(0, 4, 8)
    with pytest.raises(ValueError, match="paged attention has no backward"):
        fused_attn_bwd(4, 4, cu, cu, x, x, x, x, x, qkv_layout="paged_kv_bshd_bshd_bshd")


def test_backward_needs_what_forward_saved():
    x = torch.zeros(2, 4, 1, 8)
    cu = ints(0, 4, 8)
    with pytest.raises(ValueError, match="aux_ctx_tensors has 0 tensors: expected 3"):
        fused_attn_bwd(4, 4, cu, cu, x, x, x, x, x, qkv_layout="bshd_bshd_bshd", softmax_type="learnable")


def test_overlapping_keys_are_read_in_forward_and_refused_in_backward():
    """A forward may read keys twice; a backward would overwrite their gradients."""
    q, kv = torch.randn(4, 1, 8), torch.randn(3, 1, 8)
    cu_q, cu_kv, starts = ints(0, 2, 4), ints(0, 3, 6), ints(0, 0, 3)
    options = {"qkv_layout": "thd_thd_thd", "cu_seqlens_kv_padded": starts}
    out, aux = fused_attn_fwd(True, 2, 3, cu_q, cu_kv, q, kv, kv, **options)
    expected = torch.softmax(q[:, 0] @ kv[:, 0].T * 8**-0.5, -1) @ kv[:, 0]
    torch.testing.assert_close(out[:, 0], expected)
    with pytest.raises(ValueError, match="dk and dv: rows 0 to 3 belong to two sequences"):
        fused_attn_bwd(2, 3, cu_q, cu_kv, q, kv, kv, out, out, aux_ctx_tensors=aux, **options)


def test_layout_names():
    layout = parse_layout("paged_kv_thd_sbhd_sbhd")
    assert (layout.q_format, layout.kv_format, layout.paged) == ("thd", "sbhd", True)
