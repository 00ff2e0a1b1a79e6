"""Routes: which rows travel from which rank to which, for a given placement and schedule.

Everything is intervals of global token indices, never single rows, so that a plan for a million
tokens is a table of a few thousand numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from .placement import Placement
from .slices import IntArray, SliceTable, stable_order


class Intervals(NamedTuple):
    """Token intervals [starts, ends) that belong to ranks; sorted by rank, then start; disjoint."""

    ranks: IntArray
    starts: IntArray
    ends: IntArray


@dataclass(frozen=True, slots=True, eq=False)
class RouteTable:
    """Rows that travel: tokens [starts[i], ends[i]) go from rank srcs[i] to rank dsts[i] in stage stages[i].

    Sorted by stage, receiver, sender, start: a rank's receive buffer holds, for each stage, the
    rows of each sender in ascending order. Every (receiver, token) pair occurs at most once.
    """

    dsts: IntArray = field(repr=False)
    srcs: IntArray = field(repr=False)
    starts: IntArray = field(repr=False)
    ends: IntArray = field(repr=False)
    stages: IntArray = field(repr=False)

    @classmethod
    def empty(cls) -> RouteTable:
        """No row travels."""
        none = np.zeros(0, dtype=np.int64)
        return cls(none, none, none, none, none)

    def __len__(self) -> int:
        return len(self.dsts)

    def of_stage(self, stage: int) -> RouteTable:
        """The routes of one stage, as views."""
        first, last = np.searchsorted(self.stages, (stage, stage + 1))
        columns = (self.dsts, self.srcs, self.starts, self.ends, self.stages)
        return RouteTable(*(column[first:last] for column in columns))

    def num_rows(self) -> int:
        """Rows that travel, over all ranks."""
        return int((self.ends - self.starts).sum())

    def rows_received(self, cp_size: int) -> IntArray:
        """Rows that each rank receives, [cp_size]."""
        return np.bincount(self.dsts, self.ends - self.starts, cp_size).astype(np.int64)

    def rows_sent(self, cp_size: int) -> IntArray:
        """Rows that each rank sends (a row sent to two ranks counts twice), [cp_size]."""
        return np.bincount(self.srcs, self.ends - self.starts, cp_size).astype(np.int64)


def merge_intervals(ranks: IntArray, starts: IntArray, ends: IntArray) -> Intervals:
    """The union of each rank's intervals; touching intervals are joined, empty ones dropped."""
    filled = ends > starts
    ranks, starts, ends = ranks[filled], starts[filled], ends[filled]
    if not len(ranks):
        return Intervals(ranks, starts, ends)
    # Far enough apart that intervals of different ranks never touch.
    stride = int(ends.max()) + 2
    # Where the n-th start lies behind n ends, all that began before is closed: which end is whose does not matter.
    starts, ends = np.sort(starts + ranks * stride), np.sort(ends + ranks * stride)
    edges = np.ones(len(starts) + 1, dtype=bool)
    np.greater(starts[1:], ends[:-1], out=edges[1:-1])
    starts, ends = starts[edges[:-1]], ends[edges[1:]]
    ranks = starts // stride
    return Intervals(ranks, starts - ranks * stride, ends - ranks * stride)


def tokens_needed(tasks: SliceTable, task_ranks: IntArray) -> tuple[Intervals, Intervals]:
    """The query rows and the key rows that each rank needs for its tasks."""
    queries = merge_intervals(task_ranks, tasks.q0, tasks.q1)
    keys = merge_intervals(task_ranks, tasks.k0, tasks.k1)
    return queries, keys


def rows_missing(needed: Intervals, placement: Placement) -> IntArray:
    """Rows that each rank needs and does not own, [cp_size]: what routes would bring it."""
    return np.bincount(needed.ranks, rows_from_others(needed, placement), placement.cp_size).astype(np.int64)


def rows_from_others(needed: Intervals, placement: Placement) -> IntArray:
    """Rows of each interval that its rank, or node, does not own."""
    rows: IntArray = needed.ends - needed.starts - rows_owned(needed, placement)
    return rows


