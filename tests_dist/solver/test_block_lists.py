"""Block lists against the masks that they stand for, drawn as 0/1 matrices."""

from __future__ import annotations

import numpy as np
import pytest

from cpattn.solver import SliceTable
from cpattn.solver.block_lists import BlockLists, make_block_lists
from tests_dist.support.backend_cases import CASES


def dense_of(lists: BlockLists, num_rows: int, num_keys: int, tile_keys: int) -> np.ndarray:
    """How often each pair is walked; checks the promises of each list on the way."""
    seen = np.zeros((num_rows, num_keys), dtype=int)
    for row0, row1, f0, f1, e0, e1 in lists.blocks.tolist():
        for k0, k1 in lists.full[f0:f1].tolist():
            assert k1 > k0
            assert (k1 - k0) % tile_keys == 0
            seen[row0:row1, k0:k1] += 1
        for k0, k1, q0, q1, lo, hi in lists.edges[e0:e1].tolist():
            i, j = np.arange(row0, row1)[:, None], np.arange(k0, k1)
            mine = (i >= q0) & (i < q1)
            assert lists.mixed or mine.all()
            seen[row0:row1, k0:k1] += mine & (lo <= j - i) & (j - i <= hi)
    return seen


@pytest.mark.parametrize("tile", [(16, 8), (64, 32), (32, 64)])
@pytest.mark.parametrize("name", CASES)
def test_lists_hold_every_pair_once(name: str, tile: tuple[int, int]) -> None:
    case = CASES[name]
    for table, rows, keys in (
        (case.table, case.num_queries, case.num_keys),
        (case.table.transpose(), case.num_keys, case.num_queries),
    ):
        lists = make_block_lists(table, rows, tile_rows=tile[0], tile_keys=tile[1])
        assert np.array_equal(dense_of(lists, rows, keys, tile[1]), table.to_dense(rows, keys))
        first, last = lists.blocks[:, 0], lists.blocks[:, 1]
        assert (last - first <= tile[0]).all()
        assert sorted(r for a, b in zip(first, last, strict=True) for r in range(a, b)) == list(range(rows))
        has_spans = (lists.blocks[:, 3] > lists.blocks[:, 2]) | (lists.blocks[:, 5] > lists.blocks[:, 4])
        assert has_spans[: lists.num_busy].all()
        assert not has_spans[lists.num_busy :].any()


def test_longest_first_and_whole_tiles_without_a_mask() -> None:
    causal = SliceTable.from_columns(0, 1024, 0, 1024, -2048, 0)
    lists = make_block_lists(causal, 1024, tile_rows=128, tile_keys=64)
    assert lists.blocks[:, 0].tolist() == list(range(896, -1, -128))
    assert lists.full.shape == (7, 2), "one span of whole tiles for every block but the first"
    assert (lists.edges[:, 1] - lists.edges[:, 0]).tolist() == [128] * 8, "the mask is needed at the diagonal only"


def test_packed_documents_meet_in_no_block_and_small_branches_share_them() -> None:
    starts = np.arange(0, 1000, 20)
    documents = SliceTable.from_columns(starts, starts + 20, starts, starts + 20, -2000, 0)
    assert not make_block_lists(documents, 1000, tile_rows=128, tile_keys=64).mixed
    prefix = SliceTable.from_columns(0, 1000, 1000, 2000, -5000, 5000)
    branches = make_block_lists(SliceTable.concat([documents, prefix]), 1000, tile_rows=128, tile_keys=64)
    assert branches.mixed
    assert len(branches.blocks) == 8
