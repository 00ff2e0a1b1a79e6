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
(`relieve_senders`).

All of it is counted in iterations and computed from shared data, so all ranks get the same answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ..placement import Placement, place_contiguous
from ..slices import IntArray, SliceTable
from .components import TokenPool, find_components
from .density import DensityProfile
from .divide import Allowed
from .measure import kv_rows_received, kv_rows_sent, rank_areas
from .peel import PeelOptions, place_peeled
from .queues import place_by_density, place_in_levels
from .relief import BUSY_SENDER, relieve_senders
from .repack import repack
from .repair import even_out

__all__ = ["AREA_LIMIT", "kv_rows_received", "place_balanced", "rank_areas"]

# Largest area of a rank over the mean that counts as balanced. One component can be cut anywhere, so nothing
# hinders an even cut, and an uneven one saves few rows: with 1.01, a causal sequence would move 1 % less.
AREA_LIMIT = 1.02
AREA_LIMIT_ONE_COMPONENT = 1.004

# Peelings tried by default: as many as take about 40 ms, or 0.25 ms for each rank if that is more.
# In units of 0.11 ms a peeling costs one for each rank and 1/8 for each component.
_PEELING_BUDGET = 360
_PEELING_BUDGET_PER_RANK = 2.2
_COST_OF_COMPONENT = 0.125
_MOST_PEELINGS = 24

# Milliseconds for repacking by default: so many, less what more ranks take for peeling, at least so many for each
# rank; and for each unit of search effort.
_REPACKING = 69.0
_PEELING_PER_RANK = 0.19
_LEAST_REPACKING_PER_RANK = 0.05
_REPACKING_PER_EFFORT = 25.0
# What one round of it takes: at least, for each rank, and for each component.
_MS_PER_ROUND = 0.5
_MS_PER_RANK = 0.0075
_MS_PER_COMPONENT = 0.0007
_FEWEST_ROUNDS = 2
_MOST_ROUNDS = 48  # by default
# Pairs divided anew to relieve senders; what has to be left of the busiest at most, and rows over those before.
_RELIEVED_PAIRS = 24
_WORTH_RELIEVING = 0.9
_ROWS_FOR_RELIEF = 1.01

# With more components than this for each rank, the tiny ones are bundled.
_MOST_COMPONENTS_PER_RANK = 16

# Contiguous pieces are evened out only where they start near enough to balance: packed documents
# do not, and evening them out one exchange at a time would take long and scatter them. Nor do masks of
# more components than ranks need it.
_EVENED_BELOW = 1.5


