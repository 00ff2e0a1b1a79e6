"""One process: the compiled module's own argument orders give what the named functions give."""

from __future__ import annotations

import enum

import pytest
import torch

from cpattn import te_ops
from cpattn.te_ops import extension as tex
from tests_dist.compat.te_ops.contract import ALL_MASKS, SOFTMAXES, Case, make_sequences, place


class NVTEMask(enum.IntEnum):
    """Stands for a pybind enum."""

    NVTE_PADDING_CAUSAL_BOTTOM_RIGHT_MASK = 5


@pytest.mark.parametrize("mask", ["padding_causal_bottom_right", NVTEMask.NVTE_PADDING_CAUSAL_BOTTOM_RIGHT_MASK])
def test_forward_and_backward_positionally(mask):
    case = Case("thd_thd_thd", "padding_causal_bottom_right", (3, 0), "learnable").valid()
    s = make_sequences(case)
    p = place(case, s)
    a = p.arguments
    kinds = ("NVTE_THD_THD_THD", "NVTE_NO_BIAS", mask, "NVTE_LEARNABLE_SOFTMAX", [3, 0], True)
    cu = (a["cu_seqlens_q"], a["cu_seqlens_kv"])
    padded = (a["cu_seqlens_q_padded"], a["cu_seqlens_kv_padded"])
    sizes = (a["max_seqlen_q"], a["max_seqlen_kv"])
    out, *aux, maximum = tex.fused_attn_fwd(
        *sizes, True, 8**-0.5, 0.0, True, *kinds, *cu, p.q, p.k, p.v, torch.float32, *padded, None, None, None, None,
        None, s.offset, None, 0, True,
    )  # fmt: skip
    expected, expected_aux, expected_maximum = te_ops.fused_attn_fwd(
        True, q=p.q, k=p.k, v=p.v, softmax_offset=s.offset, return_max_logit=True, **a
    )
    assert torch.equal(out, expected)
    assert torch.equal(maximum, expected_maximum)
    assert all(torch.equal(x, y) for x, y in zip(aux, expected_aux, strict=True))
    grads = tex.fused_attn_bwd(
        *sizes, 8**-0.5, 0.0, True, *kinds, False, *cu, p.q, p.k, p.v, out, p.dout, torch.float32, None, aux, *padded
    )
    names = {n: v for n, v in a.items() if not n.startswith("page")}
    others = te_ops.fused_attn_bwd(q=p.q, k=p.k, v=p.v, o=out, d_o=p.dout, aux_ctx_tensors=aux, **names)
    assert grads[3] is None
    assert all(torch.equal(x, y) for x, y in zip(grads, others, strict=True) if x is not None)


def test_every_enum_name_is_understood():
    for mask in ALL_MASKS:
        name = f"NVTE_{mask.upper()}" + ("" if mask == "no_mask" else "_MASK")
        assert tex.enum_name(name, te_ops.MASK_TYPES) == mask
    for softmax in SOFTMAXES:
        name = f"NVTE_{softmax.upper().replace('-', '_')}_SOFTMAX"
        assert tex.enum_name(name, te_ops.SOFTMAX_TYPES) == softmax
    for layout in te_ops.LAYOUTS:
        assert tex.enum_name(f"NVTE_QKV_Layout.NVTE_{layout.upper()}", tuple(te_ops.LAYOUTS)) == layout
    with pytest.raises(ValueError, match="'NVTE_ARBITRARY_MASK' is none of no_mask, "):
        tex.enum_name("NVTE_ARBITRARY_MASK", te_ops.MASK_TYPES)


def test_cache_copy_takes_the_enum():
    new, cache = torch.ones(1, 2, 1, 4), torch.zeros(2, 2, 1, 4)
    cu, table = torch.tensor([0, 2], dtype=torch.int32), torch.tensor([[1]], dtype=torch.int32)
    tex.copy_to_kv_cache(new, new, cache, cache, table, cu, cu, "NVTE_BSHD", 1, 2, 2, 1, False)
    assert cache[1].all()
    assert not cache[0].any()
