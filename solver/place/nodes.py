"""Placement for networks of two levels: first over nodes, then over the ranks of each node.

Between nodes a row travels once for each node that needs it, over a slow link; inside, links are several times
faster. So nodes are balanced and filled like ranks of one level, which keeps whole documents in a node that would
be too long for a rank: of packed documents hardly a row leaves its node. Inside, every rank takes runs of
dense and of sparse tokens from all over its node's share. That is even, and it spreads the keys that many nodes
need, the beginnings of long documents, over the ranks that send them.

Rows inside nodes grow with the number of runs, and the busiest sender between nodes shrinks: how many are best
depends on the links, so there are several placements to choose from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from ..placement import Placement, place_contiguous
from ..slices import SliceTable, distinct
from .balance import AREA_LIMIT, AREA_LIMIT_ONE_COMPONENT, UNIT_MS, place_balanced
from .density import DensityProfile
from .measure import rank_areas
from .queues import place_by_density

# Dense and sparse runs of each rank.
_RUNS = (1, 2, 4)


def place_on_nodes(
    table: SliceTable,
    *,
    total_seqlen: int,
    cp_size: int,
    chunk_size: int,
    ranks_per_node: int | None,
    search_effort: int = 0,
    row_ms: float = UNIT_MS,
) -> Iterator[Placement]:
    """Placements for self-attention on nodes of `ranks_per_node` ranks, those of the fewest runs first.

    Args:
        table: disjoint canonical slices, indices in [0, total_seqlen).
        ranks_per_node: None, 1, or one that does not divide cp_size into several nodes: there is no placement.
        chunk_size: token counts of any two ranks differ by at most this. With less than 3 there is none.
        search_effort, row_ms: of the placement over nodes, as in `place_balanced`.

    Yields:
        Placements whose largest area is at most about AREA_LIMIT times the mean.
    """
    if ranks_per_node is None or not 1 < ranks_per_node < cp_size or cp_size % ranks_per_node:
        return
    runs = [count for count in _RUNS if 2 * count < chunk_size]
    if not runs or not total_seqlen:
        return
    nodes = place_balanced(
        table,
        total_seqlen=total_seqlen,
        cp_size=cp_size // ranks_per_node,
        # A rank's tokens are off the mean of its node by its number of runs at most.
        chunk_size=ranks_per_node * (chunk_size - 2 * runs[-1]),
        search_effort=search_effort,
        row_ms=row_ms,
        # Inside, a node's share can be cut anywhere.
        area_limit=AREA_LIMIT / AREA_LIMIT_ONE_COMPONENT,
    )
    profile = DensityProfile.from_table(table, total_seqlen).cut(nodes.starts)

    def dealt(share: DensityProfile, num_tokens: int, *, count: int) -> Placement:
        fine = place_by_density(share, total_seqlen=num_tokens, cp_size=count * ranks_per_node)
        return Placement.from_runs(fine.ends, fine.owners % ranks_per_node, cp_size=ranks_per_node)

    # Equal pieces in order suit windows, and are balanced for few other masks.
    in_order = _divided(nodes, profile, ranks_per_node, lambda _, count: place_contiguous(count, ranks_per_node))
    areas = rank_areas(table, in_order)
    if areas.max() <= AREA_LIMIT * areas.mean():
        yield in_order
    for count in runs:
        yield _divided(nodes, profile, ranks_per_node, partial(dealt, count=count))


def _divided(
    nodes: Placement,
    profile: DensityProfile,
    ranks_per_node: int,
    place: Callable[[DensityProfile, int], Placement],
) -> Placement:
    """Every node's tokens divided by `place`, which sees them as one sequence.

    Args:
        profile: of the whole sequence, cut where the nodes' runs begin.
    """
    owners_of_pieces = nodes.owner_of(profile.starts)
    all_ends, all_owners = [], []
    for node in np.flatnonzero(nodes.num_tokens).tolist():
        mine = owners_of_pieces == node
        starts = profile.starts[mine]
        ends = np.cumsum(profile.ends[mine] - starts)
        begins = np.append(0, ends[:-1])
        share = DensityProfile(begins, ends, profile.first[mine], profile.slopes[mine], profile.areas[mine])
        placement = place(share, int(ends[-1]))
        cuts = distinct(np.concatenate([placement.ends, ends]))
        piece = np.searchsorted(ends, cuts - 1, side="right")
        all_ends.append(starts[piece] + cuts - begins[piece])
        all_owners.append(node * ranks_per_node + placement.owner_of(cuts - 1))
    ends, owners = np.concatenate(all_ends), np.concatenate(all_owners)
    order = np.argsort(ends)
    return Placement.from_runs(ends[order], owners[order], cp_size=nodes.cp_size * ranks_per_node)
