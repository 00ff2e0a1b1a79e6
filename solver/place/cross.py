"""Cross-attention: queries and keys are separate sequences, which are placed beside one another."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..placement import Placement, place_contiguous
from ..slices import SliceTable
from .balance import AREA_LIMIT
from .density import DensityProfile
from .measure import rank_areas
from .queues import place_by_density


def place_cross(
    slices: SliceTable, seqlen_q: int, seqlen_k: int, cp_size: int, chunk_size: int
) -> Iterator[tuple[Placement, Placement]]:
    """Placements of queries and of keys, to choose from by time.

    Contiguous pieces of queries leave few rows to fetch where documents are many. Where they are not even, queries that
    see many keys are also dealt out with those that see few, and keys lie as these do in proportion: under a causal
    mask that is the zigzag, and a key lies where it is first seen.
    """
    pieces = _pieces(slices, seqlen_q, cp_size, chunk_size)
    yield pieces, place_contiguous(seqlen_k, cp_size)
    areas = rank_areas(slices, pieces)
    if areas.max() > AREA_LIMIT * areas.mean():
        profile = DensityProfile.from_table(slices, seqlen_q)
        dealt = place_by_density(profile, total_seqlen=seqlen_q, cp_size=cp_size)
        yield dealt, _stretched(dealt, seqlen_k)


def _pieces(slices: SliceTable, seqlen_q: int, cp_size: int, chunk_size: int) -> Placement:
    """Contiguous pieces, cut where area and token count, each weighted half, reach the next rank's share."""
    cuts = np.arange(0, seqlen_q + chunk_size, chunk_size).clip(max=seqlen_q)
    pieces, _ = slices.split_q(cuts)
    chunk = np.searchsorted(cuts, pieces.q0, side="right") - 1
    areas = np.bincount(chunk, pieces.areas(), len(cuts) - 1)
    tokens = np.diff(cuts).astype(np.float64)
    weight = tokens / max(tokens.sum(), 1.0) + areas / max(areas.sum(), 1.0)
    filled = np.concatenate([[0.0], np.cumsum(weight)])
    targets = filled[-1] * np.arange(1, cp_size) / cp_size
    ends = np.interp(targets, filled, cuts).astype(np.int64)
    return Placement.from_runs(np.append(ends, seqlen_q), np.arange(cp_size), cp_size=cp_size)


def _stretched(placement: Placement, total: int) -> Placement:
    """The same over a sequence of another length."""
    ends = placement.ends * total // placement.total_seqlen
    return Placement.from_runs(ends, placement.owners, cp_size=placement.cp_size)
