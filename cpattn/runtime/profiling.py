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

Outside such a block nothing is recorded, and a call pays a look at one variable for each exchange.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar, cast

import torch
import torch.distributed as dist

from cpattn.backends import Backend
from cpattn.collectives import PendingRows, RowRoutes, cast_encoded, group_reduce, heads_to_rows
from cpattn.keys.key import AttnKey, BoundPlan

Thread: TypeAlias = Literal["compute", "wait", "transfer"]
PassName: TypeAlias = Literal["forward", "backward"]
# With head sharding a pass is attention with head exchanges before and after it.
_Part: TypeAlias = Literal["before", "attention", "after"]
# A moment: nanoseconds of the performance counter, or an event on a CUDA stream.
_Mark: TypeAlias = "int | torch.cuda.Event"
_Function = TypeVar("_Function", bound=Callable[..., Any])

_active: Profile | None = None


class Span(NamedTuple):
    """Something that a rank did, in seconds since its profile began (in a `Trace`: since the first call).

    name: in thread compute "kernel", "encode", "pack", "unpack" or "reduce"; in the others what
        travels: "queries", "keys 1" (stage 1), on their way home "results" and "gradients 1"; with head
        sharding also rows traded for heads, "heads of q", and heads for rows, "rows of out".
    stage: 0 works on own keys; None where none is meant. side: of a kernel, "host" (own queries) or
        "guest" (received ones).
    """

    thread: Thread
    name: str
    stage: int | None
    side: str
    start: float
    end: float


class Call(NamedTuple):
    """One pass of one attention call on one rank, head exchanges included. key: in words."""

    name: PassName
    key: str
    start: float
    end: float
    spans: tuple[Span, ...]

    @property
    def seconds(self) -> float:
        return self.end - self.start

    def seconds_of(self, thread: Thread, *names: str) -> float:
        """Seconds of a thread's spans, of those with one of the names if any is given."""
        return sum(s.end - s.start for s in self.spans if s.thread == thread and (not names or s.name in names))


class RankTrace(NamedTuple):
    """The calls of one rank, in the order in which they began. began_ns: the profile, time of day."""

    rank: int
    host: str
    began_ns: int
    calls: tuple[Call, ...]


class Shares(NamedTuple):
    """Seconds of a rank over all its calls: they began and ended within `step`.

    compute: kernels and the merges of their results. copies: encoding, packing, unpacking, reducing.
    wait: exposed communication. other: the rest (allocating, casting, Python). transfer: exchanges
    under way, hidden or not.
    """

    rank: int
    step: float
    compute: float
    copies: float
    wait: float
    other: float
    transfer: float

    @property
    def exposed(self) -> float:
        """Exposed communication as a share of the step."""
        return self.wait / self.step if self.step else 0.0


@dataclass(frozen=True, slots=True)
class Trace:
    """What all ranks of a group did; seconds since the first call of any of them.

    Clocks of one machine are one clock; those of several agree as well as their time of day does.
    """

    ranks: tuple[RankTrace, ...]

    def shares(self) -> tuple[Shares, ...]:
        """Where each rank's time went."""
        return tuple(_shares(trace) for trace in self.ranks)

    def table(self) -> str:
        """`shares` as text, in milliseconds of an average forward and backward."""
        calls = max((sum(call.name == "forward" for call in t.calls) for t in self.ranks), default=0)
        lines = ["rank     step  compute   copies     wait    other transfer  exposed"]
        for s in self.shares():
            cells = (s.step, s.compute, s.copies, s.wait, s.other, s.transfer)
            shown = " ".join(f"{1e3 * x / max(calls, 1):8.3f}" for x in cells)
            lines.append(f"{s.rank:4d} {shown} {s.exposed:8.1%}")
        return "\n".join([*lines, f"ms of an attention call, forward and backward; mean of {calls}"])

    def to_chrome(self) -> dict[str, Any]:
        """The trace in Chrome's JSON format: a process for each rank; times in microseconds.

        Source: "Trace Event Format", complete ("X") and metadata ("M") events.
        """
        events: list[dict[str, Any]] = []
        for trace in self.ranks:
            events += _chrome_events(trace)
        return {"traceEvents": events, "displayTimeUnit": "ms"}

    def save(self, path: str | Path) -> None:
        """Write `to_chrome` to a file."""
        Path(path).write_text(json.dumps(self.to_chrome()))


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


