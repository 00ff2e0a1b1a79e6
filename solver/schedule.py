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
from numpy.typing import NDArray

from .placement import Placement
from .routes import Intervals, merge_intervals, tokens_needed
from .slices import K0, K1, Q0, Q1, IntArray, SliceTable, distinct, expand_counts, pairs_in_rows


class Schedule(NamedTuple):
    """Disjoint tasks, and the rank that computes each."""

    tasks: SliceTable
    task_ranks: IntArray


def bisect_tasks(table: SliceTable, cp_size: int, *, q_cost: float, k_cost: float) -> Schedule:
    """Tiles of equal area for each rank, by recursive bisection of the mask.

    Every part is cut in two along queries or along keys, where its area divides as its ranks do, in
    the direction in which less has to be duplicated: a cut along queries makes both halves fetch
    the keys that they share, a cut along keys the queries. Any mask; all parts of a level at once.

    A part also has a stretch of tokens that its ranks are to own, at first the whole sequence, and a
    cut divides it. Along keys, those of the stretch and all others are cut apart, each where their
    area divides: with one cut for both, keys before the stretch (a tree's root) would go to one half
    and most of the stretch to the other, whose ranks would own either its queries or its keys.

    Args:
        table: disjoint canonical slices.
        cp_size: number of ranks.
        q_cost, k_cost: what a query row and a key row cost to move, in the same unit.
    """
    tasks, node = table, np.zeros(len(table), dtype=np.int64)
    parts = _Parts.whole(table, cp_size)
    while (parts.num_ranks > 1).any():
        by_q, by_k, own_cuts = _cut_both_ways(tasks, node, parts)
        num_parts = len(parts.num_ranks)
        shared_keys, shared_queries = _duplicated(by_q, num_parts), _duplicated(by_k, num_parts)
        along_q = k_cost * shared_keys <= q_cost * shared_queries
        q_half, k_half = along_q[by_q.node], ~along_q[by_k.node]
        tasks = SliceTable.concat([by_q.table.take(q_half), by_k.table.take(k_half).transpose()])
        node = np.concatenate([by_q.child()[q_half], by_k.child()[k_half]])
        parts, alive = parts.cut(np.where(along_q, *own_cuts))
        node = (np.cumsum(alive) - 1)[node]
    first_rank = parts.first_rank[node]
    order = np.lexsort((tasks.k0, tasks.q0, first_rank))
    return Schedule(tasks.take(order), first_rank[order])


class _Parts(NamedTuple):
    """Parts of the mask: the ranks of each, and the tokens [own_start, own_end) that these are to own."""

    first_rank: IntArray
    num_ranks: IntArray
    own_start: IntArray
    own_end: IntArray

    @classmethod
    def whole(cls, table: SliceTable, cp_size: int) -> _Parts:
        end = int(max(table.q1.max(initial=0), table.k1.max(initial=0)))
        return cls(*(np.array([value], dtype=np.int64) for value in (0, cp_size, 0, end)))

    def left_share(self) -> np.ndarray:
        """Share of each part's ranks in its left half; 0 for one rank."""
        return (self.num_ranks // 2) / self.num_ranks

    def cut(self, own_cuts: IntArray) -> tuple[_Parts, NDArray[np.bool_]]:
        """The halves, left before right, and which of them have ranks: the others are left out."""
        left = self.num_ranks // 2
        own_cuts = np.clip(own_cuts, self.own_start, self.own_end)
        left_halves = (self.first_rank, left, self.own_start, own_cuts)
        right_halves = (self.first_rank + left, self.num_ranks - left, own_cuts, self.own_end)
        columns = [np.stack(pair, axis=-1).ravel() for pair in zip(left_halves, right_halves, strict=True)]
        alive = columns[1] > 0
        return _Parts(*(column[alive] for column in columns)), alive


class _Halves(NamedTuple):
    """Slices cut in two: the node of each and whether it is right of the cut."""

    table: SliceTable
    node: IntArray
    right: IntArray

    def child(self) -> IntArray:
        return 2 * self.node + self.right


def _cut_both_ways(
    tasks: SliceTable, node: IntArray, parts: _Parts
) -> tuple[_Halves, _Halves, tuple[IntArray, IntArray]]:
    """Each part cut along queries, and along keys (transposed); where either divides what it owns."""
    num_parts = len(parts.num_ranks)
    split, parent, is_own = _split_own_keys(tasks, parts.own_start[node], parts.own_end[node])
    # Three cuts for each part, found together: its queries, its other keys, its own keys.
    label = np.concatenate([node, num_parts + 2 * node[parent] + is_own])
    share = parts.left_share()
    share = np.concatenate([share, np.repeat(share, 2)])
    both = SliceTable.concat([tasks, split.transpose()])
    cuts = _area_cuts(both, label, share)
    halves, parent, right = _cut_at(both, cuts[label])
    label = label[parent]
    q, k = label < num_parts, label >= num_parts
    by_q = _Halves(halves.take(q), label[q], right[q])
    by_k = _Halves(halves.take(k), (label[k] - num_parts) // 2, right[k])
    # A part may have no task on its own keys: then it divides them as its ranks.
    has_own = np.bincount(label, minlength=3 * num_parts)[num_parts + 1 :: 2] > 0
    even = parts.own_start + ((parts.own_end - parts.own_start) * parts.left_share()).astype(np.int64)
    return by_q, by_k, (cuts[:num_parts], np.where(has_own, cuts[num_parts + 1 :: 2], even))


def _split_own_keys(
    tasks: SliceTable, own_start: IntArray, own_end: IntArray
) -> tuple[SliceTable, IntArray, IntArray]:
    """Tasks cut along keys where their part's own keys begin and end; the task of each piece, and if it is own."""
    n = len(tasks)
    data = np.concatenate([tasks.data] * 3)
    before, own, after = data[:n], data[n : 2 * n], data[2 * n :]
    before[:, K1] = np.minimum(before[:, K1], own_start)
    own[:, K0] = np.maximum(own[:, K0], own_start)
    own[:, K1] = np.minimum(own[:, K1], own_end)
    after[:, K0] = np.maximum(after[:, K0], own_end)
    pieces, parent = SliceTable(data).canonical()
    return pieces, parent % n, (parent // n == 1).astype(np.int64)


def _cut_at(table: SliceTable, cut: IntArray) -> tuple[SliceTable, IntArray, IntArray]:
    """Slices cut at one query index each; the slice of each piece, and whether it is right of the cut."""
    n = len(table)
    data = np.concatenate([table.data, table.data])
    data[:n, Q1] = np.minimum(data[:n, Q1], cut)
    data[n:, Q0] = np.maximum(data[n:, Q0], cut)
    halves, parent = SliceTable(data).canonical()
    return halves, parent % n, (parent >= n).astype(np.int64)


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
    cuts = distinct(np.concatenate([[0, total_seqlen], *queries[1:], *keys[1:]]))
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
    ends = distinct(np.concatenate([tokens, places]))
    ends = ends[ends > 0]
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)[: len(ends)]
    interval = np.searchsorted(tokens, starts, side="right")
    rank = np.searchsorted(places, starts, side="right")
    return interval, rank, ends - starts
