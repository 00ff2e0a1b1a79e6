"""The time of a schedule before its routes are made, and the stages in which its remote keys travel best.

The same clock as for a simulation runs on rough figures: a rank's work on its own keys and on each stage's is
taken to be in proportion to their rows, and every stage to have its share of what each link carries. That
costs a millisecond or two, at any number of ranks and stages.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .clock import LATE_SHARE, Clock, Hop, Leg, legs
from .cost import FloatArray, Hardware, Heads
from .routes import LinkRows
from .slices import IntArray

# Factors by which the first and the last stage may be smaller than the others.
_EDGES = (1, 2, 4)
# What one stage more has to save to be worth its latency and its slices.
_STAGE_GAIN = 0.002


@dataclass(frozen=True, slots=True, eq=False)
class Load:
    """What a schedule asks of every rank, each [cp_size].

    areas: visible pairs. own_slices, far_slices: slices with keys that it owns, and with others; gaps, cuts: so many
    more there are of the latter in one stage, as what is fetched has gaps, and in each of several stages, whose edges
    cut slices apart. own_share: of its pairs, those on keys that it
    owns. guest_share: those of queries that it receives. merged: rows of queries that see keys which it does not own,
    fetched: rows of those keys. late: rows of its own queries, and of keys, in work on its own keys. keys, queries:
    rows on its links; two_level: these go between nodes and then inside them, else at once. relays: they travel on.
    """

    areas: IntArray
    own_slices: IntArray
    far_slices: IntArray
    gaps: FloatArray
    cuts: FloatArray
    own_share: FloatArray
    guest_share: FloatArray
    merged: FloatArray
    fetched: FloatArray
    late: tuple[FloatArray, FloatArray]
    keys: LinkRows
    queries: LinkRows
    two_level: bool
    relays: bool = False

    @property
    def num_hops(self) -> int:
        return 1 + self.two_level + self.relays


class Staging(NamedTuple):
    """Weights of the stages in which remote keys travel, and the time of both passes.

    relays: 0: owners send rows to all who need them. Else rows travel on, over nodes of so many ranks (1: no nodes).
    """

    weights: tuple[int, ...]
    seconds: float
    relays: int = 0


def choose_stages(step: Step, counts: Iterable[int]) -> Staging:
    """Number and sizes of the stages by the estimated time of both passes.

    The first keys and the last gradients have only parts of the work on own keys to hide behind: so the first and the
    last stage may be smaller than the others, by a factor that is chosen as well. Those between are equal,
    since the largest two make the buffers. More stages hide more, but pay more latencies and launches, and
    ranks that are not alike wait for one another more often.

    Args:
        counts: numbers of stages in ascending order; the search ends at one that brings less than 0.2 %. (0,) where
            no key travels.
    """
    best: Staging | None = None
    for count in counts:
        found = step.staged(count)
        if best is not None and found.seconds >= best.seconds * (1 - _STAGE_GAIN):
            break
        best = found
    assert best is not None, "counts is empty"
    return best


class Step:
    """The step of a load, timed with any stages; what does not depend on them is reckoned once, and times are kept."""

    def __init__(self, load: Load, heads: Heads, hardware: Hardware) -> None:
        self._timed: dict[int, Staging] = {}
        self.load, self.heads, self.hardware = load, heads, hardware
        self.row = heads.row_bytes()
        self.queries = self._wires(load.queries, np.ones((1, 1, 1)), self.row.of_queries)
        # The shares of its own queries' pairs, and of those of queries that it receives, if any rank does.
        guests = {} if self.queries == [None] else {"guest": load.guest_share}
        self.sides = {"own": 1 - load.guest_share, **guests}
        self.home = self._home()

    def staged(self, count: int) -> Staging:
        """The best weights of so many stages, and the time of both passes."""
        if count not in self._timed:
            self._timed.update(self._one_or_two() if count in (1, 2) else {count: self._several(count)})
        return self._timed[count]

    def _one_or_two(self) -> dict[int, Staging]:
        """One stage is two of which the first is empty: both are issued at the start. So one clock times both."""
        shares = np.array([[[0.0], [0.5]], [[1.0], [0.5]]])
        return {count: Staging((1,) * count, seconds) for count, seconds in enumerate(self.seconds(shares).tolist(), 1)}

    def _several(self, count: int) -> Staging:
        edges = np.array(_EDGES if count > 2 else (1,))
        weights = np.ones((count, len(edges), 1), dtype=np.int64)
        weights[1:-1] = edges[:, None]
        seconds = self.seconds(weights / np.maximum(weights.sum(axis=0), 1))
        at = int(seconds.argmin())
        return Staging(tuple(weights[:, at, 0].tolist()), float(seconds[at]))

    def _home(self) -> dict[str, FloatArray]:
        """Seconds of both passes on keys that are owned, [2, 1, cp_size], by side."""
        load, own_slices = self.load, self.load.own_slices
        shares = {side: load.own_share * share for side, share in self.sides.items()}
        if not load.keys.any():
            return {side: self._kernel(share[None, None], own_slices) for side, share in shares.items()}
        late = np.array((0.0, LATE_SHARE))[:, None, None]
        parts = {**shares, "own": shares["own"] * (1 - late), "late": shares["own"] * late}
        slices = {"own": own_slices * (1 - late), "late": own_slices * late}
        kernels = {
            side: self._kernel(np.broadcast_to(part, (2, 1, len(load.areas))), slices.get(side, own_slices))
            for side, part in parts.items()
        }
        # What comes last is added to what came first.
        rows, keys = (count * LATE_SHARE for count in load.late)
        kernels["late"][1] += self.hardware.merge_seconds(rows, keys, self.heads, backward=True)
        return kernels

    def seconds(self, shares: FloatArray) -> FloatArray:
        """Both passes of the slowest rank, [n], for n ways to share the remote keys between stages, [stages, n, 1]."""
        load = self.load
        several = (shares > 0).sum(axis=0) > 1
        slices = load.far_slices * shares + np.where(several, load.cuts, load.gaps)
        merging = self.hardware.both_merges_seconds(load.merged, load.fetched * shares, self.heads)
        parts = (1 - load.own_share) * shares
        far = {
            side: self._kernel((parts * share)[None], slices[None]) + share * merging * (shares > 0)
            for side, share in self.sides.items()
        }
        kernels = [{side: seconds[:, stage] for side, seconds in far.items()} for stage in range(len(shares))]
        by_host, delay = self.hardware.hops_by_host, self.hardware.transfer_load
        clock = Clock((2, shares.shape[1], len(load.areas)), load.num_hops, delay, by_host=by_host)
        stages = self._wires(load.keys, shares, self.row.of_keys)
        clock.run([self.home, *kernels], self.queries[0], stages)
        total: FloatArray = clock.now.max(axis=2).sum(axis=0)
        return total

    def _kernel(self, part: FloatArray, slices: np.ndarray[Any, Any]) -> FloatArray:
        """Seconds of both passes on a part of the pairs, [1 or 2, ...]."""
        slices = np.where(part > 0, np.maximum(slices, 1), 0)
        return self.hardware.both_kernels_seconds(self.load.areas * part, slices, self.heads)

    def _wires(
        self, rows: LinkRows, shares: FloatArray, row_bytes: tuple[int, int, int, int]
    ) -> list[_EstimatedWire | None]:
        """The exchange of each of these shares of the rows, [stages, n, 1]; row_bytes: as `RowBytes` has them."""
        if not rows.any():
            return [None] * len(shares)
        hardware = self.hardware
        weights = np.reshape(row_bytes, (4, 1, 1, 1)) * shares
        near = hardware.within.seconds(rows.within * weights)
        far = hardware.across.seconds(rows.across * weights)
        nothing = np.zeros_like(near)
        hops: list[Hop] = [(nothing, far), (near, nothing)] if self.load.two_level else [(near, far)]
        if rows.before is not None:
            if rows.across.any():
                hops.insert(0, (nothing, hardware.across.seconds(rows.before * weights)))
            else:
                hops.insert(0, (hardware.within.seconds(rows.before * weights), nothing))
        packed = rows.within if self.load.two_level else rows.within + rows.across
        packing = packed * (weights / hardware.copy_bytes_per_s)
        return [_EstimatedWire(*ways) for ways in legs(hops, packing, packing, by_host=hardware.hops_by_host)]


class _EstimatedWire(NamedTuple):
    """A share of the rows, and no peers in particular."""

    there: Leg
    home: Leg

    def started(self, ready: FloatArray, hop: int) -> FloatArray:
        """Halfway between when it is ready and when all are: not all of them trade with one another."""
        result: FloatArray = (ready + ready.max(axis=-1, keepdims=True)) / 2
        return result
