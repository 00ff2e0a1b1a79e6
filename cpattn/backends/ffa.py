"""`ffa`: MagiAttention's flexible flash attention, when `magi_attention` is importable.

One call takes any number of (query range, key range, kind) triples, also with shared rows, and sums
up what they see; it accumulates in fp32. Its kinds are full, causal from the bottom right, inverse
causal from the top left, and both, so slices go through `corner_pieces` (a cropped band is aligned
with no corner). Its lse is [N, T] in releases without sinks and [T, N] in those with; from 1.1.0 on it comes in
an `AttnForwardMeta`.
Source: github.com/SandAI-org/MagiAttention, magi_attention/functional/flex_flash_attn.py and
magi_attention/common/forward_meta.py, 1.0.5 to 1.1.1.

Shape legend as in `base.py`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cpattn.collectives import put_on
from cpattn.solver import SliceTable
from cpattn.solver.rounds import corner_pieces

from .base import HALF_DTYPES, Attending, KeyRows, Problem, Returning, Scoring, pad_head_dim, refuse_dtype
from .installed import call_known, device_capability, failing_import, known_parameters, missing_package
from .rows import merge_rows

_MODULE = "magi_attention.functional.flex_flash_attn"
_INSTALL = "built from github.com/SandAI-org/MagiAttention"
_HEAD_DIMS = (64, 128)


class _Work(NamedTuple):
    """q_ranges, k_ranges: int32 [n, 2]; kinds: int32 [n], in FFA's numbering (which is ours)."""

    q_ranges: Tensor
    k_ranges: Tensor
    kinds: Tensor
    max_seqlen_q: int
    max_seqlen_k: int


@dataclass(frozen=True, slots=True)
class FfaBackend:
    """MagiAttention's FFA kernel."""

    device_type: str = "cuda"
    name: str = "ffa"
    kernel: str = "MagiAttention's flexible flash attention"

    def refusal(self, problem: Problem) -> str | None:
        if missing := missing_package(_MODULE, "magi_attention", _INSTALL):
            return missing
        if problem.device_type != self.device_type:
            return f"this kernel runs on {self.device_type}, the tensors are on {problem.device_type}"
        capability = device_capability(self.device_type)
        if capability is not None and capability[0] != 9:
            return f"the GPU is sm{capability[0]}{capability[1]}: the kernel is for sm90"
        widest = max(problem.head_dim, problem.head_dim_v)
        if widest > _HEAD_DIMS[-1]:
            return f"head_dim {widest} is more than it takes ({_HEAD_DIMS[-1]})"
        return refuse_dtype(problem, HALF_DTYPES) or failing_import(_MODULE, "magi_attention")

    def prepare(self, slices: SliceTable, num_queries: int, num_keys: int, device: torch.device) -> _Work:
        pieces, kinds = corner_pieces(slices)
        data, lengths = pieces.data.astype(np.int32), (pieces.q1 - pieces.q0, pieces.k1 - pieces.k0)
        arrays = (np.ascontiguousarray(data[:, 0:2]), np.ascontiguousarray(data[:, 2:4]), kinds.astype(np.int32))
        q_ranges, k_ranges, on_device = (put_on(device, torch.from_numpy(x)) for x in arrays)
        return _Work(q_ranges, k_ranges, on_device, *(int(x.max(initial=0)) for x in lengths))

    def writes_once(self, work: _Work) -> bool:
        return True

    def forward(
        self, queries: Attending, keys: KeyRows, work: _Work, scoring: Scoring, *, fresh: bool = False
    ) -> None:
        (q_QND, out_QNE, lse_QN), (k_KGD, v_KGE) = queries, keys
        if not len(work.kinds):
            return
        function = importlib.import_module(_MODULE)._flex_flash_attn_forward
        q, k, v = (pad_head_dim(t, _head_dim(k_KGD, v_KGE)).contiguous() for t in (q_QND, k_KGD, v_KGE))
        out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)  # rows of no range are not written
        part, lse, *_ = call_known(
            function,
            {
                "q": q,
                "k": k,
                "v": v,
                "out": out,
                "lse": None,
                **_arguments(work, scoring),
                "out_type": torch.float32,
                "disable_fwd_atomic_reduction": False,
            },
            {"sink": None, "sink_layout": "sh", "qk_map": None, "fwd_unique_count": None, "ref_block_size": None}
            | {"merge_q_ranges": None, "fwd_qk_map": None, **_lengths(work)},
        )
        lse = getattr(lse, "lse", lse)
        if "sink" not in (known_parameters(function) or ()):
            lse = lse.T
        merge_rows(
            out_QNE, lse_QN, slice(0, len(q)), part[..., : v_KGE.shape[-1]], lse, first=fresh
        )

    def backward(
        self, queries: Returning, keys: KeyRows, work: _Work, scoring: Scoring, dkeys: KeyRows
    ) -> None:
        (dout_QNE, q_QND, out_QNE, lse_QN, dq_QND), (k_KGD, v_KGE), (dk_KGD, dv_KGE) = queries, keys, dkeys
        if not len(work.kinds):
            return
        function = importlib.import_module(_MODULE)._flex_flash_attn_backward
        head_dim = _head_dim(k_KGD, v_KGE)
        q, k, v, dout, out = (
            pad_head_dim(t.to(q_QND.dtype), head_dim).contiguous()
            for t in (q_QND, k_KGD, v_KGE, dout_QNE, out_QNE)
        )
        grads = [torch.zeros(t.shape, dtype=torch.float32, device=t.device) for t in (q, k, v)]
        token_major = "sink" in (known_parameters(function) or ())
        dq, dk, dv, *_ = call_known(
            function,
            {
                "dout": dout,
                "q": q,
                "k": k,
                "v": v,
                "out": out,
                "lse": lse_QN.contiguous() if token_major else lse_QN.T.contiguous(),
                "dq": grads[0],
                "dk": grads[1],
                "dv": grads[2],
                **_arguments(work, scoring),
                "dq_type": torch.float32,
                "dk_type": torch.float32,
                "dv_type": torch.float32,
                "disable_bwd_dkv_atomic_reduction": False,
            },
            {"sink": None, "sink_layout": "sh", "dsink": None, "bwd_kq_map": None, "bwd_unique_count": None}
            | {"merge_k_ranges": None, **_lengths(work)},
        )
        dq_QND += dq[..., : k_KGD.shape[-1]]
        dk_KGD += dk[..., : k_KGD.shape[-1]]
        dv_KGE += dv[..., : v_KGE.shape[-1]]


def _head_dim(k: Tensor, v: Tensor) -> int:
    widest = max(k.shape[-1], v.shape[-1])
    return next(d for d in _HEAD_DIMS if d >= widest)


def _arguments(work: _Work, scoring: Scoring) -> dict[str, Any]:
    return {
        "q_ranges": work.q_ranges,
        "k_ranges": work.k_ranges,
        "attn_type_map": work.kinds,
        "softmax_scale": scoring.scale,
        "softcap": scoring.softcap or 0.0,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "sm_margin": 0,
    }


def _lengths(work: _Work) -> dict[str, int]:
    """Required in some releases, unknown to others."""
    return {"max_seqlen_q": work.max_seqlen_q, "max_seqlen_k": work.max_seqlen_k}
