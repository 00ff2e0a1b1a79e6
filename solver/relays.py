"""Hops: by which ranks a row reaches those that need it.

A row that many ranks need would be sent by its owner as often as that, and a few owners would send all the time while
the others wait. So rows travel on: owners send some of their rows to one of the ranks that need them, and that rank
sends them to the others. Rows are dealt out so that no rank sends clearly more than the busiest one receives.

Nodes are the same thing: a row goes to one rank of each node that needs it, which sends it to the others there.
Without nodes every rank is a node of its own.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .cost import FloatArray
from .placement import Placement
from .routes import (
    Intervals,
    LinkRows,
    RouteTable,
    by_node,
    merge_intervals,
    rows_at_once,
    rows_from_others,
    rows_missing,
    rows_sent,
    two_level_routes,
)
from .slices import IntArray, distinct, expand_counts

# A row is dealt to at most about so many ranks that pass it on in parts, of at least so many rows.
_MOST_PARTS, _LEAST_PART = 32, 16
# Rounds in which the rows that are passed on are dealt out by the room that is left.
_ROUNDS = 8


class _Sends(NamedTuple):
    """Tokens [starts, ends) go from srcs to dsts. Ranks are counted on over the stages: stage * cp_size + rank."""

    dsts: IntArray
    srcs: IntArray
    starts: IntArray
    ends: IntArray

    def take(self, which: np.ndarray) -> _Sends:
        return _Sends(*(column[which] for column in self))

    @property
    def rows(self) -> IntArray:
        return self.ends - self.starts

    def table(self, cp_size: int) -> RouteTable:
        """As routes: sorted, and those of one pair of ranks that touch in one."""
        width, length = (int(most.max(initial=0)) + 1 for most in (self.srcs, self.ends))
        order = np.argsort((self.dsts * width + self.srcs) * length + self.starts)
        dsts, srcs, starts, ends = (column[order] for column in self)
        if not len(order):
            return RouteTable.empty()
        opens = np.append(True, (dsts[1:] != dsts[:-1]) | (srcs[1:] != srcs[:-1]) | (starts[1:] != ends[:-1]))
        ends = ends[np.append(opens[1:], True)]
        dsts, srcs, starts = dsts[opens], srcs[opens], starts[opens]
        return RouteTable(dsts % cp_size, srcs % cp_size, starts, ends, dsts // cp_size)


def hop_tables(routes: RouteTable, *, cp_size: int, ranks_per_node: int, relays: bool) -> tuple[RouteTable, ...]:
    """The routes of one or more stages as hops: each sends a rank's own rows, and those that the hop before brought.

    Args:
        ranks_per_node: ranks r with equal r // ranks_per_node share a node; 1 or cp_size: no nodes.
        relays: whether rows travel on. If not, they go at once, or on nodes as in `two_level_routes`.

    Returns:
        The last hop delivers. In a later hop a rank may send to itself.
    """
    nodes = 1 < ranks_per_node < cp_size
    if not relays:
        return tuple(two_level_routes(routes, ranks_per_node)) if nodes else (routes,)
    base = routes.stages * cp_size
    sends = _Sends(routes.dsts + base, routes.srcs + base, routes.starts, routes.ends)
    if not nodes:
        return tuple(part.table(cp_size) for part in _levelled(sends, cp_size))
    across, near, fanned = _by_nodes(sends, ranks_per_node)
    before, across = _levelled(across, cp_size)
    # What its owner's node needs is passed on there while other rows cross between nodes.
    passed, within = _levelled(near, cp_size, fanned)
    return tuple(part.table(cp_size) for part in (before, _joined(across, passed), within))


def _joined(sends: _Sends, others: _Sends) -> _Sends:
    return _Sends(*(np.concatenate(pair) for pair in zip(sends, others, strict=True)))


def _by_nodes(sends: _Sends, ranks_per_node: int) -> tuple[_Sends, _Sends, _Sends]:
    """Each row once to each other node that needs it, evenly to its ranks; what its owner's node needs; and from the
    ranks that it came to in others to those that need it.
    """
    node = sends.dsts // ranks_per_node
    crosses = node != sends.srcs // ranks_per_node
    far, near = sends.take(crosses), sends.take(~crosses)
    node, num_ranks = node[crosses], int(max(sends.srcs.max(initial=0), sends.dsts.max(initial=0))) + 1
    union = merge_intervals(node * num_ranks + far.srcs, far.starts, far.ends)
    to, srcs = np.divmod(union.ranks, num_ranks)
    rows = union.ends - union.starts
    before = np.cumsum(rows) - rows
    opens = np.flatnonzero(np.append(True, to[1:] != to[:-1])) if len(to) else np.zeros(0, np.int64)
    group = np.cumsum(np.append(True, to[1:] != to[:-1]))[: len(to)] - 1
    total = np.add.reduceat(rows, opens)[group] if len(to) else rows
    before = before - before[opens][group]
    first, last = before * ranks_per_node // total, (before + rows - 1) * ranks_per_node // total
    row, nth = expand_counts(last - first + 1)
    part = first[row] + nth
    low, high = (-(-((part + more) * total[row]) // ranks_per_node) for more in (0, 1))
    starts = union.starts[row] + np.maximum(low - before[row], 0)
    ends = np.minimum(union.ends[row], union.starts[row] + high - before[row])
    landing = to[row] * ranks_per_node + part
    across = _Sends(landing, srcs[row], starts, ends)
    stride = int(sends.ends.max(initial=0)) + 1
    label = (node * num_ranks + far.srcs) * stride
    held = union.ranks[row] * stride
    first = np.searchsorted(held + ends, label + far.starts, side="right")
    last = np.searchsorted(held + starts, label + far.ends, side="left")
    row, nth = expand_counts(last - first)
    at = first[row] + nth
    fanned = _Sends(
        far.dsts[row], landing[at], np.maximum(far.starts[row], starts[at]), np.minimum(far.ends[row], ends[at])
    )
    return across, near, fanned


def _levelled(sends: _Sends, cp_size: int, others: _Sends | None = None) -> tuple[_Sends, _Sends]:
    """The same in two hops: what owners of too much send to those that pass it on, then all that is delivered.

    others: what is delivered besides, and not passed on.
    """
    whole = sends if others is None else _joined(sends, others)
    rows = whole.rows * (whole.srcs != whole.dsts)
    size = (int(max(whole.srcs.max(initial=0), whole.dsts.max(initial=0))) // cp_size + 1) * cp_size
    load, taken = (np.bincount(side, rows, size) for side in (whole.srcs, whole.dsts))
    room = np.repeat(taken.reshape(-1, cp_size).max(axis=1), cp_size)
    busy = (load > room)[sends.srcs]
    if not busy.any():
        return sends.take(busy), whole
    blocks = _Blocks.of(sends.take(busy))
    passed = blocks.to_relieve(load - room)
    parts = _deal(blocks, passed, np.minimum(load, room), room)
    first, delivered = blocks.hops(passed, parts)
    delivered = _joined(sends.take(~busy), delivered)
    return first, delivered if others is None else _joined(delivered, others)


class _Blocks(NamedTuple):
    """Tokens of a sender that the same ranks need: block i has [starts[i], ends[i]) of srcs[i].

    block, dst: pairs of a block and a rank that needs it, sorted by block; counts: how many need each.
    """

    srcs: IntArray
    starts: IntArray
    ends: IntArray
    counts: IntArray
    block: IntArray
    dst: IntArray

    @classmethod
    def of(cls, sends: _Sends) -> _Blocks:
        stride = int(sends.ends.max()) + 1
        base = sends.srcs * stride
        cuts = distinct(np.concatenate([base + sends.starts, base + sends.ends]))
        first, last = np.searchsorted(cuts, base + sends.starts), np.searchsorted(cuts, base + sends.ends)
        row, nth = expand_counts(last - first)
        between = first[row] + nth
        some = np.bincount(between) > 0
        used, block = np.flatnonzero(some), (np.cumsum(some) - 1)[between]
        dst = sends.dsts[row]
        # Each block begins with another of its ranks, so that what is rounded off does not always fall to the same.
        order = np.lexsort(((dst * 40503 + block * 30011) % 65521, block))
        srcs = cuts[used] // stride
        starts, ends = cuts[used] - srcs * stride, cuts[used + 1] - srcs * stride
        return cls(srcs, starts, ends, np.bincount(block), block[order], dst[order])

    def to_relieve(self, excess: FloatArray) -> IntArray:
        """Rows of each block that travel on, so that each sender sends so many less."""
        return _to_relieve(self.srcs, self.ends - self.starts, self.counts, excess)

    def hops(self, passed: IntArray, parts: IntArray) -> tuple[_Sends, _Sends]:
        """The first hop, to those that pass rows on, and the second.

        parts: of each pair, the rows of the block that its rank passes on.
        """
        ends = np.cumsum(parts)
        starts = ends - parts
        opens = np.cumsum(self.counts) - self.counts
        shift = self.starts - starts[opens]
        some = np.flatnonzero(parts)
        block, via = self.block[some], self.dst[some]
        low, high = starts[some] + shift[block], ends[some] + shift[block]
        first = _Sends(via, self.srcs[block], low, high)
        row, nth = expand_counts(self.counts[block])
        onward = _Sends(self.dst[opens[block[row]] + nth], via[row], low[row], high[row])
        rest = (self.starts + passed)[self.block]
        direct = _Sends(self.dst, self.srcs[self.block], rest, self.ends[self.block])
        direct = direct.take(direct.rows > 0)
        return first, _joined(direct, onward)


def _to_relieve(srcs: IntArray, rows: IntArray, counts: IntArray, excess: FloatArray) -> IntArray:
    """How many of the rows of srcs[i] that counts[i] need travel on, so that each sends its excess less: those that
    most need come first.
    """
    order = np.lexsort((-counts, srcs))
    saved, sender = np.maximum(counts[order] - 1, 0), srcs[order]
    relief = rows[order] * saved
    before = np.cumsum(relief) - relief
    before -= before[np.searchsorted(sender, sender)]
    share = np.ceil((excess[sender] - before) / np.maximum(saved, 1))
    passed = np.zeros_like(rows)
    passed[order] = np.where(saved > 0, np.clip(share, 0, rows[order]), 0).astype(np.int64)
    return passed


def _deal(blocks: _Blocks, passed: IntArray, load: FloatArray, room: FloatArray) -> IntArray:
    """The rows of its block that the rank of each pair passes on, by the room that it has left under its load."""
    block, dst = blocks.block, blocks.dst
    sent = blocks.counts[block] - 1
    shares = np.zeros(len(block))
    for _ in range(_ROUNDS):
        weight = np.maximum(room - load, 1e-3)[dst]
        given = (passed[block] / _ROUNDS) * weight / np.bincount(block, weight)[block]
        shares += given
        load = load + np.bincount(dst, given * sent, len(load))
    # Whole parts: the running sum within a block is rounded to multiples of a part.
    part = np.maximum(_LEAST_PART, -(-passed // _MOST_PARTS))[block]
    behind = np.cumsum(shares)
    opens = np.cumsum(blocks.counts) - blocks.counts
    behind = behind - (behind[opens] - shares[opens])[block]
    ends = np.minimum(np.rint(behind / part).astype(np.int64) * part, passed[block])
    last = np.append(opens[1:], len(block)) - 1
    ends[last] = passed
    result: IntArray = np.diff(ends, prepend=0)
    result[opens] = ends[opens]
    return result


def relayed_link_rows(
    needed: Intervals, placement: Placement, ranks_per_node: int, *, once_per_node: bool
) -> LinkRows:
    """About what hops in which rows travel on take of each rank's links; as `link_rows`, before there are routes."""
    if not (missing := rows_missing(needed, placement)).any():
        return LinkRows(missing, missing)
    moved = rows_at_once(needed, placement, ranks_per_node)
    near_in, near_out, far_in, far_out = (column.astype(np.float64) for column in moved)
    if once_per_node:
        node = np.arange(placement.cp_size) // ranks_per_node
        # A rank passes on its share of what lands in its node, to all who need it there but itself.
        passed_on = far_in * (ranks_per_node - 1) / ranks_per_node
        near_in, all_out = near_in + passed_on, near_out + _per_rank(passed_on, node)
        # Of what it owns a rank sends each row once at least; others in its node send what it is relieved of.
        spared = np.minimum(np.maximum(all_out - near_in.max(), 0), np.maximum(near_out - placement.num_tokens, 0))
        near_out = all_out - spared + _per_rank(spared, node)
        of_ranks, nodes = by_node(needed, placement, ranks_per_node)
        of_node = merge_intervals(*of_ranks)
        landed = np.bincount(of_node.ranks, rows_from_others(of_node, nodes), nodes.cp_size)
        far_in, far_out = landed[node] / ranks_per_node, rows_sent(of_node, nodes, placement).astype(np.float64)
    taken, sent = (far_in, far_out) if once_per_node else (near_in + far_in, near_out + far_out)
    groups = (of_node, nodes) if once_per_node else (needed, placement)
    passed = _rows_passed(*groups, placement, np.maximum(sent - taken.max(), 0))
    onward = passed.onward[node] / ranks_per_node if once_per_node else passed.onward
    # What travels on does so over either kind of link as what is sent at once does.
    if once_per_node:
        far_out = sent - passed.spared + onward
    else:
        far = np.where(sent > 0, far_out / np.maximum(sent, 1), far_in > 0)
        near_out, far_out = ((sent - passed.spared + onward) * share for share in (1 - far, far))
    columns = (np.maximum(near_in, near_out), np.maximum(far_in, far_out), passed.before)
    return LinkRows(*(np.ceil(column).astype(np.int64) for column in columns))


