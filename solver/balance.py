"""Balanced placement: even area and even token counts, little KV traffic."""

from __future__ import annotations

import numpy as np

from .balance_metric import kv_rows_received, rank_areas
from .balance_profile import DensityProfile
from .placement import Placement
from .slices import IntArray, SliceTable

__all__ = ["kv_rows_received", "place_balanced", "rank_areas"]


class _Queue:
    """Token runs in the order in which they are handed out, with prefix sums over them."""

    def __init__(self, profile: DensityProfile, order: IntArray, reverse: IntArray) -> None:
        lengths = profile.ends[order] - profile.starts[order]
        self.starts = profile.starts[order].tolist()
        self.ends = profile.ends[order].tolist()
        self.reverse = reverse.tolist()
        self.first = np.where(
            reverse, profile.first[order] + profile.slopes[order] * (lengths - 1), profile.first[order]
        ).tolist()
        self.slopes = np.where(reverse, -profile.slopes[order], profile.slopes[order]).tolist()
        self.tokens = np.concatenate([[0], np.cumsum(lengths)]).tolist()
        self.areas = np.concatenate([[0], np.cumsum(profile.areas[order])]).tolist()
        self.at = 0  # tokens handed out
        self.piece = 0

    def left(self) -> int:
        return self.tokens[-1] - self.at

    def area_to(self, position: int) -> int:
        i = self._find(position)
        t = position - self.tokens[i]
        return self.areas[i] + self.first[i] * t + self.slopes[i] * (t * (t - 1) // 2)

    def _find(self, position: int) -> int:
        from bisect import bisect_right

        return min(bisect_right(self.tokens, position, self.piece) - 1, len(self.starts) - 1)

    def take(self, count: int) -> list[tuple[int, int]]:
        runs = []
        while count > 0:
            done = self.at - self.tokens[self.piece]
            start, end = self.starts[self.piece], self.ends[self.piece]
            n = min(count, end - start - done)
            runs.append((end - done - n, end - done) if self.reverse[self.piece] else (start + done, start + done + n))
            self.at += n
            count -= n
            if done + n == end - start:
                self.piece += 1
        return runs


def place_balanced(
    table: SliceTable, *, total_seqlen: int, cp_size: int, chunk_size: int, search_effort: int = 0
) -> Placement:
    """Owner of every token so that areas and token counts are even and few KV rows travel."""
    profile = DensityProfile.from_table(table, total_seqlen)
    mean = float(profile.areas.sum()) / max(total_seqlen, 1)
    profile = profile.cut_at_density(mean)
    lengths = profile.ends - profile.starts
    dense = profile.areas >= mean * lengths
    high = np.flatnonzero(dense)[::-1]
    low = np.flatnonzero(~dense)
    low = low[np.argsort(profile.areas[low] / lengths[low], kind="stable")]
    heavy = _Queue(profile, high, np.ones(len(high), dtype=bool))
    light = _Queue(profile, low, profile.slopes[low] < 0)
    runs: list[tuple[int, int]] = []
    owners: list[int] = []
    area_left = int(profile.areas.sum())
    for rank in range(cp_size):
        tokens = (heavy.left() + light.left()) // (cp_size - rank)
        target = area_left / (cp_size - rank)
        base_h = heavy.area_to(heavy.at) if heavy.left() else 0
        base_l = light.area_to(light.at) if light.left() else 0
        least, most = max(0, tokens - light.left()), min(tokens, heavy.left())
        while least < most:  # the most heavy tokens whose area still fits
            middle = (least + most + 1) // 2
            area = (heavy.area_to(heavy.at + middle) - base_h if middle else 0) + (
                light.area_to(light.at + tokens - middle) - base_l if tokens > middle else 0
            )
            if area <= target:
                least = middle
            else:
                most = middle - 1
        n = least
        area = (heavy.area_to(heavy.at + n) - base_h if n else 0) + (
            light.area_to(light.at + tokens - n) - base_l if tokens > n else 0
        )
        area_left -= area
        for queue, count in ((heavy, n), (light, tokens - n)):
            new = queue.take(count)
            runs += new
            owners += [rank] * len(new)
    if not runs:
        return Placement.from_runs(np.zeros(0, np.int64), np.zeros(0, np.int64), cp_size=cp_size)
    array = np.array(runs)
    order = np.argsort(array[:, 0])
    return Placement.from_runs(array[order, 1], np.array(owners)[order], cp_size=cp_size)
