"""Solver layer, one process: every operation on banded rectangles against the matrix that it draws."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpattn.solver import (
    UNBOUNDED,
    MaskSlice,
    SliceTable,
    TokenRange,
    disjoint_union,
    expand_counts,
    merge_neighbours,
)
from cpattn.solver.slices import pairs_in_rows
from tests_dist.support.strategies import mask_slices, slice_tables

LENGTH = 12
cuts = st.lists(st.integers(0, LENGTH), max_size=4).map(lambda c: np.array(sorted(c), dtype=np.int64))


def defined(s: MaskSlice) -> np.ndarray:
    """The pairs of a slice, one by one from the definition."""
    dense = np.zeros((LENGTH, LENGTH), dtype=bool)
    for i in range(s.q.start, s.q.end):
        for j in range(s.k.start, s.k.end):
            dense[i, j] = s.lo <= j - i <= s.hi
    return dense


def counts(table: SliceTable, shape: tuple[int, int] = (LENGTH, LENGTH)) -> np.ndarray:
    """How many rows of the table hold each pair."""
    total = np.zeros(shape, dtype=int)
    for i in range(len(table)):
        total += table.take(np.array([i])).to_dense(*shape)
    return total


@given(mask_slices(LENGTH))
def test_canonical_form_keeps_the_pairs_and_is_tight(s):
    table = SliceTable.from_slices([s])
    dense = defined(s)
    assert len(table) == dense.any()
    np.testing.assert_array_equal(table.to_dense(LENGTH, LENGTH), dense)
    for c in table:
        rows, keys = np.flatnonzero(dense.any(1)), np.flatnonzero(dense.any(0))
        assert (c.q.start, c.q.end) == (rows[0], rows[-1] + 1)
        assert (c.k.start, c.k.end) == (keys[0], keys[-1] + 1)
        ahead = [j - i for i, j in np.argwhere(dense)]
        assert (c.lo, c.hi) == (max(s.lo, min(ahead)), min(s.hi, max(ahead)))
        assert len(rows) == len(c.q), "a row of the slice sees nothing"
        assert len(keys) == len(c.k), "a key of the slice is seen by no row"
    np.testing.assert_array_equal(table.canonical().table.data, table.data)


@given(slice_tables(LENGTH))
def test_areas_and_full_rectangles(table):
    expected = [t.sum() for t in map(defined, table)]
    assert table.areas().tolist() == expected
    assert table.area() == sum(expected)
    full = [area == len(s.q) * len(s.k) for area, s in zip(expected, table, strict=True)]
    assert table.is_full().tolist() == full


def test_area_of_a_million_tokens_does_not_overflow():
    n = 1_000_000
    causal = SliceTable.from_columns(0, n, 0, n, -UNBOUNDED, 0)
    assert causal.area() == n * (n + 1) // 2
    window = SliceTable.from_columns(0, n, 0, n, -4095, 0)
    assert window.area() == 4096 * n - 4096 * 4095 // 2


@given(slice_tables(LENGTH), st.integers(-2, LENGTH + 2))
def test_pairs_in_rows(table, end):
    ends = np.full(len(table), end)
    expected = [defined(s)[: max(end, 0)].sum() for s in table]
    assert pairs_in_rows(table, ends).tolist() == expected


@given(slice_tables(LENGTH), st.data())
def test_crop_intersects(table, data):
    box = [data.draw(st.integers(0, LENGTH)) for _ in range(4)]
    q0, q1, k0, k1 = (np.full(len(table), b) for b in box)
    cropped, parent = table.crop(np.arange(len(table)), q0, q1, k0, k1)
    inside = np.zeros((LENGTH, LENGTH), dtype=bool)
    inside[box[0] : box[1], box[2] : box[3]] = True
    pieces = dict(zip(parent.tolist(), cropped, strict=True))
    for i, s in enumerate(table):
        piece = defined(pieces[i]) if i in pieces else np.zeros_like(inside)
        np.testing.assert_array_equal(piece, defined(s) & inside)


@pytest.mark.parametrize("axis", ["q", "k"])
@given(slice_tables(LENGTH), cuts)
def test_split_cuts_everywhere_and_loses_nothing(axis, table, at):
    pieces, parent = table.split_q(at) if axis == "q" else table.split_k(at)
    for i, s in enumerate(table):
        mine = pieces.take(parent == i)
        np.testing.assert_array_equal(counts(mine), defined(s).astype(int))
    for piece in pieces:
        side = piece.q if axis == "q" else piece.k
        assert not ((at > side.start) & (at < side.end)).any()
    if axis == "q":
        assert (np.diff(parent) >= 0).all(), "pieces of a row stay together, in order"


@given(slice_tables(LENGTH), st.integers(1, 4))
def test_parts_by_rows_lose_nothing(table, grain):
    parts = table.in_row_parts((0.2, 0.3, 0.5), grain)
    assert np.array_equal(sum(map(counts, parts)), counts(table))
    rows = [np.flatnonzero(counts(part).any(axis=1)) for part in parts]
    together = np.concatenate(rows)
    assert np.array_equal(together, np.unique(together)), "a row lies in one part, and parts are in order"


def test_parts_by_rows_have_their_shares():
    table = SliceTable.from_slices([MaskSlice(TokenRange(0, 4096), TokenRange(0, 4096), hi=0)])
    areas = [part.area() / table.area() for part in table.in_row_parts((1 / 3, 2 / 3), 128)]
    assert areas == pytest.approx([1 / 3, 2 / 3], abs=0.04)


@given(slice_tables(LENGTH), st.integers(0, 5), st.integers(0, 5))
def test_transpose_and_shift(table, dq, dk):
    np.testing.assert_array_equal(
        table.transpose().to_dense(LENGTH, LENGTH), table.to_dense(LENGTH, LENGTH).T
    )
    np.testing.assert_array_equal(table.transpose().transpose().data, table.data)
    moved = table.shift(dq, dk).to_dense(LENGTH + 5, LENGTH + 5)
    np.testing.assert_array_equal(moved[dq : dq + LENGTH, dk : dk + LENGTH], table.to_dense(LENGTH, LENGTH))
    assert moved.sum() == table.to_dense(LENGTH, LENGTH).sum()
    np.testing.assert_array_equal(table.shift(dq, dk).areas(), table.areas())


@given(slice_tables(LENGTH, max_size=6))
def test_disjoint_union_holds_every_pair_once(table):
    union = disjoint_union(table)
    np.testing.assert_array_equal(counts(union), table.to_dense(LENGTH, LENGTH).astype(int))
    np.testing.assert_array_equal(union.canonical().table.data, union.data)


@given(mask_slices(LENGTH), mask_slices(LENGTH))
def test_difference_of_two_is_at_most_six(a, b):
    assert len(disjoint_union(SliceTable.from_slices([a, b]))) <= 7


def random_rows(count, length, seed):
    """Rectangles of all kinds over a sequence, most of them overlapping many others."""
    rng = np.random.default_rng(seed)
    (q0, q1), (k0, k1) = np.sort(rng.integers(0, length + 1, (2, 2, count)), axis=1)
    lo = np.where(rng.random(count) < 0.5, -UNBOUNDED, rng.integers(-length, length, count))
    hi = np.where(rng.random(count) < 0.5, UNBOUNDED, rng.integers(-length, length, count))
    return SliceTable.from_columns(q0, q1, k0, k1, lo, hi)


@pytest.mark.parametrize("seed", range(3))
def test_union_of_many_rows_holds_every_pair_once(seed):
    """So many that those inside the largest are dropped first."""
    table = random_rows(400, 60, seed)
    union = disjoint_union(table)
    assert union.area() == table.to_dense(60, 60).sum()
    np.testing.assert_array_equal(union.to_dense(60, 60), table.to_dense(60, 60))


def test_union_of_random_rectangles_has_few_pieces():
    """What is left of them is what stands out at the edges: no more for ten times as many."""
    for count in (300, 3000):
        assert len(disjoint_union(random_rows(count, 1 << 16, 0))) <= 600


def test_union_of_a_grid_has_one_piece_for_each_crossing():
    n = np.arange(40)
    rows = SliceTable.from_columns(2 * n, 2 * n + 1, 0, 80, -UNBOUNDED, UNBOUNDED)
    union = disjoint_union(SliceTable.concat([rows, rows.transpose()]))
    assert len(union) <= 40 * 41 + 40
    assert union.area() == 80 * 80 - 40 * 40


def test_union_of_too_many_crossings_is_refused():
    n = np.arange(1500)
    rows = SliceTable.from_columns(2 * n, 2 * n + 1, 0, 3000, -UNBOUNDED, UNBOUNDED)
    with pytest.raises(ValueError, match=r"3000 rectangles of which \d+ pairs may overlap: at most 2097152 pairs are"):
        disjoint_union(SliceTable.concat([rows, rows.transpose()]))


def test_disjoint_rows_pass_through_the_union_untouched():
    table = SliceTable.from_columns([0, 4], [4, 9], [0, 4], [4, 9], -UNBOUNDED, 0)
    np.testing.assert_array_equal(disjoint_union(table).data, table.data)


@given(slice_tables(LENGTH, max_size=4), cuts, cuts)
def test_merge_neighbours_keeps_the_pairs(table, q_cuts, k_cuts):
    pieces = disjoint_union(table).split_q(q_cuts).table.split_k(k_cuts).table
    merged = merge_neighbours(pieces)
    assert len(merged) <= len(pieces)
    np.testing.assert_array_equal(counts(merged), counts(pieces))
    np.testing.assert_array_equal(merged.data, merged.canonical().table.data)


def test_merge_neighbours_joins_no_more_of_a_chain_than_fits():
    # The second could join either neighbour; a box of all three would have a pair that none of them has.
    chain = SliceTable.from_columns([2, 6, 7], [7, 7, 8], [0, 4, 4], [4, 5, 6], [-6, -2, -3], -2)
    merged = merge_neighbours(chain)
    assert len(merged) == 2
    np.testing.assert_array_equal(counts(merged), counts(chain))


@pytest.mark.parametrize(
    "whole",
    [
        MaskSlice(TokenRange(0, 12), TokenRange(0, 12), -UNBOUNDED, 0),
        MaskSlice(TokenRange(1, 11), TokenRange(2, 9)),
        MaskSlice(TokenRange(0, 12), TokenRange(0, 12), -3, 2),
    ],
)
def test_merge_neighbours_undoes_a_split_along_queries(whole):
    table = SliceTable.from_slices([whole])
    pieces = table.split_q(np.array([2, 3, 7])).table
    np.testing.assert_array_equal(merge_neighbours(pieces).data, table.data)


@given(st.lists(st.integers(-2, 4), max_size=6))
def test_expand_counts(sizes):
    owner, position = expand_counts(np.array(sizes, dtype=np.int64))
    expected = [(i, p) for i, n in enumerate(sizes) for p in range(n)]
    assert list(zip(owner.tolist(), position.tolist(), strict=True)) == expected


@pytest.mark.parametrize("bad", [(-1, 2), (3, 2)])
def test_bad_token_range(bad):
    with pytest.raises(ValueError, match=rf"token range \[{bad[0]}, {bad[1]}\) is not valid: a range needs"):
        TokenRange(*bad)


def test_empty_table():
    empty = SliceTable.empty()
    assert (len(empty), empty.area(), list(empty)) == (0, 0, [])
    assert len(disjoint_union(empty)) == len(merge_neighbours(empty)) == len(SliceTable.concat([])) == 0
    assert len(empty.split_q(np.array([1])).table) == len(empty.split_k(np.array([1])).table) == 0
