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
    """An exchange under way; `wait()` returns its result, once. Buffers are kept alive until then.

    An exchange of two hops starts the second when the first has arrived: in `advance()`, if that is
    called meanwhile, else in `wait()`. Call both in the same order on all ranks.
    """

    def __init__(
        self,
        work: dist.Work | None,
        then: Callable[[], PendingRows | tuple[Tensor, ...]],
        *,
        more_hops: bool = False,
    ):
        self._work = work
        self._then: Callable[[], PendingRows | tuple[Tensor, ...]] | None = then
        self._more_hops = more_hops
        self._result: tuple[Tensor, ...] | None = None

    def advance(self) -> None:
        """Start the next hop, if there is one, when the one under way has arrived."""
        if self._more_hops:
            self._step()

    def wait(self) -> tuple[Tensor, ...]:
        """Block until the rows are here (on CUDA: make the current stream wait), then return them."""
        while self._then is not None:
            self._step()
        result, self._result = self._result, None
        assert result is not None, "the result of an exchange is taken once"
        return result

    def _step(self) -> None:
        assert self._then is not None
        if self._work is not None:
            self._work.wait()
        following = self._then()
        if isinstance(following, PendingRows):
            self._work, self._then, self._more_hops = following._work, following._then, following._more_hops
        else:
            self._work, self._then, self._result, self._more_hops = None, None, following, False


def group_cast(
    rows: Sequence[Tensor],
    hops: RowRoutes | Sequence[RowRoutes],
    group: dist.ProcessGroup | None,
    *,
    async_op: bool = False,
) -> tuple[tuple[Tensor, ...], PendingRows]:
    """Send rows of several tensors to the ranks that need them, in one exchange.

    Args:
        rows: tensors [T, ...] with the same number of local rows T, any dtypes.
        hops: which rows go where. Several hops are run one after the other: the rows of a later hop
            are [local rows, rows that the hop before brought], and the last hop delivers.
        group: the ranks; None is a group of one.
        async_op: return at once; the received tensors hold nothing until `wait()` of the handle.

    Returns:
        The received rows, one tensor [sum(recv_splits), ...] for each of `rows`, ordered by sender
        and then as sent; and the handle. Tensors are views of one buffer: rows are strided, the
        last dimension is contiguous.
    """
    hops = _as_hops(hops)
    shapes = [(t.shape[1:], t.dtype) for t in rows]
    delivered = _empty_packed(hops[-1].num_received, shapes, rows[0].device)
    views = _unpack(delivered, shapes)
    pending = _cast_hop(rows, rows, hops, group, delivered, views)
    if not async_op:
        pending.wait()
    return views, pending


def _cast_hop(
    local: Sequence[Tensor],
    sendable: Sequence[Tensor],
    hops: Sequence[RowRoutes],
    group: dist.ProcessGroup | None,
    delivered: Tensor,
    views: tuple[Tensor, ...],
) -> PendingRows:
    """Run the first of the hops; `sendable` is what its rows are chosen from."""
    hop, *later = hops
    shapes = [(t.shape[1:], t.dtype) for t in local]
    send = _gather_packed(sendable, hop.send_index)
    received = _empty_packed(hop.num_received, shapes, send.device) if later else delivered
    work = _all_to_all(received, send, hop.recv_splits, hop.send_splits, hop.active, group)
    if not later:
        return PendingRows(work, lambda: views)

    def next_hop() -> PendingRows:
        landed = _unpack(received, shapes)
        both = [torch.cat([mine, came]) for mine, came in zip(local, landed, strict=True)]
        return _cast_hop(local, both, later, group, delivered, views)

    return PendingRows(work, next_hop, more_hops=True)


def group_reduce(
    rows: Sequence[Tensor],
    into: Sequence[Tensor],
    hops: RowRoutes | Sequence[RowRoutes],
    group: dist.ProcessGroup | None,
    *,
    op: Literal["sum", "lse"] = "sum",
    async_op: bool = False,
) -> PendingRows:
    """Send results back along the routes of a GroupCast and reduce them into the rows they belong to.

    Args:
        rows: tensors [sum(recv_splits), ...], in the order in which the GroupCast delivered.
        into: tensors [T, ...] to reduce into, in place, when the handle is waited for.
        hops: the hops of the GroupCast; they are run backwards, reducing after each.
        group: the ranks; None is a group of one.
        op: "sum" adds each tensor; "lse" takes (out [.., H, D], lse [.., H]) partial attention
            results and merges them (`merge_partials`).
        async_op: return at once; `into` is unchanged until `wait()`.

    The order of reduction is fixed: sender 0, 1, 2, ... Results repeat bit for bit.
    """
    *earlier, hop = _as_hops(hops)
    shapes = [(t.shape[1:], t.dtype) for t in rows]
    send = _pack(list(rows))
    received = _empty_packed(hop.num_sent, shapes, send.device)
    work = _all_to_all(received, send, hop.send_splits, hop.recv_splits, hop.active, group)

    def finish() -> PendingRows | tuple[Tensor, ...]:
        parts = _unpack(received, shapes)
        if not earlier:
            _reduce_by_sender(parts, into, hop, op)
            return tuple(into)
        # Rows that were only passed on are reduced here first, and their sums go on to the owners.
        num_local = into[0].shape[0]
        totals = _neutral_rows(into, num_local + earlier[-1].num_received, op)
        _reduce_by_sender(parts, totals, hop, op)
        _reduce_all([t[:num_local] for t in totals], into, op)
        passed_on = [t[num_local:].to(r.dtype) for t, r in zip(totals, rows, strict=True)]
        return group_reduce(passed_on, into, earlier, group, op=op, async_op=True)

    pending = PendingRows(work, finish, more_hops=bool(earlier))
    if not async_op:
        pending.wait()
    return pending


