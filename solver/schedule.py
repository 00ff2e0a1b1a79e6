"""Schedules in which queries travel too: which rank computes which tile of queries x keys.

If only keys and values travel, a long causal sequence brings nearly all of them to every rank:
O(S) rows a rank, however many ranks there are. A rank that computes a tile of x queries by y keys
needs x + y rows for x * y pairs, so with x and y in proportion traffic falls to O(S / sqrt(P)).

Bound: a rank with area A = x * y pays at least q_cost * x + k_cost * y >= 2 * sqrt(q_cost * k_cost * A),
less what it owns (S / P tokens, each worth at most q_cost + k_cost).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .placement import Placement
from .routes import Intervals, merge_intervals, tokens_needed
from .slices import IntArray, SliceTable, expand_counts, pairs_in_rows


class Schedule(NamedTuple):
    """Disjoint tasks, and the rank that computes each."""

    tasks: SliceTable
    task_ranks: IntArray


def bisect_tasks(table: SliceTable, cp_size: int, *, q_cost: float, k_cost: float) -> Schedule:
    """Tiles of equal area for each rank, by recursive bisection of the mask.

    Every part is cut in two along queries or along keys, where its area divides as its ranks do, in
    the direction in which less has to be duplicated: a cut along queries makes both halves fetch
    the keys that they share, a cut along keys the queries. Any mask; all parts of a level at once.

    Args:
        table: disjoint canonical slices.
        cp_size: number of ranks.
        q_cost, k_cost: what a query row and a key row cost to move, in the same unit.
    """
    tasks, node = table, np.zeros(len(table), dtype=np.int64)
    first_rank, num_ranks = np.zeros(1, dtype=np.int64), np.array([cp_size])
    while (num_ranks > 1).any():
        left_ranks = num_ranks // 2
        by_q = _halves(tasks, node, left_ranks / num_ranks)
        by_k = _halves(tasks.transpose(), node, left_ranks / num_ranks)
        shared_q, shared_k = _duplicated(by_q, len(num_ranks)), _duplicated(by_k, len(num_ranks))
        along_q = k_cost * shared_q <= q_cost * shared_k
        q_half, k_half = along_q[by_q.node], ~along_q[by_k.node]
        tasks = SliceTable.concat([by_q.table.take(q_half), by_k.table.take(k_half).transpose()])
        node = np.concatenate([by_q.child()[q_half], by_k.child()[k_half]])
        first_rank = np.stack([first_rank, first_rank + left_ranks], axis=-1).ravel()
        num_ranks = np.stack([left_ranks, num_ranks - left_ranks], axis=-1).ravel()
        # A part of one rank has an empty left half: drop it, and renumber.
        alive = num_ranks > 0
        node = (np.cumsum(alive) - 1)[node]
        first_rank, num_ranks = first_rank[alive], num_ranks[alive]
    order = np.lexsort((tasks.k0, tasks.q0, first_rank[node]))
    return Schedule(tasks.take(order), first_rank[node][order])


class _Halves(NamedTuple):
    """Slices cut in two: the node of each and whether it is right of the cut."""

    table: SliceTable
    node: IntArray
    right: IntArray

    def child(self) -> IntArray:
        return 2 * self.node + self.right


def _halves(table: SliceTable, node: IntArray, left_share: np.ndarray) -> _Halves:
    """Each node's slices, cut along queries where the area left of the cut is its left share."""
    cut = _area_cuts(table, node, left_share)[node]
    data = np.concatenate([table.data, table.data])
    n = len(table)
    data[:n, 1] = np.minimum(data[:n, 1], cut)
    data[n:, 0] = np.maximum(data[n:, 0], cut)
    halves, parent = SliceTable(data).canonical()
    return _Halves(halves, node[parent % n], (parent >= n).astype(np.int64))


def _area_cuts(table: SliceTable, node: IntArray, left_share: np.ndarray) -> IntArray:
    """For each node the query index c whose area below is nearest to the share; all by bisection."""
    num_nodes = len(left_share)
    total = np.bincount(node, table.areas(), num_nodes)
    target = total * left_share
    low = np.full(num_nodes, np.iinfo(np.int64).max)
    high = np.zeros(num_nodes, dtype=np.int64)
    np.minimum.at(low, node, table.q0)
    np.maximum.at(high, node, table.q1)
    low = np.minimum(low, high)
    # A node of one rank has share 0: its cut stays at its first row.
    high = np.where(left_share > 0, high, low)
    at_low, at_high = np.zeros(num_nodes), total.astype(np.float64)
    while (high - low > 1).any():
        # Areas grow about linearly between close rows: aim by interpolation, but not near the ends.
        span = np.maximum(at_high - at_low, 1.0)
        aim = np.clip((target - at_low) / span, 0.1, 0.9)
        middle = np.clip(low + (aim * (high - low)).astype(np.int64), low, high)
        middle = np.where(high - low > 1, np.clip(middle, low + 1, high - 1), low)
        area = np.bincount(node, pairs_in_rows(table, middle[node]), num_nodes)
        below = area <= target
        low, at_low = np.where(below, middle, low), np.where(below, area, at_low)
        high, at_high = np.where(below, high, middle), np.where(below, at_high, area)
    nearest = np.where(target - at_low <= at_high - target, low, high)
    return np.where(left_share > 0, nearest, low)


