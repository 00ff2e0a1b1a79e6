"""GroupCast and GroupReduce: rows to the ranks that need them, and results back.

GroupCast sends each row once to each rank that needs it, in one all-to-all with uneven splits.
GroupReduce is its exact inverse over the same routes: what was received is sent back and reduced
into the rows that it came from. Both run alike on gloo and NCCL.

Several tensors travel in one exchange: their rows are laid side by side, as bytes, in one buffer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Literal, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from . import row_kernels
from .devices import backend_of, put_on
from .merge import merge_partials
from .packing import empty_packed, gather_packed, pack_side_by_side, unpack
from .row_kernels import RowSegments

# all_to_all: one collective of all ranks. p2p: sends and receives between those that have rows for each other.
Transport = Literal["all_to_all", "p2p"]

# For each stream on which exchanges were started, the one on which their later hops are queued.
_streams: dict[torch.cuda.Stream, torch.cuda.Stream] = {}


def _queues(device: torch.device) -> bool:
    """Whether what is started there waits in a queue of the device, and not for the host."""
    return device.type == "cuda"


@contextmanager
def _beside(device: torch.device) -> Iterator[None]:
    """Queue on a stream beside the current one, behind all that is queued on that so far.

    Without CUDA there is nothing to queue: memory is stated for a device that is elsewhere.
    """
    if not torch.cuda.is_available():
        yield
        return
    current = torch.cuda.current_stream(device)
    if current not in _streams:
        _streams[current] = torch.cuda.Stream(device)
    _streams[current].wait_stream(current)
    with torch.cuda.stream(_streams[current]):
        yield


# Of point-to-point messages, so that a caller's own on the same group are not taken for them (NCCL has no tags).
_TAG = 0x6370
# Devices on which a group's ranks have met in a collective before the first point-to-point message.
_met: WeakKeyDictionary[dist.ProcessGroup, set[torch.device]] = WeakKeyDictionary()


class Relay(NamedTuple):
    """What a later hop sends, by where it lies: among the local rows, or among those that the hop before brought.

    local, landed: int64, rows in sending order of either kind, counted from the first of their kind.
    local_at, landed_at: places of those rows in sending order.
    distinct: the local rows that are sent at all, each once.
    rows: all rows in sending order, as rows of [distinct, landed rows].
    segments: of `rows`, where row kernels reduce.
    """

    local: Tensor
    local_at: Tensor
    landed: Tensor
    landed_at: Tensor
    distinct: Tensor
    rows: Tensor
    segments: RowSegments | None = None


@dataclass(frozen=True, slots=True, eq=False)
class RowRoutes:
    """One rank's part in an exchange of rows.

    send_index: int64 [sum(send_splits)], local rows in sending order, receiver by receiver; within
        one receiver no row occurs twice.
    send_splits, recv_splits: rows to and from each rank of the group.
    active: whether any rank moves a row; equal on all ranks, it decides if the collective runs.
    transport: by which calls rows travel; equal on all ranks.
    relay: of a later hop (`relaying`), whose rows are [local rows, rows that the hop before brought].
    segments: of `send_index`, where row kernels reduce what comes back, of all senders at once (`with_segments`).
    """

    send_index: Tensor = field(repr=False)
    send_splits: tuple[int, ...]
    recv_splits: tuple[int, ...]
    active: bool
    transport: Transport = "all_to_all"
    relay: Relay | None = field(default=None, repr=False)
    segments: RowSegments | None = field(default=None, repr=False)

    def relaying(self, num_local: int) -> RowRoutes:
        """The same as a later hop, over that many local rows."""
        passed_on = self.send_index >= num_local
        (local_at,), (landed_at,) = (~passed_on).nonzero(as_tuple=True), passed_on.nonzero(as_tuple=True)
        local, landed = self.send_index[local_at], self.send_index[landed_at] - num_local
        rows = torch.empty_like(self.send_index)
        distinct, rows[local_at] = local.unique(return_inverse=True)
        rows[landed_at] = landed + len(distinct)
        return replace(self, relay=Relay(local, local_at, landed, landed_at, distinct, rows))

    def with_segments(self) -> RowRoutes:
        """The same, prepared for row kernels; while indices are on the CPU, or the host waits for the device.

        Indices without data (memory stated beforehand) cannot be sorted and stay as they are.
        """
        if isinstance(self.send_index, FakeTensor):
            return self
        relay = self.relay
        if relay is not None:
            relay = relay._replace(segments=RowSegments.of(relay.rows))
        return replace(self, relay=relay, segments=RowSegments.of(self.send_index))

    def on(self, device: torch.device) -> RowRoutes:
        """The same with its indices on a device."""
        relay, segments = self.relay, self.segments
        if relay is not None:
            moved = {name: put_on(device, getattr(relay, name)) for name in Relay._fields if name != "segments"}
            relay = Relay(**moved, segments=None if relay.segments is None else relay.segments.on(device))
        segments = None if segments is None else segments.on(device)
        return replace(self, send_index=put_on(device, self.send_index), relay=relay, segments=segments)

    @property
    def num_sent(self) -> int:
        return sum(self.send_splits)

    @property
    def num_received(self) -> int:
        return sum(self.recv_splits)


class PendingRows:
    """An exchange under way; `wait()` returns its result, once. Buffers are kept alive until then.

    An exchange of several hops starts each when the one before has arrived: in `advance()`, if that is called
    meanwhile, else in `wait()`. Call both in the same order on all ranks. On CUDA all are queued at once (`follow`).
    """

    def __init__(
        self,
        work: dist.Work | None,
        then: Callable[[], PendingRows | tuple[Tensor, ...]],
        *,
        more_hops: bool = False,
        sending: Tensor | None = None,
    ):
        self._work, self._sending = work, sending
        self._then: Callable[[], PendingRows | tuple[Tensor, ...]] | None = then
        self._more_hops = more_hops
        self._result: tuple[Tensor, ...] | None = None
        # What later hops read and write on a stream of their own: freed when the current one has waited for them.
        self._held: list[Any] = []

    def follow(self, device: torch.device) -> PendingRows:
        """Queue the later hops on CUDA, each behind the one before, and give the handle.

        On the current stream they would stand behind all that is computed there meanwhile, so they are queued on one
        beside it. What they read and write is held until `wait()`, when the current stream is behind them; and the
        other one waits for the current stream before it takes memory again (torch/cuda/streams.py, `wait_stream`;
        c10/cuda/CUDACachingAllocator.cpp keeps blocks by stream).
        """
        if self._more_hops and _queues(device):
            with _beside(device):
                while self._more_hops:
                    self._held += [self._sending, self._then]
                    self._step()
        return self

    def advance(self) -> None:
        """Start the next hop, if there is one, when the one under way has arrived."""
        if self._more_hops:
            self._step()

    @property
    def work(self) -> dist.Work | None:
        """The collective under way; None where there is none, or it has been waited for."""
        return self._work

    @property
    def more_hops(self) -> bool:
        """Whether another hop follows the one under way."""
        return self._more_hops

    def arrive(self) -> None:
        """Block until the hop under way is here (on CUDA: make the current stream wait), and take nothing in yet."""
        work, self._work = self._work, None
        if work is not None:
            work.wait()
        self._sending = None

    def wait(self) -> tuple[Tensor, ...]:
        """Block until the rows are here (on CUDA: make the current stream wait), then return them."""
        while self._then is not None:
            self._step()
        self._held.clear()
        result, self._result = self._result, None
        assert result is not None, "the result of an exchange is taken once"
        return result

    def _step(self) -> None:
        assert self._then is not None
        self.arrive()
        following = self._then()
        if isinstance(following, PendingRows):
            self._work, self._then, self._more_hops = following._work, following._then, following._more_hops
            self._sending = following._sending
        else:
            self._work, self._then, self._result, self._more_hops = None, None, following, False


def group_cast(
    rows: Sequence[Tensor],
    hops: RowRoutes | Sequence[RowRoutes],
    group: dist.ProcessGroup | None,
    *,
    into: Tensor | None = None,
) -> PendingRows:
    """Start to send rows of several tensors to the ranks that need them, in one exchange.

    Args:
        rows: tensors [T, ...] with the same number of local rows T, any dtypes.
        hops: which rows go where. Several hops are run one after the other: the rows of a later hop (`relaying`)
            are [local rows, rows that the hop before brought], and the last hop delivers.
        group: the ranks; None is a group of one.
        into: uint8 [sum(recv_splits), packed_row_bytes(rows)] to receive into; None: made when the last hop starts.

    Returns:
        A handle whose `wait()` gives the received rows, one tensor [sum(recv_splits), ...] for each of
        `rows`, ordered by sender and then as sent. Tensors are views of one buffer: rows are strided,
        the last dimension is contiguous. `rows` may be overwritten at once.
    """
    hops = _as_hops(hops)
    send = gather_packed(rows, hops[0].send_index)
    return _cast_hop(send, rows, hops, group, into).follow(send.device)


def _cast_hop(
    send: Tensor,
    local: Sequence[Tensor],
    hops: Sequence[RowRoutes],
    group: dist.ProcessGroup | None,
    into: Tensor | None,
) -> PendingRows:
    """Start the first of the hops, whose rows have been gathered."""
    hop, *later = hops
    shapes = [(t.shape[1:], t.dtype) for t in local]
    received = empty_packed(hop.num_received, shapes, send.device) if later or into is None else into
    work = exchange_rows(received, send, hop.recv_splits, hop.send_splits, hop, group)
    if not later:
        return PendingRows(work, lambda: unpack(received, shapes), sending=send)

    def next_hop() -> PendingRows:
        send = _gather_relayed(local, unpack(received, shapes), _relay_of(later[0]))
        return _cast_hop(send, local, later, group, into)

    return PendingRows(work, next_hop, more_hops=True, sending=send)


def group_reduce(
    rows: Sequence[Tensor],
    into: Sequence[Tensor],
    hops: RowRoutes | Sequence[RowRoutes],
    group: dist.ProcessGroup | None,
    *,
    op: Literal["sum", "lse"] = "sum",
    packed: Tensor | None = None,
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
        packed: the buffer that `rows` are views of (`unpack_rows`): it is sent as it is. None: they are copied.
        async_op: return at once; `into` is unchanged until `wait()`.

    The order of reduction is fixed: sender 0, 1, 2, ... Results repeat bit for bit.
    """
    shapes = [(t.shape[1:], t.dtype) for t in rows]
    send = pack_side_by_side(list(rows)) if packed is None else packed
    pending = _reduce_hop(send, shapes, into, _as_hops(hops), group, op).follow(send.device)
    if not async_op:
        pending.wait()
    return pending


