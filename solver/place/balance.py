"""Balanced placement: even area and even token counts, and the fewest KV rows that we can find.

Several constructions are tried, each made for one kind of structure and none for a named mask, and
the one that moves the fewest rows among those in balance is taken:

- `place_contiguous`, made even: equal pieces in order. Best where neighbours share keys
  (windows), where a component has about a rank's tokens, and where nothing else is to be found (random blocks).
- `place_peeled`: long components split from their dense end, short ones kept whole. Best for packed
  documents; on one causal sequence it is the zigzag.
- `place_in_levels`: a share of every density level. Best for prefix trees.
- `place_by_density`: runs of dense and of sparse tokens. In balance for every mask there is.

Where the mask has several components, what pairs of ranks then hold is divided anew for fewer rows (`repack`), as
long as it pays or `search_effort` says. docs/placement.md tells it at length.

All of it is counted in iterations and computed from shared data, so all ranks get the same answer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np

from ..placement import Placement, place_contiguous
from ..slices import IntArray, SliceTable
from .components import TokenPool, find_components, join_small
from .density import DensityProfile
from .divide import Allowed
from .even import even_out
from .improve import Holdings, relieve_heaviest, repack
from .measure import kv_rows_received
from .peel import place_peeled
from .queues import place_by_density, place_in_levels

# Largest area of a rank over the mean that counts as balanced. One component can be cut anywhere, so nothing
# hinders an even cut, and an uneven one saves few rows: with 1.01, a causal sequence would move 1 % less.
AREA_LIMIT = 1.02
AREA_LIMIT_ONE_COMPONENT = 1.004
# With more components than this for each rank, the tiny ones are joined.
_MOST_COMPONENTS_PER_RANK = 16
# Ranks of all drafts that are divided at once, where ranks are few: that takes hardly longer than one draft.
_MOST_DRAFTED = 64
# How lean peelings are; others than the first are tried where several drafts are worked on.
_LEAN = (0.8, 1.0, 0.0, 0.4)
# A unit of search effort: so many times a rank divides what it holds, and about so many milliseconds. The default
# is never more than one.
_UNIT_DIVISIONS, UNIT_MS = 5120, 100.0


@dataclass(frozen=True, eq=False)
class _Problem:
    """A mask to be placed and what counts as balanced."""

    table: SliceTable = field(repr=False)
    total_seqlen: int
    cp_size: int
    chunk_size: int
    area_limit: float

    @cached_property
    def profile(self) -> DensityProfile:
        return DensityProfile.from_table(self.table, self.total_seqlen)

    @cached_property
    def components(self) -> tuple[IntArray, IntArray]:
        """Starts and ends; where there are many for each rank, tiny ones are joined."""
        found = find_components(self.table, self.total_seqlen)
        many = len(found[0]) > _MOST_COMPONENTS_PER_RANK * self.cp_size
        return join_small(*found, self.chunk_size // 2) if many else found

    @cached_property
    def most_area(self) -> float:
        """Largest area of a rank that counts as balanced."""
        limit = min(self.area_limit, AREA_LIMIT_ONE_COMPONENT) if self.num_components == 1 else self.area_limit
        return limit * (float(self.profile.areas.sum()) / self.cp_size)

    @property
    def num_components(self) -> int:
        return len(self.components[0])

    def score(self, placement: Placement) -> _Scored:
        """Balance first, then rows, then the worst rank's rows."""
        areas = np.diff(self.profile.area_below(placement.ends), prepend=0)
        area = float(np.bincount(placement.owners, areas, self.cp_size).max())
        excess = max(area / max(self.most_area, 1.0), 1.0) - 1.0
        if np.ptp(placement.num_tokens) > max(self.chunk_size, 1):
            excess = math.inf
        rows = kv_rows_received(self.table, placement)
        return _Scored((excess, int(rows.sum()), int(rows.max())), area, placement)

    def of_one_component(self, contiguous: _Scored) -> Iterator[_Scored]:
        """The placements that may suit a mask of one component."""
        size = {"total_seqlen": self.total_seqlen, "cp_size": self.cp_size}
        # Equal pieces in order are made even where ranks receive less than they own, as under a window.
        if contiguous.key[1] < self.total_seqlen:
            yield self.evened(contiguous)
        if len(self.profile) > 2:
            yield self.score(place_in_levels(self.profile, **size, chunk_size=self.chunk_size))
        yield self.peeled(_LEAN[0])
        yield self.score(place_by_density(self.profile, **size))

    def peeled(self, lean: float) -> _Scored:
        """Long components split from their dense end, made even."""
        pool = TokenPool(self.profile, *self.components)
        size = {"cp_size": self.cp_size, "chunk_size": self.chunk_size}
        return self.evened(self.score(place_peeled(pool, **size, most_area=self.most_area, lean=lean)))

    def evened(self, scored: _Scored) -> _Scored:
        """The placement with its heaviest ranks within the limit, where that works."""
        num_moves = 2 * self.cp_size
        if scored.key[0] <= 0:
            return scored
        if self.num_components == 1:
            even = even_out(scored.placement, self.profile, limit=self.most_area, max_exchanges=num_moves)
            return self.score(even)
        return self.score(relieve_heaviest(self._state([scored], self.most_area), num_rounds=num_moves))

    def repacked(self, best: _Scored, contiguous: _Scored, effort: float) -> _Scored:
        """The placement, or another one, with what pairs of ranks hold divided anew, no less balanced."""
        num_drafts = max(_MOST_DRAFTED // self.cp_size, 1)
        num_rounds = max(int(effort * _UNIT_DIVISIONS / (num_drafts * self.cp_size)), 1)
        others = [*(partial(self.peeled, lean) for lean in _LEAN[1:]), partial(self.evened, contiguous)]
        found = [other() for other in others[: int(effort * (num_drafts - 1))]]
        starts = [best, *(other for other in found if other.key[0] <= best.key[0])]
        drafts = [starts[i % len(starts)] for i in range(num_drafts)]
        area = max(self.most_area, *(draft.area for draft in drafts))
        return self.score(repack(self._state(drafts, area), num_rounds=num_rounds))

    def _state(self, drafts: list[_Scored], area: float) -> Holdings:
        """Drafts to work on, with bounds for every rank's tokens that they keep, as wide as they may be."""
        tokens = np.concatenate([draft.placement.num_tokens for draft in drafts])
        least = min(int(tokens.min()), self.total_seqlen // self.cp_size - self.chunk_size // 2)
        least = max(least, int(tokens.max()) - self.chunk_size)
        allowed = Allowed(least, least + self.chunk_size, area)
        return Holdings([draft.placement for draft in drafts], self.profile, self.components[0], allowed)


class _Scored(NamedTuple):
    """A placement, its largest area of a rank, and what it is judged by: the smallest `key` wins.

    key: area over the limit, as a share of it; rows; most rows of a rank.
    """

    key: tuple[float, int, int]
    area: float
    placement: Placement


def _key(scored: _Scored) -> tuple[float, int, int]:
    return scored.key


def place_balanced(
    table: SliceTable,
    *,
    total_seqlen: int,
    cp_size: int,
    chunk_size: int,
    search_effort: int = 0,
    row_ms: float = UNIT_MS,
    area_limit: float = AREA_LIMIT,
) -> Placement:
    """Owner of every token for self-attention whose queries and keys share the placement.

    Args:
        table: disjoint canonical slices, indices in [0, total_seqlen).
        chunk_size: token counts of any two ranks differ by at most this; at least 1.
        search_effort: how long to search, in units of about 100 ms; 0: as long as the rows that it may save are
            worth it, one unit at most. Of use only where the mask has several components.
        row_ms: by which that is decided: what a row received costs, in milliseconds, until a plan is made anew.
        area_limit: largest area over the mean; for one component it is AREA_LIMIT_ONE_COMPONENT if that is less.

    Returns:
        Runs cut at any token, within the area limit unless single tokens are too coarse for it.
    """
    contiguous = place_contiguous(total_seqlen, cp_size)
    if total_seqlen == 0 or cp_size == 1:
        return contiguous
    problem = _Problem(table, total_seqlen, cp_size, chunk_size, area_limit)
    start = problem.score(contiguous)
    if start.key[:2] == (0.0, 0):
        return contiguous
    if problem.num_components == 1:
        return min([start, *problem.of_one_component(start)], key=_key).placement
    found = [start, problem.peeled(_LEAN[0])]
    if min(found, key=_key).key[0] > 0:
        found.append(problem.score(place_by_density(problem.profile, total_seqlen=total_seqlen, cp_size=cp_size)))
    best = min(found, key=_key)
    rows = best.key[1]
    if not rows:
        return best.placement
    effort = search_effort or min(rows / cp_size * row_ms / UNIT_MS, 1.0)
    return min(best, problem.repacked(best, start, effort), key=_key).placement
