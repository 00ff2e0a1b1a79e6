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

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from ..placement import Placement, place_contiguous
from ..slices import IntArray, SliceTable
from .components import TokenPool, find_components, join_small
from .density import DensityProfile
from .divide import Allowed
from .even import even_out
from .improve import Holdings, relieve_heaviest, repack
from .measure import kv_rows_received, rank_areas
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
# A unit of search effort: so many times a rank divides what it holds, and about so many milliseconds. The default
# is never more than one.
_UNIT_DIVISIONS, UNIT_MS = 3072, 100.0
# How lean peelings are, in the order in which they are tried.
_LEAN = (0.8, 1.0, 0.0, 0.4)


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
    def limit(self) -> float:
        """Largest area over the mean."""
        alone = self.num_components == 1
        return min(self.area_limit, AREA_LIMIT_ONE_COMPONENT) if alone else self.area_limit

    @property
    def num_components(self) -> int:
        return len(self.components[0])

    @property
    def mean_area(self) -> float:
        return float(self.profile.areas.sum()) / self.cp_size

    def score(self, placement: Placement) -> _Scored:
        """Balance first, then rows, then the worst rank's rows."""
        areas = rank_areas(self.table, placement)
        imbalance = float(areas.max()) / max(float(areas.mean()), 1.0)
        uneven = int(np.ptp(placement.num_tokens)) > max(self.chunk_size, 1)
        excess = max(imbalance - self.limit, 0.0) + (1e6 if uneven else 0.0)
        rows = kv_rows_received(self.table, placement)
        return _Scored((excess, int(rows.sum()), int(rows.max())), imbalance, placement)

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
        pool, slack = TokenPool(self.profile, *self.components), self.limit - 1.0005
        size = {"cp_size": self.cp_size, "chunk_size": self.chunk_size}
        return self.evened(self.score(place_peeled(pool, **size, area_slack=slack, lean=lean)))

    def evened(self, scored: _Scored) -> _Scored:
        """The placement with its heaviest ranks within the limit, where that works."""
        if scored.key[0] <= 0:
            return scored
        area, num_moves = (self.limit - 0.0003) * self.mean_area, 2 * self.cp_size
        if self.num_components == 1:
            return self.score(even_out(scored.placement, self.profile, limit=area, max_exchanges=num_moves))
        return self.score(relieve_heaviest(self._state(scored.placement, area=area), num_rounds=24))

    def repacked(self, starts: list[_Scored], effort: float) -> _Scored:
        """The best of the placements with what pairs of ranks hold divided anew, no less balanced."""
        num_drafts = max(_MOST_DRAFTED // self.cp_size, 1)
        num_rounds = int(effort * _UNIT_DIVISIONS / (num_drafts * self.cp_size)) + 1
        drafts = [starts[i % len(starts)].placement for i in range(num_drafts)]
        # Costs are a guess for most masks, but packed documents.
        return min(map(self.score, repack(self._state(*drafts), num_rounds=num_rounds)), key=_key)

    def _state(self, *drafts: Placement, area: float | None = None) -> Holdings:
        """Drafts to work on, with bounds for every rank's share that they keep, as wide as they may be.

        area: the largest that a rank may come to, if these need not keep it.
        """
        tokens = np.concatenate([draft.num_tokens for draft in drafts])
        least = min(int(tokens.min()), self.total_seqlen // self.cp_size - self.chunk_size // 2)
        least = max(least, int(tokens.max()) - self.chunk_size)
        if area is None:
            largest = max(float(rank_areas(self.table, draft).max()) for draft in dict.fromkeys(drafts))
            area = max(largest, (self.limit - 0.0001) * self.mean_area)
        return Holdings(drafts, self.profile, self.components[0], Allowed(least, least + self.chunk_size, area))


class _Scored(NamedTuple):
    """A placement with what it is judged by: the smallest `key` (excess, rows, most rows of a rank) wins."""

    key: tuple[float, int, int]
    imbalance: float
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
    row_share = min(found, key=_key).key[1] / cp_size
    effort = search_effort or min(row_share * row_ms / UNIT_MS, 1.0)
    num_more = int(effort * _MOST_DRAFTED / cp_size)
    found += [problem.peeled(lean) for lean in _LEAN[1 : 1 + num_more]]
    if (num_more or effort >= 1) and start.key[0] > 0 and start.key[1] < total_seqlen:
        found.append(problem.evened(start))
    if min(found, key=_key).key[0] > 0:
        found.append(problem.score(place_by_density(problem.profile, total_seqlen=total_seqlen, cp_size=cp_size)))
    found.sort(key=_key)
    best = found[0]
    if not best.key[1]:
        return best.placement
    starts = [scored for scored in found if scored.key[0] <= best.key[0]]
    return min(best, problem.repacked(starts, effort), key=_key).placement
