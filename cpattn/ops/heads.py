"""Head sharding around attention: the exchanges of rows for heads, as custom ops that autograd and compile know.

A block of ranks trades its rows for heads (`shard_heads`), runs the attention of the block's rows with each rank's
heads (`attention_op`, on the key's inner key), and trades back (`gather_rows`). Backward runs the same exchanges turned
round; the head-sharded q, k and v are saved in between and do not travel again.

Shape legend: T rows of this rank, B rows of its block, N query heads, G key heads, D head dim of q and k, E of v.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor

from cpattn.keys.key import AttnKey, HeadSharding, key_of_handle
from cpattn.runtime.recording import Pass, recorded
from cpattn.runtime.trace import PassName
from cpattn.runtime.trades import HeadTrades, trade_dout, trade_gradients, trade_inputs, trade_result

from .order import exchanging_op


def shard_heads(
    q_TND: Tensor, k_TGD: Tensor, v_TGE: Tensor, key: AttnKey, *, return_lse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """All rows of this rank's block, for its heads: q [B, part, D], k [B, part, D], v [B, part, E].

    return_lse: whether lse will be traded back as well as out; ranks compare it here.
    """
    part = _sharding(key).part
    return torch.ops.cpattn.shard_heads(  # type: ignore[no-any-return]
        q_TND, k_TGD, v_TGE, key.handle, part.num_q, len(part.kv), return_lse
    )


def gather_rows(x_BME: Tensor, key: AttnKey, num_rows: int) -> Tensor:
    """All query heads of this rank's rows, [T, N, ...], from all rows of its block for its heads (out, or lse).

    num_rows: T.
    """
    return torch.ops.cpattn.gather_rows(x_BME, key.handle, num_rows, key.num_heads_q)  # type: ignore[no-any-return]


def _run_shard_heads(
    q: Tensor, k: Tensor, v: Tensor, key_handle: Tensor, num_heads_q: int, num_heads_kv: int, return_lse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    key = key_of_handle(key_handle)
    with key.checking("attention"):
        key.require_shapes(q, k, v)
    said = {"dtype": q.dtype, "device": q.device.type, "return_lse": return_lse, "trade": "rows for heads"}
    calling = key.calling("attention", q.device, **said)
    with calling, _recorded_trades("forward", "before", key, q.device) as trades:
        return trade_inputs(trades, q, k, v)


def _fake_shard_heads(
    q: Tensor, k: Tensor, v: Tensor, key_handle: Tensor, num_heads_q: int, num_heads_kv: int, return_lse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows_q, rows_k = (torch.library.get_ctx().new_dynamic_size() for _ in range(2))
    return (
        q.new_empty(rows_q, num_heads_q, q.shape[2]),
        k.new_empty(rows_k, num_heads_kv, k.shape[2]),
        v.new_empty(rows_k, num_heads_kv, v.shape[2]),
    )


def _run_shard_heads_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    key_handle: Tensor,
    rows_q: int,
    rows_k: int,
    num_heads_q: int,
    num_heads_kv: int,
) -> tuple[Tensor, Tensor, Tensor]:
    key = key_of_handle(key_handle)
    calling = key.calling("attention backward", dq.device, dtype=dq.dtype, trade="heads for rows")
    with calling, _recorded_trades("backward", "after", key, dq.device) as trades:
        return trade_gradients(trades, dq, dk, dv)


def _fake_shard_heads_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    key_handle: Tensor,
    rows_q: int,
    rows_k: int,
    num_heads_q: int,
    num_heads_kv: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        dq.new_empty(rows_q, num_heads_q, dq.shape[2]),
        dk.new_empty(rows_k, num_heads_kv, dk.shape[2]),
        dv.new_empty(rows_k, num_heads_kv, dv.shape[2]),
    )


def _save_shapes(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, _, key_handle, *_ = inputs
    ctx.save_for_backward(key_handle)
    ctx.sizes = (q.shape[0], k.shape[0], q.shape[1], k.shape[1])


def _backward_of_shard(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
    (key_handle,) = ctx.saved_tensors
    grads = torch.ops.cpattn.shard_heads_backward(dq, dk, dv, key_handle, *ctx.sizes)
    return (*grads, None, None, None, None)


_shard_heads = exchanging_op("cpattn::shard_heads", _run_shard_heads, _fake_shard_heads)
exchanging_op("cpattn::shard_heads_backward", _run_shard_heads_backward, _fake_shard_heads_backward)
_shard_heads.register_autograd(_backward_of_shard, setup_context=_save_shapes)


def _run_gather_rows(x: Tensor, key_handle: Tensor, num_rows: int, num_heads_q: int) -> Tensor:
    key = key_of_handle(key_handle)
    calling = key.calling("attention", x.device, dtype=x.dtype, lse=x.dim() == 2, trade="heads for rows")
    with calling, _recorded_trades("forward", "after", key, x.device) as trades:
        return trade_result(trades, x)


def _fake_gather_rows(x: Tensor, key_handle: Tensor, num_rows: int, num_heads_q: int) -> Tensor:
    return x.new_empty(num_rows, num_heads_q, *x.shape[2:])


def _run_gather_rows_backward(grad: Tensor, key_handle: Tensor, num_rows: int, num_heads_q: int) -> Tensor:
    key = key_of_handle(key_handle)
    calling = key.calling("attention backward", grad.device, dtype=grad.dtype, trade="rows for heads")
    with calling, _recorded_trades("backward", "before", key, grad.device) as trades:
        return trade_dout(trades, grad)


def _fake_gather_rows_backward(grad: Tensor, key_handle: Tensor, num_rows: int, num_heads_q: int) -> Tensor:
    return grad.new_empty(num_rows, num_heads_q, *grad.shape[2:])


def _save_block(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, key_handle, _, _ = inputs
    ctx.save_for_backward(key_handle)
    ctx.sizes = x.shape[:2]


def _backward_of_gather(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (key_handle,) = ctx.saved_tensors
    return torch.ops.cpattn.gather_rows_backward(grad, key_handle, *ctx.sizes), None, None, None


_gather_rows = exchanging_op("cpattn::gather_rows", _run_gather_rows, _fake_gather_rows)
exchanging_op("cpattn::gather_rows_backward", _run_gather_rows_backward, _fake_gather_rows_backward)
_gather_rows.register_autograd(_backward_of_gather, setup_context=_save_block)


def _sharding(key: AttnKey) -> HeadSharding:
    assert key.sharding is not None, "the key has no head sharding"
    return key.sharding


def _recorded_trades(
    name: PassName, part: Literal["before", "after"], key: AttnKey, device: torch.device
) -> AbstractContextManager[HeadTrades]:
    """The key's trades before or after a pass of attention."""
    sharding = _sharding(key)
    return recorded(Pass(name, key, sharding.inner, part), sharding.trades, device)
