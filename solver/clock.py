"""Time on every rank while both passes of the attention op are replayed with given kernel and transfer times.

Forward and backward are replayed side by side, as both do the same but for what backward has more: gradients that go
home, and work left till last. In forward these take no time.

The clock follows the attention op. The exchanges of the first two stages are issued at the start; after
that a rank issues the exchange of stage s + 1, computes stage s, waits; in backward it also sends each
stage's key gradients home while the next stage computes, one at a time, and leaves most of the work on its
own keys till last, behind which the last gradients travel. Where queries travel, a rank
works on its own first, on those received when they are here, and sends their results home behind its last
work on its own. A rank's exchanges take turns on its link.

Of several hops, each begins when the one before is made; or (`by_host`) when the host comes to it as well: where a
stage is taken in, and between parts of the work that is left till last.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from .cost import FloatArray

# The part of a rank's work on its own keys that backward leaves till last: fetched keys come in behind the other part.
# In 16 bits gradients of keys are twice the bytes of keys.
LATE_SHARE = 2 / 3


class PassSpan(NamedTuple):
    """One thing that every rank does: seconds [cp_size] from the start of the pass; where both are equal, not."""

    name: str
    starts: FloatArray
    ends: FloatArray


class PassTimeline(NamedTuple):
    """One pass of the attention call.

    compute: "stage 0" (own keys), "stage 1", ..., in backward "stage 0 late"; where queries travel, also
    "stage 0 guests", ..., in order of time. copies: packing of what leaves and reduction of what came home, by the
    same thread. transfers: hops, in the order in which they are issued, each from then to its arrival. seconds: when
    each rank is done, [cp_size].
    """

    compute: tuple[PassSpan, ...]
    copies: tuple[PassSpan, ...]
    transfers: tuple[PassSpan, ...]
    seconds: FloatArray

    @property
    def busy(self) -> FloatArray:
        """Seconds that each rank computes, [cp_size]."""
        total: FloatArray = np.sum([span.ends - span.starts for span in self.compute], axis=0)
        return total

    @property
    def exposed(self) -> FloatArray:
        """Seconds in which each rank does not compute, [cp_size]."""
        return self.seconds - self.busy


# A collective: seconds on each kind of link that it takes, [2, ..., cp_size], 0 where a rank moves nothing. Hops that
# take the same kind wait for one another.
Hop = tuple[FloatArray, ...]


class Leg(NamedTuple):
    """Seconds of an exchange in one direction, [2, ..., cp_size], forward and backward.

    pack: what leaves. hops: the transfers, one after the other. reduce: what came home.
    """

    pack: FloatArray
    hops: tuple[Hop, ...]
    reduce: FloatArray | None = None


def legs(hops: Sequence[Hop], sent: FloatArray, received: FloatArray, *, by_host: bool) -> list[tuple[Leg, Leg]]:
    """The way there and the way home of the exchange of each stage.

    Args:
        hops: on the way there, of all stages, by links inside nodes and between them.
        sent, received: seconds to copy the rows that a rank sends there, and those that it receives.

    All are [4, stages, ..., cp_size]: there in forward and backward, home in forward and backward.
    """
    if not by_host:
        # Both kinds of link work at once: the slower decides.
        hops = [(np.maximum(*kinds),) for kinds in hops]
    there, home = slice(0, 2), slice(2, 4)

    def of_stage(stage: int, ways: slice, hops: Sequence[Hop]) -> tuple[Hop, ...]:
        return tuple(tuple(seconds[ways, stage] for seconds in kinds) for kinds in hops)

    return [
        (
            Leg(sent[there, stage], of_stage(stage, there, hops)),
            Leg(received[home, stage], of_stage(stage, home, hops[::-1]), sent[home, stage]),
        )
        for stage in range(sent.shape[1])
    ]


class Wire(Protocol):
    """The exchange of one stage, on every rank."""

    @property
    def there(self) -> Leg:
        """The way there: of queries, or keys."""
        ...

    @property
    def home(self) -> Leg:
        """The way back: of partial results, or gradients."""
        ...

    def started(self, ready: FloatArray, hop: int) -> FloatArray:
        """When a hop, counted on the way there, begins on each rank, given when each one is ready."""
        ...


class _Trip:
    """An exchange under way. at: when the hop that was begun last is made; hops: those that are not begun."""

    def __init__(self, name: str, wire: Wire, *, home: bool, in_forward: bool) -> None:
        leg = wire.home if home else wire.there
        self.name, self.wire, self.reduce, self.in_forward = name, wire, leg.reduce, in_forward
        numbers = range(len(leg.hops))
        self.hops = deque(zip(reversed(numbers) if home else numbers, leg.hops, strict=True))
        self.at: FloatArray = np.zeros(1)


class _Span(NamedTuple):
    """A `PassSpan` of both passes, or of backward alone."""

    name: str
    starts: FloatArray
    ends: FloatArray
    in_forward: bool


class Clock:
    """Time on every rank while both passes are replayed.

    shape: [2, ..., cp_size], the passes first; several ways may be replayed at once. num_hops: of an exchange; so many
    exchanges of one kind are under way at once. transfer_load: as in `Hardware`; a rank owes that share of its
    transfers' time, and pays with the next compute or by waiting. by_host: `Hardware.hops_by_host`; hops then take
    two kinds of links.
    """

    def __init__(self, shape: tuple[int, ...], num_hops: int, transfer_load: float, *, by_host: bool = False) -> None:
        self.depth, self.transfer_load, self.by_host = num_hops, transfer_load, by_host
        self.now = np.zeros(shape)
        self.free: tuple[FloatArray, ...] = (np.zeros(shape),) * (1 + by_host)  # when links are, by kind
        self.owed = np.zeros(shape)
        self.compute: list[_Span] = []
        self.copies: list[_Span] = []
        self.transfers: list[_Span] = []

    def timeline(self, *, backward: bool) -> PassTimeline:
        """One pass of a clock of one way."""
        at = int(backward)

        def of_pass(spans: list[_Span]) -> tuple[PassSpan, ...]:
            return tuple(
                PassSpan(one.name, one.starts[at], one.ends[at]) for one in spans if backward or one.in_forward
            )

        return PassTimeline(of_pass(self.compute), of_pass(self.copies), of_pass(self.transfers), self.now[at])

    def run(
        self, kernels: Sequence[dict[str, FloatArray]], queries: Wire | None, stages: Sequence[Wire | None]
    ) -> None:
        """Replay both passes.

        kernels: seconds of each stage's work, [2, ..., cp_size], by side: "own", "guest", and in the first stage
            "late", the own work that backward leaves till last.
        queries, stages: exchanges; None where no rank moves a row.
        """

        def fetch(number: int) -> _Trip | None:
            return self._send(f"keys {number}", stages[number - 1]) if number <= len(stages) else None

        guests = self._send("queries", queries)
        ahead = max(2, self.depth)
        fetches = deque(fetch(number) for number in range(1, ahead + 1))
        homeward: deque[_Trip | None] = deque()
        for number, sides in enumerate(kernels):
            if number:
                self._take(fetches.popleft())
                self._advance(fetches)
                # With one hop the second is under way already.
                if number + self.depth > ahead:
                    fetches.append(fetch(number + self.depth))
            # Guests come last in the first stage, when they are on their way, and first in the others.
            for side in sorted(sides.keys() - {"late"}, reverse=number == 0):
                if side == "guest" and number == 0:
                    self._take(guests)
                self._compute(f"stage {number}" + " guests" * (side == "guest"), sides[side])
                if side == "guest" and number == len(kernels) - 1:
                    homeward.append(self._send("results", queries, home=True))
            if number:
                while len(homeward) >= self.depth:
                    self._take(homeward.popleft())
                self._advance(homeward)
                homeward.append(self._send(f"gradients {number}", stages[number - 1], home=True, in_forward=False))
        parts = self.depth if self.by_host else 1
        for _ in range(parts if "late" in kernels[0] else 0):
            self._compute("stage 0 late", kernels[0]["late"] / parts, in_forward=False)
            self._advance(homeward)
        for trip in homeward:
            self._take(trip)

    def _compute(self, name: str, seconds: FloatArray, *, in_forward: bool = True) -> None:
        """A kernel, and what transfers take from it meanwhile; ranks without work go on."""
        if self.transfer_load:
            working = seconds > 0
            seconds = seconds + np.where(working, self.owed, 0.0)
            self.owed = np.where(working, 0.0, self.owed)
        self._spend(self.compute, name, seconds, in_forward=in_forward)

    def _spend(self, spans: list[_Span], name: str, seconds: FloatArray, *, in_forward: bool) -> None:
        """Every rank is busy for so long."""
        now = self.now + seconds
        spans.append(_Span(name, self.now, now, in_forward))
        self.now = now

    def _take(self, trip: _Trip | None) -> None:
        """Wait for an exchange, if there is one, and take it in."""
        if trip is None:
            return
        while trip.hops:
            self._advance([trip])
        self._arrive(trip)
        if trip.reduce is not None:
            self._spend(self.copies, "reduce", trip.reduce, in_forward=trip.in_forward)

    def _advance(self, trips: Iterable[_Trip | None]) -> None:
        """Begin the next hop of those that have another, when the one under way is made."""
        for trip in trips:
            if trip is not None and trip.hops:
                self._arrive(trip)
                self._hop(trip, self.now)

    def _arrive(self, trip: _Trip) -> None:
        """Wait for the hop under way."""
        if self.transfer_load:
            self.owed = np.maximum(self.owed - np.maximum(trip.at - self.now, 0.0), 0.0)
        self.now = np.maximum(self.now, trip.at)

    def _send(self, name: str, wire: Wire | None, *, home: bool = False, in_forward: bool = True) -> _Trip | None:
        """Issue an exchange now; None where no rank moves a row."""
        if wire is None:
            return None
        self._spend(self.copies, "pack", (wire.home if home else wire.there).pack, in_forward=in_forward)
        trip = _Trip(name, wire, home=home, in_forward=in_forward)
        self._hop(trip, self.now)
        while trip.hops and not self.by_host:
            self._hop(trip, trip.at)
        return trip

    def _hop(self, trip: _Trip, begin: FloatArray) -> None:
        """Begin the next hop, when the links that it takes are free and all peers are there."""
        number, hop = trip.hops.popleft()
        for seconds, free in zip(hop, self.free, strict=True):
            begin = np.where(seconds > 0, np.maximum(begin, free), begin)
        starts = trip.wire.started(begin, number)
        self.free = tuple(
            np.where(seconds > 0, starts + seconds, free) for seconds, free in zip(hop, self.free, strict=True)
        )
        transfer = hop[0] if len(hop) == 1 else np.maximum(*hop)
        # Where a rank moves nothing it waits for no one.
        trip.at = np.where(transfer > 0, starts + transfer, begin)
        if self.transfer_load:
            self.owed = self.owed + self.transfer_load * transfer
        self.transfers.append(_Span(trip.name, begin, trip.at, trip.in_forward))
