"""Drafts: who computes what and who owns what, with the rows that follow and the time that they take, before routes.

Of many drafts that are timed one becomes a plan.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from .cost import DEFAULT_HARDWARE, Hardware, Heads, RowCosts, row_costs
from .estimate import Load, Staging, Step, choose_stages
from .fingerprint import fingerprint_of
from .placement import Placement
from .plan import Plan, how_rows_travel
from .relays import numbers_by_need, relayed_link_rows
from .routes import (
    Intervals,
    LinkRows,
    RouteTable,
    link_rows,
    make_routes,
    merge_intervals,
    most_shared_stages,
    rows_missing,
    rows_owned,
    rows_sent,
    runs_needed,
    tokens_needed,
)
from .schedule import Schedule
from .slices import IntArray, SliceTable

# Heads 32:8 of dim 128 in 16 bits.
DEFAULT_COSTS = row_costs(32, 8, 128, 128)
# More stages than this split the remote keys into tiles too small to be worth it.
MAX_STAGES = 8
_FEW_STAGES = 3
# In two stages so much slower than another way to send rows, one is in any.
_SLOWER_WAY = 1.3
# Rows travel on where owners would send so much more than any rank receives, and that is estimated to be faster.
SENDS_MUCH, RELAYS_SECONDS = 1.2, 0.99


@dataclass(frozen=True, eq=False)
class Draft:
    """Who computes which task (disjoint) and who owns what, with the rows that follow, before routes are made.

    A task may be computed by a rank that owns neither its queries nor its keys. queries, keys: rows that
    each rank needs.
    """

    tasks: SliceTable
    task_ranks: IntArray
    q_placement: Placement
    k_placement: Placement
    queries: Intervals
    keys: Intervals
    # What `_step` made, by its arguments: it is asked for again with every number of stages.
    _steps: dict[tuple[Heads, Hardware, int, bool, bool], Step] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, schedule: Schedule, q_placement: Placement, k_placement: Placement) -> Draft:
        """The draft of a schedule over rows placed as given."""
        return cls(*schedule, q_placement, k_placement, *tokens_needed(*schedule))

    def renumbered(self) -> Draft:
        """The same with ranks that need the same keys next to each other; queries and keys must be placed alike."""
        placement = self.k_placement
        number = numbers_by_need(self.keys, placement.cp_size)
        placement = Placement.from_runs(placement.ends, number[placement.owners], cp_size=placement.cp_size)
        return Draft.of(Schedule(self.tasks, number[self.task_ranks]), placement, placement)

    @cached_property
    def keys_owned(self) -> IntArray:
        """Rows of each of `keys` that its rank owns."""
        return rows_owned(self.keys, self.k_placement)

    @cached_property
    def keys_missing(self) -> IntArray:
        """Rows of keys that travel to each rank, [cp_size]."""
        rows = self.keys.ends - self.keys.starts - self.keys_owned
        return np.bincount(self.keys.ranks, rows, self.k_placement.cp_size).astype(np.int64)

    @cached_property
    def queries_missing(self) -> IntArray:
        """Rows of queries that travel to each rank, [cp_size]."""
        return rows_missing(self.queries, self.q_placement)

    def bytes_moved(self, costs: RowCosts) -> int:
        """Bytes that travel in both passes, over all ranks."""
        return int(self.queries_missing.sum()) * costs.q + int(self.keys_missing.sum()) * costs.kv

    def staging(
        self,
        costs: RowCosts,
        hardware: Hardware,
        ranks_per_node: int | None,
        num_stages: int | None,
        relays: bool | None = False,
    ) -> Staging:
        """How remote keys travel best, in any number of stages or the given one, and the estimated time.

        relays: whether rows travel on; None: where that is estimated to be faster, and owners would send too much.

        Raises:
            ValueError: cp_size is no multiple of ranks_per_node.
        """
        step = self._step(costs.heads, hardware, ranks_per_node)
        if not step.load.keys.any():
            return choose_stages(step, (0,))
        counts = (num_stages,) if num_stages is not None else range(1, self._most_stages() + 1)
        nodes = self._relay_nodes(hardware, ranks_per_node)
        ways = {} if relays else {0: step}
        if relays or (relays is None and self._may_relay(nodes if ranks_per_node is None else 1)):
            ways[nodes] = self._step(costs.heads, hardware, None if nodes == 1 else nodes, relays=True)

        def staged(way: int, counts: Iterable[int]) -> Staging:
            return choose_stages(ways[way], counts)._replace(relays=way)

        if len(ways) > 1 and num_stages is None:
            # One way may be far slower than the other, in whatever number of stages.
            tried = [staged(way, (2,)) for way in ways]
            least = min(one.seconds for one in tried)
            ways = {one.relays: ways[one.relays] for one in tried if one.seconds < _SLOWER_WAY * least}
        # Rows travel on only where that is a clear gain.
        return min(
            (staged(way, counts) for way in ways), key=lambda one: one.seconds / (RELAYS_SECONDS if one.relays else 1)
        )

    def _may_relay(self, nodes: int) -> bool:
        """Whether there are nodes, or a rank sends clearly more rows than any receives and others could do it."""
        if nodes > 1 or self.k_placement.cp_size <= 2:
            return nodes > 1
        sent = rows_sent(self.keys, self.k_placement, self.k_placement).max()
        return bool(sent > SENDS_MUCH * self.keys_missing.max())

    def _relay_nodes(self, hardware: Hardware, ranks_per_node: int | None) -> int:
        """Ranks of the nodes over which rows travel on: the plan's, else the hardware's; 1 where there are none."""
        size = self.k_placement.cp_size
        nodes = hardware.ranks_per_node if ranks_per_node is None else _ranks_per_node(ranks_per_node, size)
        return nodes if nodes < size and size % nodes == 0 else 1

    def _step(self, heads: Heads, hardware: Hardware, ranks_per_node: int | None, *, relays: bool = False) -> Step:
        """What each rank computes and moves, to be timed."""
        cp_size = self.q_placement.cp_size
        per_node = _ranks_per_node(ranks_per_node, cp_size)
        two_level = 1 < per_node < cp_size
        # Hops go by the plan's nodes; on one level a row takes the link that the hardware has between two ranks.
        nodes = per_node if two_level else hardware.ranks_per_node
        by = heads, hardware, nodes, two_level, relays
        if (step := self._steps.get(by)) is None:
            step = self._steps[by] = Step(self._counted(nodes, two_level, relays), heads, hardware)
        return step

    def _counted(self, nodes: int, two_level: bool, relays: bool) -> Load:
        """What each rank computes and moves over such nodes."""
        def on_links(needed: Intervals, placement: Placement, missing: IntArray) -> LinkRows:
            if not missing.any():
                return LinkRows(missing, missing)
            count = relayed_link_rows if relays else link_rows
            return count(needed, placement, nodes, once_per_node=two_level)

        queries = on_links(self.queries, self.q_placement, self.queries_missing)
        keys = on_links(self.keys, self.k_placement, self.keys_missing)
        # Only what links carry depends on how rows travel.
        ways: dict[str, Any] = {"queries": queries, "keys": keys, "two_level": two_level, "relays": relays}
        if known := next(iter(self._steps.values()), None):
            return replace(known.load, **ways)
        return self._load(**ways)

    def _load(self, **ways: Any) -> Load:
        """What each rank computes; ways: how rows travel, the fields `queries`, `keys`, `two_level` and `relays`."""
        tasks, ranks, keys, size = self.tasks, self.task_ranks, self.keys, self.q_placement.cp_size
        q_needed, k_needed = (np.bincount(need.ranks, need.ends - need.starts, size) for need in (self.queries, keys))
        owned_by_task = rows_owned(Intervals(ranks, tasks.k0, tasks.k1), self.k_placement)
        sees_own, far = owned_by_task > 0, tasks.k1 - tasks.k0 - owned_by_task
        # As many rows as see the first so many keys.
        last = np.clip(tasks.k0 + far - tasks.lo, tasks.q0, tasks.q1)
        merged = merge_intervals(ranks, tasks.q0, np.where(far > 0, last, tasks.q0))
        seen = merge_intervals(ranks[sees_own], tasks.q0[sees_own], tasks.q1[sees_own])
        owned = rows_owned(seen, self.q_placement) if self.queries_missing.any() else seen.ends - seen.starts
        at_home = np.bincount(seen.ranks, owned, size)
        # Each sender's rows are divided between stages: two edges, at which as many slices are cut as see one row.
        senders = np.minimum(np.bincount(keys.ranks, runs_needed(keys, self.k_placement)[1], size), size - 1)
        fetched = np.bincount(keys.ranks[self.keys_owned < keys.ends - keys.starts], minlength=size)
        gaps = np.clip(fetched + np.bincount(self.k_placement.owners, minlength=size) - 2, 0, senders)
        missing, tokens = self.keys_missing, self.k_placement.num_tokens
        seen_by = np.bincount(ranks, far, size) / np.maximum(missing, 1)
        return Load(
            areas=np.bincount(ranks, tasks.areas(), size).astype(np.int64),
            own_slices=np.bincount(ranks, sees_own, size).astype(np.int64),
            far_slices=np.bincount(ranks, far > 0, size).astype(np.int64),
            gaps=gaps * seen_by,
            cuts=senders * seen_by,
            merged=np.bincount(merged.ranks, merged.ends - merged.starts, size).astype(np.float64),
            fetched=missing.astype(np.float64),
            own_share=tokens / np.maximum(tokens + missing, 1),
            guest_share=self.queries_missing / np.maximum(q_needed, 1),
            late=(at_home.astype(np.float64), (k_needed - missing).astype(np.float64)),
            **ways,
        )

    def num_runs(self) -> int:
        """Runs of the placement that ranks need keys of: routes of one stage, and those at home."""
        return int(runs_needed(self.keys, self.k_placement)[1].sum())

    def _most_stages(self) -> int:
        """As many as can share all senders, if that is a few; where it is not, they do not share them anyway."""
        shared = most_shared_stages(self.num_runs())
        return min(shared, MAX_STAGES) if shared >= _FEW_STAGES else MAX_STAGES

    def plan(self, staging: Staging, ranks_per_node: int | None) -> Plan:
        """The plan whose remote keys travel so; raises as `staging`."""
        cp_size, relays = self.q_placement.cp_size, staging.relays > 0
        ranks_per_node = _ranks_per_node(staging.relays if staging.relays > 1 else ranks_per_node, cp_size)
        num_stages = len(staging.weights)
        same_node = ranks_per_node if 1 < ranks_per_node < cp_size else 1
        q_routes = make_routes(self.queries, self.q_placement) if self.queries_missing.any() else RouteTable.empty()
        kv_routes = make_routes(self.keys, self.k_placement, staging.weights or (1,), ranks_per_node=same_node)
        tasks = (self.tasks, self.task_ranks)
        placements = (self.q_placement, self.k_placement)
        ways = how_rows_travel(num_stages, ranks_per_node, relays)
        return Plan(
            q_placement=self.q_placement,
            k_placement=self.k_placement,
            tasks=self.tasks,
            task_ranks=self.task_ranks,
            q_routes=q_routes,
            kv_routes=kv_routes,
            num_stages=num_stages,
            ranks_per_node=ranks_per_node,
            fingerprint=fingerprint_of(*tasks, *placements, q_routes, kv_routes, *ways),
            relays=relays,
        )


def _ranks_per_node(ranks_per_node: int | None, cp_size: int) -> int:
    """As many as there are ranks for a network of one level."""
    if ranks_per_node is None:
        return cp_size
    if ranks_per_node < 1 or cp_size % ranks_per_node:
        raise ValueError(
            f"ranks_per_node is {ranks_per_node} and cp_size is {cp_size}: nodes must be of equal size; "
            f"pass None for a network of one level"
        )
    return ranks_per_node


def assemble_plan(
    tasks: SliceTable,
    task_ranks: IntArray,
    q_placement: Placement,
    k_placement: Placement,
    *,
    num_stages: int | None = None,
    ranks_per_node: int | None = None,
    costs: RowCosts = DEFAULT_COSTS,
    hardware: Hardware = DEFAULT_HARDWARE,
) -> Plan:
    """The plan in which rank task_ranks[i] computes tasks[i] (disjoint) and tokens lie as placed.

    A task may be computed by a rank that owns neither its queries nor its keys. Without num_stages
    the number is chosen for the heads of `costs` on `hardware`.
    """
    draft = Draft.of(Schedule(tasks, task_ranks), q_placement, k_placement)
    return draft.plan(draft.staging(costs, hardware, ranks_per_node, num_stages), ranks_per_node)
