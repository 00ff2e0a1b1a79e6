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

from cpattn.collectives import PendingRows, RowRoutes, cast_encoded, group_cast, group_reduce

from .key import AttnKey, BoundPlan


def run_forward(
    key: AttnKey, plan: BoundPlan, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, numbers: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    # Where a row's result is written once, it needs no accumulator in fp32.
    once = len(plan.stages) == 1 and not plan.moves_queries and sink is None
    once = once and plan.backend.writes_once(plan.stages[0].host_work)
    out, lse = _empty_partial(q, v, q.dtype if once else accumulator_dtype(q.dtype))
    if plan.moves_queries:
        (q_guest,), pending_queries = _cast(key, plan.queries, (q,), _encoded(key, q))
        out_guest, lse_guest = _empty_partial(q_guest, v, accumulator_dtype(q.dtype))
    encoded = _encoded(key, k, v) if len(plan.stages) > 1 else ()
    pending = _fetch(key, plan, 1, k, v, encoded)
    reduction = PendingRows(None, tuple)
    keys, values = k, v
    for number, stage in enumerate(plan.stages):
        if number:
            keys, values = pending.wait()
            pending = _fetch(key, plan, number + 1, k, v, encoded)
        for side in _work_order(plan, number):
            if side == "host":
                plan.backend.forward(
                    q, keys, values, stage.host_work, **numbers, out_QNE=out, lse_QN=lse, fresh=number == 0
                )
                continue
            if number == 0:
                pending_queries.wait()
            plan.backend.forward(
                q_guest, keys, values, stage.guest_work, **numbers, out_QNE=out_guest, lse_QN=lse_guest
            )
            if number == len(plan.stages) - 1:
                results = (out_guest.to(q.dtype), lse_guest)
                reduction = group_reduce(
                    results, (out, lse), plan.queries, key.cp_group, op="lse", async_op=True
                )
    reduction.wait()
    if sink is not None:
        total = torch.logaddexp(lse, sink.to(lse.dtype))
        # A row that sees no key and a sink of -inf: nothing to share out, and no NaN.
        out *= torch.exp(lse - total).masked_fill_(total == -torch.inf, 0).unsqueeze(-1)
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
    sides = {"host": (dout, q, out, lse, dq)}
    if plan.moves_queries:
        rows = (dout, q, lse, row_delta(dout, out, dtype))
        guests, pending_queries = _cast(key, plan.queries, rows, _encoded(key, dout, q))
    encoded = _encoded(key, k, v) if len(plan.stages) > 1 else ()
    pending = _fetch(key, plan, 1, k, v, encoded)
    keys, values, dkeys, dvalues = k, v, dk, dv
    reductions: list[PendingRows] = []
    for number, stage in enumerate(plan.stages):
        if number:
            keys, values = pending.wait()
            pending = _fetch(key, plan, number + 1, k, v, encoded)
            dkeys, dvalues = (torch.zeros(t.shape, dtype=dtype, device=q.device) for t in (keys, values))
        for side in _work_order(plan, number):
            if side == "guest" and number == 0:
                pending_queries.wait()
                sides["guest"] = _guest_rows(guests, dtype)
            dout_, q_, out_, lse_, dq_ = sides[side]
            work = stage.host_work if side == "host" else stage.guest_work
            plan.backend.backward(
                dout_, q_, keys, values, out_, lse_, work, **numbers, dq_QND=dq_, dk_KGD=dkeys, dv_KGE=dvalues
            )
            if side == "guest" and number == len(plan.stages) - 1:
                reductions.append(group_reduce((dq_,), (dq,), plan.queries, key.cp_group, async_op=True))
        if number:
            while reductions:  # at most one stage's gradients are in flight
                reductions.pop(0).wait()
            reductions.append(group_reduce((dkeys, dvalues), (dk, dv), stage.kv, key.cp_group, async_op=True))
    for reduction in reductions:
        reduction.wait()
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _work_order(plan: BoundPlan, number: int) -> tuple[str, ...]:
    """Local queries ("host") and received ones ("guest") of a stage, in the order of their work.

    In the first stage the guests are still on their way, so they come last; later they come first,
    so that after the last stage their results travel home behind the work on local queries.
    """
    if not plan.moves_queries:
        return ("host",)
    return ("host", "guest") if number == 0 else ("guest", "host")


def _guest_rows(
    received: tuple[Tensor, ...], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dout, q, out, lse of received queries (dout, q, lse, delta), and an accumulator for dq."""
    dout, q, lse, delta = received
    dq = torch.zeros(q.shape, dtype=dtype, device=q.device)
    return dout, q, _out_of_delta(dout, delta), lse, dq


def _fetch(
    key: AttnKey, plan: BoundPlan, number: int, k: Tensor, v: Tensor, encoded: tuple[Tensor, ...]
) -> PendingRows:
    """Start to fetch the keys and values of a stage; nothing after the last."""
    if number >= len(plan.stages):
        return PendingRows(None, tuple)
    _, pending = _cast(key, plan.stages[number].kv, (k, v), encoded)
    return pending


def _encoded(key: AttnKey, *rows: Tensor) -> tuple[Tensor, ...]:
    """What travels in the place of these rows where the key compresses the wire; else nothing."""
    return () if key.codec is None else key.codec.encode(rows)


def _cast(
    key: AttnKey, hops: tuple[RowRoutes, ...], rows: tuple[Tensor, ...], encoded: tuple[Tensor, ...]
) -> tuple[tuple[Tensor, ...], PendingRows]:
    """Start to send rows, the first of them as `encoded` where that is not empty."""
    if key.codec is None:
        return group_cast(rows, hops, key.cp_group, async_op=True)
    like, plain = rows[: len(encoded)], rows[len(encoded) :]
    return cast_encoded(encoded, plain, hops, key.cp_group, key.codec, like=like)


def _empty_partial(q: Tensor, v: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Accumulators of rows that have seen no key yet; dtype is that of out."""
    out = torch.zeros((*q.shape[:2], v.shape[-1]), dtype=dtype, device=q.device)
    lse_dtype = accumulator_dtype(q.dtype)
    return out, torch.full(q.shape[:2], -torch.inf, dtype=lse_dtype, device=q.device)


def row_delta(dout: Tensor, out: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over head dim of dout * out, [T, N]: all that backward needs of out."""
    return (dout.to(dtype) * out.to(dtype)).sum(-1)


def _out_of_delta(dout: Tensor, delta: Tensor) -> Tensor:
    """An out with the given delta, for kernels that ask for out: its projection on dout.

    So delta travels in place of out, a head dim's worth of elements less. The projection is no
    longer than out itself, so nothing overflows, and its rounding disturbs delta less than out's.
    """
    wide = dout.to(delta.dtype)
    # Both are divided by the largest element: squares of very small gradients would vanish.
    largest = wide.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(delta.dtype).tiny)
    unit = wide / largest
    square = (unit * unit).sum(-1, keepdim=True).clamp_min(1.0)  # 1 or more, but for dout = 0
    return (unit * (delta.unsqueeze(-1) / largest / square)).to(dout.dtype)


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
