"""Banded rectangles rewritten for kernels that know only simple masks: exact, for canonical slices.

Full rectangles, causal squares, inverse-causal squares, and small rectangles with an explicit band, for
kernels that take a boolean `is_causal` or a mask tensor. Kernels of the flash-attention kind need none of
this: to them every canonical slice is a window (`rounds.window_params`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .rounds import CAUSAL_PIECE, FULL_PIECE, INV_PIECE, corner_pieces
from .slices import MaskSlice, SliceTable, TokenRange

FULL, CAUSAL, INV_CAUSAL, BANDED = range(4)

# Below this many rows a causal square costs a CPU kernel as much as a full one (it skips no
# blocks), so the edge is left to a mask and the square is joined with the keys beside it.
SMALL_SQUARE = 512
# Most pairs of a tile that carries an explicit mask.
MAX_MASKED_PAIRS = 1 << 22
# Rows of the triangles that the edges of a wide window are cut into.
TRIANGLE = 1024


class KernelTile(NamedTuple):
    """A rectangle of rows [q0, q1) x [k0, k1) with a mask that a kernel knows.

    kind FULL; CAUSAL and INV_CAUSAL (squares: j <= i and j >= i from the corner); or BANDED with
    the band lo <= j - i <= hi, i and j counted from the corner.
    """

    kind: int
    q0: int
    q1: int
    k0: int
    k1: int
    lo: int = 0
    hi: int = 0


def kernel_tiles(table: SliceTable, *, mask_below: int = 1536) -> list[KernelTile]:
    """The pairs of a canonical slice table as disjoint tiles; every row of a tile sees a key.

    Args:
        mask_below: windows narrower than this become rectangles with an explicit mask; wider ones
            triangles and full rectangles, which waste less but are three times as many tiles.
    """
    tiles: list[KernelTile] = []
    pieces, kinds = corner_pieces(table)
    for kind, (q0, q1, k0, k1, lo, hi) in zip(kinds.tolist(), pieces.data.tolist(), strict=True):
        if kind == FULL_PIECE:
            tiles.append(KernelTile(FULL, q0, q1, k0, k1))
        elif kind == CAUSAL_PIECE:
            tiles.extend(_causal_tiles(q0, q1, k0, k1, hi))
        elif kind == INV_PIECE:
            # Turned by 180 degrees, an upper-left edge is a lower-right one.
            tiles.extend(_turn(tile) for tile in _causal_tiles(-q1, -q0, -k1, -k0, -lo))
        else:
            tiles.extend(_window_tiles(q0, q1, k0, k1, lo, hi, mask_below))
    return tiles


def _causal_tiles(q0: int, q1: int, k0: int, k1: int, hi: int) -> list[KernelTile]:
    """A rectangle cut only by an edge j - i <= hi; canonical, so the last row sees all keys."""
    first = hi - (k0 - q0)  # the first row sees keys k0 .. k0 + first
    square = k1 - k0 - first  # rows from q0 + square - 1 on see all keys
    below = q0 + square
    tiles = []
    if below < q1:
        tiles.append(KernelTile(FULL, below, q1, k0, k1))
    if first and square <= SMALL_SQUARE and square * (k1 - k0) <= MAX_MASKED_PAIRS:
        tiles.append(KernelTile(BANDED, q0, below, k0, k1, -(square - 1), first))
        return tiles
    tiles.append(KernelTile(CAUSAL, q0, below, k0 + first, k1))
    if first:
        tiles.append(KernelTile(FULL, q0, below, k0, k0 + first))
    return tiles


def _window_tiles(
    q0: int, q1: int, k0: int, k1: int, lo: int, hi: int, mask_below: int
) -> list[KernelTile]:
    """A rectangle cut by both edges all along, in blocks of rows that have one shape.

    A block of b rows holds b * (width + b) pairs of which b * width are visible. Small blocks waste
    little and run slowly. Triangles of TRIANGLE rows are the smallest at which the CPU kernel works
    on large blocks of queries and skips part of what a causal mask hides.
    """
    width = hi - lo + 1
    masked = width < max(mask_below, 2)
    block = (192 if width >= 512 else 128 if width >= 128 else 64) if masked else min(width, TRIANGLE)
    starts = np.arange(q0, q1, block)
    ends = np.minimum(starts + block, q1)
    if masked and block * (block + width) <= MAX_MASKED_PAIRS:
        blocks = SliceTable.from_columns(starts, ends, k0, k1, lo, hi)
        return [
            KernelTile(BANDED, a, b, c, d, lo_ - (c - a), hi_ - (c - a))
            for a, b, c, d, lo_, hi_ in blocks.data.tolist()
        ]
    left, right = ends - 1 + lo, starts + hi + 1  # all rows of a block see the keys between these
    tiles = []
    for keys_from, keys_to in ((k0, left), (left, right), (right, k1)):
        keys_from, keys_to = np.maximum(keys_from, k0), np.minimum(keys_to, k1)
        tiles.extend(kernel_tiles(SliceTable.from_columns(starts, ends, keys_from, keys_to, lo, hi)))
    return tiles


def _turn(tile: KernelTile) -> KernelTile:
    kind, q0, q1, k0, k1, lo, hi = tile
    shift = (k1 - k0) - (q1 - q0)
    kind = INV_CAUSAL if kind == CAUSAL else kind
    return KernelTile(kind, -q1, -q0, -k1, -k0, shift - hi, shift - lo)


def tiles_to_slices(tiles: list[KernelTile]) -> SliceTable:
    """The slices that tiles stand for: the inverse of `kernel_tiles`, for tests and pictures."""
    slices = []
    for kind, q0, q1, k0, k1, lo, hi in tiles:
        span = (q1 - q0) + (k1 - k0)
        lo_, hi_ = {
            FULL: (-span, span),
            CAUSAL: (-span, 0),
            INV_CAUSAL: (0, span),
            BANDED: (lo, hi),
        }[kind]
        slices.append(
            MaskSlice(TokenRange(q0, q1), TokenRange(k0, k1), lo_ + k0 - q0, hi_ + k0 - q0)
        )
    return SliceTable.from_slices(slices)
