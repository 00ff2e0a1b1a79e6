"""Tiny components handled by the bundle, so that planning does not pay for each of them.

Components that no token outside sees may be laid out in any order. Here the tiny ones are moved to
the end, sparsest first, and joined to bundles; placement works on that layout and its runs are moved
back to where the tokens are.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ..placement import Placement
from ..slices import IntArray
from .density import DensityProfile


@dataclass(frozen=True, slots=True, eq=False)
class BundledLayout:
    """Components in a new order, next to one another, and groups of them that count as one.

    profile: the density in the new order. offsets[i]: new start of the i-th component in the new
    order; homes[i]: its start in the sequence. starts, ends: groups, in the new order.
    """

    profile: DensityProfile = field(repr=False)
    offsets: IntArray = field(repr=False)
    homes: IntArray = field(repr=False)
    starts: IntArray = field(repr=False)
    ends: IntArray = field(repr=False)

    @classmethod
    def make(
        cls, profile: DensityProfile, starts: IntArray, ends: IntArray, *, bundle_size: int
    ) -> BundledLayout:
        """Bundles of less than `bundle_size` tokens out of components of at most half of that.

        starts, ends: components, in order, from token 0 to the last one. O(n log n), all in numpy.
        """
        sizes = ends - starts
        profile = profile.cut(starts)
        owner = np.searchsorted(starts, profile.starts, side="right") - 1
        areas = np.zeros(len(starts), dtype=np.int64)
        np.add.at(areas, owner, profile.areas)
        tiny = 2 * sizes <= bundle_size
        order = np.lexsort((np.where(tiny, areas / sizes, starts), tiny))
        offsets = np.cumsum(sizes[order]) - sizes[order]
        tiny_tokens = np.where(tiny, sizes, 0)[order]
        group = (np.cumsum(tiny_tokens) - tiny_tokens) // max(bundle_size // 2, 1)
        opens = np.append(True, (group[1:] != group[:-1]) | ~tiny[order][:-1])[: len(starts)]
        group_starts = offsets[opens]
        group_ends = np.append(group_starts[1:], sizes.sum())[: len(group_starts)]
        moved = _reordered(profile, owner, order)
        return cls(moved, offsets, starts[order], group_starts, group_ends)

    def placement(self, ends: list[int], owners: list[int], *, cp_size: int) -> Placement:
        """Placement in the sequence from runs in the new order; run i ends at ends[i], any order."""
        run_ends, run_owners = np.array(ends, dtype=np.int64), np.array(owners, dtype=np.int64)
        by_end = np.argsort(run_ends, kind="stable")
        run_ends, run_owners = run_ends[by_end], run_owners[by_end]
        run_starts = np.concatenate([[0], run_ends[:-1]])[: len(run_ends)]
        cuts = np.unique(np.concatenate([self.offsets, run_starts])).astype(np.int64)
        home = np.searchsorted(self.offsets, cuts, side="right") - 1
        lengths = np.diff(cuts, append=run_ends[-1:])
        at = self.homes[home] + cuts - self.offsets[home]
        back = np.argsort(at, kind="stable")
        owner = run_owners[np.searchsorted(run_ends, cuts, side="right")]
        return Placement.from_runs((at + lengths)[back], owner[back], cp_size=cp_size)


def _reordered(profile: DensityProfile, owner: IntArray, order: IntArray) -> DensityProfile:
    """The profile with its pieces in the order of their components."""
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    pieces = np.argsort(place[owner], kind="stable")
    lengths = (profile.ends - profile.starts)[pieces]
    ends = np.cumsum(lengths)
    return DensityProfile(
        ends - lengths, ends, profile.first[pieces], profile.slopes[pieces], profile.areas[pieces]
    )
