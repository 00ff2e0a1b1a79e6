"""Head sharding around attention: the exchanges of rows for heads, as custom ops that autograd and compile know.

A block of ranks trades its rows for heads (`shard_heads`), runs the attention of the block's rows with each rank's
heads (`attention_op`, on the key's inner key), and trades back (`gather_rows`). Backward runs the same exchanges turned
round; the head-sharded q, k and v are saved in between and do not travel again.

Shape legend: T rows of this rank, B rows of its block, N query heads, G key heads, D head dim of q and k, E of v.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from cpattn.collectives import HeadExchange, PendingRows, heads_to_rows, rows_to_heads
from cpattn.keys.key import AttnKey, HeadSharding, key_of_handle
from cpattn.runtime.profiling import traded, watched_heads


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


@torch.library.custom_op("cpattn::shard_heads", mutates_args=())
def _shard_heads(
    q: Tensor, k: Tensor, v: Tensor, key_handle: Tensor, num_heads_q: int, num_heads_kv: int, return_lse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    key = key_of_handle(key_handle)
    key.require_shapes(q, k, v)
    # What attention compares comes too late for this exchange, and among other ranks.
    key.agree(dtype=q.dtype, device=q.device.type, return_lse=return_lse)
    return traded("forward", "before", _trade_rows)(key, q, k, v)


@_shard_heads.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, key_handle: Tensor, num_heads_q: int, num_heads_kv: int, return_lse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows_q, rows_k = (torch.library.get_ctx().new_dynamic_size() for _ in range(2))
    return (
        q.new_empty(rows_q, num_heads_q, q.shape[2]),
        k.new_empty(rows_k, num_heads_kv, k.shape[2]),
        v.new_empty(rows_k, num_heads_kv, v.shape[2]),
    )


@torch.library.custom_op("cpattn::shard_heads_backward", mutates_args=())
def _shard_heads_backward(
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
    return traded("backward", "after", _trade_heads)(key, dq, dk, dv)


@_shard_heads_backward.register_fake
def _(
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


_shard_heads.register_autograd(_backward_of_shard, setup_context=_save_shapes)


@torch.library.custom_op("cpattn::gather_rows", mutates_args=())
def _gather_rows(x: Tensor, key_handle: Tensor, num_rows: int, num_heads_q: int) -> Tensor:
    key = key_of_handle(key_handle)
    return traded("forward", "after", _trade_result)(key, x)


@_gather_rows.register_fake
def _(x: Tensor, key_handle: Tensor, num_rows: int, num_heads_q: int) -> Tensor:
    return x.new_empty(num_rows, num_heads_q, *x.shape[2:])


@torch.library.custom_op("cpattn::gather_rows_backward", mutates_args=())
def _gather_rows_backward(grad: Tensor, key_handle: Tensor, num_rows: int, num_heads_q: int) -> Tensor:
    key = key_of_handle(key_handle)
    return traded("backward", "before", _trade_dout)(key, grad)


@_gather_rows_backward.register_fake
def _(grad: Tensor, key_handle: Tensor, num_rows: int, num_heads_q: int) -> Tensor:
    return grad.new_empty(num_rows, num_heads_q, *grad.shape[2:])


def _save_block(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, key_handle, _, _ = inputs
    ctx.save_for_backward(key_handle)
    ctx.sizes = x.shape[:2]


def _backward_of_gather(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (key_handle,) = ctx.saved_tensors
    return torch.ops.cpattn.gather_rows_backward(grad, key_handle, *ctx.sizes), None, None, None


_gather_rows.register_autograd(_backward_of_gather, setup_context=_save_block)


def _sharding(key: AttnKey) -> HeadSharding:
    assert key.sharding is not None, "the key has no head sharding"
    return key.sharding


def _group(key: AttnKey) -> ProcessGroup:
    assert key.cp_group is not None, "head sharding needs a group"
    return key.cp_group


def _trade_rows(key: AttnKey, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return trade_rows(_sharding(key), _group(key), q, k, v)


def _trade_heads(key: AttnKey, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return trade_heads(_sharding(key), _group(key), dq, dk, dv)


def _trade_result(key: AttnKey, x: Tensor) -> Tensor:
    """Heads for rows, of out or lse."""
    exchange = watched_heads("rows of out" if x.dim() == 3 else "rows of lse", heads_to_rows)
    (whole,) = exchange(x, _sharding(key).queries, _group(key)).wait()
    return whole


def _trade_dout(key: AttnKey, dout: Tensor) -> Tensor:
    """Rows for heads, of the gradient of out."""
    (block,) = watched_heads("heads of dout", rows_to_heads)(dout, _sharding(key).queries, _group(key)).wait()
    return block


def trade_rows(
    sharding: HeadSharding, group: ProcessGroup, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows for heads, of q, k and v."""
    exchanges = _by_exchange(sharding, q=q, k=k, v=v)
    return _wait_three([watched_heads(f"heads of {n}", rows_to_heads)(x, by, group) for n, x, by in exchanges])


def trade_heads(
    sharding: HeadSharding, group: ProcessGroup, dq: Tensor, dk: Tensor, dv: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Heads for rows, of the gradients of q, k and v."""
    exchanges = _by_exchange(sharding, dq=dq, dk=dk, dv=dv)
    return _wait_three([watched_heads(f"rows of {n}", heads_to_rows)(x, by, group) for n, x, by in exchanges])


def _by_exchange(sharding: HeadSharding, **tensors: Tensor) -> list[tuple[str, Tensor, HeadExchange]]:
    """Name, tensor and exchange of q, k and v, or their gradients."""
    exchanges = (sharding.queries, sharding.keys, sharding.keys)
    return [(name, x, by) for (name, x), by in zip(tensors.items(), exchanges, strict=True)]


def _wait_three(pending: list[PendingRows]) -> tuple[Tensor, Tensor, Tensor]:
    """The exchanges have all been started; waits for one after the other."""
    (a,), (b,), (c,) = (p.wait() for p in pending)
    return a, b, c