@dataclass(frozen=True, slots=True, eq=False)
class _Problem:
    """A mask to be placed and what counts as balanced."""

    table: SliceTable = field(repr=False)
    profile: DensityProfile = field(repr=False)
    total_seqlen: int
    cp_size: int
    chunk_size: int
    components: IntArray = field(repr=False)
    limit: float  # largest area over the mean

    @property
    def num_components(self) -> int:
        return len(self.components)

    def even_out(self, placement: Placement) -> Placement:
        """The placement with its areas brought under the limit by exchanges."""
        mean = float(self.profile.areas.sum()) / self.cp_size
        limit = (self.limit - 0.0003) * mean
        if rank_areas(self.table, placement).max() <= limit:
            return placement
        return even_out(placement, self.profile, limit=limit, max_exchanges=2 * self.cp_size)

    def repack(self, placement: Placement, search_effort: int) -> Placement:
        """The placement with what pairs of ranks hold divided anew, no less balanced."""
        time = max(_REPACKING - _PEELING_PER_RANK * self.cp_size, _LEAST_REPACKING_PER_RANK * self.cp_size)
        per_round = _MS_PER_ROUND + _MS_PER_RANK * self.cp_size + _MS_PER_COMPONENT * self.num_components
        rounds = min(max(int(time / per_round), _FEWEST_ROUNDS), _MOST_ROUNDS)
        rounds += int(_REPACKING_PER_EFFORT * search_effort / per_round)
        return repack(placement, self.profile, self.components, self._allowed(placement), num_rounds=rounds)

    def relieve_senders(self, placement: Placement) -> Placement:
        """The placement, or one whose busiest sender sends clearly less, for hardly more rows in all."""
        received = kv_rows_received(self.table, placement)
        sent = kv_rows_sent(self.table, placement)
        busiest = int(sent.max())
        if busiest <= BUSY_SENDER * received.max():
            return placement
        allowed = self._allowed(placement)
        relieved = relieve_senders(
            placement, self.profile, self.components, allowed, sent=sent, num_pairs=_RELIEVED_PAIRS
        )
        now = kv_rows_received(self.table, relieved)
        fewer = kv_rows_sent(self.table, relieved).max() <= _WORTH_RELIEVING * busiest
        if fewer and now.sum() <= _ROWS_FOR_RELIEF * received.sum() and now.max() <= received.max():
            return relieved
        return placement

    def _allowed(self, placement: Placement) -> Allowed:
        """Bounds for every rank's share that the placement keeps, as wide as they may be."""
        mean = float(self.profile.areas.sum()) / self.cp_size
        largest = float(rank_areas(self.table, placement).max())
        tokens = placement.num_tokens
        least = min(int(tokens.min()), self.total_seqlen // self.cp_size - self.chunk_size // 2)
        least = max(least, int(tokens.max()) - self.chunk_size)
        return Allowed(least, least + self.chunk_size, max(largest, (self.limit - 0.0001) * mean))


class _Scored(NamedTuple):
    """A placement with what it is judged by: the smallest `key` wins."""

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
    if total_seqlen == 0 or cp_size == 1:
        return place_contiguous(total_seqlen, cp_size)
    components = find_components(table, total_seqlen)[0]
    problem = _Problem(
        table,
        DensityProfile.from_table(table, total_seqlen),
        total_seqlen,
        cp_size,
        chunk_size,
        components,
        limit=min(area_limit, AREA_LIMIT_ONE_COMPONENT) if len(components) == 1 else area_limit,
    )
    contiguous = best = _score(problem, place_contiguous(total_seqlen, cp_size))
    for placement in _constructions(problem, contiguous):
        best = _better(best, _score(problem, placement))
    if best.key[0] > 0 or problem.num_components == 1:
        even = place_by_density(problem.profile, total_seqlen=total_seqlen, cp_size=cp_size)
        best = _better(best, _score(problem, even))
    if problem.num_components > 1 and best.key[1] > 0:
        peeled = best.placement
        for effort in sorted({0, search_effort}):
            best = _better(best, _score(problem, problem.repack(peeled, effort)))
        return problem.relieve_senders(best.placement)
    return best.placement


def _better(a: _Scored, b: _Scored) -> _Scored:
    return b if b.key < a.key else a


def _score(problem: _Problem, placement: Placement) -> _Scored:
    """Balance first, then rows, then the worst rank's rows."""
    areas = rank_areas(problem.table, placement)
    imbalance = float(areas.max()) / max(float(areas.mean()), 1.0)
    uneven = int(np.ptp(placement.num_tokens)) > max(problem.chunk_size, 1)
    excess = max(imbalance - problem.limit, 0.0) + (1e6 if uneven else 0.0)
    rows = kv_rows_received(problem.table, placement)
    return _Scored((excess, int(rows.sum()), int(rows.max())), imbalance, placement)


def _constructions(problem: _Problem, contiguous: _Scored) -> Iterator[Placement]:
    """The placements that suit this mask's structure, except the one that suits any."""
    size = {"total_seqlen": problem.total_seqlen, "cp_size": problem.cp_size}
    few = problem.num_components <= problem.cp_size
    if few and problem.limit < contiguous.imbalance < _EVENED_BELOW:
        yield problem.even_out(contiguous.placement)
    one_component = problem.num_components == 1
    if one_component and len(problem.profile) > 2:
        yield place_in_levels(problem.profile, **size, chunk_size=problem.chunk_size)
    budget = max(_PEELING_BUDGET, _PEELING_BUDGET_PER_RANK * problem.cp_size)
    cost = problem.cp_size + _COST_OF_COMPONENT * problem.num_components
    tries = 1 if one_component else min(max(int(budget / cost), 1), _MOST_PEELINGS)
    many = problem.num_components > _MOST_COMPONENTS_PER_RANK * problem.cp_size
    bundle_size = problem.chunk_size // 2 if many else 0
    for options in _peel_options(tries, problem.limit - 1.0):
        pool = TokenPool(problem.table, problem.profile, problem.total_seqlen, bundle_size=bundle_size)
        peeled = place_peeled(pool, **size, chunk_size=problem.chunk_size, options=options)
        yield problem.even_out(peeled)


def _peel_options(count: int, area_slack: float) -> Iterator[PeelOptions]:
    """The first `count` of a fixed sequence of options, the generally best ones first."""
    slack = area_slack - 0.0005
    first = (
        PeelOptions(slack, 0.8, 3.2, 1.0, 0.0, tops_from=0.5, tops_spend=0.4),
        PeelOptions(slack - 0.001, 1.0, 2.2, 2.0, 0.0, tops_from=0.5, tops_spend=0.7),
        PeelOptions(slack, 1.0, 4.5, 0.7, 2.0, tops_from=0.5, tops_spend=0.7),
        PeelOptions(slack, 1.0, 3.2, 1.0, 0.0, tops_from=0.5, tops_spend=0.0),
        PeelOptions(slack - 0.001, 1.0, 4.5, 0.5, 0.0, tops_from=0.5, tops_spend=0.0),
        PeelOptions(slack - 0.001, 0.0, 3.2, 0.7, 0.0, tops_from=0.46, tops_spend=0.4),
        PeelOptions(slack, 0.3, 2.2, 0.7, 2.0, tops_from=0.5, tops_spend=0.7),
        PeelOptions(slack, 0.8, 3.2, 1.0, 0.0, tops_from=0.9, tops_spend=0.8),
    )
    yield from first[:count]
    rng = np.random.default_rng(0)
    for _ in range(count - len(first)):
        a, b, c, d, e, f, g = rng.random(7).tolist()
        own_bias = 0.0 if e < 0.3 else 4.0 * e - 1.0
        spend = 0.0 if g < 0.4 else g
        yield PeelOptions(slack - 0.002 * a, b, 2.0 + 3.0 * c, 0.5 * 4.0**d, own_bias, 0.45 + 0.2 * f, spend)
