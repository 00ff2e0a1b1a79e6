"""GroupCast and GroupReduce: rows to the ranks that need them, and results back.

GroupCast sends each row once to each rank that needs it, in one all-to-all with uneven splits.
GroupReduce is its exact inverse over the same routes: what was received is sent back and reduced
into the rows that it came from. Both run alike on gloo and NCCL.

Several tensors travel in one exchange: their rows are laid side by side, as bytes, in one buffer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from .merge import merge_partials

# Views of the packed bytes are read as up to 8-byte elements.
_ALIGN = 8


@dataclass(frozen=True, slots=True, eq=False)
class RowRoutes:
    """One rank's part in an exchange of rows.

    send_index: int64 [sum(send_splits)], local rows in sending order, receiver by receiver; within
        one receiver no row occurs twice.
    send_splits, recv_splits: rows to and from each rank of the group.
    active: whether any rank moves a row; equal on all ranks, it decides if the collective runs.
    """

    send_index: Tensor = field(repr=False)
    send_splits: tuple[int, ...]
    recv_splits: tuple[int, ...]
    active: bool

    @property
    def num_sent(self) -> int:
        return sum(self.send_splits)

    @property
    def num_received(self) -> int:
        return sum(self.recv_splits)


class PendingRows:
    """An exchange under way. `wait()` returns its result; call it once, before the group's next use
    of the buffers. The buffers are kept alive until then."""

    def __init__(self, work: dist.Work | None, finish: Callable[[], tuple[Tensor, ...]]):
        self._work = work
        self._finish: Callable[[], tuple[Tensor, ...]] | None = finish

    def wait(self) -> tuple[Tensor, ...]:
        """Block until the rows are here (on CUDA: make the current stream wait), then return them."""
        assert self._finish is not None, "the result of an exchange is taken once"
        if self._work is not None:
            self._work.wait()
        finish, self._finish = self._finish, None
        return finish()


def group_cast(
    rows: Sequence[Tensor], routes: RowRoutes, group: dist.ProcessGroup | None, *, async_op: bool = False
) -> tuple[tuple[Tensor, ...], PendingRows]:
    """Send rows of several tensors to the ranks that need them, in one exchange.

    Args:
        rows: tensors [T, ...] with the same number of local rows T, any dtypes.
        routes: which rows go where.
        group: the ranks; None is a group of one.
        async_op: return at once; the received tensors hold nothing until `wait()` of the handle.

    Returns:
        The received rows, one tensor [sum(recv_splits), ...] for each of `rows`, ordered by sender
        and then as sent; and the handle. Tensors are views of one buffer: rows are strided, the
        last dimension is contiguous.
    """
    shapes = [(t.shape[1:], t.dtype) for t in rows]
    send = _pack([t.index_select(0, routes.send_index) for t in rows])
    received, work = _all_to_all(send, routes.send_splits, routes.recv_splits, routes.active, group)
    views = _unpack(received, shapes)
    pending = PendingRows(work, lambda: views)
    if not async_op:
        pending.wait()
    return views, pending


def group_reduce(
    rows: Sequence[Tensor],
    into: Sequence[Tensor],
    routes: RowRoutes,
    group: dist.ProcessGroup | None,
    *,
    op: Literal["sum", "lse"] = "sum",
    async_op: bool = False,
) -> PendingRows:
    """Send results back along the routes of a GroupCast and reduce them into the rows they belong to.

    Args:
        rows: tensors [sum(recv_splits), ...], in the order in which the GroupCast delivered.
        into: tensors [T, ...] to reduce into, in place, when the handle is waited for.
        routes: the routes of the GroupCast.
        group: the ranks; None is a group of one.
        op: "sum" adds each tensor; "lse" takes (out [.., H, D], lse [.., H]) partial attention
            results and merges them (`merge_partials`).
        async_op: return at once; `into` is unchanged until `wait()`.

    The order of reduction is fixed: sender 0, 1, 2, ... Results repeat bit for bit.
    """
    shapes = [(t.shape[1:], t.dtype) for t in rows]
    send = _pack(list(rows))
    received, work = _all_to_all(send, routes.recv_splits, routes.send_splits, routes.active, group)

    def finish() -> tuple[Tensor, ...]:
        parts = _unpack(received, shapes)
        start = 0
        for count in routes.send_splits:
            if count:
                index = routes.send_index[start : start + count]
                _reduce_rows([p[start : start + count] for p in parts], into, index, op)
                start += count
        return tuple(into)

    pending = PendingRows(work, finish)
    if not async_op:
        pending.wait()
    return pending


def _reduce_rows(parts: Sequence[Tensor], into: Sequence[Tensor], index: Tensor, op: str) -> None:
    """Reduce one sender's rows; they are distinct, so no two of them meet in a row."""
    if op == "lse":
        out, lse = into[0].index_select(0, index), into[1].index_select(0, index)
        merge_partials(out, lse, parts[0], parts[1])
        into[0].index_copy_(0, index, out)
        into[1].index_copy_(0, index, lse)
        return
    for total, part in zip(into, parts, strict=True):
        # index_add_ of distinct rows: every row is added to once, so the order is fixed on CUDA too.
        total.index_add_(0, index, part.to(total.dtype))


def _all_to_all(
    send: Tensor,
    send_splits: tuple[int, ...],
    recv_splits: tuple[int, ...],
    active: bool,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, dist.Work | None]:
    received = send.new_empty((sum(recv_splits), *send.shape[1:]))
    if group is None or not active:
        return received, None
    work = dist.all_to_all_single(
        received, send, list(recv_splits), list(send_splits), group=group, async_op=True
    )
    return received, work


def _row_bytes(shape: torch.Size, dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGN) * _ALIGN


def _pack(tensors: list[Tensor]) -> Tensor:
    """Rows of several tensors side by side; a single tensor travels as it is."""
    if len(tensors) == 1:
        return tensors[0].contiguous()
    num_rows = tensors[0].shape[0]
    widths = [_aligned(_row_bytes(t.shape[1:], t.dtype)) for t in tensors]
    packed = torch.empty(num_rows, sum(widths), dtype=torch.uint8, device=tensors[0].device)
    for tensor, view in zip(tensors, _unpack(packed, [(t.shape[1:], t.dtype) for t in tensors]), strict=True):
        view.copy_(tensor)
    return packed


def _unpack(packed: Tensor, shapes: Sequence[tuple[torch.Size, torch.dtype]]) -> tuple[Tensor, ...]:
    """The tensors that lie side by side in the rows of a packed buffer, as views."""
    if len(shapes) == 1:
        return (packed,)
    views, at = [], 0
    for shape, dtype in shapes:
        nbytes = _row_bytes(shape, dtype)
        columns = packed[:, at : at + nbytes].view(dtype)
        views.append(columns.unflatten(1, shape) if len(shape) != 1 else columns)
        at += _aligned(nbytes)
    return tuple(views)
