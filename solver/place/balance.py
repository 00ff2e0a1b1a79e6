"""Balanced placement: even area and even token counts, and the fewest KV rows that we can find.

Several constructions are tried, each made for one kind of structure and none for a named mask, and
the one that moves the fewest rows among those in balance is taken:

- `place_contiguous`, then evened out: equal pieces in order. Best where neighbours share keys
  (windows) and where nothing else is to be found (random blocks).
- `place_peeled`: long components split from their dense end, short ones kept whole. Best for packed
  documents; on one causal sequence it is the zigzag.
- `place_in_levels`: a share of every density level. Best for prefix trees.
- `place_by_density`: runs of dense and of sparse tokens. In balance for every mask there is.

Where the mask has several components, what pairs of ranks then hold is divided anew: for fewer rows
(`repack`, with which `search_effort` goes on), and so that no rank sends far more than the others
(`relieve_senders`). docs/placement.md tells it at length.

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
from .improve import BUSY_SENDER, relieve_heaviest, relieve_senders, repack
from .measure import kv_rows_received, kv_rows_sent, rank_areas
from .peel import PeelOptions, place_peeled
from .queues import place_by_density, place_in_levels

# Largest area of a rank over the mean that counts as balanced. One component can be cut anywhere, so nothing
# hinders an even cut, and an uneven one saves few rows: with 1.01, a causal sequence would move 1 % less.
AREA_LIMIT = 1.02
AREA_LIMIT_ONE_COMPONENT = 1.004

# Contiguous pieces are evened out only where they start near enough to balance: long packed documents
# do not, and evening them out one exchange at a time would take long and scatter them.
_EVENED_BELOW = 1.5

# With more components than this for each rank, the tiny ones are joined.
_MOST_COMPONENTS_PER_RANK = 16

# Peelings in the order in which they are tried.
_PEELINGS = (
    PeelOptions(0.8, 3.2, 1.0, 0.0, 0.4),
    PeelOptions(1.0, 2.2, 2.0, 0.0, 0.7),
    PeelOptions(1.0, 4.5, 0.7, 2.0, 0.7),
    PeelOptions(0.0, 3.2, 0.7, 0.0, 0.4),
    PeelOptions(0.3, 2.2, 0.7, 2.0, 0.7),
    PeelOptions(0.5, 3.2, 0.5, 0.0, 0.0),
)

# Milliseconds for the search; those for each rank, if that is more; and those for a unit of search effort. Peelings
# get up to 45 %. (Counted as what peelings and rounds take on one core of 2024; never measured.)
_SEARCH_MS, _SEARCH_MS_PER_RANK, _EFFORT_MS = 106.0, 0.22, 25.0
_MOST_ROUNDS = 48


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

    def even_out(self, placement: Placement) -> Placement:
        """The placement with its areas brought under the limit by exchanges."""
        limit = (self.limit - 0.0003) * self.mean_area
        if rank_areas(self.table, placement).max() <= limit:
            return placement
        return even_out(placement, self.profile, limit=limit, max_exchanges=2 * self.cp_size)

    def constructions(self, contiguous: _Scored) -> Iterator[Placement]:
        """The placements that suit this mask's structure, except the one that suits any."""
        if self.limit < contiguous.imbalance < _EVENED_BELOW:
            yield self.even_out(contiguous.placement)
        if self.num_components == 1 and len(self.profile) > 2:
            yield place_in_levels(
                self.profile, total_seqlen=self.total_seqlen, cp_size=self.cp_size, chunk_size=self.chunk_size
            )
        for options in _PEELINGS[: self.effort().peelings]:
            pool = TokenPool(self.profile, *self.components)
            peeled = place_peeled(
                pool,
                cp_size=self.cp_size,
                chunk_size=self.chunk_size,
                area_slack=self.limit - 1.0005,
                options=options,
            )
            yield self.even_out(peeled)

    def effort(self, search_effort: int = 0) -> _Effort:
        """What the search may take, by what a peeling and a round of repacking take."""
        time = max(_SEARCH_MS - 0.15 * self.cp_size, _SEARCH_MS_PER_RANK * self.cp_size)
        peeling = 0.11 * self.cp_size + 0.014 * self.num_components
        a_round = 0.5 + 0.0075 * self.cp_size + 0.0007 * self.num_components
        peelings = 1 if self.num_components == 1 else min(max(int(0.45 * time / peeling), 1), len(_PEELINGS))
        rounds = max(int((time - peelings * peeling) / a_round), 2)
        starts = min(max(rounds // _MOST_ROUNDS, 1), 2)
        return _Effort(peelings, starts, min(rounds, _MOST_ROUNDS) + int(_EFFORT_MS * search_effort / a_round))

    def lightened(self, scored: _Scored) -> _Scored:
        """The placement with its heaviest ranks within the limit, where that works."""
        allowed = self._allowed(scored.placement)._replace(area=(self.limit - 0.0001) * self.mean_area)
        parts = (scored.placement, self.profile, self.components[0], allowed)
        return self.score(relieve_heaviest(*parts, num_divisions=self.cp_size))

    def repacked(self, scored: _Scored, num_rounds: int) -> _Scored:
        """The placement with what pairs of ranks hold divided anew, no less balanced."""
        placement = scored.placement
        allowed = self._allowed(placement)
        return self.score(repack(placement, self.profile, self.components[0], allowed, num_rounds=num_rounds))

    def relieve_senders(self, best: _Scored) -> Placement:
        """The placement, or one whose busiest sender sends clearly less, for hardly more rows in all."""
        placement = best.placement
        _, rows, most_received = best.key
        busiest = int(kv_rows_sent(self.table, placement).max())
        if busiest <= BUSY_SENDER * most_received:
            return placement
        relieved = relieve_senders(
            placement, self.profile, self.components[0], self._allowed(placement), num_pairs=24
        )
        now = kv_rows_received(self.table, relieved)
        fewer = kv_rows_sent(self.table, relieved).max() <= 0.9 * busiest
        return relieved if fewer and now.sum() <= 1.01 * rows and now.max() <= most_received else placement

    def _allowed(self, placement: Placement) -> Allowed:
        """Bounds for every rank's share that the placement keeps, as wide as they may be."""
        largest = float(rank_areas(self.table, placement).max())
        tokens = placement.num_tokens
        least = min(int(tokens.min()), self.total_seqlen // self.cp_size - self.chunk_size // 2)
        least = max(least, int(tokens.max()) - self.chunk_size)
        return Allowed(least, least + self.chunk_size, max(largest, (self.limit - 0.0001) * self.mean_area))


class _Effort(NamedTuple):
    """How much is searched: peelings, the best of them that are repacked, and rounds of it for each."""

    peelings: int
    starts: int
    rounds: int


class _Scored(NamedTuple):
    """A placement with what it is judged by: the smallest `key` (excess, rows, most rows of a rank) wins."""

    key: tuple[float, int, int]
    imbalance: float
    placement: Placement


def place_balanced(
    table: SliceTable,
    *,
    total_seqlen: int,
    cp_size: int,
    chunk_size: int,
    search_effort: int = 0,
    area_limit: float = AREA_LIMIT,
) -> Placement:
    """Owner of every token for self-attention whose queries and keys share the placement.

    Args:
        table: disjoint canonical slices, indices in [0, total_seqlen).
        chunk_size: token counts of any two ranks differ by at most this; at least 1.
        search_effort: further search, in units of about 25 ms; 0 is the fast default. Of use only where
            the mask has several components.
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
    found = [start, *map(problem.score, problem.constructions(start))]
    best = min(found, key=_key)
    if best.key[0] > 0 and problem.num_components > 1:
        best = problem.lightened(best)
        found.append(best)
    if best.key[0] > 0 or problem.num_components == 1:
        even = place_by_density(problem.profile, total_seqlen=total_seqlen, cp_size=cp_size)
        found.append(problem.score(even))
    found.sort(key=_key)
    best = found[0]
    if problem.num_components == 1 or not best.key[1]:
        return best.placement
    effort = problem.effort()
    for scored in found[: effort.starts]:
        best = min(best, problem.repacked(scored, effort.rounds), key=_key)
    if search_effort:
        best = min(best, problem.repacked(found[0], problem.effort(search_effort).rounds), key=_key)
    return problem.relieve_senders(best)


def _key(scored: _Scored) -> tuple[float, int, int]:
    return scored.key
