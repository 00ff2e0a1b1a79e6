"""`attention`: exact attention over the whole sequence, from each rank's rows.

Executes a rank plan and decides nothing. Forward, stage by stage: fetch remote keys and values
(the next stage's travel while this stage computes), run the local kernel on the stage's slices,
merge by log-sum-exp in fp32. Backward takes the same routes turned round: the local kernel with the
global out and lse, and a GroupReduce of the key and value gradients to their owners. Where the plan
moves queries, they travel first and their partial results come home last.

Shape legend: T local tokens, N query heads, G key heads, D head dim of q and k, E head dim of v.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from cpattn.collectives import PendingRows, group_cast, group_reduce

from .key import AttnKey, BoundPlan, key_of_handle


def attention(
    q_TND: Tensor,
    k_TGD: Tensor,
    v_TGE: Tensor,
    key: AttnKey,
    *,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of this rank's queries over the whole sequence, under the key's mask.

    Call it on all ranks of the key's group, in the same order.

    Args:
        q_TND: [T_local, num_heads_q, head_dim], this rank's rows in the key's order; fp64, fp32,
            bf16 or fp16. Any strides.
        k_TGD: [T_local, num_heads_kv, head_dim] ([key.num_keys, ...] in cross-attention).
        v_TGE: [T_local, num_heads_kv, head_dim_v].
        key: from `make_key`.
        softmax_scale: factor on the scores; None is head_dim ** -0.5.
        softcap: c caps the scaled scores to c * tanh(scores / c).
        sink: [num_heads_q], a logit per head that takes part in the softmax and has no value; the
            same on all ranks.
        return_lse: also return the log-sum-exp.

    Returns:
        out [T_local, num_heads_q, head_dim_v] in q's dtype; with return_lse also lse
        [T_local, num_heads_q], natural log, sink included, fp32 (fp64 for fp64), without gradient.
        A query that sees no key gives out 0, lse -inf (without a sink) and zero gradients.

    Gradient: of the sum over ranks of the local losses. q, k and v get the whole gradient of their
    rows. The sink, like any replicated parameter, gets this rank's share: sum it over the ranks
    (DDP and FSDP2 do, and divide by the number of ranks: scale the loss by it).

    Raises:
        ValueError: a shape, dtype, device or number does not fit the key; before any collective.
    """
    if torch.is_autocast_enabled(q_TND.device.type):
        dtype = torch.get_autocast_dtype(q_TND.device.type)
        q_TND, k_TGD, v_TGE = (t.to(dtype) for t in (q_TND, k_TGD, v_TGE))
    scale = key.head_dim**-0.5 if softmax_scale is None else float(softmax_scale)
    _check_call(q_TND, k_TGD, v_TGE, key, scale, softcap, sink)
    out, lse = torch.ops.cpattn.attention_forward(
        q_TND, k_TGD, v_TGE, sink, key.handle, scale, None if softcap is None else float(softcap)
    )
    return (out, lse.detach()) if return_lse else out


def _check_call(
    q: Tensor, k: Tensor, v: Tensor, key: AttnKey, scale: float, softcap: float | None, sink: Tensor | None
) -> None:
    expected = {
        "q": (q, (key.num_tokens, key.num_heads_q, key.head_dim)),
        "k": (k, (key.num_keys, key.num_heads_kv, key.head_dim)),
        "v": (v, (key.num_keys, key.num_heads_kv, key.head_dim_v)),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}: the key expects {shape} (rows of rank "
                f"{key.cp_rank}, heads, head dim); did you dispatch with this key?"
            )
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device} and q is {q.dtype} on {q.device}: "
                f"q, k and v must agree"
            )
    if sink is not None and (tuple(sink.shape) != (key.num_heads_q,) or sink.device != q.device):
        raise ValueError(
            f"sink has shape {tuple(sink.shape)} on {sink.device}: expected ({key.num_heads_q},), one "
            f"logit per query head, on {q.device}"
        )
    if not math.isfinite(scale):
        raise ValueError(f"softmax_scale is {scale}: it must be a finite number")
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise ValueError(f"softcap is {softcap}: it must be a finite number above 0, or None")


@torch.library.custom_op("cpattn::attention_forward", mutates_args=())
def _attention_forward(
    q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, key_handle: int, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    key = key_of_handle(key_handle)
    plan = key.bind(q.device, q.dtype, softcap is not None)
    key.agree(dtype=q.dtype, scale=scale, softcap=softcap, sink=sink is not None, device=q.device.type)
    q, k, v = (_dense_last_dim(t) for t in (q, k, v))
    return _run_forward(key, plan, q, k, v, sink, {"scale": scale, "softcap": softcap})


@_attention_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, key_handle: int, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    out = q.new_empty((*q.shape[:2], v.shape[-1]))
    return out, q.new_empty(q.shape[:2], dtype=_accumulator_dtype(q.dtype))


@torch.library.custom_op("cpattn::attention_backward", mutates_args=())
def _attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sink: Tensor | None,
    key_handle: int,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    key = key_of_handle(key_handle)
    plan = key.bind(q.device, q.dtype, softcap is not None)
    dout, q, k, v, out = (_dense_last_dim(t) for t in (dout, q, k, v, out))
    dq, dk, dv = _run_backward(key, plan, dout, q, k, v, out, lse, {"scale": scale, "softcap": softcap})
    if sink is None:
        return dq, dk, dv, q.new_empty(0)
    return dq, dk, dv, _sink_gradient(dout, out, lse, sink)


@_attention_backward.register_fake
def _(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sink: Tensor | None,
    key_handle: int,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dsink = q.new_empty(0) if sink is None else torch.empty_like(sink)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsink


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, sink, key_handle, scale, softcap = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, sink)
    ctx.arguments = key_handle, scale, softcap
    if isinstance(key_handle, int):
        ctx.key = key_of_handle(key_handle)  # alive until backward, even if the caller drops it


def _backward(ctx: Any, dout: Tensor, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, sink = ctx.saved_tensors
    dq, dk, dv, dsink = torch.ops.cpattn.attention_backward(
        dout, q, k, v, out, lse, sink, *ctx.arguments
    )
    return dq, dk, dv, None if sink is None else dsink, None, None, None


_attention_forward.register_autograd(_backward, setup_context=_setup_context)


def _run_forward(
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


def _run_backward(
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
        rows = (dout, q, lse, _delta(dout, out, dtype))
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
    dtype = _accumulator_dtype(q.dtype)
    out = torch.zeros((*q.shape[:2], v.shape[-1]), dtype=dtype, device=q.device)
    return out, torch.full(q.shape[:2], -torch.inf, dtype=dtype, device=q.device)


def _delta(dout: Tensor, out: Tensor, dtype: torch.dtype) -> Tensor:
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


def _sink_gradient(dout: Tensor, out: Tensor, lse: Tensor, sink: Tensor) -> Tensor:
    """d/dsink of softmax with an extra logit: its probability is exp(sink - lse) and its value 0."""
    probability = torch.exp(sink.to(lse.dtype) - lse)
    return -(probability * _delta(dout, out, lse.dtype)).sum(0).to(sink.dtype)


def _accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _dense_last_dim(x: Tensor) -> Tensor:
    """Kernels take any strides but that of the last dimension; overlapping rows are copied."""
    if x.stride(-1) != 1 or 0 in x.stride():
        return x.contiguous()
    return x