def rows_owned(needed: Intervals, placement: Placement) -> IntArray:
    """Rows of each interval that its rank owns."""
    if not len(needed.ranks):
        return np.zeros(0, dtype=np.int64)
    stride = placement.total_seqlen + 1
    order = np.argsort(placement.owners, kind="stable")
    run_at = (placement.owners * stride + placement.starts)[order]

    def owned_before(tokens: IntArray) -> IntArray:
        """How many tokens before the given one the rank of each interval owns."""
        nth = np.searchsorted(run_at, needed.ranks * stride + tokens, side="right") - 1
        run = order[np.maximum(nth, 0)]
        inside = np.minimum(tokens, placement.ends[run]) - placement.starts[run]
        same = (nth >= 0) & (placement.owners[run] == needed.ranks)
        return np.where(same, placement.local_starts[run] + inside, 0)

    return owned_before(needed.ends) - owned_before(needed.starts)


class LinkRows(NamedTuple):
    """Rows that each rank moves in an exchange, in the busier direction, by the kind of link, [cp_size].

    before: in a hop that goes before, to those that pass rows on; None: there is none.
    """

    within: IntArray
    across: IntArray
    before: IntArray | None = None

    def any(self) -> bool:
        """Whether any rank moves a row."""
        return bool(self.within.any() or self.across.any())


def link_rows(needed: Intervals, placement: Placement, ranks_per_node: int, *, once_per_node: bool) -> LinkRows:
    """What bringing each rank the rows that it needs and does not own takes of its links.

    Args:
        ranks_per_node: ranks r with equal r // ranks_per_node share a node.
        once_per_node: a row crosses between nodes once for all ranks of a node, as in `two_level_routes`, and
            then fans out inside.
    """
    size = placement.cp_size
    missing = rows_missing(needed, placement)
    if not missing.any():
        return LinkRows(np.zeros_like(missing), np.zeros_like(missing))
    if size <= ranks_per_node:
        return LinkRows(np.maximum(missing, rows_sent(needed, placement, placement)), np.zeros_like(missing))
    of_node, nodes = by_node(needed, placement, ranks_per_node)
    if once_per_node:
        return _two_level_link_rows(needed, merge_intervals(*of_node), placement, nodes, ranks_per_node)
    moved = rows_at_once(needed, placement, ranks_per_node)
    return LinkRows(np.maximum(moved.near_in, moved.near_out), np.maximum(moved.far_in, moved.far_out))


