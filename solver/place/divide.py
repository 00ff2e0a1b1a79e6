"""The best division of what two ranks hold together, for many pairs of ranks at once.

Two ranks together hold a dozen pieces of components. All subsets of the pieces that are free to move are
looked at, and for each of them every piece as the one that is cut, where the two ranks' areas and token
counts allow it. That is hundreds of divisions for each pair, in closed form: twenty microseconds where many
pairs are divided at once.

A rank's rows are counted as the keys that its densest token of each component sees. That is exact for
packed documents; for other masks the caller compares what comes out by the exact count.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..slices import IntArray

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

# Rows that one piece more is worth: every piece is a route to each rank that needs it.
PIECE_PRICE = 16


class Allowed(NamedTuple):
    """What a rank may hold: tokens in [least, most], visible pairs up to `area`, for all or for each pair of ranks."""

    least: int
    most: int
    area: float | FloatArray


class Pool(NamedTuple):
    """What each of M pairs of ranks holds: up to F pieces that may go to either rank, and others that are kept.

    component: -1 where a pair has fewer pieces. need: keys seen by the densest token of a piece; sparse: by
    the token at its sparser end; rise: how many more at the other end, on a straight line. kept_need: keys of
    the piece's component that either rank needs for what it keeps.
    """

    component: FloatArray  # [M, F], as all up to `rise`
    tokens: FloatArray
    area: FloatArray
    need: FloatArray
    sparse: FloatArray
    rise: FloatArray
    kept_need: FloatArray  # [M, 2, F]
    kept_tokens: FloatArray  # [M, 2]
    kept_area: FloatArray  # [M, 2]


class Divisions(NamedTuple):
    """The first rank of pair i takes the pieces in the bits of subset[i] and the sparser tokens[i] of piece cut[i].

    The other rank takes the rest. cut: -1 where no piece is cut. found: whether any division is allowed.
    """

    found: BoolArray
    subset: IntArray
    cut: IntArray
    tokens: IntArray


def best_divisions(
    pool: Pool, allowed: Allowed, *, temperature: float = 0.0, rng: np.random.Generator | None = None
) -> Divisions:
    """The division of the fewest rows for each pair, among those allowed; with `rng` give or take the temperature."""
    members, without, *_ = _subsets(pool.tokens.shape[1])
    bounds = _Bounds.of(pool, allowed)
    rows, need_a = _rows(pool)
    tokens_a = pool.tokens @ members.T + pool.kept_tokens[:, :1]
    area_a = pool.area @ members.T + pool.kept_area[:, :1]
    fits = (tokens_a >= bounds.least) & (tokens_a <= bounds.most)
    fits &= (area_a >= bounds.floor) & (area_a <= bounds.limit)
    whole = np.where(fits, rows, np.inf)
    rows, tokens_a, area_a = (values[:, without] for values in (rows, tokens_a, area_a))
    fewest, extra, cuts = _fewest_tokens(pool, bounds, tokens_a, area_a, need_a)
    cut = np.where(cuts, rows + extra + PIECE_PRICE, np.inf)
    scores = np.concatenate([whole, cut.reshape(len(whole), -1)], axis=1)
    if rng is not None and temperature > 0:
        scores += temperature * rng.standard_exponential(scores.shape, dtype=np.float32)
    best, pair = scores.argmin(axis=1), np.arange(len(scores))
    is_cut = best >= len(members)
    piece, nth = np.divmod(np.maximum(best - len(members), 0), without.shape[1])
    subset = np.where(is_cut, without[piece, nth], np.minimum(best, len(members) - 1))
    found = np.isfinite(scores[pair, best])
    counts = np.where(found & is_cut, fewest[pair, piece, nth], 0).astype(np.int64)
    return Divisions(found, subset, np.where(is_cut, piece, -1), counts)


class _Bounds(NamedTuple):
    """What rank a of each pair may hold so that rank b, which gets the rest, is within its own bounds.

    Each [M, 1], or [1, 1] where it is the same for all.
    """

    least: FloatArray
    most: FloatArray
    floor: FloatArray
    limit: FloatArray

    @classmethod
    def of(cls, pool: Pool, allowed: Allowed) -> _Bounds:
        tokens = (pool.tokens.sum(axis=1) + pool.kept_tokens.sum(axis=1))[:, None]
        area = (pool.area.sum(axis=1) + pool.kept_area.sum(axis=1))[:, None]
        least = np.maximum(allowed.least, tokens - allowed.most)
        most = np.minimum(allowed.most, tokens - allowed.least)
        limit = np.reshape(allowed.area, (-1, 1))
        return cls(least, most, area - limit, limit)


class _Subsets(NamedTuple):
    """All S = 2**F subsets of F pieces, by their bits."""

    members: FloatArray  # 0 or 1, [S, F]
    without: IntArray  # the subsets without each piece, [F, S / 2]
    apart: FloatArray  # members of the subsets without each piece, [F, F, S / 2]; the piece comes second
    counts: FloatArray  # for rank a and b, whether it has a piece and none of a set, [2, S sets, F, S subsets]
    earlier: BoolArray  # [i, j]: whether j comes before i


@lru_cache(maxsize=16)
def _subsets(n: int) -> _Subsets:
    every = np.arange(1 << n)
    members = (every[:, None] >> np.arange(n)) & 1
    without = np.stack([np.flatnonzero(members[:, i] == 0) for i in range(n)])
    counts_a = members.T[None] * ((every[:, None] & every) == 0)[:, None]
    counts = np.stack([counts_a, counts_a[..., ::-1]]).astype(np.float64)  # rank b has what is not in the subset
    apart = members[without].transpose(2, 0, 1).astype(np.float64)
    return _Subsets(members.astype(np.float64), without, apart, counts, np.tri(n, k=-1, dtype=np.bool_))


def _fewest_tokens(
    pool: Pool, bounds: _Bounds, tokens_a: FloatArray, area_a: FloatArray, need_a: FloatArray
) -> tuple[FloatArray, FloatArray, BoolArray]:
    """For each piece and each subset without it, [M, F, S / 2]: the fewest tokens of its sparser end with which rank a
    is within its bounds, the keys that it then needs more, and whether there is such a number.

    t tokens from the sparser end have an area of first * t + slope * t * (t - 1) / 2.
    """
    least, most, floor, limit = (bound[:, :, None] for bound in bounds)
    size, first = pool.tokens[:, :, None], pool.sparse[:, :, None]
    slope = pool.rise[:, :, None] / np.maximum(size - 1, 1)
    half = first - slope / 2
    half_squared, twice = half * half, 2 * slope

    def count_of(area: FloatArray) -> FloatArray:
        area = np.maximum(area, 0)
        return 2 * area / np.maximum(half + np.sqrt(np.maximum(half_squared + twice * area, 0)), 1e-9)

    fewest = np.maximum(np.maximum(least - tokens_a, 1), np.ceil(count_of(floor - area_a)))
    room = limit - area_a
    largest = np.where(room >= 0, np.floor(count_of(room)), 0)
    largest = np.minimum(np.minimum(most - tokens_a, size - 1), largest)
    return fewest, np.maximum(first + slope * (fewest - 1) - need_a, 0), fewest <= largest


def _rows(pool: Pool) -> tuple[FloatArray, FloatArray]:
    """Keys needed by both ranks, less a constant, for each subset, [M, S]; and by rank a of the component of each
    piece, for each subset without it, [M, F, S / 2].

    Of the pieces of a component that a rank takes, the densest counts, if it needs more than what the rank keeps.
    """
    num_free = pool.tokens.shape[1]
    _, without, apart, counts, earlier = _subsets(num_free)
    alike = (pool.component[:, :, None] == pool.component[:, None, :]) & (pool.component[:, :, None] >= 0)
    # Ties go to the piece that comes first.
    denser = pool.need[:, None, :] > pool.need[:, :, None]
    denser |= (pool.need[:, None, :] == pool.need[:, :, None]) & earlier
    above = ((alike & denser) << np.arange(num_free)).sum(axis=2)
    more = np.maximum(pool.need[:, None] - pool.kept_need, 0)
    for_a, for_b = (more[:, side, None] @ counts[side, above, np.arange(num_free)] for side in (0, 1))
    need_a = np.repeat(pool.kept_need[:, 0, :, None], without.shape[1], axis=2)
    others = alike * pool.need[:, None, :]
    for i in range(num_free):
        np.maximum(need_a, others[:, :, i, None] * apart[i], out=need_a)
    return (for_a + for_b)[:, 0], need_a
