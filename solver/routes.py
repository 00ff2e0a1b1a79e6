"""Routes: which rows travel from which rank to which, for a given placement and schedule.

Everything is intervals of global token indices, never single rows, so that a plan for a million
tokens is a table of a few thousand numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from .placement import Placement
from .slices import IntArray, SliceTable, expand_counts


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
        """The routes of one stage."""
        mine = self.stages == stage
        columns = (self.dsts, self.srcs, self.starts, self.ends, self.stages)
        return RouteTable(*(column[mine] for column in columns))

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
    starts, ends = starts + ranks * stride, ends + ranks * stride
    order = np.argsort(starts, kind="stable")
    starts, ends = starts[order], np.maximum.accumulate(ends[order])
    opens = np.append(True, starts[1:] > ends[:-1])
    closes = np.append(opens[1:], True)
    starts, ends = starts[opens], ends[closes]
    ranks = starts // stride
    return Intervals(ranks, starts - ranks * stride, ends - ranks * stride)


def tokens_needed(tasks: SliceTable, task_ranks: IntArray) -> tuple[Intervals, Intervals]:
    """The query rows and the key rows that each rank needs for its tasks."""
    queries = merge_intervals(task_ranks, tasks.q0, tasks.q1)
    keys = merge_intervals(task_ranks, tasks.k0, tasks.k1)
    return queries, keys


def rows_missing(needed: Intervals, placement: Placement) -> IntArray:
    """Rows that each rank needs and does not own, [cp_size]: what routes would bring it."""
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

    if not len(needed.ranks):
        return np.zeros(placement.cp_size, dtype=np.int64)
    owned = owned_before(needed.ends) - owned_before(needed.starts)
    missing = np.bincount(needed.ranks, needed.ends - needed.starts - owned, placement.cp_size)
    return missing.astype(np.int64)


# Routes handled together: at a thousand ranks there are millions, and whole columns of them would spill
# out of the caches and take several times the memory of the result.
_BLOCK = 1 << 16


def make_routes(needed: Intervals, placement: Placement, num_stages: int = 1) -> RouteTable:
    """Routes that bring each rank the tokens it needs and does not own, in `num_stages` stages."""
    first = np.searchsorted(placement.ends, needed.starts, side="right")
    counts = np.searchsorted(placement.starts, needed.ends, side="left") - first
    blocks = []
    for a, b in _rank_blocks(needed.ranks, counts):
        need, nth = expand_counts(counts[a:b])
        need += a
        run = first[need] + nth
        travels = np.flatnonzero(needed.ranks[need] != placement.owners[run])
        need, run = need[travels], run[travels]
        starts = np.maximum(needed.starts[need], placement.starts[run])
        ends = np.minimum(needed.ends[need], placement.ends[run])
        pieces = (needed.ranks[need], placement.owners[run], starts, ends)
        blocks.append(_staged_block(*pieces, num_stages=num_stages, cp_size=placement.cp_size))
    return _by_stage(blocks, num_stages)


def split_stages(routes: RouteTable, num_stages: int, cp_size: int) -> RouteTable:
    """The same rows (all of stage 0) in num_stages parts; each receiver's rows are divided evenly.

    In token order, which keeps a stage's keys together, so that its tiles stay large.
    """
    order = np.lexsort((routes.starts, routes.dsts))
    columns = tuple(column[order] for column in (routes.dsts, routes.srcs, routes.starts, routes.ends))
    blocks = [
        _staged_block(*(column[a:b] for column in columns), num_stages=num_stages, cp_size=cp_size)
        for a, b in _rank_blocks(columns[0], np.ones(len(routes), dtype=np.int64))
    ]
    return _by_stage(blocks, num_stages)


def _by_stage(blocks: list[RouteTable], num_stages: int) -> RouteTable:
    """One table of blocks that lie in the order of receivers, each in the order of a table."""
    if not blocks:
        return RouteTable.empty()
    cuts = [np.searchsorted(block.stages, np.arange(num_stages + 1)) for block in blocks]

    def joined(name: str) -> IntArray:
        parts = [
            getattr(block, name)[cut[stage] : cut[stage + 1]]
            for stage in range(num_stages)
            for block, cut in zip(blocks, cuts, strict=True)
        ]
        return np.concatenate(parts)

    return RouteTable(*(joined(name) for name in ("dsts", "srcs", "starts", "ends", "stages")))


def _staged_block(
    dsts: IntArray, srcs: IntArray, starts: IntArray, ends: IntArray, *, num_stages: int, cp_size: int
) -> RouteTable:
    """All routes of some receivers in stages; they come in the order of (receiver, start)."""
    if num_stages <= 1 or not len(dsts):
        order = np.argsort(dsts * cp_size + srcs, kind="stable")
        stages = np.zeros(len(order), dtype=np.int64)
        return RouteTable(dsts[order], srcs[order], starts[order], ends[order], stages)
    lengths = ends - starts
    before = np.cumsum(lengths) - lengths
    own = np.searchsorted(dsts, dsts)
    before -= before[own]
    # Stage s of a receiver with n rows holds its rows [s * n // num_stages, (s + 1) * n // num_stages):
    # row b is in the last stage s with s * n // num_stages <= b.
    n = np.bincount(own, lengths)[own].astype(np.int64)
    first = ((before + 1) * num_stages - 1) // n
    last = ((before + lengths) * num_stages - 1) // n
    row, stage = expand_counts(last - first + 1)
    stage += first[row]
    shift = (starts - before)[row]
    new_starts = np.maximum(starts[row], stage * n[row] // num_stages + shift)
    new_ends = np.minimum(ends[row], (stage + 1) * n[row] // num_stages + shift)
    # With fewer rows than stages some stages are empty. A stable sort keeps starts ascending.
    order = np.argsort((stage * cp_size + dsts[row]) * cp_size + srcs[row], kind="stable")
    order = order[new_ends[order] > new_starts[order]]
    row = row[order]
    return RouteTable(dsts[row], srcs[row], new_starts[order], new_ends[order], stage[order])


def _rank_blocks(ranks: IntArray, weights: IntArray) -> Iterator[tuple[int, int]]:
    """Cuts of a column of sorted ranks into stretches of about _BLOCK weight, none inside a rank."""
    total = np.cumsum(weights)
    start = 0
    while start < len(ranks):
        done = int(total[start - 1]) if start else 0
        end = int(np.searchsorted(total, done + _BLOCK, side="right"))
        # At least one whole rank, and no more than fits.
        end = int(np.searchsorted(ranks, ranks[end], side="left")) if end < len(ranks) else end
        if end <= start:
            end = int(np.searchsorted(ranks, ranks[start], side="right"))
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
