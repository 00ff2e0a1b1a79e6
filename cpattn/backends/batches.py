"""Which results of packed calls go to which rows, launch by launch: tables for `cpattn.collectives.call_kernels`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from cpattn.collectives import put_on
from cpattn.collectives.call_kernels import FIRST, NONE, ROW, CallRows
from cpattn.solver import IntArray

from .base import Turn


def rows_of_batches(
    num_rows: int, batches: Sequence[Sequence[IntArray]], device: torch.device, turn: Turn | None = None
) -> list[CallRows]:
    """One for each launch of a work. batches: for each call the rows that its results belong to.

    A row may occur again. The first launch has an entry of no call for rows that none of the calls has, or none of the
    whole pass, of which the work is a part where `turn` is given.
    """
    if turn is None:
        never = np.ones(num_rows, dtype=bool)
        for rows in (rows for calls in batches for rows in calls):
            never[rows] = False
        turn = Turn(np.ones(num_rows, dtype=bool), never)
    new, blind = turn.fresh.copy(), np.flatnonzero(turn.never)
    found = []
    for calls in batches:
        entries = [ROW * np.arange(len(rows)) + number for number, rows in enumerate(calls)]
        found.append(_by_row([blind, *calls], [np.full_like(blind, NONE), *entries], new))
        blind = blind[:0]
    return [CallRows(*(put_on(device, torch.from_numpy(x.astype(np.int32))) for x in pair)) for pair in found]


def _by_row(rows: list[IntArray], entries: list[IntArray], new: np.ndarray) -> tuple[IntArray, IntArray]:
    """Offsets and entries by row. new: bool, rows without an entry so far; changed."""
    every = np.concatenate(rows)
    order = np.concatenate(entries)[np.argsort(every, kind="stable")]
    counts = np.bincount(every, minlength=len(new))
    offsets = np.concatenate([[0], np.cumsum(counts)])
    order[offsets[:-1][(counts > 0) & new]] += FIRST
    new[every] = False
    return offsets, order