class Profile:
    """What `profile` recorded on this rank. A call that raised is left out."""

    def __init__(self) -> None:
        self._began_ns, self._zero_ns = time.time_ns(), time.perf_counter_ns()
        self._calls: list[list[_OpenCall]] = []  # each in parts
        self._clocks: dict[torch.device, _CudaClock] = {}
        self.current: _OpenCall | None = None

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
        return None if everyone is None else _from_first_call(everyone)

    def run(self, name: PassName, pass_: Callable[..., Any], key: AttnKey, plan: BoundPlan, *tensors: Any) -> Any:
        """Run a pass of the attention call and record it."""
        call = _OpenPass(name, key, plan, self._clock(tensors[0].device, key.cp_group))
        return self._record(call, lambda: pass_(key, call.watched_plan(), *tensors))

    def trade(self, name: PassName, part: _Part, trade: Callable[..., Any], key: AttnKey, *tensors: Any) -> Any:
        """Run the head exchanges before or after a pass and record them as part of it."""
        assert key.sharding is not None
        clock = self._clock(tensors[0].device, key.cp_group)
        call = _OpenCall(name, repr(key), clock, inner=key.sharding.inner, part=part)
        return self._record(call, lambda: trade(key, *tensors))

    def _record(self, call: _OpenCall, run: Callable[[], Any]) -> Any:
        self.current = call
        try:
            result = run()
        finally:
            self.current = None
        call.end = call.mark()
        if self._calls and call.continues(self._calls[-1][-1]):
            self._calls[-1].append(call)
        else:
            self._calls.append([call])
        return result

    def _clock(self, device: torch.device, group: dist.ProcessGroup | None) -> _CpuClock | _CudaClock:
        if device.type != "cuda":
            return _CpuClock(self._zero_ns)
        if device not in self._clocks:
            on_streams = group is not None and dist.get_backend(group) == "nccl"
            self._clocks[device] = _CudaClock(device, self._zero_ns, on_streams)
        return self._clocks[device]


def profiled(name: PassName, pass_: _Function) -> _Function:
    """The pass itself, or under a profile one that is recorded."""
    recorded = _active
    if recorded is None:
        return pass_
    return cast(_Function, lambda *args: recorded.run(name, pass_, *args))


def traded(name: PassName, part: Literal["before", "after"], trade: _Function) -> _Function:
    """The head exchanges before or after a pass, or under a profile ones that are recorded."""
    recorded = _active
    if recorded is None:
        return trade
    return cast(_Function, lambda *args: recorded.trade(name, part, trade, *args))


def timed(name: str, function: _Function) -> _Function:
    """The function itself, or under a profile one whose calls are spans of thread compute."""
    if _active is None or _active.current is None:
        return function
    return cast(_Function, _active.current.spanning(function, "compute", name))


def watched(hops: tuple[RowRoutes, ...], exchange: _Function) -> _Function:
    """The exchange (`group_cast`, `group_reduce`, `cast_encoded`), or under a profile one that is recorded."""
    if _active is None or _active.current is None:
        return exchange
    assert isinstance(_active.current, _OpenPass)
    return cast(_Function, _active.current.watching(hops, exchange))


def watched_heads(name: str, exchange: _Function) -> _Function:
    """The exchange (`rows_to_heads`, `heads_to_rows`), or under a profile one that is recorded by the name."""
    if _active is None or _active.current is None:
        return exchange
    last = "unpack" if exchange is heads_to_rows else None
    return cast(_Function, _active.current.watch(exchange, name, None, last))


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


class _Label(NamedTuple):
    """A stage's work and where it belongs."""

    work: Any
    stage: int
    side: str


class _OpenCall:
    """A part of a pass while it runs. inner: the key of the attention that it belongs to."""

    def __init__(self, name: PassName, key: str, clock: Any, *, inner: AttnKey, part: _Part) -> None:
        self._name, self._key, self._clock, self._inner, self._part = name, key, clock, inner, part
        self._spans: list[tuple[Thread, str, int | None, str, _Mark, _Mark]] = []
        self._transfers: list[tuple[str, int | None, _Mark, _Arrival]] = []
        self.mark: Callable[[], _Mark] = clock.mark
        self._start = self.mark()
        self.end = self._start

    def continues(self, last: _OpenCall) -> bool:
        """Whether this is a further part of the pass whose last part is given."""
        follows = {"before": (), "attention": ("before",), "after": ("attention", "after")}[self._part]
        return self._name == last._name and self._inner is last._inner and last._part in follows

    @property
    def last_end(self) -> _Mark:
        """When the span that was recorded last ended."""
        return self._spans[-1][-1]

    def spanning(
        self, function: Callable[..., Any], thread: Thread, name: str, stage: int | None = None, side: str = ""
    ) -> Callable[..., Any]:
        """The function, each call of it a span."""

        def spanned(*args: Any, **options: Any) -> Any:
            start = self.mark()
            result = function(*args, **options)
            self._spans.append((thread, name, stage, side, start, self.mark()))
            return result

        return spanned

    def watch(
        self, exchange: Callable[..., Any], name: str, stage: int | None, last: str | None
    ) -> Callable[..., PendingRows]:
        """The exchange, whose start is a span and whose handle is watched; last: name of the span of its last step."""

        def watched_exchange(*args: Any, **options: Any) -> PendingRows:
            pending = self.spanning(exchange, "compute", "pack", stage)(*args, **options)
            return _WatchedRows(pending, self, name, stage, last=last)

        return watched_exchange

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
        return Call(self._name, self._key, seconds(self._start), seconds(self.end), tuple(spans))


