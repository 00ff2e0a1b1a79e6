"""`te`: TransformerEngine's fused attention (cuDNN), many slices in one call.

`fused_attn_fwd` and `fused_attn_bwd` with layout `thd_thd_thd`: `cu_seqlens` carry only lengths and
`cu_seqlens_padded` only start offsets, so slices are sequences over the buffers as they lie, and key
ranges may overlap in forward. Forward zero-fills out and stores the rows it covers (stats of other
rows are garbage); backward zero-fills and stores dq, dk, dv, and takes out and stats as inputs, so
those of the whole attention go in. Stats are the whole log-sum-exp, natural log, [T, N, 1] fp32.

Versions differ in arguments (2.12 wants `dqkv_dtype`; 2.20 wants the formats of out and gradients,
whose defaults are another layout), so the adapter looks at the signature, not at the version.
Source: the code of TransformerEngine 2.12.0 and 2.20.2.

Shape legend as in `base.py`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cpattn.solver import SliceTable
from cpattn.solver.rounds import CAUSAL_PIECE, INV_PIECE

from .base import Attending, KeyRows, Problem, Returning, Scoring, kernel_head_dim, pad_head_dim
from .installed import failing_import, known_parameters, missing_package
from .offsets import Mask, OffsetCall, OffsetWork, plan_offsets, refuse_cudnn, within, writes_once
from .rows import add_rows, merge_rows, take_rows

_MODULE = "transformer_engine.pytorch.cpp_extensions.fused_attn"


@dataclass(frozen=True, slots=True)
class TeBackend:
    """TransformerEngine's `fused_attn_fwd/bwd` on packed sequences."""

    device_type: str = "cuda"
    name: str = "te"
    kernel: str = "TransformerEngine fused attention (cuDNN)"

    def refusal(self, problem: Problem) -> str | None:
        if missing := missing_package(_MODULE, "transformer-engine"):
            return missing
        if problem.device_type != self.device_type:
            return f"this kernel runs on {self.device_type}, the tensors are on {problem.device_type}"
        if torch.are_deterministic_algorithms_enabled():
            return "its deterministic backward of packed sequences takes memory quadratic in tokens"
        return refuse_cudnn(problem, self.device_type) or failing_import(_MODULE, "transformer-engine")

    def prepare(
        self, slices: SliceTable, num_queries: int, num_keys: int, device: torch.device
    ) -> OffsetWork:
        return plan_offsets(slices, device)

    def writes_once(self, work: OffsetWork) -> bool:
        return writes_once(work)

    def forward(
        self, queries: Attending, keys: KeyRows, work: OffsetWork, scoring: Scoring, *, fresh: bool = False
    ) -> None:
        (q_QND, out_QNE, lse_QN), (k_KGD, v_KGE) = queries, keys
        te, head_dim, head_dim_v = importlib.import_module(_MODULE), kernel_head_dim(k_KGD, v_KGE), v_KGE.shape[-1]
        q, k, v = (pad_head_dim(t, head_dim).contiguous() for t in (q_QND, k_KGD, v_KGE))
        for call in work.forward:
            out, aux, *_ = te.fused_attn_fwd(
                is_training=True,
                **_lengths(call),
                q=q[call.q_span],
                k=k[call.k_span],
                v=v[call.k_span],
                fake_dtype=q.dtype,
                fused_attention_backend=te.FusedAttnBackend["F16_arbitrary_seqlen"],
                attn_scale=scoring.scale,
                **_layout(te.fused_attn_fwd),
                **_mask(call.mask),
            )
            stats, rows = aux[0], within(call.rows, call.q_span)
            if stats.dim() != 3:
                raise RuntimeError(
                    f"TransformerEngine gave statistics of shape {tuple(stats.shape)}: packed ones, "
                    f"[tokens, heads, 1], need cuDNN 9.6 or later"
                )
            part = take_rows(out, rows)[..., :head_dim_v], take_rows(stats, rows).squeeze(-1)
            merge_rows(out_QNE, lse_QN, call.rows, *part, first=fresh and call.first)

    def backward(
        self, queries: Returning, keys: KeyRows, work: OffsetWork, scoring: Scoring, dkeys: KeyRows
    ) -> None:
        (dout_QNE, q_QND, out_QNE, lse_QN, dq_QND), (k_KGD, v_KGE), (dk_KGD, dv_KGE) = queries, keys, dkeys
        te, head_dim = importlib.import_module(_MODULE), kernel_head_dim(k_KGD, v_KGE)
        d, e = k_KGD.shape[-1], v_KGE.shape[-1]
        q, k, v, dout, out = (
            pad_head_dim(t.to(q_QND.dtype), head_dim).contiguous()
            for t in (q_QND, k_KGD, v_KGE, dout_QNE, out_QNE)
        )
        rng_state = torch.zeros(2, dtype=torch.int64, device=q.device)  # read only with dropout
        more: dict[str, Any] = {}
        if "dqkv_dtype" in (known_parameters(te.fused_attn_bwd) or ()):
            more["dqkv_dtype"] = importlib.import_module("transformer_engine.pytorch.constants").TE_DType[q.dtype]
        for call in work.backward:
            stats = lse_QN[call.q_span].unsqueeze(-1).contiguous()
            dq, dk, dv, *_ = te.fused_attn_bwd(
                **_lengths(call),
                q=q[call.q_span],
                k=k[call.k_span],
                v=v[call.k_span],
                o=out[call.q_span],
                d_o=dout[call.q_span],
                fake_dtype=q.dtype,
                aux_ctx_tensors=[stats, rng_state],
                fused_attention_backend=te.FusedAttnBackend["F16_arbitrary_seqlen"],
                attn_scale=scoring.scale,
                **more,
                **_layout(te.fused_attn_bwd),
                **_mask(call.mask),
            )
            rows, k_rows = within(call.rows, call.q_span), within(call.keys, call.k_span)
            add_rows(dq_QND, call.rows, take_rows(dq, rows)[..., :d])
            add_rows(dk_KGD, call.keys, take_rows(dk, k_rows)[..., :d])
            add_rows(dv_KGE, call.keys, take_rows(dv, k_rows)[..., :e])


