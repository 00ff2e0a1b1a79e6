"""Where the time of attention goes: what each rank computed, moved and waited for, stage by stage.

    with cpattn.profile() as profile:
        step()
    trace = profile.gather(group)     # on rank 0 the trace of all ranks, elsewhere None
    if trace is not None:
        print(trace.table())
        trace.save("trace.json")      # opens in https://ui.perfetto.dev and chrome://tracing

It records every attention call of this process inside the block, forward and backward, whichever key
it uses. Three threads of a rank are told apart: `compute` (kernels with the merges of their results,
packing of what is sent, reduction of what came home), `wait` (the same thread, blocked in an exchange
that has not arrived: what communication costs) and `transfer` (exchanges from start to arrival). On
CUDA the times are those of the streams, taken by events.

Execution knows nothing of it: a pass is handed a plan whose exchanges and kernel record what they do. Outside such a
block it gets the plan itself, and a call pays a look at one variable.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar, cast

import torch
import torch.distributed as dist

from cpattn.backends import Backend
from cpattn.collectives import HeadExchange, PendingRows, backend_of

from .bound import BoundPlan
from .exchanges import Exchanges, Rows, Trip
from .trace import Call, PassName, RankTrace, Side, Span, Thread, Trace, trace_from_first_call
from .trades import HeadTrades

# A moment: nanoseconds of the performance counter, or an event on a CUDA stream.
_Mark: TypeAlias = "int | torch.cuda.Event"
_Bound = TypeVar("_Bound", BoundPlan, HeadTrades)

_active: Profile | None = None


class Pass(NamedTuple):
    """A pass of an attention call, or with head trades a part of it: attention itself, or the trades around it.

    key: what the call is of, named by its `repr`. attention: what the attention is of; the parts of a pass have the
    same object.
    """

    name: PassName
    key: object
    attention: object
    part: Literal["before", "attention", "after"] = "attention"

    def continues(self, last: Pass) -> bool:
        """Whether this is a further part of the pass whose last part is given."""
        follows = {"before": (), "attention": ("before",), "after": ("attention", "after")}[self.part]
        return self.name == last.name and self.attention is last.attention and last.part in follows


@contextmanager
def profile() -> Iterator[Profile]:
    """Record the attention calls of this process inside the block.

    Raises:
        RuntimeError: inside another such block.
    """
    global _active
    if _active is not None:
        raise RuntimeError("cpattn.profile() inside cpattn.profile(): a call is recorded once; use the outer profile")
    _active = recorded = Profile()
    try:
        yield recorded
    finally:
        _active = None


def recorded(of: Pass, bound: _Bound, device: torch.device) -> AbstractContextManager[_Bound]:
    """The plan, or the head trades, to run the pass with: under a profile ones that record it while the block runs."""
    return nullcontext(bound) if _active is None else _active.record(of, bound, device)


class Profile:
    """What `profile` recorded on this rank. A call that raised is left out."""

    def __init__(self) -> None:
        self._began_ns, self._zero_ns = time.time_ns(), time.perf_counter_ns()
        self._calls: list[list[_OpenCall]] = []  # each in parts
        self._clocks: dict[torch.device, _CudaClock] = {}

    def calls(self) -> tuple[Call, ...]:
        """The calls of this rank, seconds since the profile began. On CUDA it waits for the device."""
        for device in self._clocks:
            torch.cuda.synchronize(device)
        return tuple(_joined([part.closed() for part in parts]) for parts in self._calls)

    def gather(self, group: dist.ProcessGroup | None = None) -> Trace | None:
        """The trace of all ranks of a group on its first rank, None on the others; all of them call it.

        group: None is this process alone.
        """
        rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        mine = RankTrace(rank, socket.gethostname(), self._began_ns, self.calls())
        everyone: list[Any] | None = [mine]
        if group is not None:
            everyone = [None] * size if rank == 0 else None
            dist.gather_object(mine, everyone, dst=dist.get_global_rank(group, 0), group=group)
        return None if everyone is None else trace_from_first_call(everyone)

    @contextmanager
    def record(self, of: Pass, bound: _Bound, device: torch.device) -> Iterator[_Bound]:
        """Record what runs inside the block with the plan or the trades that it gives."""
        call = _OpenCall(of, self._clock(device, bound.exchanges.group))
        yield _watched_plan(bound, call) if isinstance(bound, BoundPlan) else _watched_trades(bound, call)
        call.end = call.mark()
        if self._calls and of.continues(self._calls[-1][-1].of):
            self._calls[-1].append(call)
        else:
            self._calls.append([call])

    def _clock(self, device: torch.device, group: dist.ProcessGroup | None) -> _CpuClock | _CudaClock:
        if device.type != "cuda":
            return _CpuClock(self._zero_ns)
        if device not in self._clocks:
            on_streams = group is not None and backend_of(group, device.type) == "nccl"
            self._clocks[device] = _CudaClock(device, self._zero_ns, on_streams)
        return self._clocks[device]


class _CpuClock:
    """Moments as nanoseconds of the performance counter."""

    def __init__(self, zero_ns: int) -> None:
        self._zero_ns = zero_ns

    def mark(self) -> _Mark:
        return time.perf_counter_ns()

    def seconds(self, mark: _Mark) -> float:
        assert isinstance(mark, int)
        return (mark - self._zero_ns) * 1e-9

    def watch(self, work: dist.Work, arrival: _Arrival) -> None:
        """Have the moment stored when the exchange arrives; else when it is waited for."""
        try:
            future = work.get_future()
        except RuntimeError:  # gloo's point-to-point has none
            return
        future.add_done_callback(lambda _: arrival.note(self.mark()))


class _CudaClock:
    """Moments as events on the streams, brought to the performance counter by one that was waited for.

    exchanges_on_streams: whether exchanges run on CUDA streams too, as NCCL's do.
    """

    def __init__(self, device: torch.device, zero_ns: int, exchanges_on_streams: bool) -> None:
        self._stream = torch.cuda.Stream(device)
        self._exchanges_on_streams = exchanges_on_streams
        self._base = torch.cuda.Event(enable_timing=True)
        self._base.record(torch.cuda.current_stream(device))
        self._base.synchronize()
        self._base_s = (time.perf_counter_ns() - zero_ns) * 1e-9
        self._device = device

    def mark(self) -> _Mark:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self, mark: _Mark) -> float:
        assert not isinstance(mark, int)
        return self._base_s + self._base.elapsed_time(mark) * 1e-3

    def watch(self, work: dist.Work, arrival: _Arrival) -> None:
        """A stream of its own waits for the exchange: the event on it is the arrival."""
        if not self._exchanges_on_streams:  # waiting for it would block this thread
            return
        with torch.cuda.stream(self._stream):
            work.wait()
            arrival.note(self.mark())


class _Arrival:
    """The moment at which an exchange arrived; the first that is noted holds."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.mark: _Mark | None = None

    def note(self, mark: _Mark) -> None:
        with self._lock:
            if self.mark is None:
                self.mark = mark


