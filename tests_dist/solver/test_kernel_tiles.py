"""Solver layer, one process: slices rewritten for kernels that know only corner-aligned masks."""

from __future__ import annotations

import importlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import given

from cpattn import AttnMaskSpec
from cpattn.masks.spec import lower_mask
from cpattn.solver import (
    BANDED,
    CAUSAL,
    FULL,
    INV_CAUSAL,
    KernelTile,
    SliceTable,
    disjoint_union,
    kernel_tiles,
    tiles_to_slices,
    window_params,
)
from tests_dist.support.masks import MASKS
from tests_dist.support.strategies import slice_tables

# The package exports a function of the module's name.
module = importlib.import_module("cpattn.solver.kernel_tiles")
LENGTH = 12


def drawn(tile: KernelTile) -> np.ndarray:
    """The tile's own matrix, from the meaning of its kind to a kernel."""
    rows, keys = tile.q1 - tile.q0, tile.k1 - tile.k0
    diff = np.arange(keys)[None, :] - np.arange(rows)[:, None]
    if tile.kind == FULL:
        return np.ones((rows, keys), dtype=bool)
    if tile.kind == BANDED:
        return (diff >= tile.lo) & (diff <= tile.hi)
    assert rows == keys, "a corner-aligned mask means one thing only on a square"
    return diff <= 0 if tile.kind == CAUSAL else diff >= 0


def assert_tiles_are(tiles: list[KernelTile], dense: np.ndarray) -> None:
    count = np.zeros(dense.shape, dtype=np.int8)
    for tile in tiles:
        mine = drawn(tile)
        assert mine.any(1).all(), f"{tile}: a row sees no key, which kernels get wrong"
        count[tile.q0 : tile.q1, tile.k0 : tile.k1] += mine
    np.testing.assert_array_equal(count, dense.astype(np.int8))


@pytest.mark.parametrize("small_square", [0, 2, 512])
@given(slice_tables(LENGTH))
def test_tiles_are_the_slices(small_square, table):
    """With squares of any size by mask, by causal kernel, and mixed."""
    table = disjoint_union(table)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SMALL_SQUARE", small_square)
        tiles = kernel_tiles(table)
    assert_tiles_are(tiles, table.to_dense(LENGTH, LENGTH))
    back = tiles_to_slices(tiles)
    assert back.area() == table.area()
    np.testing.assert_array_equal(back.to_dense(LENGTH, LENGTH), table.to_dense(LENGTH, LENGTH))


@pytest.mark.parametrize("mask", MASKS)
def test_tiles_of_the_masks_that_the_ranks_run(mask):
    spec = MASKS[mask]
    assert_tiles_are(kernel_tiles(lower_mask(spec)), spec.to_dense())


LARGE = {
    "causal": ((0, 2000, 0, 2000, -9999, 0), {CAUSAL: 1}),
    "causal, keys before": ((0, 2000, 0, 3000, -9999, 1000), {CAUSAL: 1, FULL: 1}),
    "causal, rows below": ((0, 2000, 0, 700, -9999, 0), {CAUSAL: 1, FULL: 1}),
    "inverse causal": ((0, 2000, 0, 2000, 0, 9999), {INV_CAUSAL: 1}),
    "inverse causal, keys after": ((0, 2000, 0, 3000, 0, 9999), {INV_CAUSAL: 1, FULL: 1}),
    "small corner": ((0, 1000, 0, 1400, -9999, 1000), {BANDED: 1, FULL: 1}),
}


@pytest.mark.parametrize("name", LARGE)
def test_large_squares_go_to_the_causal_kernel(name):
    row, kinds = LARGE[name]
    table = SliceTable.from_columns(*([x] for x in row))
    tiles = kernel_tiles(table)
    assert Counter(tile.kind for tile in tiles) == kinds
    assert_tiles_are(tiles, table.to_dense(2000, 3000))


@pytest.mark.parametrize("window", [1, 2, 100, 129, 4000])
def test_windows_in_blocks(window):
    """A window of 4000 over 6000 tokens is too wide for one mask per block."""
    table = lower_mask(AttnMaskSpec.sliding_window(6000, window))
    tiles = kernel_tiles(table)
    assert_tiles_are(tiles, table.to_dense(6000, 6000))
    masked = sum((t.q1 - t.q0) * (t.k1 - t.k0) for t in tiles if t.kind == BANDED)
    sizes = [(t.q1 - t.q0) * (t.k1 - t.k0) for t in tiles if t.kind == BANDED]
    assert max(sizes, default=0) <= module.MAX_MASKED_PAIRS
    assert masked <= 1.6 * table.area() + 6000 * 300, "most of what a kernel computes is masked away"


@pytest.mark.parametrize("max_pairs", [1 << 19, 1 << 20])
def test_windows_too_wide_for_one_mask(max_pairs, monkeypatch):
    monkeypatch.setattr(module, "MAX_MASKED_PAIRS", max_pairs)
    table = lower_mask(AttnMaskSpec.sliding_window(5000, (2500, 1000)))
    tiles = kernel_tiles(table)
    assert_tiles_are(tiles, table.to_dense(5000, 5000))
    assert all((t.q1 - t.q0) * (t.k1 - t.k0) <= max_pairs for t in tiles if t.kind == BANDED)


@given(slice_tables(LENGTH))
def test_window_params_are_the_band(table):
    """As flash attention reads them: from the bottom-right corner, -1 for no limit."""
    left, right = window_params(table)
    for s, a, b in zip(table, left.tolist(), right.tolist(), strict=True):
        rows, keys = len(s.q), len(s.k)
        assert a >= -1
        assert b >= -1
        shown = np.zeros((LENGTH, LENGTH), dtype=bool)
        for i in range(rows):
            for j in range(keys):
                at = i + keys - rows
                shown[s.q.start + i, s.k.start + j] = (a < 0 or j >= at - a) and (b < 0 or j <= at + b)
        np.testing.assert_array_equal(shown, SliceTable.from_slices([s]).to_dense(LENGTH, LENGTH))
