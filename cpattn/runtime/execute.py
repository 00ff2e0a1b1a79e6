"""The execution of a rank plan: exchanges, local kernels and merges, forward and backward.

It decides nothing. Forward, stage by stage: fetch remote keys and values (the next stage's travel
while this stage computes), run the local kernel on the stage's slices, merge by log-sum-exp in
fp32. Backward takes the same routes turned round: the local kernel with the global out and lse,
and a GroupReduce of the key and value gradients to their owners. Where the plan moves queries,
they travel first and their partial results come home last.

Shape legend: T local tokens, N query heads, G key heads, D head dim of q and k, E head dim of v.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

from cpattn.collectives import (
    PendingRows,
    RowRoutes,
    cast_encoded,
    group_cast,
    group_reduce,
    packed_row_bytes,
    unpack_rows,
)
from cpattn.keys.key import AttnKey, BoundPlan

from .profiling import timed, watched


def run_forward(
    key: AttnKey,
    plan: BoundPlan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    kept: Tensor,
    numbers: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """out and lse. kept: uint8 [kept_bytes] that receives the fetched keys and values, or empty to let them go."""
    # Where a row's result is written once, it needs no accumulator in fp32.
    once = len(plan.stages) == 1 and not plan.moves_queries and sink is None
    once = once and plan.backend.writes_once(plan.stages[0].host_work)
    out, lse = _empty_partial(q, v, q.dtype if once else accumulator_dtype(q.dtype))
    if plan.moves_queries:
        pending_queries = _cast(key, plan.queries, (q,), _encoded(key, q))
    fetches = _Fetches(key, plan, k, v, _rooms(key, plan, k, v, kept))
    reduction = PendingRows(None, tuple)
    keys, values = k, v
    for number, stage in enumerate(plan.stages):
        if number:
            keys, values = fetches.take()
        for side in _work_order(plan, number):
            if side == "host":
                plan.backend.forward(
                    q, keys, values, stage.host_work, **numbers, out_QNE=out, lse_QN=lse, fresh=number == 0
                )
                continue
            if number == 0:
                (q_guest,) = pending_queries.wait()
                out_guest, lse_guest = _empty_partial(q_guest, v, accumulator_dtype(q.dtype))
            plan.backend.forward(
                q_guest, keys, values, stage.guest_work, **numbers, out_QNE=out_guest, lse_QN=lse_guest
            )
            if number == len(plan.stages) - 1:
                results = (out_guest.to(q.dtype), lse_guest)
                reduction = watched(plan.queries, group_reduce)(
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
    kept: Tensor,
    numbers: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v. kept: the keys and values that forward fetched; empty: they are fetched again."""
    dtype = lse.dtype
    # exp(score - inf) = 0: rows that see nothing have no gradient, and no NaN.
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    dq, dk, dv = (torch.zeros(t.shape, dtype=dtype, device=t.device) for t in (q, k, v))
    sides = {"host": (dout, q, out, lse, dq)}
    if plan.moves_queries:
        rows = (dout, q, lse, row_delta(dout, out, dtype))
        pending_queries = _cast(key, plan.queries, rows, _encoded(key, dout, q))
    fetches = _Fetches(key, plan, k, v, _rooms(key, plan, k, v, kept), filled=True)
    keys, values, dkeys, dvalues = k, v, dk, dv
    reductions: deque[PendingRows] = deque()
    for number, stage in enumerate(plan.stages):
        if number:
            keys, values = fetches.take()
            packed, (dkeys, dvalues) = _packed_zeros((keys, values), dtype)
        for side in _work_order(plan, number):
            if side == "guest" and number == 0:
                sides["guest"] = timed("unpack", _guest_rows)(pending_queries.wait(), dtype)
            dout_, q_, out_, lse_, dq_ = sides[side]
            work = stage.host_work if side == "host" else stage.guest_work
            plan.backend.backward(
                dout_, q_, keys, values, out_, lse_, work, **numbers, dq_QND=dq_, dk_KGD=dkeys, dv_KGE=dvalues
            )
            if side == "guest" and number == len(plan.stages) - 1:
                send_home = watched(plan.queries, group_reduce)
                reductions.append(send_home((dq_,), (dq,), plan.queries, key.cp_group, async_op=True))
        if number:
            # At most one stage's gradients are in flight; those that take two hops get two stages' work to hide behind.
            while len(reductions) >= _depth(plan):
                reductions.popleft().wait()
            for reduction in reductions:
                reduction.advance()
            send_home = watched(stage.kv, group_reduce)
            gradients = (dkeys, dvalues)
            reductions.append(send_home(gradients, (dk, dv), stage.kv, key.cp_group, packed=packed, async_op=True))
    for reduction in reductions:
        reduction.wait()
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _packed_zeros(like: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A buffer of zeros from which rows of these shapes travel without a copy, and the tensors in it."""
    none = tuple(t.new_empty((0, *t.shape[1:]), dtype=dtype) for t in like)
    packed = torch.zeros((like[0].shape[0], packed_row_bytes(none)), dtype=torch.uint8, device=like[0].device)
    return packed, unpack_rows(packed, none)


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


class _Fetches:
    """The keys and values of the remote stages, each fetched while the stage before computes.

    The first two are fetched behind the work on own keys, so that ranks with much of that and ranks with little
    need not meet between them. On a two-level network two stages are always under way: the second hop of one, inside
    the nodes, and the first hop of the next, between them, travel behind the same work. What a stage fetches is held in
    full only in its second hop.

    rooms: what each stage's keys and values are received into, to be kept; none: they are let go.
    filled: forward has fetched into the rooms, if there are any, so nothing travels.
    """

    def __init__(
        self, key: AttnKey, plan: BoundPlan, k: Tensor, v: Tensor, rooms: tuple[Tensor, ...], *, filled: bool = False
    ) -> None:
        self._key, self._plan, self._k, self._v = key, plan, k, v
        self._rooms, self._at_hand = rooms, filled and bool(rooms)
        self._encoded = _encoded(key, k, v) if len(plan.stages) > 1 and not self._at_hand else ()
        self._pending = deque(self._start(number) for number in (1, 2))
        self._taken = 0

    def take(self) -> tuple[Tensor, ...]:
        """Keys and values of the next stage; starts what travels while it computes."""
        rows = self._pending.popleft().wait()
        for pending in self._pending:
            pending.advance()
        self._taken += 1
        # At one level, two stages' buffers are full: the one taken and the next.
        if self._taken + _depth(self._plan) > 2:
            self._pending.append(self._start(self._taken + _depth(self._plan)))
        return rows

    def _start(self, number: int) -> PendingRows:
        """Start to fetch those of a stage; nothing after the last."""
        key, plan, k, v = self._key, self._plan, self._k, self._v
        if number >= len(plan.stages):
            return PendingRows(None, tuple)
        if self._at_hand:
            return PendingRows(None, lambda: _kept_rows(key, self._rooms[number - 1], k, v))
        room = self._rooms[number - 1] if self._rooms else None
        return _cast(key, plan.stages[number].kv, (k, v), self._encoded, room)


def _depth(plan: BoundPlan) -> int:
    """Exchanges of one kind that are under way at once: one for each hop."""
    return len(plan.queries)


def kept_bytes(key: AttnKey, plan: BoundPlan, k: Tensor, v: Tensor) -> int:
    """Bytes of the keys and values that all stages fetch, as they travel."""
    rows = sum(stage.kv[-1].num_received for stage in plan.stages[1:])
    return rows * packed_row_bytes(_travelling(key, k, v))


def _rooms(key: AttnKey, plan: BoundPlan, k: Tensor, v: Tensor, kept: Tensor) -> tuple[Tensor, ...]:
    """The part of `kept` that belongs to each remote stage, [rows, bytes of a row]; none if the key keeps nothing."""
    if not key.options.keep_kv:  # and not by what there is to keep, which differs between ranks
        return ()
    rows = kept.view(-1, packed_row_bytes(_travelling(key, k, v)))
    return rows.split([stage.kv[-1].num_received for stage in plan.stages[1:]])


def _travelling(key: AttnKey, *rows: Tensor) -> tuple[Tensor, ...]:
    """Tensors with the row shapes and dtypes in which these rows travel, and no rows."""
    none = tuple(t[:0] for t in rows)
    return none if key.codec is None else key.codec.encode(none)


def _kept_rows(key: AttnKey, room: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    views = unpack_rows(room, _travelling(key, k, v))
    return views if key.codec is None else timed("unpack", key.codec.decode)(views, k.dtype)


def _encoded(key: AttnKey, *rows: Tensor) -> tuple[Tensor, ...]:
    """What travels in the place of these rows where the key compresses the wire; else nothing."""
    return () if key.codec is None else timed("encode", key.codec.encode)(rows)


def _cast(
    key: AttnKey,
    hops: tuple[RowRoutes, ...],
    rows: tuple[Tensor, ...],
    encoded: tuple[Tensor, ...],
    into: Tensor | None = None,
) -> PendingRows:
    """Start to send rows, the first of them as `encoded` where that is not empty; received into `into` if given."""
    if key.codec is None:
        return watched(hops, group_cast)(rows, hops, key.cp_group, into=into)
    dtypes, plain = [t.dtype for t in rows[: len(encoded)]], rows[len(encoded) :]
    return watched(hops, cast_encoded)(encoded, plain, hops, key.cp_group, key.codec, dtypes=dtypes, into=into)


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