def _duplicated(halves: _Halves, num_nodes: int) -> np.ndarray:
    """Key rows that both halves of a node need, for each node."""
    union = merge_intervals(halves.child(), halves.table.k0, halves.table.k1)
    both = np.bincount(union.ranks // 2, union.ends - union.starts, num_nodes)
    once = merge_intervals(halves.node, halves.table.k0, halves.table.k1)
    return both - np.bincount(once.ranks, once.ends - once.starts, num_nodes)


def place_for_schedule(
    schedule: Schedule, *, total_seqlen: int, cp_size: int, q_cost: float, k_cost: float
) -> Placement:
    """Equal tokens for each rank (within one), each where it saves most of the schedule's traffic.

    A token costs nothing to move to its owner: the owner saves q_cost if it computes with the
    token's query and k_cost if it computes with its key. Tokens are dealt out in rounds, first to
    ranks that use both, then the dearer one alone, then the other, then anyone with room; within a
    round, an interval's tokens are shared evenly among its users with room.
    """
    queries, keys = tokens_needed(schedule.tasks, schedule.task_ranks)
    cuts = np.unique(np.concatenate([[0, total_seqlen], *queries[1:], *keys[1:]]))
    q_pairs, k_pairs = _uses(queries, cuts, cp_size), _uses(keys, cuts, cp_size)
    both = np.intersect1d(q_pairs, k_pairs, assume_unique=True)
    dearer, other = (q_pairs, k_pairs) if q_cost >= k_cost else (k_pairs, q_pairs)
    left = np.diff(cuts)
    room = np.diff(np.arange(cp_size + 1) * total_seqlen // cp_size)
    dealt: list[tuple[IntArray, IntArray, IntArray]] = []
    for pairs in (both, dearer, other):
        interval, rank = pairs // cp_size, pairs % cp_size
        for _ in range(8):
            given = _deal(interval, rank, left, room)
            if not given.any():
                break
            left = left - np.bincount(interval, given, len(left)).astype(np.int64)
            room = room - np.bincount(rank, given, cp_size).astype(np.int64)
            some = given > 0
            dealt.append((interval[some], rank[some], given[some]))
    dealt.append(_fill(left, room))
    interval, rank, given = (np.concatenate(column) for column in zip(*dealt, strict=True))
    order = np.lexsort((rank, interval))
    return Placement.from_runs(np.cumsum(given[order]), rank[order], cp_size=cp_size)


def _uses(needed: Intervals, cuts: IntArray, cp_size: int) -> IntArray:
    """Pairs interval * cp_size + rank, sorted: which elementary intervals each rank needs."""
    first = np.searchsorted(cuts, needed.starts)
    last = np.searchsorted(cuts, needed.ends)
    owner, nth = expand_counts(last - first)
    return np.sort((first[owner] + nth) * cp_size + needed.ranks[owner])


def _deal(interval: IntArray, rank: IntArray, left: IntArray, room: IntArray) -> IntArray:
    """Tokens given for each (interval, rank) pair: offered evenly, accepted as far as room goes."""
    users = np.bincount(interval, room[rank] > 0, len(left))
    open_ = (room[rank] > 0) & (left[interval] > 0)
    offer = np.where(open_, -(-left[interval] // np.maximum(users[interval], 1).astype(np.int64)), 0)
    # An interval never gives more than it has, a rank never takes more than its room: cap the
    # running sums along each.
    offer = _cap_running(interval, offer, left)
    by_rank = np.argsort(rank, kind="stable")
    offer[by_rank] = _cap_running(rank[by_rank], offer[by_rank], room)
    return offer


def _cap_running(group: IntArray, amount: IntArray, limit: IntArray) -> IntArray:
    """Amounts (sorted by group) cut so that the running sum within a group stays within its limit."""
    if not len(group):
        return amount
    ends = np.cumsum(amount)
    first = np.searchsorted(group, group)
    before = ends - amount
    within = before - before[first]
    return np.clip(limit[group] - within, 0, amount)


def _fill(left: IntArray, room: IntArray) -> tuple[IntArray, IntArray, IntArray]:
    """The tokens that are left, in order, into the room that is left, in order."""
    tokens, places = np.cumsum(left), np.cumsum(room)
    ends = np.unique(np.concatenate([tokens, places]))
    ends = ends[ends > 0]
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)[: len(ends)]
    interval = np.searchsorted(tokens, starts, side="right")
    rank = np.searchsorted(places, starts, side="right")
    return interval, rank, ends - starts
