"""Solver layer, one process: placements, and routes row by row against sets of tokens."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpattn.solver import (
    Intervals,
    Placement,
    RouteTable,
    SliceTable,
    make_routes,
    merge_intervals,
    place_contiguous,
    place_zigzag,
    rows_missing,
    tokens_needed,
    two_level_routes,
)
from cpattn.solver import routes as routes_module
from cpattn.solver.routes import link_rows
from tests_dist.support.strategies import slice_tables, spans

TOTAL = 17


@st.composite
def placements(draw: st.DrawFn, total: int = TOTAL, cp_size: int = 3) -> Placement:
    """Every token to any rank: the worst of all layouts."""
    owners = draw(st.lists(st.integers(0, cp_size - 1), min_size=total, max_size=total))
    return Placement.from_runs(np.arange(1, total + 1), np.array(owners, dtype=np.int64), cp_size=cp_size)


def owners_of(placement: Placement) -> list[int]:
    """Owner of each token, from the ranks' token lists."""
    owners = [-1] * placement.total_seqlen
    for rank in range(placement.cp_size):
        for token in placement.tokens_of(rank).tolist():
            assert owners[token] == -1, "a token has two owners"
            owners[token] = rank
    return owners


def rows_of(routes: RouteTable) -> list[tuple[int, int, int, int]]:
    """(stage, receiver, sender, token) of each row, in the table's order."""
    columns = (routes.stages, routes.dsts, routes.srcs, routes.starts, routes.ends)
    return [
        (stage, dst, src, token)
        for stage, dst, src, start, end in zip(*(c.tolist() for c in columns), strict=True)
        for token in range(start, end)
    ]


@given(placements())
def test_a_placement_is_consistent_with_itself(placement):
    owners = owners_of(placement)
    assert -1 not in owners
    assert placement.owner_of(np.arange(TOTAL)).tolist() == owners
    assert placement.num_tokens.tolist() == [owners.count(rank) for rank in range(placement.cp_size)]
    for start, local, owner in zip(placement.starts, placement.local_starts, placement.owners, strict=True):
        assert placement.tokens_of(owner)[local] == start
    assert (placement.owners[1:] != placement.owners[:-1]).all(), "neighbours of one owner are joined"


