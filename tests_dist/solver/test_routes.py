"""Solver layer, one process: placements, and routes row by row against sets of tokens."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpattn.solver import (
    Placement,
    RouteTable,
    SliceTable,
    make_routes,
    merge_intervals,
    place_contiguous,
    place_zigzag,
    rows_missing,
    split_stages,
    tokens_needed,
)
from tests_dist.strategies import slice_tables, spans

many = settings(max_examples=200, deadline=None, derandomize=True)
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
@many
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
@many
def test_merge_intervals_is_the_union_of_each_rank(intervals):
    columns = np.array([(rank, *span) for rank, span in intervals], dtype=np.int64).reshape(-1, 3).T
    merged = merge_intervals(*columns)
    for rank in range(4):
        expected = {t for r, (start, end) in intervals if r == rank for t in range(start, end)}
        mine = [(s, e) for r, s, e in zip(*merged, strict=True) if r == rank]
        assert [t for s, e in mine for t in range(s, e)] == sorted(expected)
        assert all(b[0] > a[1] for a, b in itertools.pairwise(mine)), "touching intervals are joined"
    assert sorted(merged.ranks) == list(merged.ranks)


@given(slice_tables(TOTAL), placements(), st.integers(1, 4), st.randoms(use_true_random=False))
@many
def test_routes_bring_each_missing_row_once(tasks, placement, num_stages, random):
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
        staged = split_stages(routes, num_stages, 3)
        for table in (routes, staged):
            rows = rows_of(table)
            assert sorted(row[1:] for row in rows) == sorted(expected)
            assert rows == sorted(rows), "order: stage, receiver, sender, token"
            assert table.num_rows() == len(expected)
            assert table.rows_received(3).tolist() == [sum(d == r for d, _, _ in expected) for r in range(3)]
            assert table.rows_sent(3).tolist() == [sum(s == r for _, s, _ in expected) for r in range(3)]
        assert rows_missing(needed, placement).tolist() == routes.rows_received(3).tolist()
        for rank in range(3):
            mine = [
                [t for st_, dst, _, t in rows_of(staged) if (st_, dst) == (stage, rank)]
                for stage in range(num_stages)
            ]
            sizes = [len(tokens) for tokens in mine]
            assert max(sizes) - min(sizes) <= 1, "a receiver's rows are divided evenly"
            in_order = [t for tokens in mine for t in sorted(tokens)]
            assert in_order == sorted(in_order), "stages are in token order"


def test_nothing_travels_in_a_group_of_one():
    tasks = SliceTable.from_columns(0, 9, 0, 9, 0, 0)
    queries, keys = tokens_needed(tasks, np.zeros(1, dtype=np.int64))
    one = place_contiguous(9, 1)
    assert len(make_routes(queries, one)) == len(make_routes(keys, one)) == len(RouteTable.empty()) == 0