class _OpenCall:
    """A part of a pass while it runs."""

    def __init__(self, of: Pass, clock: _CpuClock | _CudaClock) -> None:
        self.of, self._key, self._clock = of, repr(of.key), clock
        self._spans: list[tuple[Thread, str, int | None, Side, _Mark, _Mark]] = []
        self._transfers: list[tuple[str, int | None, _Mark, _Arrival]] = []
        self.mark: Callable[[], _Mark] = clock.mark
        self._start = self.mark()
        self.end = self._start

    @property
    def last_end(self) -> _Mark:
        """When the span that was recorded last ended."""
        return self._spans[-1][-1]

    def spanning(
        self, function: Callable[..., Any], thread: Thread, name: str, stage: int | None = None, side: Side = ""
    ) -> Callable[..., Any]:
        """The function, each call of it a span."""

        def spanned(*args: Any, **options: Any) -> Any:
            start = self.mark()
            result = function(*args, **options)
            self._spans.append((thread, name, stage, side, start, self.mark()))
            return result

        return spanned

    def departed(self, work: dist.Work, name: str, stage: int | None) -> _Arrival:
        """Record an exchange that has begun."""
        arrival = _Arrival()
        self._transfers.append((name, stage, self.mark(), arrival))
        self._clock.watch(work, arrival)
        return arrival

    def closed(self) -> Call:
        seconds = self._clock.seconds
        spans = [
            Span(thread, name, stage, side, seconds(start), seconds(end))
            for thread, name, stage, side, start, end in self._spans
        ]
        for name, stage, start, arrival in self._transfers:
            assert arrival.mark is not None, "an exchange was never waited for"
            spans.append(Span("transfer", name, stage, "", seconds(start), max(seconds(start), seconds(arrival.mark))))
        spans.sort(key=lambda span: (span.start, span.end))
        return Call(self.of.name, self._key, seconds(self._start), seconds(self.end), tuple(spans))


class _Label(NamedTuple):
    """A stage's work and where it belongs."""

    work: Any
    stage: int
    side: Side


def _watched_plan(plan: BoundPlan, call: _OpenCall) -> BoundPlan:
    """The plan with exchanges and a kernel that record what they do."""
    stages = tuple(
        stage._replace(
            own_work=_Label(stage.own_work, number, "own"),
            guest_work=_Label(stage.guest_work, number, "guest"),
            in_backward=tuple(None if part is None else _Label(part, number, "own") for part in stage.in_backward),
        )
        for number, stage in enumerate(plan.stages)
    )
    backend, exchanges = _WatchedBackend(plan.backend, call), _WatchedExchanges(plan.exchanges, call)
    return plan._replace(backend=cast(Backend, backend), exchanges=cast(Exchanges, exchanges), stages=stages)


