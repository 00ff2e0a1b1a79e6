"""`attention`: exact attention over the whole sequence, from each rank's rows.

The public function, and the two custom ops behind it. Custom ops take tensors and numbers only, so
a key travels as its handle in a tensor: `torch.compile` puts no guard on the value of a tensor, and
one compiled graph serves every mask. Execution is in `cpattn.runtime.execute`.

Shape legend: T local tokens, N query heads, G key heads, D head dim of q and k, E head dim of v.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from torch import Tensor

from cpattn.keys.key import AttnKey, key_of_handle, require_key
from cpattn.runtime.execute import (
    Attending,
    KeyRows,
    Scoring,
    accumulator_dtype,
    kept_bytes,
    run_backward,
    run_forward,
)
from cpattn.runtime.recording import Pass, recorded
from cpattn.runtime.sinks import row_delta, sink_gradient

from .heads import gather_rows, shard_heads
from .order import exchanging_op
from .transforms import refuse_transforms


@torch.compiler.assume_constant_result  # torch 2.11 cannot trace the question
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


@overload
def attention(
    q_TND: Tensor,
    k_TGD: Tensor,
    v_TGE: Tensor,
    key: AttnKey,
    *,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    return_lse: Literal[False] = False,
    layer: int | str | None = None,
) -> Tensor: ...
@overload
def attention(
    q_TND: Tensor,
    k_TGD: Tensor,
    v_TGE: Tensor,
    key: AttnKey,
    *,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    return_lse: Literal[True],
    layer: int | str | None = None,
) -> tuple[Tensor, Tensor]: ...
@overload
def attention(
    q_TND: Tensor,
    k_TGD: Tensor,
    v_TGE: Tensor,
    key: AttnKey,
    *,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    return_lse: bool,
    layer: int | str | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...
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
    layer: int | str | None = None,
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
        layer: what this call is in the model, for ranks to compare: layers that are alike in all else, and that ranks
            call in another order, are told apart by it alone.

    Returns:
        out [T_local, num_heads_q, head_dim_v] in q's dtype; with return_lse also lse
        [T_local, num_heads_q], natural log, sink included, fp32 (fp64 for fp64), without gradient.
        A query that sees no key gives out 0, lse -inf (without a sink) and zero gradients.

    Gradient: of the sum over ranks of the local losses. q, k and v get the whole gradient of their
    rows. The sink, like any replicated parameter, gets this rank's share: sum it over the ranks
    (DDP and FSDP2 do, and divide by the number of ranks: scale the loss by it).

    Raises:
        ValueError: a shape, dtype, device or number does not fit the key, an input is a DTensor, or ranks are in
            different calls; before any row travels.
        LostRankError: a rank of the group raised, died or did not come, in time or at all.
        NotImplementedError: under torch.func (grad, vjp, jacrev, jvp, vmap) or forward-mode differentiation.
    """
    require_key(key, "attention")
    for name, x in (("q", q_TND), ("k", k_TGD), ("v", v_TGE), ("sink", sink)):
        if not isinstance(x, Tensor) and (x is not None or name != "sink"):
            raise ValueError(f"{name} is {type(x).__name__}: expected a tensor")
    refuse_transforms("attention", q_TND, k_TGD, v_TGE, sink)
    device_type = q_TND.device.type
    if _has_autocast(device_type) and torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        # fp64 stays what it is, as in torch's own functions.
        q_TND, k_TGD, v_TGE = (t if t.dtype == torch.float64 else t.to(dtype) for t in (q_TND, k_TGD, v_TGE))
    # Here and not in the op: of tensors on two devices the dispatcher would choose one.
    _told(key, _check_tensors, q_TND, k_TGD, v_TGE, sink)
    scale = q_TND.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    softcap = None if softcap is None else float(softcap)
    if scale <= 0:  # fused kernels scale masked scores of -inf too, and make them inf or NaN
        q_TND, scale = (-q_TND, -scale) if scale < 0 else (q_TND * 0, 1.0)
    num_rows, sharding = q_TND.shape[0], key.sharding
    inner = key if sharding is None else sharding.inner
    if sharding is not None:
        _told(key, check_numbers, key, scale, softcap, sink)
        sink = None if sink is None else sink[sharding.part.first : sharding.part.last]
        q_TND, k_TGD, v_TGE = shard_heads(q_TND, k_TGD, v_TGE, key, return_lse=return_lse)
    out, lse, *_ = torch.ops.cpattn.attention_forward(
        q_TND, k_TGD, v_TGE, sink, inner.handle, scale, softcap, inner.options.running.keep_kv, _name_of(layer)
    )
    lse = lse.detach()
    if sharding is not None:
        out = gather_rows(out, key, num_rows)
        lse = gather_rows(lse, key, num_rows) if return_lse else lse
    return (out, lse) if return_lse else out


def _name_of(layer: int | str | None) -> str | None:
    return None if layer is None else str(layer)


def _told(key: AttnKey, check: Callable[..., None], *args: Any) -> None:
    """Run a check; ranks that wait for this one's part in the call hear of what it raises (not from compiled code)."""
    if torch.compiler.is_compiling():
        check(*args)
        return
    with key.checking("attention"):
        check(*args)


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None) -> None:
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device} and q is {q.dtype} on {q.device}: "
                f"q, k and v must agree"
            )
    if sink is not None and sink.device != q.device:
        raise ValueError(f"sink is on {sink.device} and q on {q.device}: move the sink to {q.device}")


