"""Dense attention of one sequence, and the checks that all fakes share.

Shape legend: T query rows, S key rows, N query heads, G key heads.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class ContractError(Exception):
    """A call that the real kernel does not serve."""


def require(condition: bool, message: str) -> None:
    """Raise ContractError unless the condition holds."""
    if not condition:
        raise ContractError(message)


def band(num_queries: int, num_keys: int, left: int, right: int, *, bottom_right: bool = True) -> Tensor:
    """[T, S] of a window aligned with a corner; -1 leaves a side open."""
    diagonal = torch.arange(num_queries)[:, None] + (num_keys - num_queries if bottom_right else 0)
    keys = torch.arange(num_keys)[None, :]
    visible = torch.ones(num_queries, num_keys, dtype=torch.bool)
    if left >= 0:
        visible &= keys >= diagonal - left
    if right >= 0:
        visible &= keys <= diagonal + right
    return visible


def _scores(q: Tensor, k: Tensor, visible: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    groups = q.shape[1] // k.shape[1]
    scores = torch.einsum("tnd,snd->nts", q.float(), k.float().repeat_interleave(groups, 1)) * scale
    slope = torch.ones_like(scores)
    if softcap:
        capped = torch.tanh(scores / softcap)
        scores, slope = softcap * capped, 1 - capped * capped
    return scores.masked_fill(~visible, -torch.inf), slope


def attend(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(out [T, N, E] fp32, lse [T, N]); 0 and -inf in rows that see nothing."""
    scores, _ = _scores(q, k, visible, scale, softcap)
    lse = torch.logsumexp(scores, -1)
    p = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    groups = q.shape[1] // k.shape[1]
    return torch.einsum("nts,sne->tne", p, v.float().repeat_interleave(groups, 1)), lse.T


def attend_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse_TN: Tensor,
    visible: Tensor,
    scale: float,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) in fp32 with the out and lse given, whatever they are of."""
    groups = q.shape[1] // k.shape[1]
    scores, slope = _scores(q, k, visible, scale, softcap)
    p = torch.exp(scores - lse_TN.float().T[..., None])
    dp = torch.einsum("tne,sne->nts", dout.float(), v.float().repeat_interleave(groups, 1))
    delta = (dout.float() * out.float()).sum(-1).T[..., None]
    ds = p * (dp - delta) * scale * slope
    dq = torch.einsum("nts,snd->tnd", ds, k.float().repeat_interleave(groups, 1))
    dk = torch.einsum("nts,tnd->snd", ds, q.float()).unflatten(1, (-1, groups)).sum(2)
    dv = torch.einsum("nts,tne->sne", p, dout.float()).unflatten(1, (-1, groups)).sum(2)
    return dq, dk, dv


def check_rows(q: Tensor, k: Tensor, v: Tensor, *, max_head_dim: int, same_dims: bool) -> None:
    """What all fused kernels want of packed rows."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        require(x.dim() == 3, f"{name} has {x.dim()} dims")
        require(x.dtype in (torch.float16, torch.bfloat16), f"{name} is {x.dtype}")
        require(x.dtype == q.dtype, "dtypes differ")
        require(x.stride(-1) == 1, f"the last dim of {name} is strided")
        # 128-bit copies from global memory: flash-attention v2.8.3, csrc/flash_attn/src/kernel_traits.h.
        steps = [stride for n, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n > 1]
        places = [n * x.itemsize for n in (*steps, x.storage_offset())]
        require(all(place % 16 == 0 for place in places), f"rows of {name} are not aligned to 16 bytes")
        require(x.shape[-1] % 8 == 0 and x.shape[-1] <= max_head_dim, f"{name} has head dim {x.shape[-1]}")
    require(q.shape[-1] == k.shape[-1] and k.shape[:2] == v.shape[:2], "shapes of q, k, v")
    require(not same_dims or q.shape[-1] == v.shape[-1], "values are not as wide as keys")
    require(q.shape[1] % k.shape[1] == 0, "heads")


def check_lengths(cu_seqlens: Tensor, rows: int) -> list[int]:
    """Prefix sums as a list."""
    require(cu_seqlens.dtype == torch.int32 and cu_seqlens.dim() == 1, "cu_seqlens must be int32 [B + 1]")
    require(cu_seqlens.is_contiguous(), "cu_seqlens must be contiguous")
    ends: list[int] = cu_seqlens.tolist()
    require(ends[0] == 0 and ends == sorted(ends) and ends[-1] == rows, f"cu_seqlens {ends} over {rows} rows")
    return ends


def bind_schema(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name, as an aten op's own schema would take them."""
    schema = op._schema
    names = [a.name for a in schema.arguments]
    positional = [a.name for a in schema.arguments if not a.kwarg_only]
    require(len(args) <= len(positional), f"{schema.name} takes {len(positional)} positional arguments")
    bound = dict(zip(positional, args, strict=False))
    for name, value in kwargs.items():
        require(name in names and name not in bound, f"{schema.name} has no argument {name}")
        bound[name] = value
    for a in schema.arguments:
        require(a.name in bound or a.has_default_value(), f"{schema.name} needs {a.name}")
        bound.setdefault(a.name, a.default_value)
    return bound


def parameters_of(function: Callable[..., Any]) -> set[str]:
    """Names of its parameters."""
    return set(inspect.signature(function).parameters)