def _watched_trades(trades: HeadTrades, call: _OpenCall) -> HeadTrades:
    """The head trades with exchanges that record what they do."""
    return trades._replace(exchanges=cast(Exchanges, _WatchedExchanges(trades.exchanges, call)))


class _WatchedBackend:
    """A backend whose kernels are spans; it takes labelled works."""

    def __init__(self, backend: Backend, call: _OpenCall) -> None:
        self._backend, self._call = backend, call

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._backend, name)
        if not callable(method):
            return method

        def labelled(*args: Any, **options: Any) -> Any:
            label = next(arg for arg in args if isinstance(arg, _Label))
            plain = tuple(label.work if arg is label else arg for arg in args)
            if name not in ("forward", "backward", "attend", "differentiate"):
                return method(*plain, **options)
            return self._call.spanning(method, "compute", "kernel", label.stage, label.side)(*plain, **options)

        return labelled


class _WatchedExchanges:
    """`Exchanges` whose starts are spans, and whose handles are watched."""

    def __init__(self, exchanges: Exchanges, call: _OpenCall) -> None:
        self._exchanges, self._call = exchanges, call
        self.group, self.travelling, self.gradients = exchanges.group, exchanges.travelling, exchanges.gradients

    def encode(self, rows: Sequence[torch.Tensor]) -> Rows:
        return self._if_encoding(self._exchanges.encode, "encode")(rows)

    def decode(self, travelled: Rows, dtype: torch.dtype) -> Rows:
        return self._if_encoding(self._exchanges.decode, "unpack")(travelled, dtype)

    def cast(self, trip: Trip, rows: Rows, encoded: Rows, **options: Any) -> PendingRows:
        last = "unpack" if encoded or options.get("then") is not None else None
        started = self._started(self._exchanges.cast, trip.stage)(trip, rows, encoded, **options)
        return _WatchedRows(started, self._call, trip.name, trip.stage, last=last)

    def reduce(self, trip: Trip, rows: Rows, into: Rows, **options: Any) -> PendingRows:
        started = self._started(self._exchanges.reduce, trip.stage)(trip, rows, into, **options)
        return _WatchedRows(started, self._call, trip.home, trip.stage, last="reduce")

    def to_heads(self, name: str, x: torch.Tensor, by: HeadExchange) -> PendingRows:
        return _WatchedRows(self._started(self._exchanges.to_heads)(name, x, by), self._call, name, None, last=None)

    def to_rows(self, name: str, x: torch.Tensor, by: HeadExchange) -> PendingRows:
        return _WatchedRows(self._started(self._exchanges.to_rows)(name, x, by), self._call, name, None, last="unpack")

    def _started(self, exchange: Callable[..., PendingRows], stage: int | None = None) -> Callable[..., PendingRows]:
        return self._call.spanning(exchange, "compute", "pack", stage)

    def _if_encoding(self, function: Callable[..., Rows], name: str) -> Callable[..., Rows]:
        return function if self._exchanges.codec is None else self._call.spanning(function, "compute", name)


class _WatchedRows(PendingRows):
    """An exchange under way whose transfer, waits and last step are recorded; last None: nothing is left to do."""

    def __init__(
        self, pending: PendingRows, call: _OpenCall, name: str, stage: int | None, *, last: str | None
    ) -> None:
        self._pending, self._call, self._name, self._stage, self._last = pending, call, name, stage, last
        self._arrival: _Arrival | None = None
        self._depart()

    def advance(self) -> None:
        if self._pending.more_hops:
            self.arrive()
            self._call.spanning(self._pending.advance, "compute", "pack", self._stage)()
            self._depart()

    def arrive(self) -> None:
        if self._arrival is not None:
            self._call.spanning(self._pending.arrive, "wait", self._name, self._stage)()
            self._arrival.note(self._call.last_end)  # at the latest
            self._arrival = None

    def wait(self) -> tuple[torch.Tensor, ...]:
        while self._pending.more_hops:
            self.advance()
        self.arrive()
        if self._last is None:
            return self._pending.wait()
        rows: tuple[torch.Tensor, ...] = self._call.spanning(self._pending.wait, "compute", self._last, self._stage)()
        return rows

    def _depart(self) -> None:
        if self._pending.work is not None:
            self._arrival = self._call.departed(self._pending.work, self._name, self._stage)


def _joined(parts: Sequence[Call]) -> Call:
    """The parts of a pass, one after the other, as one call."""
    return parts[0]._replace(end=parts[-1].end, spans=tuple(span for part in parts for span in part.spans))
