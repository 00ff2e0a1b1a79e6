"""Slices as fused kernels want them: pieces, windows and rounds cover every pair once (one process, no kernel)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cpattn.backends.rows import as_rows, first_writers
from cpattn.solver import UNBOUNDED, SliceTable
from cpattn.solver.rounds import (
    BI_PIECE,
    INV_PIECE,
    colour_rounds,
    corner_pieces,
    group_windows,
    square_pieces,
)
from tests_dist.support.backend_cases import CASES, random_table
from tests_dist.support.fakes.dense import band

TABLES = {name: case.table for name, case in CASES.items() if case.num_queries < 400}
TABLES |= {f"seed {seed}": random_table(seed, 60, 6) for seed in range(100, 130)}


def _count(table: SliceTable, size: int) -> np.ndarray:
    """How often each pair occurs."""
    count = np.zeros((size, size), dtype=int)
    for row in range(len(table)):
        count += table.take(np.array([row])).to_dense(size, size)
    return count


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("cut", [corner_pieces, square_pieces])
def test_pieces_are_the_pairs(name, cut):
    table = TABLES[name]
    pieces, kinds = cut(table)
    assert (_count(pieces, 400) == _count(table, 400)).all()
    if cut is corner_pieces:
        assert len(pieces) <= 3 * len(table)
    else:
        assert not (kinds == BI_PIECE).any()
        inverse = pieces.take(kinds == INV_PIECE)
        assert (inverse.q1 - inverse.q0 == inverse.k1 - inverse.k0).all()


def test_a_window_over_one_document_stays_in_two_pieces():
    table = SliceTable.from_columns(0, 100, 0, 100, -15, 0)
    assert corner_pieces(table).table.data[:, :4].tolist() == [[0, 15, 0, 15], [15, 100, 0, 100]]


@pytest.mark.parametrize("name", TABLES)
def test_groups_share_a_window_that_shows_their_pairs(name):
    table = TABLES[name]
    groups = group_windows(table)
    assert sum(len(members) for _, _, members in groups) == len(table)
    for left, right, members in groups:
        for s in members:
            alone = SliceTable.from_slices([s]).to_dense(400, 400)[s.q.start : s.q.end, s.k.start : s.k.end]
            assert torch.equal(band(len(s.q), len(s.k), left, right), torch.from_numpy(alone))


def test_short_documents_join_the_window_of_long_ones():
    lengths = np.array([1, 40, 7, 100, 16])
    ends = np.cumsum(lengths)
    table = SliceTable.from_columns(ends - lengths, ends, ends - lengths, ends, -15, 0)
    ((left, right, members),) = group_windows(table)
    assert (left, right, len(members)) == (15, 0, 5)


@pytest.mark.parametrize(("length", "joins"), [(15, True), (16, True), (17, False), (40, False)])
def test_a_document_joins_a_window_only_where_it_hides_nothing(length, joins):
    """A window of 16 keys shows all of a causal document of 16 tokens, not of one of 17; and turned round."""
    table = SliceTable.from_columns([0, length], [length, 200], [0, length], [length, 200], [-UNBOUNDED, -15], 0)
    assert len(group_windows(table)) == (1 if joins else 2)
    table = SliceTable.from_columns([0, length], [length, 200], [0, length], [length, 200], 0, [UNBOUNDED, 15])
    assert len(group_windows(table)) == (1 if joins else 2)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("disjoint_keys", [False, True])
def test_rounds_do_not_collide(name, disjoint_keys):
    table = TABLES[name]
    rounds = colour_rounds(table, disjoint_keys=disjoint_keys)
    assert sorted(i for members in rounds for i in members.tolist()) == list(range(len(table)))
    for members in rounds:
        chosen = table.take(members)
        assert (chosen.q0[1:] >= chosen.q1[:-1]).all()
        if disjoint_keys:
            order = np.argsort(chosen.k0)
            assert (chosen.k0[order][1:] >= chosen.k1[order][:-1]).all()
    if not disjoint_keys and len(table):
        deepest = max(_depth(table, row) for row in range(400))
        assert len(rounds) == deepest, "as many rounds as slices share a row"


def _depth(table: SliceTable, row: int) -> int:
    return int(((table.q0 <= row) & (row < table.q1)).sum())


def test_first_writers():
    def rows(*spans):
        starts, ends = np.array(spans).T
        return SliceTable.from_columns(starts, ends, 0, 5, -1000, 1000)

    rounds = [rows((0, 5), (10, 15)), rows((5, 10)), rows((4, 6)), rows((20, 25)), rows((14, 15), (30, 31))]
    assert first_writers(rounds) == [True, True, False, True, False]


def test_rows_that_follow_on_are_a_slice():
    cpu = torch.device("cpu")
    assert as_rows(np.array([3, 5]), np.array([5, 9]), cpu) == slice(3, 9)
    index = as_rows(np.array([3, 6]), np.array([5, 8]), cpu)
    assert isinstance(index, torch.Tensor)
    assert index.tolist() == [3, 4, 6, 7]