def all_gather(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Equally many rows [n, ...] of every rank of the group, as [group size * n, ...]."""
    everyone = rows.new_empty((dist.get_world_size(group) * rows.shape[0], *rows.shape[1:]))
    # torch 2.13 renamed the call and warns about the old name.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(everyone, rows.contiguous(), group=group)
    return everyone


def _as_hops(hops: RowRoutes | Sequence[RowRoutes]) -> Sequence[RowRoutes]:
    return (hops,) if isinstance(hops, RowRoutes) else hops


def _neutral_rows(like: Sequence[Tensor], num_rows: int, op: str) -> list[Tensor]:
    """Rows that change nothing when reduced with others: zeros, and lse -inf."""
    rows = [t.new_zeros((num_rows, *t.shape[1:])) for t in like]
    if op == "lse":
        rows[1].fill_(-torch.inf)
    return rows


def _reduce_all(parts: Sequence[Tensor], into: Sequence[Tensor], op: str) -> None:
    if op == "lse":
        merge_partials(into[0], into[1], parts[0], parts[1])
        return
    for total, part in zip(into, parts, strict=True):
        total += part


def _reduce_by_sender(parts: Sequence[Tensor], into: Sequence[Tensor], hop: RowRoutes, op: str) -> None:
    """Reduce what came back along a hop; each sender's rows are distinct, so no two meet in a row."""
    start = 0
    for count in hop.send_splits:
        if count:
            index = hop.send_index[start : start + count]
            _reduce_rows([p[start : start + count] for p in parts], into, index, op)
            start += count


def _reduce_rows(parts: Sequence[Tensor], into: Sequence[Tensor], index: Tensor, op: str) -> None:
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
    received: Tensor,
    send: Tensor,
    recv_splits: tuple[int, ...],
    send_splits: tuple[int, ...],
    active: bool,
    group: dist.ProcessGroup | None,
) -> dist.Work | None:
    if group is None or not active:
        return None
    work: dist.Work | None = dist.all_to_all_single(
        received, send, list(recv_splits), list(send_splits), group=group, async_op=True
    )
    return work


def _row_bytes(shape: torch.Size, dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGN) * _ALIGN


def _empty_packed(
    num_rows: int, shapes: Sequence[tuple[torch.Size, torch.dtype]], device: torch.device
) -> Tensor:
    """A buffer for rows of tensors side by side; a single tensor travels as it is."""
    if len(shapes) == 1:
        (shape, dtype), *_ = shapes
        return torch.empty(num_rows, *shape, dtype=dtype, device=device)
    width = sum(_aligned(_row_bytes(shape, dtype)) for shape, dtype in shapes)
    return torch.empty(num_rows, width, dtype=torch.uint8, device=device)


def _gather_packed(tensors: Sequence[Tensor], index: Tensor) -> Tensor:
    """The rows `index` of several tensors side by side in one buffer, each copied once."""
    shapes = [(t.shape[1:], t.dtype) for t in tensors]
    packed = _empty_packed(index.numel(), shapes, index.device)
    for tensor, view in zip(tensors, _unpack(packed, shapes), strict=True):
        torch.index_select(tensor.detach(), 0, index, out=view)
    return packed


def _pack(tensors: list[Tensor]) -> Tensor:
    """Rows of several tensors side by side in one buffer."""
    if len(tensors) == 1:
        return tensors[0].contiguous()
    shapes = [(t.shape[1:], t.dtype) for t in tensors]
    packed = _empty_packed(tensors[0].shape[0], shapes, tensors[0].device)
    for tensor, view in zip(tensors, _unpack(packed, shapes), strict=True):
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
        views.append(columns.unflatten(1, shape) if shape else columns.squeeze(1))
        at += _aligned(nbytes)
    return tuple(views)