def _reduce_hop(
    send: Tensor,
    shapes: list[tuple[torch.Size, torch.dtype]],
    into: Sequence[Tensor],
    hops: Sequence[RowRoutes],
    group: dist.ProcessGroup | None,
    op: Literal["sum", "lse"],
    mine: tuple[tuple[list[Tensor], Tensor], ...] = (),
) -> PendingRows:
    """Start the last of the hops backwards, with rows of these shapes that lie side by side.

    mine: what hops that came before brought for rows of this rank, and for which: added in the end, since what is
    computed meanwhile is added to the same rows.
    """
    *earlier, hop = hops
    received = empty_packed(hop.num_sent, shapes, send.device)
    work = exchange_rows(received, send, hop.send_splits, hop.recv_splits, hop, group)

    def finish() -> PendingRows | tuple[Tensor, ...]:
        parts = unpack(received, shapes)
        if not earlier:
            for totals, index in mine:
                _reduce_rows(totals, into, index, op)
            _reduce_by_sender(parts, into, hop.send_splits, hop.send_index, op, hop.segments)
            return tuple(into)
        # Rows that were only passed on are reduced here first, and their sums go on to the owners.
        relay = _relay_of(hop)
        num_mine = len(relay.distinct)
        totals = _neutral_rows(into, num_mine + earlier[-1].num_received, op)
        _reduce_by_sender(parts, totals, hop.send_splits, relay.rows, op, relay.segments)
        passed_on = [t[num_mine:].to(dtype) for t, (_, dtype) in zip(totals, shapes, strict=True)]
        kept = ([t[:num_mine] for t in totals], relay.distinct)
        return _reduce_hop(pack_side_by_side(passed_on), shapes, into, earlier, group, op, (*mine, kept))

    return PendingRows(work, finish, more_hops=bool(earlier), sending=send)


