"""Plans checked without ranks or torch: every row that travels is followed, every pair that is computed is counted.

`replay` hands token indices round along the exchanges of all rank plans, as the runtime does with rows, and counts
which global (query, key) pairs the slices over the local buffers then compute.
"""

from __future__ import annotations

import itertools

import numpy as np

from cpattn import AttnMaskSpec
from cpattn.solver import Exchange, Plan, RankPlan, SliceTable


def require_exact_plan(plan: Plan, spec: AttnMaskSpec) -> None:
    """Raise AssertionError unless the plan computes each pair of the mask once, and moves nothing for nothing."""
    count = replay(plan, (spec.total_seqlen, spec.seqlen_k))
    np.testing.assert_array_equal(count, spec.to_dense().astype(int))
    assert plan.areas().sum() == spec.to_dense().sum()


def hop(exchanges: list[Exchange], rows: list[np.ndarray]) -> list[np.ndarray]:
    """What each rank receives when rank r sends rows[r] along exchanges[r]; both ends must agree."""
    sent = []
    for exchange, mine in zip(exchanges, rows, strict=True):
        order = [row for start, end in exchange.send_runs.tolist() for row in range(start, end)]
        assert len(order) == exchange.num_sent
        bounds = np.cumsum((0, *exchange.send_splits)).tolist()
        parts = [mine[order[a:b]] for a, b in itertools.pairwise(bounds)]
        assert all(len(np.unique(part)) == len(part) for part in parts), "a receiver gets a row twice"
        sent.append(parts)
    received = []
    for rank, exchange in enumerate(exchanges):
        parts = [sent[sender][rank] for sender in range(len(rows))]
        assert tuple(len(part) for part in parts) == exchange.recv_splits
        received.append(np.concatenate(parts))
    moved = any(len(r) for r in received)
    assert all(exchange.active == moved for exchange in exchanges), (
        "active is not equal on all ranks, or idle"
    )
    return received


def nodes_sent_to(rank: int, exchange: Exchange, per_node: int) -> set[int]:
    """The nodes of the other ranks that it sends to."""
    return {to // per_node for to, rows in enumerate(exchange.send_splits) if rows and to != rank}


def require_hops_across(ranks: list[RankPlan], per_node: int) -> None:
    """Hops before the last are for other nodes."""
    for mine in ranks:
        for hops in (mine.queries, *(stage.kv for stage in mine.stages)):
            for exchange in hops[:-1]:
                assert mine.rank // per_node not in nodes_sent_to(mine.rank, exchange, per_node)


def exchanged(hops: list[tuple[Exchange, ...]], rows: list[np.ndarray], per_node: int) -> list[np.ndarray]:
    """The same over all hops of each rank; a later hop may pass on what the one before brought."""
    assert len({len(mine) for mine in hops}) == 1, "ranks have different numbers of hops"
    every = [list(exchanges) for exchanges in zip(*hops, strict=True)]
    sendable = rows
    for exchanges, following in itertools.pairwise(every):
        landed = hop(exchanges, sendable)
        sendable = [np.concatenate(pair) for pair in zip(rows, landed, strict=True)]
        for mine, came, exchange in zip(rows, landed, following, strict=True):
            passed_on = {row for start, end in exchange.send_runs.tolist() for row in range(start, end)}
            assert set(range(len(mine), len(mine) + len(came))) <= passed_on, "a row lands for nothing"
    if len(every) == 1:
        assert not any(exchange.send_splits[rank] for rank, exchange in enumerate(every[0])), "sent to itself"
    if 1 < per_node < len(rows):
        assert all(nodes_sent_to(*each, per_node) <= {each[0] // per_node} for each in enumerate(every[-1])), (
            "the last hop leaves a node"
        )
    return hop(every[-1], sendable)


def computed(slices: SliceTable, rows: np.ndarray, keys: np.ndarray, count: np.ndarray) -> None:
    """Add the pairs of slices over buffers that hold these tokens."""
    local = slices.to_dense(len(rows), len(keys))
    assert local.sum() == slices.area(), "slices of one buffer overlap"
    np.add.at(count, np.ix_(rows, keys), local)


def used(axis: int, tables: list[SliceTable], shape: tuple[int, int]) -> np.ndarray:
    seen = np.zeros(shape, dtype=bool)
    for table in tables:
        seen |= table.to_dense(*shape)
    return np.asarray(seen.any(axis))


def replay(plan: Plan, shape: tuple[int, int]) -> np.ndarray:
    """How often each pair is computed, over all ranks and stages; checks the traffic on the way."""
    ranks = [plan.for_rank(rank) for rank in range(plan.cp_size)]
    queries = [plan.q_placement.tokens_of(rank) for rank in range(plan.cp_size)]
    keys = [plan.k_placement.tokens_of(rank) for rank in range(plan.cp_size)]
    for total, tokens in zip(shape, (queries, keys), strict=True):
        assert sorted(np.concatenate(tokens).tolist()) == list(range(total)), "tokens are not owned once"
    for rank, mine in enumerate(ranks):
        assert (mine.rank, mine.cp_size) == (rank, plan.cp_size)
        assert (mine.num_queries, mine.num_keys) == (len(queries[rank]), len(keys[rank]))
        np.testing.assert_array_equal(mine.q_runs, plan.q_placement.runs_of(rank))
        assert len(mine.stages) == plan.num_stages + 1
    per_node = plan.ranks_per_node
    if not plan.relays:
        require_hops_across(ranks, per_node)
    guests = exchanged([mine.queries for mine in ranks], queries, per_node)
    count = np.zeros(shape, dtype=int)
    arrived = [set(tokens.tolist()) for tokens in keys]
    guest_used = [np.zeros(len(tokens), dtype=bool) for tokens in guests]
    for number in range(plan.num_stages + 1):
        stages = [mine.stages[number] for mine in ranks]
        buffers = keys if number == 0 else exchanged([stage.kv for stage in stages], keys, per_node)
        for rank, (stage, buffer) in enumerate(zip(stages, buffers, strict=True)):
            assert stage.num_keys == len(buffer)
            assert number == 0 or not arrived[rank] & set(buffer.tolist()), "a key arrives twice"
            arrived[rank] |= set(buffer.tolist())
            computed(stage.own, queries[rank], buffer, count)
            computed(stage.guest, guests[rank], buffer, count)
            if number:
                of_own = used(0, [stage.own], (len(queries[rank]), len(buffer)))
                of_guests = used(0, [stage.guest], (len(guests[rank]), len(buffer)))
                assert (of_own | of_guests).all(), "a key travels for nothing"
            guest_used[rank] |= used(1, [stage.guest], (len(guests[rank]), len(buffer)))
    assert all(seen.all() for seen in guest_used), "a query travels for nothing"
    return count
