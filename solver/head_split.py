"""Head sharding: a block of ranks shares the rows of one context rank, and each takes some of the heads.

A group of C * U ranks is C context ranks of U ranks each: rank r is part r % U of context rank r // U. The plan is made
for the C context ranks. Outside attention part u owns the u-th of U nearly equal pieces of its context rank's rows;
inside, the block exchanges rows for heads, and part u computes all rows of the context rank for its heads.
Source: DeepSpeed-Ulysses (arXiv:2309.14509) for the exchange; here heads need not divide by U, nor by its key heads.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from .cost import Hardware, Heads
from .placement import Placement
from .plan import Exchange, RankPlan
from .slices import expand_counts

# Parts are cut between whole runs of query heads that share a key head, as long as the largest part grows by no more.
_UNEVEN = 1.125


class HeadPart(NamedTuple):
    """Heads of one part of a block.

    first, last: its query heads, [first, last).
    kv: its key heads in order; each serves (last - first) / len(kv) of its query heads, the next ones in order. A key
        head occurs more than once where the part cuts runs of unequal length out of the groups.
    """

    first: int
    last: int
    kv: tuple[int, ...]

    @property
    def num_q(self) -> int:
        return self.last - self.first


def split_heads(num_heads_q: int, num_heads_kv: int, head_degree: int) -> tuple[HeadPart, ...]:
    """Contiguous parts of the query heads, as even as can be, and the key heads that each needs.

    >>> split_heads(5, 1, 2)
    (HeadPart(first=0, last=2, kv=(0,)), HeadPart(first=2, last=5, kv=(0,)))

    Three groups of two on two parts: a part's groups are cut into runs of 2 and 1, so its key heads are repeated.

    >>> [part.kv for part in split_heads(6, 3, 2)]
    [(0, 0, 1), (1, 2, 2)]

    Raises:
        ValueError: there are fewer query heads than parts.
    """
    if head_degree > num_heads_q:
        raise ValueError(
            f"head_degree is {head_degree} and num_heads_q is {num_heads_q}: a rank would be left without a head; "
            f"use a head_degree of at most {num_heads_q}"
        )
    group = num_heads_q // num_heads_kv
    unit = max(unit for unit in range(1, group + 1) if group % unit == 0 and _fits(num_heads_q, unit, head_degree))
    ends = [num_heads_q // unit * part // head_degree * unit for part in range(head_degree + 1)]
    return tuple(_part(first, last, group) for first, last in itertools.pairwise(ends))


def _fits(num_heads_q: int, unit: int, head_degree: int) -> bool:
    """Whether parts of whole units are nearly as even as parts of single heads."""
    units = num_heads_q // unit
    return units >= head_degree and -(-units // head_degree) * unit <= _UNEVEN * -(-num_heads_q // head_degree)


def _part(first: int, last: int, group: int) -> HeadPart:
    runs = np.unique(np.arange(first, last) // group, return_counts=True)[1]
    step = math.gcd(*runs.tolist())
    return HeadPart(first, last, tuple(head // group for head in range(first, last, step)))


def head_exchange_bytes(placements: tuple[Placement, Placement], parts: tuple[HeadPart, ...], heads: Heads) -> int:
    """Bytes that the busiest rank sends (or receives, if more) in the head exchanges of one pass.

    Forward sends q, k and v and brings out home; backward is its mirror: dout, then dq, dk and dv.

    Args:
        placements: of query and of key rows over the context ranks.
        parts: heads of each part of a block. heads: all of them.
    """
    degree = len(parts)
    rows_q, rows_k = (float(-(-placement.num_tokens.max() // degree)) for placement in placements)
    dims_kv = heads.head_dim + heads.head_dim_v
    elements = []
    for part in parts:
        others_q, others_kv = heads.num_q - part.num_q, sum(len(other.kv) for other in parts) - len(part.kv)
        mine_q, mine_kv = (degree - 1) * part.num_q, (degree - 1) * len(part.kv)
        sent = rows_q * (others_q * heads.head_dim + mine_q * heads.head_dim_v) + rows_k * others_kv * dims_kv
        received = rows_q * (mine_q * heads.head_dim + others_q * heads.head_dim_v) + rows_k * mine_kv * dims_kv
        elements.append(max(sent, received))
    return int(max(elements)) * heads.itemsize


def head_exchange_seconds(
    placements: tuple[Placement, Placement], parts: tuple[HeadPart, ...], heads: Heads, hardware: Hardware
) -> float:
    """Predicted seconds of the head exchanges of both passes; nothing hides them.

    A pass has two exchanges, one after the other, and rows are packed and unpacked. Blocks are consecutive ranks.
    """
    degree, near = len(parts), hardware.ranks_per_node
    if degree == 1:
        return 0.0
    moved = float(head_exchange_bytes(placements, parts, heads))
    far = moved * max(degree - near, 0) / (degree - 1)
    times = []
    for link, num_bytes in ((hardware.within, moved - far), (hardware.across, far)):
        if num_bytes > 0:
            times.append(2 * link.latency_s + num_bytes / link.bytes_per_s)
    return 2 * (max(times, default=0.0) + 2 * moved / hardware.copy_bytes_per_s)


def split_rows(placement: Placement, head_degree: int) -> Placement:
    """Who owns which token outside attention: each rank's rows in head_degree pieces of nearly equal length."""
    if head_degree == 1:
        return placement
    # A run is cut wherever a piece of its owner's rows ends inside it.
    counts = placement.num_tokens[:, None] * np.arange(1, head_degree + 1) // head_degree
    piece_ends = counts[placement.owners]
    first_row = placement.local_starts
    last_row = first_row + placement.ends - placement.starts
    first = (piece_ends <= first_row[:, None]).sum(1)
    last = (piece_ends < last_row[:, None]).sum(1)
    run, nth = expand_counts(last - first + 1)
    piece = first[run] + nth
    ends = placement.starts[run] + np.minimum(piece_ends[run, piece], last_row[run]) - first_row[run]
    owners = placement.owners[run] * head_degree + piece
    return Placement.from_runs(ends, owners, cp_size=placement.cp_size * head_degree)