def all_gather(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Equally many rows [n, ...] of every rank of the group, as [group size * n, ...]; any dtype."""
    everyone = rows.new_empty((dist.get_world_size(group) * rows.shape[0], *rows.shape[1:]))
    # torch 2.13 renamed the call and warns about the old name.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(_as_bytes(everyone), _as_bytes(rows.contiguous()), group=group)
    return everyone


def _as_bytes(rows: Tensor) -> Tensor:
    """Contiguous rows [n, ...] as uint8 [n, bytes], a view: backends of torch.distributed know few dtypes."""
    return rows.detach().view(rows.shape[0], math.prod(rows.shape[1:])).view(torch.uint8)


def _as_hops(hops: RowRoutes | Sequence[RowRoutes]) -> Sequence[RowRoutes]:
    return (hops,) if isinstance(hops, RowRoutes) else hops


def _relay_of(hop: RowRoutes) -> Relay:
    if hop.relay is None:
        raise ValueError("routes of a later hop do not say what they relay: make them with relaying(num_local)")
    return hop.relay


def _neutral_rows(like: Sequence[Tensor], num_rows: int, op: str) -> list[Tensor]:
    """Rows that change nothing when reduced with others: zeros, and lse -inf."""
    rows = [t.new_zeros((num_rows, *t.shape[1:])) for t in like]
    if op == "lse":
        rows[1].fill_(-torch.inf)
    return rows


def _reduce_by_sender(
    parts: Sequence[Tensor],
    into: Sequence[Tensor],
    splits: Sequence[int],
    rows: Tensor,
    op: str,
    segments: RowSegments | None = None,
) -> None:
    """Reduce what came back along a hop into those rows; each sender's rows are distinct, so no two meet in a row.

    segments: of the rows; with them all senders are reduced in one launch, in the same order.
    """
    if segments is not None and row_kernels.fused(*parts, *into):
        _reduce_fused(parts, into, op, segments=segments)
        return
    start = 0
    for count in splits:
        if count:
            index = rows[start : start + count]
            _reduce_rows([p[start : start + count] for p in parts], into, index, op)
            start += count


def _reduce_fused(
    parts: Sequence[Tensor],
    into: Sequence[Tensor],
    op: str,
    *,
    index: Tensor | None = None,
    segments: RowSegments | None = None,
) -> None:
    if op == "lse":
        row_kernels.merge_rows(into[0], into[1], parts[0], parts[1], index=index, segments=segments)
        return
    for pair in range(0, len(parts), 2):  # a launch takes two
        row_kernels.add_rows(into[pair : pair + 2], parts[pair : pair + 2], index=index, segments=segments)


def _reduce_rows(parts: Sequence[Tensor], into: Sequence[Tensor], index: Tensor, op: str) -> None:
    if row_kernels.fused(*parts, *into):
        _reduce_fused(parts, into, op, index=index)
        return
    if op == "lse":
        out, lse = into[0].index_select(0, index), into[1].index_select(0, index)
        merge_partials(out, lse, parts[0], parts[1])
        into[0].index_copy_(0, index, out)
        into[1].index_copy_(0, index, lse)
        return
    for total, part in zip(into, parts, strict=True):
        # index_add_ of distinct rows: every row is added to once, so the order is fixed on CUDA too.
        total.index_add_(0, index, part.to(total.dtype))


class _Exchange(Protocol):
    """What is equal on all ranks of an exchange: whether it runs, and how."""

    @property
    def active(self) -> bool: ...
    @property
    def transport(self) -> Transport: ...


def exchange_rows(
    received: Tensor,
    send: Tensor,
    recv_splits: Sequence[int],
    send_splits: Sequence[int],
    exchange: _Exchange,
    group: dist.ProcessGroup | None,
) -> dist.Work | None:
    """Start to exchange rows of two contiguous buffers, split by rank; None where there is nothing to wait for."""
    if group is None or not exchange.active:
        return None
    received, send = _as_bytes(received), _as_bytes(send)
    if exchange.transport == "p2p":
        return _point_to_point(received.split(list(recv_splits)), send.split(list(send_splits)), group)
    work: dist.Work | None = dist.all_to_all_single(
        received, send, list(recv_splits), list(send_splits), group=group, async_op=True
    )
    return work


def _point_to_point(incoming: Sequence[Tensor], outgoing: Sequence[Tensor], group: dist.ProcessGroup) -> dist.Work:
    """Send and receive the parts that have rows. Messages of one pair of ranks match in the order of their start.

    NCCL wants a collective to have run on the group before ranks may stay out of this
    (`torch.distributed.batch_isend_irecv`: undefined else), so the first exchange of a group begins with one.
    """
    rank, device = dist.get_rank(group), incoming[0].device
    if backend_of(group, device.type) == "nccl" and device not in _met.setdefault(group, set()):
        dist.all_reduce(torch.zeros(1, device=device), group=group)
        _met[group].add(device)
    incoming[rank].copy_(outgoing[rank])
    peers = [peer for peer in range(len(incoming)) if peer != rank]
    messages = [dist.P2POp(dist.irecv, incoming[p], None, group, _TAG, p) for p in peers if len(incoming[p])]
    messages += [dist.P2POp(dist.isend, outgoing[p], None, group, _TAG, p) for p in peers if len(outgoing[p])]
    return _Several(dist.batch_isend_irecv(messages) if messages else [])


class _Several(dist.Work):
    """Messages that are waited for together."""

    def __init__(self, works: list[dist.Work]) -> None:
        super().__init__()
        self._works = works

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        for work in self._works:
            work.wait(timeout)
        return True

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self._works)


def _gather_relayed(local: Sequence[Tensor], landed: Sequence[Tensor], relay: Relay) -> Tensor:
    """What a later hop sends, gathered from where it lies: the local rows are many, and few of them are sent."""
    shapes = [(t.shape[1:], t.dtype) for t in local]
    packed = empty_packed(relay.rows.numel(), shapes, relay.rows.device)
    for mine, came, view in zip(local, landed, unpack(packed, shapes), strict=True):
        view.index_copy_(0, relay.local_at, mine.detach().index_select(0, relay.local))
        view.index_copy_(0, relay.landed_at, came.index_select(0, relay.landed))
    return packed