class _OpenPass(_OpenCall):
    """The attention of a pass while it runs."""

    def __init__(self, name: PassName, key: AttnKey, plan: BoundPlan, clock: Any) -> None:
        super().__init__(name, repr(key), clock, inner=key, part="attention")
        self._plan = plan
        self._routes: dict[int, int | None] = {id(stage.kv): n for n, stage in enumerate(plan.stages)}
        self._routes[id(plan.queries)] = None

    def watched_plan(self) -> BoundPlan:
        """The plan with a backend that records its kernels."""
        stages = tuple(
            stage._replace(
                host_work=_Label(stage.host_work, number, "host"), guest_work=_Label(stage.guest_work, number, "guest")
            )
            for number, stage in enumerate(self._plan.stages)
        )
        return self._plan._replace(backend=cast(Backend, _WatchedBackend(self._plan.backend, self)), stages=stages)

    def watching(self, hops: tuple[RowRoutes, ...], exchange: Callable[..., Any]) -> Callable[..., PendingRows]:
        """`watch` for an exchange of the plan."""
        stage = self._routes[id(hops)]
        home = exchange is group_reduce
        kind = ("results" if home else "queries") if stage is None else ("gradients" if home else "keys")
        name = kind if stage is None else f"{kind} {stage}"
        last = {group_reduce: "reduce", cast_encoded: "unpack"}.get(exchange)
        return self.watch(exchange, name, stage, last)


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
            if name not in ("forward", "backward"):
                return method(*plain, **options)
            return self._call.spanning(method, "compute", "kernel", label.stage, label.side)(*plain, **options)

        return labelled


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


def _from_first_call(ranks: Sequence[RankTrace]) -> Trace:
    """Traces with seconds since each rank's profile began as one with seconds since the first call."""
    epoch = min(trace.began_ns for trace in ranks)
    lags = [(trace.began_ns - epoch) * 1e-9 for trace in ranks]
    first = min((call.start + lag for trace, lag in zip(ranks, lags, strict=True) for call in trace.calls), default=0.0)
    return Trace(tuple(_moved(trace, lag - first) for trace, lag in zip(ranks, lags, strict=True)))


def _moved(trace: RankTrace, seconds: float) -> RankTrace:
    """The trace with all times later by `seconds`."""

    def moved(call: Call) -> Call:
        spans = tuple(span._replace(start=span.start + seconds, end=span.end + seconds) for span in call.spans)
        return call._replace(start=call.start + seconds, end=call.end + seconds, spans=spans)

    return trace._replace(calls=tuple(moved(call) for call in trace.calls))


def _shares(trace: RankTrace) -> Shares:
    calls = trace.calls
    step = sum(call.seconds for call in calls)
    kernels = sum(call.seconds_of("compute", "kernel") for call in calls)
    copies = sum(call.seconds_of("compute") for call in calls) - kernels
    wait = sum(call.seconds_of("wait") for call in calls)
    transfer = sum(call.seconds_of("transfer") for call in calls)
    return Shares(trace.rank, step, kernels, copies, wait, step - kernels - copies - wait, transfer)


# Threads of a rank in the trace, from the top; further lanes of transfers that overlap follow.
_CALLS, _COMPUTE, _WAIT, _TRANSFER = range(4)


def _chrome_events(trace: RankTrace) -> Iterator[dict[str, Any]]:
    yield {"ph": "M", "pid": trace.rank, "name": "process_name", "args": {"name": f"rank {trace.rank} ({trace.host})"}}
    yield {"ph": "M", "pid": trace.rank, "name": "process_sort_index", "args": {"sort_index": trace.rank}}
    names = {_CALLS: "attention calls", _COMPUTE: "compute", _WAIT: "wait"}
    for call in trace.calls:
        yield _event(trace.rank, _CALLS, call.name, call.start, call.end, {"key": call.key})
        lanes = transfer_lanes(call)
        for span, lane in zip(call.spans, lanes, strict=True):
            thread = {"compute": _COMPUTE, "wait": _WAIT, "transfer": _TRANSFER + lane}[span.thread]
            names.setdefault(thread, "transfer" if not lane else f"transfer {lane + 1}")
            args = {"pass": call.name, "stage": span.stage, "side": span.side}
            shown = {name: value for name, value in args.items() if value not in (None, "")}
            yield _event(trace.rank, thread, span.name, span.start, span.end, shown)
    for thread, name in names.items():
        yield {"ph": "M", "pid": trace.rank, "tid": thread, "name": "thread_name", "args": {"name": name}}
        yield {"ph": "M", "pid": trace.rank, "tid": thread, "name": "thread_sort_index", "args": {"sort_index": thread}}


def _event(rank: int, thread: int, name: str, start: float, end: float, args: dict[str, Any]) -> dict[str, Any]:
    return {
        "ph": "X", "pid": rank, "tid": thread, "name": name, "cat": "attention", "ts": start * 1e6,
        "dur": (end - start) * 1e6, "args": args,
    }  # fmt: skip


def transfer_lanes(call: Call) -> list[int]:
    """A lane for each span, such that transfers that overlap are in different ones; 0 for other threads."""
    ends: list[float] = []
    lanes = []
    for span in call.spans:
        lane = 0
        if span.thread == "transfer":
            lane = next((n for n, end in enumerate(ends) if end <= span.start), len(ends))
            ends[lane : lane + 1] = [span.end]
        lanes.append(lane)
    return lanes
