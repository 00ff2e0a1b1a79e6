"""The execution of a rank plan: exchanges, local kernels and merges, forward and backward.

It decides nothing. Forward, stage by stage: fetch remote keys and values (the next stage's travel
while this stage computes), run the local kernel on the stage's slices, merge by log-sum-exp in
fp32. Backward takes the same routes turned round: the local kernel with the global out and lse,
and a GroupReduce of the key and value gradients to their owners. Where the plan moves queries,
they travel first and their partial results come home last.

Shape legend: T local tokens, N query heads, G key heads, D head dim of q and k, E head dim of v.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cpattn.collectives import PendingRows, group_cast, group_reduce

from .key import AttnKey, BoundPlan


def run_forward(
    key: AttnKey, plan: BoundPlan, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, numbers: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    out, lse = _empty_partial(q, v)
    guests: tuple[Tensor, ...] = ()
    if plan.moves_queries:
        (q_guest,), pending_queries = group_cast((q,), plan.queries, key.cp_group, async_op=True)
        guests = (q_guest, *_empty_partial(q_guest, v))
    pending = _fetch(key, plan, 1, k, v)
    if guests:
        pending_queries.wait()
    keys, values = k, v
    for number, stage in enumerate(plan.stages):
        if number:
            keys, values = pending.wait()
            pending = _fetch(key, plan, number + 1, k, v)
        plan.backend.forward(q, keys, values, stage.host_work, **numbers, out_QNE=out, lse_QN=lse)
        if stage.has_guests:
            q_guest, out_guest, lse_guest = guests
            plan.backend.forward(
                q_guest, keys, values, stage.guest_work, **numbers, out_QNE=out_guest, lse_QN=lse_guest
            )
    if guests:
        results = (guests[1].to(q.dtype), guests[2])
        group_reduce(results, (out, lse), plan.queries, key.cp_group, op="lse")
    if sink is not None:
        total = torch.logaddexp(lse, sink.to(lse.dtype))
        out *= torch.exp(lse - total).unsqueeze(-1)
        lse = total
    return out.to(q.dtype), lse


def run_backward(
    key: AttnKey,
    plan: BoundPlan,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    numbers: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = lse.dtype
    # exp(score - inf) = 0: rows that see nothing have no gradient, and no NaN.
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    dq, dk, dv = (torch.zeros(t.shape, dtype=dtype, device=t.device) for t in (q, k, v))
    host = (dout, q, out, lse, dq)
    guest: tuple[Tensor, ...] = ()
    if plan.moves_queries:
        rows = (dout, q, lse, row_delta(dout, out, dtype))
        guests, pending_queries = group_cast(rows, plan.queries, key.cp_group, async_op=True)
    pending = _fetch(key, plan, 1, k, v)
    if plan.moves_queries:
        pending_queries.wait()
        dout_guest, q_guest, lse_guest, delta_guest = guests
        out_guest = _out_of_delta(dout_guest, delta_guest)
        dq_guest = torch.zeros(q_guest.shape, dtype=dtype, device=q.device)
        guest = (dout_guest, q_guest, out_guest, lse_guest, dq_guest)
    keys, values, dkeys, dvalues = k, v, dk, dv
    reductions: list[PendingRows] = []
    for number, stage in enumerate(plan.stages):
        if number:
            keys, values = pending.wait()
            pending = _fetch(key, plan, number + 1, k, v)
            dkeys, dvalues = (torch.zeros(t.shape, dtype=dtype, device=q.device) for t in (keys, values))
        for rows, work in ((host, stage.host_work), (guest, stage.guest_work)):
            if rows is guest and not stage.has_guests:
                continue
            dout_, q_, out_, lse_, dq_ = rows
            plan.backend.backward(
                dout_, q_, keys, values, out_, lse_, work, **numbers, dq_QND=dq_, dk_KGD=dkeys, dv_KGE=dvalues
            )
        if number:
            while reductions:  # at most one stage's gradients are in flight
                reductions.pop().wait()
            reductions.append(
                group_reduce((dkeys, dvalues), (dk, dv), stage.kv, key.cp_group, async_op=True)
            )
    if guest:
        group_reduce((guest[-1],), (dq,), plan.queries, key.cp_group)
    for reduction in reductions:
        reduction.wait()
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _fetch(key: AttnKey, plan: BoundPlan, number: int, k: Tensor, v: Tensor) -> PendingRows:
    """Start to fetch the keys and values of a stage; nothing after the last."""
    if number >= len(plan.stages):
        return PendingRows(None, tuple)
    _, pending = group_cast((k, v), plan.stages[number].kv, key.cp_group, async_op=True)
    return pending


def _empty_partial(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Accumulators of rows that have seen no key yet."""
    dtype = accumulator_dtype(q.dtype)
    out = torch.zeros((*q.shape[:2], v.shape[-1]), dtype=dtype, device=q.device)
    return out, torch.full(q.shape[:2], -torch.inf, dtype=dtype, device=q.device)


def row_delta(dout: Tensor, out: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over head dim of dout * out, [T, N]: all that backward needs of out."""
    return (dout.to(dtype) * out.to(dtype)).sum(-1)


def _out_of_delta(dout: Tensor, delta: Tensor) -> Tensor:
    """An out with the given delta, for kernels that ask for out: its projection on dout.

    So delta travels in place of out, a head dim's worth of elements less. The projection is no
    longer than out itself, so nothing overflows, and its rounding disturbs delta less than out's.
    """
    wide = dout.to(delta.dtype)
    square = (wide * wide).sum(-1).clamp_min(torch.finfo(delta.dtype).tiny)
    return (wide * (delta / square).unsqueeze(-1)).to(dout.dtype)


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
