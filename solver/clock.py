"""Time on every rank while a pass of the attention op is replayed with given kernel and transfer times.

The clock follows the attention op. The exchanges of the first two stages are issued at the start; after
that a rank issues the exchange of stage s + 1, computes stage s, waits; in backward it also sends each
stage's key gradients home while the next stage computes, one at a time, and leaves most of the work on its
own keys till last, behind which the last gradients travel. Where queries travel, a rank
works on its own first, on those received when they are here, and sends their results home behind its last
work on its own. A rank's exchanges take turns on its link.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
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
    same thread. transfers: in the order in which they are issued, each from then to its arrival. seconds: when each
    rank is done, [cp_size].
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


class Wire(Protocol):
    """The exchange of one stage, on every rank."""

    @property
    def active(self) -> bool:
        """Whether any rank moves a row."""
        ...

    def seconds(self, row_bytes: int) -> FloatArray:
        """The transfer, once it has begun; 0 where a rank moves nothing."""
        ...

    def packing(self, row_bytes: int, *, home: bool) -> tuple[FloatArray, FloatArray]:
        """Seconds to pack what leaves and to take in what comes (home: the way back)."""
        ...

    def started(self, ready: FloatArray) -> FloatArray:
        """When it begins on each rank, given when each one is ready."""
        ...


class Arrival(NamedTuple):
    """When an exchange is here on each rank, and the seconds that taking it in costs then, [cp_size]."""

    at: FloatArray
    reduction: FloatArray


class Clock:
    """Time on every rank while a pass is replayed.

    shape: [..., cp_size]; several passes may be replayed at once. num_hops: of an exchange; so many
    exchanges of one kind are under way at once. transfer_load: as in `Hardware`; a rank owes that share of its
    transfers' time, and pays with the next compute or by waiting.
    """

    def __init__(self, shape: tuple[int, ...], num_hops: int, transfer_load: float) -> None:
        self.depth = num_hops
        self.transfer_load = transfer_load
        self.now = np.zeros(shape)
        self.link_free = np.zeros(shape)
        self.owed = np.zeros(shape)
        self.compute: list[PassSpan] = []
        self.copies: list[PassSpan] = []
        self.transfers: list[PassSpan] = []

    def timeline(self) -> PassTimeline:
        return PassTimeline(tuple(self.compute), tuple(self.copies), tuple(self.transfers), self.now)

    def run(
        self,
        kernels: Sequence[dict[str, FloatArray]],
        queries: Wire,
        stages: Sequence[Wire],
        *,
        out_bytes: int,
        kv_bytes: int,
        home_bytes: int,
        dkv_bytes: int,
    ) -> None:
        """Replay one pass; dkv_bytes 0: no gradients go home. kernels: seconds of each stage's work, by side: "own",
        "guest", and in the first stage "late", the own work that is left till last.
        """

        def fetch(number: int) -> Arrival | None:
            return self._send(f"keys {number}", stages[number - 1], kv_bytes) if number <= len(stages) else None

        guests = self._send("queries", queries, out_bytes)
        ahead = max(2, self.depth)
        fetches = deque(fetch(number) for number in range(1, ahead + 1))
        homeward: deque[Arrival | None] = deque()
        for number, sides in enumerate(kernels):
            if number:
                self._take(fetches.popleft())
                # With one hop the second is under way already.
                if number + self.depth > ahead:
                    fetches.append(fetch(number + self.depth))
            # Guests come last in the first stage, when they are on their way, and first in the others.
            for side in sorted(sides.keys() - {"late"}, reverse=number == 0):
                if side == "guest" and number == 0:
                    self._take(guests)
                self._compute(f"stage {number}" + " guests" * (side == "guest"), sides[side])
                if side == "guest" and number == len(kernels) - 1:
                    homeward.append(self._send("results", queries, home_bytes, home=True))
            if number and dkv_bytes:
                while len(homeward) >= self.depth:
                    self._take(homeward.popleft())
                homeward.append(self._send(f"gradients {number}", stages[number - 1], dkv_bytes, home=True))
        if "late" in kernels[0]:
            self._compute("stage 0 late", kernels[0]["late"])
        for arrival in homeward:
            self._take(arrival)

    def _compute(self, name: str, seconds: FloatArray) -> None:
        """A kernel, and what transfers take from it meanwhile; ranks without work go on."""
        working = seconds > 0
        self._spend(self.compute, name, seconds + np.where(working, self.owed, 0.0))
        self.owed = np.where(working, 0.0, self.owed)

    def _spend(self, spans: list[PassSpan], name: str, seconds: FloatArray) -> None:
        """Every rank is busy for so long."""
        spans.append(PassSpan(name, self.now, self.now + seconds))
        self.now = self.now + seconds

    def _take(self, arrival: Arrival | None) -> None:
        """Wait for an exchange, if there is one, and take it in."""
        if arrival is None:
            return
        self.owed = np.maximum(self.owed - np.maximum(arrival.at - self.now, 0.0), 0.0)
        self.now = np.maximum(self.now, arrival.at)
        if arrival.reduction.any():
            self._spend(self.copies, "reduce", arrival.reduction)

    def _send(self, name: str, wire: Wire, row_bytes: int, *, home: bool = False) -> Arrival | None:
        """Issue an exchange now; None where no rank moves a row."""
        if not wire.active:
            return None
        pack, unpack = wire.packing(row_bytes, home=home)
        self._spend(self.copies, "pack", pack)
        begin = np.maximum(self.now, self.link_free)
        starts = wire.started(begin)
        seconds = wire.seconds(row_bytes)
        self.owed = self.owed + self.transfer_load * seconds
        ends = starts + seconds
        # Where a rank moves nothing it waits for no one.
        idle = ends == starts
        starts, ends = np.where(idle, begin, starts), np.where(idle, begin, ends)
        self.link_free = ends
        self.transfers.append(PassSpan(name, begin, ends))
        # Received rows are used where they lie; only what comes home is reduced.
        return Arrival(np.where(idle, self.now, ends), unpack if home else np.zeros_like(unpack))
