"""Balanced placement: even area and even token counts, and the fewest KV rows that we can find.

Several constructions are tried, each made for one kind of structure and none for a named mask, and
the one that moves the fewest rows among those in balance is taken:

- `place_contiguous`: equal pieces in order. Best for windows, where neighbours share keys.
- `place_peeled`: long components split from their dense end, short ones kept whole. Best for packed
  documents; on one causal sequence it is the zigzag.
- `place_in_levels`: a share of every density level. Best for prefix trees.
- `place_by_density`: runs of dense and of sparse tokens. In balance for every mask there is.

All of it is counted in iterations and computed from shared data, so all ranks get the same answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from .balance_metric import kv_rows_received, rank_areas
from .balance_peel import PeelOptions, place_peeled
from .balance_pool import TokenPool, find_components
from .balance_profile import DensityProfile
from .balance_queues import place_by_density, place_in_levels
from .placement import Placement, place_contiguous
from .slices import SliceTable

__all__ = ["AREA_LIMIT", "kv_rows_received", "place_balanced", "rank_areas"]

# Largest area of a rank over the mean that counts as balanced, if any placement keeps it. One
# component can be cut anywhere, so nothing hinders an even cut; whole documents have to be packed.
AREA_LIMIT = 1.02
AREA_LIMIT_ONE_COMPONENT = 1.01

# Peelings tried by default: about this many ranks' worth, so that small groups get more tries.
_RANKS_OF_PEELING = 128
_MOST_PEELINGS = 8


class _Scored(NamedTuple):
    """A placement with what it is judged by; the smallest `key` wins."""

    key: tuple[float, int, int]
    placement: Placement


def place_balanced(
    table: SliceTable, *, total_seqlen: int, cp_size: int, chunk_size: int, search_effort: int = 0
) -> Placement:
    """Owner of every token for self-attention whose queries and keys share the placement.

    Args:
        table: disjoint canonical slices, indices in [0, total_seqlen).
        chunk_size: token counts of any two ranks differ by at most this, at least 1.
        search_effort: further peelings to try, each with other options; 0 is the fast default.

    Returns:
        Runs cut at any token. The largest area is at most AREA_LIMIT times the mean, unless single
        tokens are too coarse for that (a few tokens per rank) or no construction got there.
    """
    if total_seqlen == 0 or cp_size == 1:
        return place_contiguous(total_seqlen, cp_size)
    one_component = len(find_components(table, total_seqlen)[0]) == 1
    limit = AREA_LIMIT_ONE_COMPONENT if one_component else AREA_LIMIT
    profile = DensityProfile.from_table(table, total_seqlen)
    best = _score(table, place_contiguous(total_seqlen, cp_size), chunk_size, limit)
    candidates = _candidates(table, profile, total_seqlen, cp_size, chunk_size, search_effort, limit)
    for placement in candidates:
        best = min(best, _score(table, placement, chunk_size, limit), key=lambda scored: scored.key)
    if best.key[0] > 0 or one_component or search_effort:
        placement = place_by_density(profile, total_seqlen=total_seqlen, cp_size=cp_size)
        best = min(best, _score(table, placement, chunk_size, limit), key=lambda scored: scored.key)
    return best.placement


def _score(table: SliceTable, placement: Placement, chunk_size: int, limit: float) -> _Scored:
    """Balance first, then rows, then the worst rank's rows."""
    areas = rank_areas(table, placement)
    imbalance = float(areas.max()) / max(float(areas.mean()), 1.0)
    spread = int(np.ptp(placement.num_tokens))
    excess = max(imbalance - limit, 0.0) + (1e6 if spread > max(chunk_size, 1) else 0.0)
    rows = kv_rows_received(table, placement)
    return _Scored((excess, int(rows.sum()), int(rows.max())), placement)


def _candidates(
    table: SliceTable,
    profile: DensityProfile,
    total_seqlen: int,
    cp_size: int,
    chunk_size: int,
    search_effort: int,
    limit: float,
) -> Iterator[Placement]:
    one_component = limit == AREA_LIMIT_ONE_COMPONENT
    if one_component and len(profile) > 2:
        yield place_in_levels(profile, total_seqlen=total_seqlen, cp_size=cp_size, chunk_size=chunk_size)
    tries = 1 if one_component else min(max(_RANKS_OF_PEELING // cp_size, 1), _MOST_PEELINGS)
    for options in _peel_options(tries + search_effort, limit - 1.0):
        pool = TokenPool(table, profile, total_seqlen)
        yield place_peeled(
            pool, total_seqlen=total_seqlen, cp_size=cp_size, chunk_size=chunk_size, options=options
        )


def _peel_options(count: int, area_slack: float) -> Iterator[PeelOptions]:
    """The first `count` of a fixed sequence of options, the generally best ones first."""
    slack = area_slack - 0.0005
    first = (
        PeelOptions(slack, lean=0.8, own_bias=0.0),
        PeelOptions(slack, lean=0.3, run_ahead=4.5, gap_price=0.7),
        PeelOptions(slack - 0.001, lean=0.5, run_ahead=4.5, own_bias=0.0),
        PeelOptions(slack, lean=0.0, run_ahead=2.2, gap_price=2.0, own_bias=0.0),
    )
    yield from first[:count]
    rng = np.random.default_rng(0)
    for _ in range(count - len(first)):
        a, b, c, d, e = rng.random(5).tolist()
        yield PeelOptions(slack - 0.002 * a, b, 2.0 + 3.0 * c, 0.5 * 4.0**d, own_bias=0.0 if e < 0.5 else 4.0 * e - 1.0)