def _lengths(call: OffsetCall) -> dict[str, Any]:
    if "te" not in call.cached:
        call.cached["te"] = _make_lengths(call)
    lengths: dict[str, Any] = call.cached["te"]
    return lengths


def _make_lengths(call: OffsetCall) -> dict[str, Any]:
    # The selector wants the keys' maximum to be the larger one, and backward more than one row; for
    # packed sequences neither number sizes anything.
    longest = max(call.max_seqlen_q, call.max_seqlen_k, 2)
    return {
        "max_seqlen_q": max(call.max_seqlen_q, 2),
        "max_seqlen_kv": longest,
        "cu_seqlens_q": _prefix_sums(call.lengths_q),
        "cu_seqlens_kv": _prefix_sums(call.lengths_k),
        "cu_seqlens_q_padded": _offsets(call.starts_q, call.q_span),
        "cu_seqlens_kv_padded": _offsets(call.starts_k, call.k_span),
    }


def _prefix_sums(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def _offsets(starts: Tensor, span: slice) -> Tensor:
    """Start offsets, and the size of the buffer for the kernel's dummy sequences."""
    return torch.nn.functional.pad(starts, (0, 1), value=span.stop - span.start).to(torch.int32)


def _layout(function: Any) -> dict[str, str]:
    known = known_parameters(function) or ()
    formats = {"o_format": "thd", "do_format": "thd", "dqkv_layout": "thd_thd_thd"}
    return {"qkv_layout": "thd_thd_thd", **{k: v for k, v in formats.items() if k in known}}


def _mask(mask: Mask) -> dict[str, Any]:
    if mask.kind == CAUSAL_PIECE:
        return {
            "attn_mask_type": "padding_causal_bottom_right",
            "window_size": (mask.left, 0),
            "bottom_right_diagonal": True,
        }
    window = (0, -1) if mask.kind == INV_PIECE else (-1, -1)
    return {"attn_mask_type": "padding", "window_size": window, "bottom_right_diagonal": False}
