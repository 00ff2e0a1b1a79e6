"""`sdpa` on CPU: torch's own flash kernel with log-sum-exp, one call per kernel tile.

The kernel (`aten::_scaled_dot_product_flash_attention_for_cpu`) knows full and top-left causal
masks and additive float masks. What it gets wrong is handled here: it crashes on empty inputs and
returns lse = 0 for rows that see nothing (no tile has either), reads garbage where the last
dimension is strided, and refuses values whose head dim differs from that of the keys.
Shape legend as in `base.py`.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from cpattn.collectives import merge_partials
from cpattn.solver import BANDED, CAUSAL, INV_CAUSAL, KernelTile, SliceTable, kernel_tiles

from .base import Problem

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class CpuSdpaBackend:
    """torch's CPU flash attention over kernel tiles."""

    name = "sdpa"

    def refusal(self, problem: Problem) -> str | None:
        if problem.device_type != "cpu":
            return f"this kernel runs on cpu, the tensors are on {problem.device_type}"
        if problem.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            return f"dtype {problem.dtype} is not one of float32, float64, bfloat16, float16"
        if problem.softcap:
            return "torch's CPU flash kernel has no softcap"
        return None

    def prepare(
        self, slices: SliceTable, num_queries: int, num_keys: int, device: torch.device
    ) -> tuple[KernelTile, ...]:
        return tuple(kernel_tiles(slices))

    def forward(
        self,
        q_QND: Tensor,
        k_KGD: Tensor,
        v_KGE: Tensor,
        work: tuple[KernelTile, ...],
        *,
        scale: float,
        softcap: float | None,
        out_QNE: Tensor,
        lse_QN: Tensor,
    ) -> None:
        if not work:
            return
        head_dim_v = v_KGE.shape[-1]
        q, k, v = _same_head_dim(q_QND, k_KGD, v_KGE)
        for tile in work:
            rows, keys = slice(tile.q0, tile.q1), slice(tile.k0, tile.k1)
            out, lse = _tile_forward(tile, _heads_first(q[rows]), _heads_first(k[keys]), _heads_first(v[keys]), scale)
            out_tile = out[0].transpose(0, 1)[..., :head_dim_v]
            merge_partials(out_QNE[rows], lse_QN[rows], out_tile, lse[0].T)

    def backward(
        self,
        dout_QNE: Tensor,
        q_QND: Tensor,
        k_KGD: Tensor,
        v_KGE: Tensor,
        out_QNE: Tensor,
        lse_QN: Tensor,
        work: tuple[KernelTile, ...],
        *,
        scale: float,
        softcap: float | None,
        dq_QND: Tensor,
        dk_KGD: Tensor,
        dv_KGE: Tensor,
    ) -> None:
        if not work:
            return
        head_dim, head_dim_v = k_KGD.shape[-1], v_KGE.shape[-1]
        q, k, v = _same_head_dim(q_QND, k_KGD, v_KGE)
        dout, out = _pad_head_dim(dout_QNE, q.shape[-1]), _pad_head_dim(out_QNE, q.shape[-1])
        for tile in work:
            rows, keys = slice(tile.q0, tile.q1), slice(tile.k0, tile.k1)
            dq, dk, dv = _tile_backward(
                tile,
                *(_heads_first(t) for t in (dout[rows], q[rows], k[keys], v[keys], out[rows])),
                lse_QN[rows].T[None],
                scale,
            )
            dq_QND[rows] += dq[0].transpose(0, 1)[..., :head_dim]
            dk_KGD[keys] += dk[0].transpose(0, 1)[..., :head_dim]
            dv_KGE[keys] += dv[0].transpose(0, 1)[..., :head_dim_v]


def _tile_forward(
    tile: KernelTile, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    if tile.kind == INV_CAUSAL:
        # Turned by 180 degrees, an inverse-causal square is a causal one.
        out, lse = _forward(q.flip(2), k.flip(2), v.flip(2), 0.0, True, scale=scale)
        return out.flip(2), lse.flip(2)
    mask = _band_mask(tile, q.dtype) if tile.kind == BANDED else None
    out, lse = _forward(q, k, v, 0.0, tile.kind == CAUSAL, attn_mask=mask, scale=scale)
    return out, lse


def _tile_backward(
    tile: KernelTile,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if tile.kind == INV_CAUSAL:
        turned = (t.flip(2) for t in (dout, q, k, v, out, lse))
        dq, dk, dv = _backward(*turned, 0.0, True, scale=scale)
        return dq.flip(2), dk.flip(2), dv.flip(2)
    mask = _band_mask(tile, q.dtype) if tile.kind == BANDED else None
    dq, dk, dv = _backward(
        dout, q, k, v, out, lse, 0.0, tile.kind == CAUSAL, attn_mask=mask, scale=scale
    )
    return dq, dk, dv


def _heads_first(x_TND: Tensor) -> Tensor:
    return x_TND.transpose(0, 1).unsqueeze(0)


def _pad_head_dim(x: Tensor, head_dim: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, head_dim - x.shape[-1])) if x.shape[-1] < head_dim else x


def _same_head_dim(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Zero columns for the narrower side: they add nothing to scores, and nothing to the result."""
    head_dim = max(k.shape[-1], v.shape[-1])
    return _pad_head_dim(q, head_dim), _pad_head_dim(k, head_dim), _pad_head_dim(v, head_dim)


def _band_mask(tile: KernelTile, dtype: torch.dtype) -> Tensor:
    return _additive_band(tile.q1 - tile.q0, tile.k1 - tile.k0, tile.lo, tile.hi, dtype)


@lru_cache(maxsize=32)
def _additive_band(rows: int, keys: int, lo: int, hi: int, dtype: torch.dtype) -> Tensor:
    """0 inside the band and -inf outside; blocks of one window share it."""
    diff = torch.arange(keys) - torch.arange(rows)[:, None]
    mask = torch.zeros(rows, keys, dtype=dtype)
    return mask.masked_fill_((diff < lo) | (diff > hi), -torch.inf)


