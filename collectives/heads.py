"""Rows for heads: all heads of a rank's rows against the rows of a whole block of ranks for some heads, and back.

The block is some ranks of a group; all ranks of the group take part in the collective, as no group is made for blocks.

Shape legend: T rows of this rank, B rows of the block, N all heads, M heads of this rank, D whatever follows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .exchange import PendingRows, Transport, exchange_rows


@dataclass(frozen=True, slots=True)
class HeadExchange:
    """One rank's part in the exchanges of its block.

    block: the block's ranks in the group, part by part.
    part: which of them this rank is.
    rows: rows of each part outside attention; in the block they lie part by part.
    heads: heads of each part inside; a head may be with several parts, and more than once with one.
    num_heads: N.
    active: whether any rank of the group has rows; equal on all ranks, it decides if the collective runs.
    transport: by which calls they travel; equal on all ranks.
    """

    block: tuple[int, ...]
    part: int
    rows: tuple[int, ...]
    heads: tuple[tuple[int, ...], ...]
    num_heads: int
    active: bool
    transport: Transport = "all_to_all"

    def splits(self, sizes: Sequence[int], group_size: int) -> tuple[int, ...]:
        """Sizes of the block's parts as splits over the group."""
        splits = [0] * group_size
        for rank, size in zip(self.block, sizes, strict=True):
            splits[rank] = size
        return tuple(splits)


def rows_to_heads(x_TND: Tensor, exchange: HeadExchange, group: dist.ProcessGroup) -> PendingRows:
    """Start to exchange this rank's rows for its heads; the handle gives [B, M, *D], contiguous.

    x_TND may have any strides, and may be overwritten at once.
    """
    rest = x_TND.shape[2:]
    width = math.prod(rest)
    sent = [x_TND.shape[0] * len(heads) * width for heads in exchange.heads]
    mine = len(exchange.heads[exchange.part])
    send = x_TND.new_empty(sum(sent))
    for heads, part in zip(exchange.heads, send.split(sent), strict=True):
        _take_heads(x_TND.detach(), heads, out=part.view(x_TND.shape[0], len(heads), *rest))
    received = x_TND.new_empty(sum(exchange.rows), mine, *rest)
    recv = [rows * mine * width for rows in exchange.rows]
    size = dist.get_world_size(group)
    recv_splits, send_splits = exchange.splits(recv, size), exchange.splits(sent, size)
    work = exchange_rows(received.view(-1), send, recv_splits, send_splits, exchange, group)
    return PendingRows(work, lambda: (received,), sending=send)


def heads_to_rows(x_BMD: Tensor, exchange: HeadExchange, group: dist.ProcessGroup) -> PendingRows:
    """Start to exchange the block's rows of this rank's heads for its rows; the handle gives [T, N, *D], contiguous.

    The adjoint of `rows_to_heads`: a head that several parts have arrives as their sum, taken in fp32 in the order of
    the parts; one that no part has as zero.
    """
    rest = x_BMD.shape[2:]
    width = math.prod(rest)
    mine, rows = len(exchange.heads[exchange.part]), exchange.rows[exchange.part]
    send = x_BMD.detach().contiguous().view(-1)
    sent = [n * mine * width for n in exchange.rows]
    recv = [rows * len(heads) * width for heads in exchange.heads]
    received = x_BMD.new_empty(sum(recv))
    size = dist.get_world_size(group)
    recv_splits, send_splits = exchange.splits(recv, size), exchange.splits(sent, size)
    work = exchange_rows(received, send, recv_splits, send_splits, exchange, group)

    def collect() -> tuple[Tensor, ...]:
        parts = [
            flat.view(rows, len(heads), *rest)
            for flat, heads in zip(received.split(recv), exchange.heads, strict=True)
        ]
        return (_add_heads(parts, exchange),)

    return PendingRows(work, collect, sending=send)


def _take_heads(x: Tensor, heads: tuple[int, ...], *, out: Tensor) -> None:
    for nth, head, length in _runs(heads):
        out[:, nth : nth + length] = x[:, head : head + length]


def _add_heads(parts: Sequence[Tensor], exchange: HeadExchange) -> Tensor:
    """[T, N, *D] from the heads of each part, [T, M, *D]; added up where parts share heads."""
    like = parts[0]
    shape = (like.shape[0], exchange.num_heads, *like.shape[2:])
    if sorted(head for heads in exchange.heads for head in heads) == list(range(exchange.num_heads)):
        whole = like.new_empty(shape)
        for heads, part in zip(exchange.heads, parts, strict=True):
            for nth, head, length in _runs(heads):
                whole[:, head : head + length] = part[:, nth : nth + length]
        return whole
    total = like.new_zeros(shape, dtype=torch.promote_types(like.dtype, torch.float32))
    for heads, part in zip(exchange.heads, parts, strict=True):
        for nth, head, length in _runs(heads):
            total[:, head : head + length] += part[:, nth : nth + length]
    return total.to(like.dtype)


def _runs(heads: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """Stretches of consecutive heads: (place in the list, head, length)."""
    starts = [nth for nth, head in enumerate(heads) if nth == 0 or head != heads[nth - 1] + 1]
    return [(a, heads[a], b - a) for a, b in zip(starts, [*starts[1:], len(heads)], strict=True)]
