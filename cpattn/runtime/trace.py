"""What a profile recorded, as a user reads it: spans, shares, a table, a file for a trace viewer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

Thread: TypeAlias = Literal["compute", "wait", "transfer"]
PassName: TypeAlias = Literal["forward", "backward"]
Side: TypeAlias = Literal["own", "guest", ""]


class Span(NamedTuple):
    """Something that a rank did, in seconds since its profile began (in a `Trace`: since the first call).

    name: in thread compute "kernel", "encode", "pack", "unpack" or "reduce"; in the others what
        travels: "queries", "keys 1" (stage 1), on their way home "results" and "gradients 1"; with head
        sharding also rows traded for heads, "heads of q", and heads for rows, "rows of out".
    stage: 0 works on own keys; None where none is meant. side: of a kernel, "own" (this rank's queries) or
        "guest" (those of other ranks).
    """

    thread: Thread
    name: str
    stage: int | None
    side: Side
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


def trace_from_first_call(ranks: Sequence[RankTrace]) -> Trace:
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