def spread_rank_plan(rank_plan: RankPlan, head_degree: int, part: int) -> RankPlan:
    """A context rank's plan as one of its parts runs it in the whole group: its peers are the same part elsewhere."""

    def spread(exchange: Exchange) -> Exchange:
        return replace(
            exchange,
            send_splits=_spread(exchange.send_splits, head_degree, part),
            recv_splits=_spread(exchange.recv_splits, head_degree, part),
        )

    stages = tuple(replace(stage, kv=tuple(map(spread, stage.kv))) for stage in rank_plan.stages)
    return replace(
        rank_plan,
        rank=rank_plan.rank * head_degree + part,
        cp_size=rank_plan.cp_size * head_degree,
        queries=tuple(map(spread, rank_plan.queries)),
        stages=stages,
    )


def _spread(splits: tuple[int, ...], head_degree: int, part: int) -> tuple[int, ...]:
    spread = [0] * (len(splits) * head_degree)
    spread[part::head_degree] = splits
    return tuple(spread)


def context_ranks_per_node(ranks_per_node: int | None, head_degree: int) -> int | None:
    """Context ranks that share a node; 1 where a block spans nodes; None is a network of one level.

    Raises:
        ValueError: some blocks would lie in one node and some in two.
    """
    if ranks_per_node is None or ranks_per_node % head_degree == 0:
        return None if ranks_per_node is None else ranks_per_node // head_degree
    if head_degree % ranks_per_node:
        raise ValueError(
            f"head_degree is {head_degree} and ranks_per_node is {ranks_per_node}: one must divide the other, so that "
            f"the ranks which share heads lie alike in the nodes"
        )
    return 1
