"""Work per query token: how many keys each token of the sequence sees, as straight lines.

Inside a banded rectangle the number of keys that a query sees is piecewise linear in its index, so
the whole mask gives a piecewise linear density and a piecewise quadratic prefix sum. Both are exact
integers; nothing here is as long as the sequence.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from ..slices import IntArray, SliceTable, distinct


@dataclass(frozen=True, eq=False)
class DensityProfile:
    """Keys seen by each query token, in linear pieces.

    Piece i covers tokens [starts[i], ends[i]); its token starts[i] + t sees first[i] + slopes[i] * t
    keys. Pieces cover [0, total_seqlen) in order. areas: pairs of each piece. All int64 [num_pieces].
    """

    starts: IntArray = field(repr=False)
    ends: IntArray = field(repr=False)
    first: IntArray = field(repr=False)
    slopes: IntArray = field(repr=False)
    areas: IntArray = field(repr=False)

    @classmethod
    def from_table(cls, table: SliceTable, total_seqlen: int) -> DensityProfile:
        """Profile of disjoint canonical slices.

        Row i of a slice sees min(k1, i + hi + 1) - max(k0, i + lo) keys: the first term climbs until
        i = k1 - 1 - hi, the second from i = k0 - lo on.
        """
        q0, q1, k0, k1, lo, hi = table.data.T
        # A bend at a slice's last token changes nothing: leave it out.
        climb_ends = np.where(k1 - 1 - hi >= q1 - 1, q1, np.maximum(k1 - 1 - hi, q0))
        fall_starts = np.where(k0 - lo >= q1 - 1, q1, np.maximum(k0 - lo, q0))
        at_start = np.minimum(k1, q0 + hi + 1) - np.maximum(k0, q0 + lo)
        at_end = at_start + (climb_ends - q0) - (q1 - fall_starts)
        climbs, falls = (climb_ends > q0).astype(np.int64), (fall_starts <= q0).astype(np.int64)
        # Events: at each position, the change of the density's value and of its slope. The value of
        # a line jumps only where a slice begins or ends; a bend inside leaves it continuous.
        at = np.concatenate([q0, climb_ends, fall_starts, q1])
        stays_climbing = climbs - (climb_ends < q1) * climbs
        is_falling = falls + (fall_starts < q1) * (1 - falls)
        bend_up = (climb_ends < q1) * climbs
        bend_down = (fall_starts < q1) * (1 - falls)
        slope = np.concatenate([climbs - falls, -bend_up, -bend_down, is_falling - stays_climbing])
        jump = np.concatenate([at_start, 0 * q0, 0 * q0, -at_end])
        return cls._from_events(at, jump, slope, total_seqlen)

    @classmethod
    def _from_events(cls, at: IntArray, jump: IntArray, slope: IntArray, total: int) -> DensityProfile:
        points, where = np.unique(np.concatenate([[0, total], at]), return_inverse=True)
        jumps = np.zeros(len(points), dtype=np.int64)
        bends = np.zeros(len(points), dtype=np.int64)
        np.add.at(jumps, where[2:], jump)
        np.add.at(bends, where[2:], slope)
        starts, ends = points[:-1], points[1:]
        slopes = np.cumsum(bends)[:-1]
        lengths = ends - starts
        climbed = np.concatenate([[0], np.cumsum(slopes * lengths)[:-1]])[: len(starts)]
        first = np.cumsum(jumps)[:-1] + climbed
        areas = first * lengths + slopes * (lengths * (lengths - 1) // 2)
        return cls(starts, ends, first, slopes, areas)

    def __len__(self) -> int:
        return len(self.starts)

    def cut(self, cuts: IntArray) -> DensityProfile:
        """The same profile with its pieces also cut at the token indices `cuts`."""
        total = int(self.ends[-1]) if len(self) else 0
        inner = cuts[(cuts > 0) & (cuts < total)]
        starts = distinct(np.concatenate([self.starts, inner])).astype(np.int64)
        piece = np.searchsorted(self.starts, starts, side="right") - 1
        ends = np.append(starts[1:], total)[: len(starts)].astype(np.int64)
        first = self.first[piece] + self.slopes[piece] * (starts - self.starts[piece])
        slopes, lengths = self.slopes[piece], ends - starts
        areas = first * lengths + slopes * (lengths * (lengths - 1) // 2)
        return DensityProfile(starts, ends, first, slopes, areas)

    def cut_at_density(self, density: float) -> DensityProfile:
        """Cut so that every piece lies wholly below `density` or wholly at or above it."""
        bent = self.slopes != 0
        first, slopes = self.first[bent], self.slopes[bent]
        # Climbing: the first token at or above; falling: the first token below.
        ratio = (density - first) / slopes
        steps = np.where(slopes > 0, np.ceil(ratio), np.floor(ratio) + 1).astype(np.int64)
        starts, ends = self.starts[bent], self.ends[bent]
        at = starts + steps
        return self.cut(at[(at > starts) & (at < ends)])

    def density(self, tokens: IntArray) -> IntArray:
        """Keys that each query token sees."""
        i = np.searchsorted(self.starts, tokens, side="right") - 1
        result: IntArray = self.first[i] + self.slopes[i] * (tokens - self.starts[i])
        return result

    @cached_property
    def prefix(self) -> IntArray:
        """Visible pairs of all queries before each piece, and all pairs, [num_pieces + 1]."""
        return np.append(0, np.cumsum(self.areas))

    def area_below(self, tokens: IntArray) -> IntArray:
        """Visible pairs of all queries before each token."""
        i = np.searchsorted(self.starts[1:], tokens, side="right")
        t = tokens - self.starts[i]
        result: IntArray = self.prefix[i] + self.first[i] * t + self.slopes[i] * (t * (t - 1) // 2)
        return result

    @cached_property
    def ramp(self) -> AreaRamp:
        """The same profile as plain Python lists, for many single look-ups."""
        starts, first, slopes, prefix = (
            column.tolist() for column in (self.starts, self.first, self.slopes, self.prefix)
        )
        return AreaRamp(starts, first, slopes, prefix, int(self.ends[-1]) if len(self) else 0)


@dataclass(frozen=True, slots=True, eq=False)
class AreaRamp:
    """Running sum of a density profile, and its inverse, one token index at a time.

    Plain lists and `bisect`: a look-up costs under a microsecond, ten times less than numpy's for a
    single number, and placement makes tens of thousands of them one after the other.
    """

    starts: list[int] = field(repr=False)
    first: list[int] = field(repr=False)
    slopes: list[int] = field(repr=False)
    prefix: list[int] = field(repr=False)
    total_seqlen: int

    def below(self, token: int) -> int:
        """Visible pairs of all queries before `token`."""
        i = bisect_right(self.starts, token) - 1
        t = token - self.starts[i]
        return self.prefix[i] + self.first[i] * t + self.slopes[i] * (t * (t - 1) // 2)

    def density(self, token: int) -> int:
        """Keys that query `token` sees."""
        i = bisect_right(self.starts, token) - 1
        return self.first[i] + self.slopes[i] * (token - self.starts[i])

    def token_at(self, area: int) -> int:
        """About the largest token with below(token) <= area; off by one where rounding bites."""
        i = bisect_right(self.prefix, area) - 1
        if i >= len(self.starts):
            return self.total_seqlen
        rest, slope = area - self.prefix[i], self.slopes[i]
        if slope == 0:
            return self.starts[i] + (rest // self.first[i] if self.first[i] else 0)
        b = self.first[i] - slope / 2
        steps = (math.sqrt(max(b * b + 2.0 * slope * rest, 0.0)) - b) / slope
        return self.starts[i] + max(int(steps), 0)


def last_within(value: Callable[[int], float], least: int, most: int) -> int:
    """The largest count in [least, most] with value(count) <= 0, or least - 1 if there is none; value must not fall.

    False position in the Illinois variant (the value at an end that stays is halved), with a halving every third
    time: values that are nearly straight, as areas are, take a few looks instead of one for each bit.
    """
    low, high = value(least), value(most)
    if high <= 0:
        return most
    if low > 0:
        return least - 1
    side, looks = 0, 0
    while most - least > 1:
        looks += 1
        guess = least + int((most - least) * (low / (low - high))) if looks % 3 else (least + most) // 2
        guess = min(max(guess, least + 1), most - 1)
        found = value(guess)
        if found > 0:
            if side > 0:
                low /= 2
            most, high, side = guess, found, 1
        else:
            if side < 0:
                high /= 2
            least, low, side = guess, found, -1
    return least