@pytest.mark.parametrize("cp_size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("total", [0, 1, 4, 17, 64])
@pytest.mark.parametrize("place", [place_contiguous, place_zigzag])
def test_named_layouts_cover_any_length(place, total, cp_size):
    placement = place(total, cp_size)
    assert placement.total_seqlen == total
    assert -1 not in owners_of(placement)
    tokens = placement.num_tokens
    assert tokens.max() - tokens.min() <= (1 if place is place_contiguous else 2)


def test_named_layouts_by_hand():
    assert owners_of(place_contiguous(7, 3)) == [0, 0, 1, 1, 2, 2, 2]
    assert owners_of(place_zigzag(8, 2)) == [0, 0, 1, 1, 1, 1, 0, 0]
    assert owners_of(place_zigzag(12, 3)) == [0, 0, 1, 1, 2, 2, 2, 2, 1, 1, 0, 0]


@given(st.lists(st.tuples(st.integers(0, 3), spans(TOTAL)), max_size=8))
def test_merge_intervals_is_the_union_of_each_rank(intervals):
    columns = np.array([(rank, *span) for rank, span in intervals], dtype=np.int64).reshape(-1, 3).T
    merged = merge_intervals(*columns)
    for rank in range(4):
        expected = {t for r, (start, end) in intervals if r == rank for t in range(start, end)}
        mine = [(s, e) for r, s, e in zip(*merged, strict=True) if r == rank]
        assert [t for s, e in mine for t in range(s, e)] == sorted(expected)
        assert all(b[0] > a[1] for a, b in itertools.pairwise(mine)), "touching intervals are joined"
    assert sorted(merged.ranks) == list(merged.ranks)


@given(
    slice_tables(TOTAL),
    placements(),
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.integers(1, 3),
    st.randoms(use_true_random=False),
)
def test_routes_bring_each_missing_row_once(tasks, placement, weights, ranks_per_node, random):
    """From its owner, and nothing that the receiver has; staging moves the same rows."""
    ranks = np.array([random.randrange(3) for _ in range(len(tasks))], dtype=np.int64)
    owners = owners_of(placement)
    queries, keys = tokens_needed(tasks, ranks)
    for needed, side in ((queries, "q"), (keys, "k")):
        expected = set()
        for rank, s in zip(ranks.tolist(), tasks, strict=True):
            tokens = s.q if side == "q" else s.k
            expected |= {(rank, owners[t], t) for t in range(tokens.start, tokens.end) if owners[t] != rank}
        routes = make_routes(needed, placement)
        with few_routes():
            turned = make_routes(needed, placement, weights, ranks_per_node=ranks_per_node)
        staged = make_routes(needed, placement, weights, ranks_per_node=ranks_per_node)
        for table in (routes, staged, turned):
            rows = rows_of(table)
            assert sorted(row[1:] for row in rows) == sorted(expected)
            assert rows == sorted(rows), "order: stage, receiver, sender, token"
            assert all(0 <= row[0] < len(weights) for row in rows)
            assert table.num_rows() == len(expected)
            assert table.rows_received(3).tolist() == [sum(d == r for d, _, _ in expected) for r in range(3)]
            assert table.rows_sent(3).tolist() == [sum(s == r for _, s, _ in expected) for r in range(3)]
        for table in (staged, turned):
            stages = {(dst // ranks_per_node, token): set() for _, dst, _, token in rows_of(table)}
            for stage, dst, _, token in rows_of(table):
                stages[dst // ranks_per_node, token].add(stage)
            assert all(len(found) == 1 for found in stages.values()), "a row gets to a node in one stage"
        assert rows_missing(needed, placement).tolist() == routes.rows_received(3).tolist()


@contextlib.contextmanager
def few_routes() -> Iterator[None]:
    """Routes are made as for very many: a stage has whole senders."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routes_module, "_MOST_SHARED", 0)
        yield


def all_to_all(cp_size: int, total: int) -> tuple[Intervals, Placement]:
    """Every rank needs every token of contiguous pieces."""
    zeros = np.zeros(cp_size, dtype=np.int64)
    return Intervals(np.arange(cp_size), zeros, zeros + total), place_contiguous(total, cp_size)


def test_every_stage_takes_its_share_from_every_sender():
    needed, placement = all_to_all(4, 4000)
    staged = make_routes(needed, placement, (1, 3, 3, 1))
    for stage, share in enumerate((1 / 8, 3 / 8, 3 / 8, 1 / 8)):
        routes = staged.of_stage(stage)
        assert np.abs(routes.ends - routes.starts - 1000 * share).max() <= 32, "in blocks of 32 rows"
        assert len(routes) == 12, "from each of three senders to each receiver"


def test_a_stage_of_whole_senders_has_its_share_and_all_senders_work():
    needed, placement = all_to_all(4, 4000)
    with few_routes():
        staged = make_routes(needed, placement, (1, 3, 3, 1))
    assert len(staged) <= 24, "half of what a share of each would make"
    for stage, share in enumerate((1 / 8, 3 / 8, 3 / 8, 1 / 8)):
        routes = staged.of_stage(stage)
        assert np.abs(routes.rows_received(4) - 3000 * share).max() <= 1
        assert (routes.rows_sent(4) > 0).sum() >= 3, "receivers do not all begin with the same sender"


def test_small_messages_spread_over_the_stages():
    """32 rows from each of 63 senders are not cut, and do not all come in one stage."""
    needed, placement = all_to_all(64, 64 * 32)
    staged = make_routes(needed, placement, (1, 2, 1))
    assert (staged.ends - staged.starts == 32).all()
    received = np.array([staged.of_stage(stage).rows_received(64) for stage in range(3)]).T / (63 * 32)
    assert np.abs(received - [0.25, 0.5, 0.25]).max() < 0.1


@given(slice_tables(TOTAL), placements(total=TOTAL, cp_size=6), st.randoms(use_true_random=False))
def test_link_rows_are_those_of_the_routes(tasks, placement, random):
    ranks = np.array([random.randrange(6) for _ in range(len(tasks))], dtype=np.int64)
    _, needed = tokens_needed(tasks, ranks)
    routes = make_routes(needed, placement)

    def busier(table: RouteTable, near: bool) -> list[int]:
        mine = (table.dsts // 2 == table.srcs // 2) == near
        mine &= table.srcs != table.dsts
        table = RouteTable(*(c[mine] for c in (table.dsts, table.srcs, table.starts, table.ends, table.stages)))
        return np.maximum(table.rows_received(6), table.rows_sent(6)).tolist()

    once = link_rows(needed, placement, 2, once_per_node=False)
    assert once.within.tolist() == busier(routes, near=True)
    assert once.across.tolist() == busier(routes, near=False)

    two = link_rows(needed, placement, 2, once_per_node=True)
    across, within = two_level_routes(routes, 2)
    assert two.across.tolist() == busier(across, near=False)
    assert two.within.tolist() == busier(within, near=True)


def test_nothing_travels_in_a_group_of_one():
    tasks = SliceTable.from_columns(0, 9, 0, 9, 0, 0)
    queries, keys = tokens_needed(tasks, np.zeros(1, dtype=np.int64))
    one = place_contiguous(9, 1)
    assert len(make_routes(queries, one)) == len(make_routes(keys, one)) == len(RouteTable.empty()) == 0
