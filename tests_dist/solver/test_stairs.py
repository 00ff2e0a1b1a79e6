"""Staircases of full rectangles (one process, no kernel): the same pairs, once each, in few rounds."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpattn.solver import UNBOUNDED, SliceTable, disjoint_union
from cpattn.solver.rounds import colour_rounds
from cpattn.solver.stairs import cut_stairs


def _full(q0, q1, k0, k1) -> SliceTable:
    return SliceTable.from_columns(q0, q1, k0, k1, -UNBOUNDED, UNBOUNDED)


def _count(table: SliceTable, size: int) -> np.ndarray:
    count = np.zeros((size, size), dtype=int)
    for q0, q1, k0, k1, *_ in table.data.tolist():
        count[q0:q1, k0:k1] += 1
    return count


def _rounds(table: SliceTable) -> int:
    return len(colour_rounds(table, disjoint_keys=True))


def _turned(table: SliceTable, size: int, way: str) -> SliceTable:
    q0, q1, k0, k1 = table.data.T[:4]
    if "q" in way:
        q0, q1 = size - q1, size - q0
    if "k" in way:
        k0, k1 = size - k1, size - k0
    return _full(k0, k1, q0, q1) if "t" in way else _full(q0, q1, k0, k1)


@pytest.mark.parametrize("way", ["", "q", "k", "qk", "t"])
@pytest.mark.parametrize("steps", [3, 4, 7, 8, 32, 33])
def test_a_staircase_takes_a_logarithm_of_its_steps(steps: int, way: str) -> None:
    """Block causal, from every corner: 32 blocks are 6 rounds, not 32."""
    starts, size = np.arange(steps) * 3, steps * 3
    table = _turned(_full(starts, starts + 3, 0, starts + 3), size, way)
    cut = cut_stairs(table)
    assert _rounds(table) == steps
    assert _rounds(cut) == 1 + math.ceil(math.log2(steps))
    assert (_count(cut, size) == _count(table, size)).all()


@given(st.integers(0, 10**6), st.integers(1, 14))
def test_pairs_stay_and_rounds_do_not_grow(seed: int, number: int) -> None:
    """Random rectangles, many of them steps of one staircase; edges and steps of size 0 included."""
    rng, size = np.random.default_rng(seed), 24
    cuts = np.sort(rng.integers(0, size + 1, number + 1))
    ends = rng.integers(0, size + 1, number)
    ends = np.sort(ends) if rng.random() < 0.7 else ends
    rest = np.sort(rng.integers(0, size + 1, (2, 3, 2)), axis=-1)
    stairs = _full(cuts[:-1], cuts[1:], 0 if rng.random() < 0.7 else np.minimum(ends, 3), ends)
    more = _full(rest[0, :, 0], rest[0, :, 1], rest[1, :, 0], rest[1, :, 1])
    table = disjoint_union(SliceTable.concat([stairs, more]) if rng.random() < 0.5 else stairs)
    cut = cut_stairs(table)
    count = _count(cut, size)
    assert count.max(initial=0) <= 1
    assert (count == _count(table, size)).all()
    assert _rounds(cut) <= _rounds(table)


def test_a_table_without_stairs_is_left_alone() -> None:
    table = _full([0, 4, 8], [4, 8, 12], [0, 4, 8], [4, 8, 12])
    assert cut_stairs(table) is table
