"""Tokens not yet placed, as components of the mask that are eaten from both ends.

A component is a stretch of tokens that sees, and is seen by, no token outside: a packed document, a
prefix tree, or the whole sequence. Of each, a middle [lo, hi) is left. Its *top* is the end whose
queries see most (the last tokens of a causal document), its *bottom* the other one. A rank that
holds a piece of a component needs about as many keys as the piece's densest query sees, whatever
else it holds, so tops are dear and bottoms are cheap; that number is called `need`.
"""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np

from ..slices import IntArray, SliceTable
from .density import AreaRamp, DensityProfile

# How one component is listed in by_need, by_density and by_size.
_Key = tuple[tuple[int, int], tuple[float, int, int], tuple[int, int]]


def find_components(table: SliceTable, total_seqlen: int) -> tuple[IntArray, IntArray]:
    """Starts and ends of the components, in order; they cover [0, total_seqlen).

    Slices whose hulls of queries and keys overlap belong together. A stretch that no slice touches
    is a component of area 0.
    """
    starts = np.minimum(table.q0, table.k0)
    ends = np.maximum(table.q1, table.k1)
    order = np.argsort(starts, kind="stable")
    starts, ends = starts[order], np.maximum.accumulate(ends[order])
    opens = np.append(True, starts[1:] >= ends[:-1])[: len(starts)]
    starts, ends = starts[opens], ends[np.append(opens[1:], True)[: len(ends)]]
    gap_starts = np.append(0, ends)
    gap_ends = np.append(starts, total_seqlen)
    gaps = gap_ends > gap_starts
    starts = np.concatenate([starts, gap_starts[gaps]])
    ends = np.concatenate([ends, gap_ends[gaps]])
    order = np.argsort(starts)
    return starts[order], ends[order]


def join_small(starts: IntArray, ends: IntArray, size: int) -> tuple[IntArray, IntArray]:
    """Components of fewer than `size` tokens joined to neighbours of that kind, up to `size` tokens together.

    Planning then does not pay for each of thousands of tiny documents. One of them may come to be cut between two
    ranks, which costs few rows.
    """
    lengths = ends - starts
    small = lengths < size
    # The first of a stretch of small ones, and any whose start lies past another multiple of `size` in it.
    opens = np.append(True, ~small[:-1]) | ~small
    begin = np.maximum.accumulate(np.where(opens, starts, 0))
    block = (ends - begin - 1) // max(size, 1)
    opens[1:] |= block[1:] != block[:-1]
    return starts[opens], np.append(starts[opens][1:], ends[-1:])


class TokenPool:
    """Components with tokens left, sorted by top need, density and size.

    Mutable on purpose: it is the working state of one placement and never leaves it.
    """

    def __init__(self, profile: DensityProfile, starts: IntArray, ends: IntArray) -> None:
        """starts, ends: components, in order, from token 0 to the last one; tiny ones may be joined."""
        self.ramp: AreaRamp = profile.ramp
        below = profile.area_below
        below_starts, below_ends = below(starts), below(ends)
        areas = below_ends - below_starts
        flipped = profile.density(starts) > profile.density(ends - 1)  # the top is at the start
        self.lo: list[int] = starts.tolist()
        self.hi: list[int] = ends.tolist()
        self._below_lo: list[int] = below_starts.tolist()
        self._below_hi: list[int] = below_ends.tolist()
        self.areas: list[int] = areas.tolist()
        self.flipped: list[bool] = flipped.tolist()
        self._keys = [self._key(i) for i in range(len(self.lo))]
        # Each list holds its sort key first and the component last.
        self.by_need: list[tuple[int, int]] = sorted(key[0] for key in self._keys)
        self.by_density: list[tuple[float, int, int]] = sorted(key[1] for key in self._keys)
        self.by_size: list[tuple[int, int]] = sorted(key[2] for key in self._keys)

    def size(self, i: int) -> int:
        """Tokens left of component i."""
        return self.hi[i] - self.lo[i]

    def top_need(self, i: int) -> int:
        """Keys seen by the first token that take_top would give."""
        return self.ramp.density(self.lo[i] if self.flipped[i] else self.hi[i] - 1)

    def bottom_need(self, i: int, count: int) -> int:
        """Keys seen by the last of the `count` tokens that take_bottom would give; at least 1 token."""
        return self.ramp.density(self.hi[i] - count if self.flipped[i] else self.lo[i] + count - 1)

    def top_area(self, i: int, count: int) -> int:
        """Area of the first `count` tokens from the top."""
        if self.flipped[i]:
            return self.ramp.below(self.lo[i] + count) - self._below_lo[i]
        return self._below_hi[i] - self.ramp.below(self.hi[i] - count)

    def bottom_area(self, i: int, count: int) -> int:
        """Area of the first `count` tokens from the bottom."""
        if self.flipped[i]:
            return self._below_hi[i] - self.ramp.below(self.hi[i] - count)
        return self.ramp.below(self.lo[i] + count) - self._below_lo[i]

    def top_tokens(self, i: int, area: float) -> int:
        """How many tokens from the top fit into `area`."""
        if area <= 0:
            return 0
        if area >= self.areas[i]:
            return self.size(i)
        lo, hi, ramp = self.lo[i], self.hi[i], self.ramp
        if self.flipped[i]:
            count = ramp.token_at(int(self._below_lo[i] + area)) - lo
        else:
            count = hi - ramp.token_at(int(self._below_hi[i] - area))
        count = max(0, min(count, hi - lo))
        while count and self.top_area(i, count) > area:
            count -= 1
        return count

    def take_all(self, i: int) -> tuple[int, int, int]:
        """Remove component i: start, end and area of what was left."""
        self._remove(i)
        run = self.lo[i], self.hi[i], self.areas[i]
        self.lo[i] = self.hi[i]
        return run

    def take_top(self, i: int, count: int) -> tuple[int, int, int]:
        """Remove `count` tokens from the top: start, end and area of the run."""
        return self._take(i, count, from_start=self.flipped[i])

    def take_bottom(self, i: int, count: int) -> tuple[int, int, int]:
        """Remove `count` tokens from the bottom: start, end and area of the run."""
        return self._take(i, count, from_start=not self.flipped[i])

    def _take(self, i: int, count: int, *, from_start: bool) -> tuple[int, int, int]:
        self._remove(i)
        if from_start:
            start = self.lo[i]
            end = self.lo[i] = start + count
            self._below_lo[i] = self.ramp.below(end)
        else:
            end = self.hi[i]
            start = self.hi[i] = end - count
            self._below_hi[i] = self.ramp.below(start)
        area = self.areas[i]
        self.areas[i] = self._below_hi[i] - self._below_lo[i]
        area -= self.areas[i]
        if self.size(i):
            self._insert(i)
        return start, end, area

    def _key(self, i: int) -> _Key:
        size = self.size(i)
        density = self.areas[i] / size
        return (self.top_need(i), i), (density, size, i), (size, i)

    def _insert(self, i: int) -> None:
        self._keys[i] = need, density, size = self._key(i)
        insort(self.by_need, need)
        insort(self.by_density, density)
        insort(self.by_size, size)

    def _remove(self, i: int) -> None:
        need, density, size = self._keys[i]
        del self.by_need[bisect_left(self.by_need, need)]
        del self.by_density[bisect_left(self.by_density, density)]
        del self.by_size[bisect_left(self.by_size, size)]
