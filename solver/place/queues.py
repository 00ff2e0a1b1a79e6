"""Placements that hand tokens out of queues: balanced for any mask, whatever its structure."""

from __future__ import annotations

from bisect import bisect_right

import numpy as np

from ..placement import Placement
from ..slices import IntArray
from .density import DensityProfile, last_within

# Gaps between levels, as a share of the range of densities; smaller ones are noise.
_LEAST_GAP = 0.05


class _Queue:
    """Pieces of a density profile in hand-out order, with prefix sums; eaten from both ends."""

    def __init__(self, profile: DensityProfile, order: IntArray, *, ascending: bool = False) -> None:
        lengths = profile.ends[order] - profile.starts[order]
        last = profile.first[order] + profile.slopes[order] * (lengths - 1)
        # Backwards through the sequence, or (ascending) each piece from its sparser end.
        reverse = profile.slopes[order] < 0 if ascending else np.ones(len(order), dtype=bool)
        self._starts: list[int] = profile.starts[order].tolist()
        self._ends: list[int] = profile.ends[order].tolist()
        self._reverse = reverse.tolist()
        self._first: list[int] = np.where(reverse, last, profile.first[order]).tolist()
        self._slopes: list[int] = np.where(reverse, -profile.slopes[order], profile.slopes[order]).tolist()
        self.cuts: list[int] = np.concatenate([[0], np.cumsum(lengths)]).tolist()
        self._areas: list[int] = np.concatenate([[0], np.cumsum(profile.areas[order])]).tolist()
        self.head: int = 0
        self.tail: int = self.cuts[-1]

    def __len__(self) -> int:
        return self.tail - self.head

    def area(self, start: int, end: int) -> int:
        """Area of the queue's positions [start, end)."""
        return self.below(end) - self.below(start)

    def below(self, position: int) -> int:
        """Area of the positions before this one."""
        if not position:
            return 0
        i = min(bisect_right(self.cuts, position) - 1, len(self._starts) - 1)
        t = position - self.cuts[i]
        return self._areas[i] + self._first[i] * t + self._slopes[i] * (t * (t - 1) // 2)

    def pop_head(self, count: int) -> list[tuple[int, int]]:
        """Token runs of the next `count` positions."""
        self.head += count
        return self._runs(self.head - count, self.head)

    def pop_tail(self, count: int) -> list[tuple[int, int]]:
        """Token runs of the last `count` positions."""
        self.tail -= count
        return self._runs(self.tail, self.tail + count)

    def _runs(self, start: int, end: int) -> list[tuple[int, int]]:
        runs = []
        i = bisect_right(self.cuts, start) - 1
        while start < end:
            stop = min(end, self.cuts[i + 1])
            a, b = start - self.cuts[i], stop - self.cuts[i]
            if self._reverse[i]:
                runs.append((self._ends[i] - b, self._ends[i] - a))
            else:
                runs.append((self._starts[i] + a, self._starts[i] + b))
            start, i = stop, i + 1
        return runs


def place_by_density(profile: DensityProfile, *, total_seqlen: int, cp_size: int) -> Placement:
    """Even tokens and, up to one token's density, even area, for any mask.

    Two queues: the tokens that see at least the mean number of keys, last ones first, and the
    others, sparsest pieces first. Every rank takes a run of both. Whatever has been taken, if all
    ranks so far hold the mean area then what is left has the mean density, and some mixture of
    dense and sparse tokens meets the next rank's share: so all ranks come out even.
    """
    area_left = int(profile.areas.sum())
    profile = profile.cut_at_density(area_left / max(total_seqlen, 1))
    lengths = profile.ends - profile.starts
    is_dense = profile.areas * total_seqlen >= lengths * area_left
    sparse = np.flatnonzero(~is_dense)
    sparse = sparse[np.argsort(profile.areas[sparse] / lengths[sparse], kind="stable")]
    heavy = _Queue(profile, np.flatnonzero(is_dense)[::-1])
    light = _Queue(profile, sparse, ascending=True)
    runs: list[list[tuple[int, int]]] = []
    for rank in range(cp_size):
        ranks_left = cp_size - rank
        tokens = (len(heavy) + len(light)) // ranks_left
        count, area = _mix(heavy, light, tokens, area_left / ranks_left)
        area_left -= area
        runs.append(heavy.pop_head(count) + light.pop_head(tokens - count))
    return _placement(runs)


def _mix(heavy: _Queue, light: _Queue, tokens: int, target: float) -> tuple[int, int]:
    """Of `tokens`, the largest number to take from `heavy` with an area of at most `target`; that area."""

    before, light_end = heavy.below(heavy.head) + light.below(light.head), light.head + tokens

    def area(count: int) -> int:
        return heavy.below(heavy.head + count) + light.below(light_end - count) - before

    least, most = max(0, tokens - len(light)), min(tokens, len(heavy))
    count = max(last_within(lambda count: area(count) - target, least, most), least)
    return count, area(count)


def place_in_levels(profile: DensityProfile, *, total_seqlen: int, cp_size: int, chunk_size: int) -> Placement:
    """Each rank takes its share of every level of the mask, in step: for prefix trees.

    Levels are groups of pieces of similar density: a tree's root, its branches, its leaves. They are
    walked backwards at the same pace, so a rank's leaves meet their own branch. The sparsest level
    (the root, which every rank needs anyway) is eaten from both ends, in the proportion that
    makes the rank's area even. With one level this is the zigzag.
    """
    *upper, base = (_Queue(profile, order) for order in _levels(profile))
    area_left = int(profile.areas.sum())
    tokens_left = total_seqlen
    runs: list[list[tuple[int, int]]] = []
    for rank in range(cp_size):
        ranks_left = cp_size - rank
        tokens, target = tokens_left // ranks_left, area_left / ranks_left
        mine: list[tuple[int, int]] = []
        taken = area = 0
        for queue in upper:
            count = _snapped_share(queue, ranks_left, chunk_size // 2)
            area += queue.area(queue.head, queue.head + count)
            mine += queue.pop_head(count)
            taken += count
        rest = max(0, min(tokens - taken, len(base))) if ranks_left > 1 else len(base)
        head = _head_share(base, rest, target - area)
        area += base.area(base.head, base.head + head)
        area += base.area(base.tail - (rest - head), base.tail)
        mine += base.pop_head(head) + base.pop_tail(rest - head)
        tokens_left -= taken + rest
        area_left -= area
        runs.append(mine)
    return _placement(runs)


def _levels(profile: DensityProfile) -> list[IntArray]:
    """Groups of pieces, densest first, last tokens first within each: cut at wide gaps."""
    lengths = profile.ends - profile.starts
    density = profile.areas / lengths
    order = np.argsort(-density, kind="stable")
    gaps = -np.diff(density[order])
    cuts = np.flatnonzero(gaps > _LEAST_GAP * np.ptp(density)) + 1
    return [np.sort(group)[::-1] for group in np.split(order, cuts)]


def _snapped_share(queue: _Queue, ranks_left: int, tolerance: int) -> int:
    """An even share of the queue, moved to the end of a piece where one is near."""
    if ranks_left == 1:
        return len(queue)
    share = len(queue) // ranks_left
    goal = queue.head + share
    i = bisect_right(queue.cuts, goal)
    near = min(queue.cuts[max(i - 1, 0) : i + 1], key=lambda cut: abs(cut - goal))
    if abs(near - goal) <= tolerance and near >= queue.head:
        return min(near - queue.head, len(queue))
    return share


def _head_share(base: _Queue, count: int, target: float) -> int:
    """How many of `count` base tokens to take from the head (the dense end) for an area of `target`."""
    target += base.below(base.head) - base.below(base.tail)
    rest = base.tail - count
    return max(last_within(lambda n: base.below(base.head + n) - base.below(rest + n) - target, 0, count), 0)


def _placement(runs: list[list[tuple[int, int]]]) -> Placement:
    """Placement from each rank's token runs."""
    owners = np.repeat(np.arange(len(runs)), [len(mine) for mine in runs])
    table = np.array([run for mine in runs for run in mine], dtype=np.int64).reshape(-1, 2)
    order = np.argsort(table[:, 0], kind="stable")
    return Placement.from_runs(table[order, 1], owners[order], cp_size=len(runs))