def by_node(needed: Intervals, placement: Placement, ranks_per_node: int) -> tuple[Intervals, Placement]:
    """The intervals with nodes in the place of ranks, which may overlap, and the placement of nodes."""
    nodes = Placement.from_runs(
        placement.ends, placement.owners // ranks_per_node, cp_size=-(-placement.cp_size // ranks_per_node)
    )
    return needed._replace(ranks=needed.ranks // ranks_per_node), nodes


class RowsAtOnce(NamedTuple):
    """Rows that each rank receives and sends inside its node and beyond it, [cp_size]."""

    near_in: IntArray
    near_out: IntArray
    far_in: IntArray
    far_out: IntArray


def rows_at_once(needed: Intervals, placement: Placement, ranks_per_node: int) -> RowsAtOnce:
    """What each rank moves if owners send all that is needed themselves, to each rank."""
    of_node, nodes = by_node(needed, placement, ranks_per_node)
    far_in = np.bincount(needed.ranks, rows_from_others(of_node, nodes), placement.cp_size).astype(np.int64)
    far_out = rows_sent(of_node, nodes, placement)
    near_out = rows_sent(needed, placement, placement) - far_out
    return RowsAtOnce(rows_missing(needed, placement) - far_in, near_out, far_in, far_out)


def _two_level_link_rows(
    needed: Intervals, of_node: Intervals, placement: Placement, nodes: Placement, ranks_per_node: int
) -> LinkRows:
    """Link rows of routes in two hops. A row lands in a node, and is sent on there, at its owner's place."""
    size = placement.cp_size
    places = Placement.from_runs(placement.ends, placement.owners % ranks_per_node, cp_size=ranks_per_node)

    def by_place(intervals: Intervals, *, at_home: bool) -> IntArray:
        """Rows of the intervals of each rank, or node, by the places of their owners, [size, places].

        at_home: only those whose owners are in the node.
        """
        group, starts, ends = (np.repeat(column, ranks_per_node) for column in intervals)
        place = np.tile(np.arange(ranks_per_node), len(intervals.ranks))
        cell = group * ranks_per_node + place
        owners, owned_by = (placement, cell) if at_home else (places, place)
        rows = rows_owned(Intervals(owned_by, starts, ends), owners)
        return np.bincount(cell, rows, size * ranks_per_node).astype(np.int64).reshape(size, ranks_per_node)

    landed = (by_place(of_node, at_home=False) - by_place(of_node, at_home=True)).ravel()[:size]
    moved = by_place(needed, at_home=False)
    # What lies or lands at a rank's own place need not be sent to it.
    moved[np.arange(size), np.arange(size) % ranks_per_node] = 0
    sent = moved.reshape(-1, ranks_per_node, ranks_per_node).sum(axis=1).ravel()
    across = np.maximum(landed, rows_sent(of_node, nodes, placement))
    return LinkRows(np.maximum(moved.sum(axis=1), sent), across)


def rows_sent(needed: Intervals, groups: Placement, placement: Placement) -> IntArray:
    """Rows that each rank sends to other groups, [cp_size]; the intervals' ranks are groups, as the owners of `groups`.

    A row counts once for each interval that has it, of a group that does not own it.
    """
    run = np.searchsorted(groups.ends, placement.starts, side="right")
    everyone = _rows_covered(needed.starts, needed.ends, placement.starts, placement.ends)
    stride = placement.total_seqlen + 1
    base, own = needed.ranks * stride, groups.owners[run] * stride
    same = _rows_covered(needed.starts + base, needed.ends + base, placement.starts + own, placement.ends + own)
    return np.bincount(placement.owners, everyone - same, placement.cp_size).astype(np.int64)


def _rows_covered(starts: IntArray, ends: IntArray, low: IntArray, high: IntArray) -> IntArray:
    """For each [low, high) the rows of the intervals [starts, ends) in it, all intervals added up."""
    starts, ends = np.sort(starts), np.sort(ends)
    started, ended = np.append(0, np.cumsum(starts)), np.append(0, np.cumsum(ends))

    def below(x: IntArray) -> IntArray:
        i, j = np.searchsorted(starts, x), np.searchsorted(ends, x)
        result: IntArray = (i * x - started[i]) - (j * x - ended[j])
        return result

    return below(high) - below(low)


# Routes handled together: at a thousand ranks there are millions, and whole columns of them would spill
# out of the caches and take several times the memory of the result.
_BLOCK = 1 << 16
# With more routes than this over all stages, a stage takes whole senders instead of a share of each.
_MOST_SHARED = 1 << 19
# Rows below which a sender's rows are not divided between stages.
_LEAST_ROWS = 32


def runs_needed(needed: Intervals, placement: Placement) -> tuple[IntArray, IntArray]:
    """For each interval the first run of the placement that it meets, and how many it meets."""
    first = np.searchsorted(placement.ends, needed.starts, side="right")
    return first, np.searchsorted(placement.starts, needed.ends, side="left") - first


def most_shared_stages(num_runs: int) -> int:
    """Number of stages up to which each takes its share of every sender's rows, with so many runs needed."""
    return _MOST_SHARED // max(num_runs, 1)


def make_routes(
    needed: Intervals, placement: Placement, weights: Sequence[int] = (1,), *, ranks_per_node: int = 1
) -> RouteTable:
    """Routes that bring each rank the tokens it needs and does not own, in stages.

    Every stage takes its share of what each sender has for each receiver, so no sender is busier in one
    stage than in another. At many ranks, where that would make too many routes, it takes its share of a
    receiver's rows in token order, beginning elsewhere for each receiver.

    Args:
        weights: of the stages, each at least 1: their numbers of rows are in proportion.
        ranks_per_node: ranks r with equal r // ranks_per_node that need the same row get it in the same
            stage, so that it crosses to them once.
    """
    first, counts = runs_needed(needed, placement)
    stages = _Stages(np.array(weights, dtype=np.int64), ranks_per_node, placement.cp_size)
    by_sender = len(weights) <= most_shared_stages(int(counts.sum()))
    blocks = []
    for a, b in _group_blocks(needed.ranks // ranks_per_node, counts):
        ranks, low, high, begin, count = (x[a:b] for x in (*needed, first, counts))
        position = np.cumsum(count) - count
        run = np.arange(int(count.sum())) + np.repeat(begin - position, count)
        dsts, srcs = np.repeat(ranks, count), placement.owners[run]
        starts, ends = placement.starts[run], placement.ends[run]
        np.maximum(starts, np.repeat(low, count), out=starts)
        np.minimum(ends, np.repeat(high, count), out=ends)
        blocks.append(stages.of_block(dsts, srcs, starts, ends, by_sender=by_sender))
    return _by_stage(blocks, len(weights))


def _by_stage(blocks: list[RouteTable], num_stages: int) -> RouteTable:
    """One table of blocks that lie in the order of receivers, each in the order of a table."""
    if len(blocks) < 2:
        return blocks[0] if blocks else RouteTable.empty()
    cuts = [np.searchsorted(block.stages, np.arange(num_stages + 1)) for block in blocks]

    def joined(name: str) -> IntArray:
        parts = [
            getattr(block, name)[cut[stage] : cut[stage + 1]]
            for stage in range(num_stages)
            for block, cut in zip(blocks, cuts, strict=True)
        ]
        return np.concatenate(parts)

    return RouteTable(*(joined(name) for name in ("dsts", "srcs", "starts", "ends", "stages")))


class _Stages(NamedTuple):
    """How rows are divided between stages."""

    weights: IntArray
    ranks_per_node: int
    cp_size: int

    def of_block(
        self, dsts: IntArray, srcs: IntArray, starts: IntArray, ends: IntArray, *, by_sender: bool
    ) -> RouteTable:
        """All routes of some nodes in stages, less what stays where it is; they come sorted by receiver, then start."""
        travels = np.flatnonzero(dsts != srcs)
        order = travels[stable_order((dsts * self.cp_size + srcs)[travels])]
        dsts, srcs, starts, ends = dsts[order], srcs[order], starts[order], ends[order]
        if len(self.weights) == 1 or not len(dsts):
            return RouteTable(dsts, srcs, starts, ends, np.zeros(len(dsts), np.int64))
        node = dsts // self.ranks_per_node if self.ranks_per_node > 1 else dsts
        label = node * self.cp_size + srcs if by_sender else node
        # In this order what a rank receives of a sender is one stretch without overlaps.
        in_order = by_sender and self.ranks_per_node == 1
        before, group, groups, totals = _positions(label, starts, ends, in_order=in_order)
        shift = starts - before

        def tokens(bound: IntArray) -> IntArray:
            edge: IntArray = bound[group]
            edge += shift
            return edge

        bounds: Iterable[tuple[IntArray, IntArray]]
        if by_sender:
            bounds = pairwise(map(tokens, self._shared_bounds(groups, totals)))
        else:
            bounds = ((tokens(first), tokens(end)) for first, end in self._turned_bounds(groups, totals))
        parts: list[tuple[IntArray, ...]] = []
        for first, end in bounds:
            low, high = np.maximum(first, starts), np.minimum(end, ends)
            row = np.flatnonzero(low < high)
            parts.append((dsts[row], srcs[row], low[row], high[row], np.full(len(row), len(parts))))
        return RouteTable(*map(np.concatenate, zip(*parts, strict=True)))

    def _shared_bounds(self, groups: IntArray, totals: IntArray) -> Iterator[IntArray]:
        """The first row of each stage among the rows of each group, and the end, [n].

        A group is a node's number times cp_size plus a sender, and rows are
        divided in blocks: block b of B lies at (b + phase) / B of the way, and belongs to the stage that
        has this share.
        """
        whole = int(self.weights.sum())
        # The phase is a mixture of both, so that small messages spread over the stages.
        node = groups // self.cp_size
        phase = whole * ((groups - node * self.cp_size) * 40503 + node * 30011 & _PHASES - 1)
        blocks = -(-totals // _LEAST_ROWS) * _PHASES
        yield np.zeros_like(totals)
        for share in np.cumsum(self.weights)[:-1].tolist():
            cut = -((phase - share * blocks) // (whole * _PHASES))
            yield np.minimum(cut * _LEAST_ROWS, totals)
        yield totals

    def _turned_bounds(self, groups: IntArray, totals: IntArray) -> Iterator[tuple[IntArray, IntArray]]:
        """Where each stage begins and ends among the rows of each group, a node: they go to the stages in turn, from
        another one on for each node.
        """
        num_stages, before = len(self.weights), np.cumsum([0, *self.weights, *self.weights])
        turn = groups % num_stages
        for stage in range(num_stages):
            nth = turn + (stage - turn) % num_stages
            low, high = ((before[nth + more] - before[turn]) * totals // before[num_stages] for more in (0, 1))
            yield low, high


_PHASES = 1 << 16


def _positions(
    label: IntArray, starts: IntArray, ends: IntArray, *, in_order: bool
) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    """Where intervals lie in the union of those of their label.

    Args:
        in_order: they are sorted by label and start, and those of a label are disjoint.

    Returns:
        For each interval the rows of the union before it and the number of its label among all labels;
        these labels, ascending; and the rows of the union of each.
    """
    union = Intervals(label, starts, ends) if in_order else merge_intervals(label, starts, ends)
    lengths = union.ends - union.starts
    first = np.flatnonzero(np.append(True, union.ranks[1:] != union.ranks[:-1]))
    group = np.repeat(np.arange(len(first)), np.diff(first, append=len(lengths)))
    before = np.cumsum(lengths)
    before -= lengths
    before -= before[first][group]
    labels, totals = union.ranks[first], np.add.reduceat(lengths, first)
    if in_order:
        return before, group, labels, totals
    stride = int(ends.max()) + 2
    at = np.searchsorted(union.ranks * stride + union.starts, label * stride + starts, side="right") - 1
    return before[at] + starts - union.starts[at], group[at], labels, totals


def _group_blocks(groups: IntArray, weights: IntArray) -> Iterator[tuple[int, int]]:
    """Cuts of a column of sorted group numbers into stretches of about _BLOCK weight, none inside a group."""
    total = np.cumsum(weights)
    start = 0
    while start < len(groups):
        done = int(total[start - 1]) if start else 0
        end = int(np.searchsorted(total, done + _BLOCK, side="right"))
        # At least one whole group, and no more than fits.
        end = int(np.searchsorted(groups, groups[end], side="left")) if end < len(groups) else end
        if end <= start:
            end = int(np.searchsorted(groups, groups[start], side="right"))
        yield start, end
        start = end


class TwoLevelRoutes(NamedTuple):
    """Routes in two hops: across nodes, once per row and node, then within the nodes.

    across: from the owner to one rank of each node that needs the row, the one with the owner's
        place in its node, so that the traffic of a node is spread over its ranks.
    within: from the owner, or from the rank that the row came to, to each rank that needs it (a
        rank may send to itself). Sorted like any routes, with the forwarding rank as sender.
    """

    across: RouteTable
    within: RouteTable


def two_level_routes(routes: RouteTable, ranks_per_node: int) -> TwoLevelRoutes:
    """The same deliveries with every row crossing between nodes once per node.

    Ranks r with equal r // ranks_per_node share a node.
    """
    node_of_dst = routes.dsts // ranks_per_node
    crosses = node_of_dst != routes.srcs // ranks_per_node
    landing = node_of_dst * ranks_per_node + routes.srcs % ranks_per_node
    # Union over the receivers of a node, for each stage, landing rank and source.
    num_ranks = int(max(routes.dsts.max(initial=0), routes.srcs.max(initial=0))) + ranks_per_node
    label = (routes.stages * num_ranks + landing) * num_ranks + routes.srcs
    union = merge_intervals(label[crosses], routes.starts[crosses], routes.ends[crosses])
    stage_landing, srcs = union.ranks // num_ranks, union.ranks % num_ranks
    across = RouteTable(
        stage_landing % num_ranks, srcs, union.starts, union.ends, stage_landing // num_ranks
    )
    senders = np.where(crosses, landing, routes.srcs)
    order = np.lexsort((routes.starts, senders, routes.dsts, routes.stages))
    columns = (routes.dsts, senders, routes.starts, routes.ends, routes.stages)
    return TwoLevelRoutes(across, RouteTable(*(column[order] for column in columns)))
