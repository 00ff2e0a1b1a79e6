"""Recurrences and convolutions by their definitions, token by token, document by document; differentiable.

Shape legend: T tokens, G key heads, H value heads, K head dim of q and k, V of v, C channels, W width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def recurrence(
    q_TGK: Tensor, k_TGK: Tensor, v_THV: Tensor, decay: Tensor | None, beta_TH: Tensor | None, seqlens: Sequence[int]
) -> Tensor:
    """out [T, H, V]; decay is a log, [T, H] or [T, H, K]."""
    heads, dim_v = v_THV.shape[1:]
    groups = heads // q_TGK.shape[1]
    q, k = q_TGK.repeat_interleave(groups, 1), k_TGK.repeat_interleave(groups, 1)
    rows, start = [], 0
    for seqlen in seqlens:
        state = v_THV.new_zeros(heads, k.shape[2], dim_v)
        for t in range(start, start + seqlen):
            if decay is not None:
                factor = decay[t].exp()
                state = state * (factor[:, :, None] if decay.dim() == 3 else factor[:, None, None])
            written = v_THV[t]
            if beta_TH is not None:
                written = beta_TH[t][:, None] * (written - torch.einsum("hk,hkv->hv", k[t], state))
            state = state + torch.einsum("hk,hv->hkv", k[t], written)
            rows.append(torch.einsum("hk,hkv->hv", q[t], state))
        start += seqlen
    return torch.stack(rows) if rows else v_THV


def convolution(x_TC: Tensor, weight_CW: Tensor, bias_C: Tensor | None, seqlens: Sequence[int]) -> Tensor:
    """Depthwise causal convolution of each document alone."""
    parts = []
    for part in x_TC.split(list(seqlens)):
        padded = torch.nn.functional.pad(part.T[None], (weight_CW.shape[1] - 1, 0))
        if part.shape[0]:
            parts.append(torch.nn.functional.conv1d(padded, weight_CW[:, None], bias_C, groups=x_TC.shape[1])[0].T)
    return torch.cat(parts) if parts else x_TC