class _Passed(NamedTuple):
    """Rows that each rank hands to others to pass on, and sends so many less of to those that need them, [cp_size];
    what each group sends on then, dealt evenly.
    """

    before: IntArray
    spared: FloatArray
    onward: FloatArray


def _rows_passed(needed: Intervals, groups: Placement, placement: Placement, excess: FloatArray) -> _Passed:
    """What travels on if each rank sends its excess less; the intervals' ranks are groups, as in `rows_sent`."""
    cuts = distinct(np.concatenate([needed.starts, needed.ends, placement.starts, placement.ends]))
    at, rows = cuts[:-1], np.diff(cuts)
    opened, closed = (np.bincount(np.searchsorted(cuts, edge), minlength=len(cuts)) for edge in needed[1:])
    group = groups.owners[np.searchsorted(groups.ends, at, side="right")]
    stride = placement.total_seqlen + 1
    nth = np.searchsorted(needed.ranks * stride + needed.starts, group * stride + at, side="right") - 1
    own = (nth >= 0) & (needed.ranks[nth] == group) & (needed.ends[nth] > at)
    srcs = placement.owners[np.searchsorted(placement.ends, at, side="right")]
    counts = np.cumsum(opened - closed)[:-1] - own
    passed = _to_relieve(srcs, rows, counts, excess)
    each = passed * (1 - 1 / np.maximum(counts, 1))
    total = np.append(0.0, np.cumsum(each))
    first, last = (np.searchsorted(cuts, edge) for edge in needed[1:])
    onward = np.bincount(needed.ranks, total[last] - total[first], groups.cp_size)
    onward -= np.bincount(group, each * own, groups.cp_size)
    before, spared = (np.bincount(srcs, rows, placement.cp_size) for rows in (passed, passed * counts))
    return _Passed(before.astype(np.int64), spared.astype(np.float64), onward.astype(np.float64))


def numbers_by_need(needed: Intervals, cp_size: int) -> IntArray:
    """New numbers of the ranks, [cp_size], in the order of the longest run of tokens that each needs."""
    lengths = needed.ends - needed.starts
    order = np.lexsort((-lengths, needed.ranks))
    ranks, first = np.unique(needed.ranks[order], return_index=True)
    start, length = np.zeros(cp_size, dtype=np.int64), np.zeros(cp_size, dtype=np.int64)
    start[ranks], length[ranks] = needed.starts[order[first]], lengths[order[first]]
    number: IntArray = np.argsort(np.lexsort((length, start)))
    return number


def _per_rank(rows: FloatArray, node: IntArray) -> FloatArray:
    """The mean over the ranks of its node, for each rank."""
    mean: FloatArray = (np.bincount(node, rows) / np.bincount(node))[node]
    return mean
