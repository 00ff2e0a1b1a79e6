"""Dense attention of batches in the layers' layout, and the pieces that its masks are put together from."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tests_dist.support.oracle import dense_attention


def dense_batch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    *,
    scale: float | None = None,
    sink: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """[B, S, heads, dim] under visible [B or 1, S_q, S_k], in fp64; differentiable."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    rows = [
        dense_attention(
            q[b].double(),
            k[b].double(),
            v[b].double(),
            np.asarray(visible[b % visible.shape[0]]),
            scale=scale,
            sink=None if sink is None else sink.double(),
            softcap=softcap,
        )[0]
        for b in range(q.shape[0])
    ]
    return torch.stack(rows)


def band(num_q: int, num_k: int, left: int | None = None, right: int | None = 0, shift: int = 0) -> Tensor:
    """[1, num_q, num_k]: query i sees keys i + shift - left .. i + shift + right; None is no limit."""
    ahead = torch.arange(num_k) - torch.arange(num_q)[:, None] - shift
    visible = torch.ones(num_q, num_k, dtype=torch.bool)
    if left is not None:
        visible &= ahead >= -left
    if right is not None:
        visible &= ahead <= right
    return visible[None]


def same_document(lengths: list[int]) -> Tensor:
    """[1, T, T]: pairs of tokens of one document."""
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return (ids[:, None] == ids)[None]


def cu_seqlens(lengths: list[int]) -> Tensor:
    """Prefix sums, int32."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def additive(visible: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """[B, 1, S_q, S_k] of 0 and the dtype's lowest number, as transformers makes it."""
    mask = torch.zeros(visible.shape, dtype=dtype)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]


def rel_error(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted."""
    return ((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30)).item()