def check_numbers(key: AttnKey, scale: float, softcap: float | None, sink: Tensor | None) -> None:
    """Check what scales, caps and joins the scores of a key's attention.

    Raises:
        ValueError: names the value and the rule.
    """
    if sink is not None and tuple(sink.shape) != (key.num_heads_q,):
        raise ValueError(
            f"sink has shape {tuple(sink.shape)}: expected ({key.num_heads_q},), one logit per query head"
        )
    if not math.isfinite(scale):
        raise ValueError(f"softmax_scale is {scale}: it must be a finite number")
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise ValueError(f"softcap is {softcap}: it must be a finite number above 0, or None")


def _run_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    key_handle: Tensor,
    scale: float,
    softcap: float | None,
    keep_kv: bool,
    layer: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, lse, the fetched keys and values of all stages as bytes (none without keep_kv), and the call's number."""
    key = key_of_handle(key_handle)
    with key.checking("attention"):
        key.require_shapes(q, k, v)
        check_numbers(key, scale, softcap, sink)
        plan = key.bind(q.device, q.dtype, softcap is not None)
    q, k, v = (_dense_last_dim(t) for t in (q, k, v))
    kv = KeyRows(k, v)
    kept = q.new_empty(kept_bytes(plan, kv) if keep_kv else 0, dtype=torch.uint8)
    said = {"layer": layer, "dtype": q.dtype, "scale": scale, "softcap": softcap}
    said |= {"sink": sink is not None, "device": q.device.type}
    calling = key.calling("attention", q.device, **said)
    with calling as number, recorded(Pass("forward", key, key), plan, q.device) as plan:
        out, lse = run_forward(plan, q, kv, sink, kept, Scoring(scale, softcap))
    return out, lse, kept, torch.tensor([number], device="cpu")


def _fake_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    key_handle: Tensor,
    scale: float,
    softcap: float | None,
    keep_kv: bool,
    layer: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out = q.new_empty((*q.shape[:2], v.shape[-1]))
    lse = q.new_empty(q.shape[:2], dtype=accumulator_dtype(q.dtype))
    num_kept = torch.library.get_ctx().new_dynamic_size() if keep_kv else 0  # type: ignore[no-untyped-call]
    number = torch.empty(1, dtype=torch.int64, device="cpu")
    return out, lse, q.new_empty(num_kept, dtype=torch.uint8), number


def _run_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    kept: Tensor,
    call: Tensor,
    sink: Tensor | None,
    key_handle: Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    key = key_of_handle(key_handle)
    plan = key.bind(q.device, q.dtype, softcap is not None)
    dout, q, k, v, out = (_dense_last_dim(t) for t in (dout, q, k, v, out))
    forward = Attending(q, out, lse)
    said = {"of call": int(call), "dtype": q.dtype, "scale": scale, "softcap": softcap}
    calling = key.calling("attention backward", q.device, **said)
    with calling, recorded(Pass("backward", key, key), plan, q.device) as plan:
        dq, dk, dv = run_backward(plan, dout, forward, KeyRows(k, v), kept, Scoring(scale, softcap))
    if sink is None:
        return dq, dk, dv, q.new_empty(0)
    return dq, dk, dv, sink_gradient(row_delta(dout, out, lse.dtype), lse, sink)


def _fake_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    kept: Tensor,
    call: Tensor,
    sink: Tensor | None,
    key_handle: Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dsink = q.new_empty(0) if sink is None else torch.empty_like(sink)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsink


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, sink, key_handle, scale, softcap, *_ = inputs
    ctx.save_for_backward(q, k, v, *output, sink, key_handle)
    ctx.scale, ctx.softcap = scale, softcap
    ctx.set_materialize_grads(False)  # no zeros for lse and kept; without dout there is no backward


def _backward(ctx: Any, dout: Tensor, dlse: Tensor | None, dkept: None, dcall: None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, kept, call, sink, key_handle = ctx.saved_tensors
    dq, dk, dv, dsink = torch.ops.cpattn.attention_backward(
        dout, q, k, v, out, lse, kept, call, sink, key_handle, ctx.scale, ctx.softcap
    )
    return dq, dk, dv, None if sink is None else dsink, None, None, None, None, None


def _no_second_derivative(ctx: Any, *grads: Tensor | None) -> None:
    raise RuntimeError(
        "attention has no second derivative: call backward or autograd.grad without create_graph=True through it"
    )


_attention_forward = exchanging_op("cpattn::attention_forward", _run_attention_forward, _fake_attention_forward)
_attention_forward.register_autograd(_backward, setup_context=_setup_context)
_attention_backward = exchanging_op(
    "cpattn::attention_backward", _run_attention_backward, _fake_attention_backward
)
_attention_backward.register_autograd(_no_second_derivative)


def _dense_last_dim(x: Tensor) -> Tensor:
    """Kernels take any strides but that of the last dimension; overlapping rows are copied."""
    if x.stride(-1) != 1 or 0 in x.stride():
        return x.contiguous()
    return x
