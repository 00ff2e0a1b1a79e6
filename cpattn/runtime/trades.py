"""Trades of rows for heads within a block of ranks, before and after attention.

Shape legend: T rows of this rank, B rows of its block, N query heads, G key heads, D head dim of q and k, E of v.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from cpattn.collectives import HeadExchange, PendingRows
from cpattn.solver import HeadPart

from .exchanges import Exchanges


class HeadTrades(NamedTuple):
    """How a block of ranks shares the heads, from the view of one of them.

    exchanges: of the whole group. part: this rank's heads. queries, keys: the exchange of rows for heads of q, out and
    lse, and of k and v.
    """

    exchanges: Exchanges
    part: HeadPart
    queries: HeadExchange
    keys: HeadExchange


def trade_inputs(trades: HeadTrades, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows for heads: q [B, part, D], k [B, part, D] and v [B, part, E] of the block's rows."""
    to_heads, by = trades.exchanges.to_heads, trades.keys
    started = to_heads("heads of q", q, trades.queries), to_heads("heads of k", k, by), to_heads("heads of v", v, by)
    return _wait_three(*started)


def trade_gradients(trades: HeadTrades, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Heads for rows: the gradients of q, k and v, whole for this rank's rows."""
    to_rows, by = trades.exchanges.to_rows, trades.keys
    started = to_rows("rows of dq", dq, trades.queries), to_rows("rows of dk", dk, by), to_rows("rows of dv", dv, by)
    return _wait_three(*started)


def trade_result(trades: HeadTrades, x_BM: Tensor) -> Tensor:
    """Heads for rows: out [B, part, E] or lse [B, part], whole for this rank's rows."""
    name = "rows of out" if x_BM.dim() == 3 else "rows of lse"
    (whole,) = trades.exchanges.to_rows(name, x_BM, trades.queries).wait()
    return whole


def trade_dout(trades: HeadTrades, dout_TNE: Tensor) -> Tensor:
    """Rows for heads: the gradient of out, [B, part, E]."""
    (block,) = trades.exchanges.to_heads("heads of dout", dout_TNE, trades.queries).wait()
    return block


def _wait_three(a: PendingRows, b: PendingRows, c: PendingRows) -> tuple[Tensor, Tensor, Tensor]:
    """They have all been started; waits for one after the other."""
    (first,), (second,), (third,) = a.wait(), b.wait(), c.wait()
    return first, second, third
