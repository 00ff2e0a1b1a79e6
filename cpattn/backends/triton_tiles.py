"""Tile sizes of the Triton kernels, by generation of the GPU, element size and head dim: looked up, never searched.

Chosen by what the compiler says of them (`launch/benchmarks/triton_compile.py`: no registers spilled, shared memory
within the chip's); not yet timed on a GPU.
"""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """Rows of a block and keys of a step (in the kernel of dk and dv: keys of a block and rows of a step), and how
    many warps run it in how many pipeline stages."""

    rows: int
    keys: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """Of the three kernels."""

    forward: Tile
    dq: Tile
    dkv: Tile


# By generation and element size: (head dim up to, tiles). Kinds that are not listed take the rows of sm80.
_TABLE: dict[tuple[str, int], tuple[tuple[int, Tiles], ...]] = {
    ("sm80", 2): (
        (64, Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(32, 64, 4, 2))),
        (128, Tiles(Tile(128, 32, 8, 3), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2))),
        (256, Tiles(Tile(64, 32, 8, 2), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1))),
    ),
    ("sm80", 4): (
        (64, Tiles(Tile(64, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2))),
        (128, Tiles(Tile(32, 32, 4, 2), Tile(32, 32, 4, 1), Tile(32, 32, 8, 1))),
        (256, Tiles(Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1))),
    ),
    ("sm90", 2): (
        (64, Tiles(Tile(128, 64, 4, 3), Tile(128, 64, 8, 2), Tile(64, 64, 4, 2))),
        (128, Tiles(Tile(128, 64, 8, 2), Tile(64, 64, 4, 2), Tile(32, 64, 8, 2))),
        (256, Tiles(Tile(64, 32, 8, 2), Tile(64, 32, 8, 2), Tile(32, 32, 8, 1))),
    ),
    ("sm100", 2): (
        (64, Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 64, 4, 2))),
        (128, Tiles(Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(32, 64, 8, 2))),
        (256, Tiles(Tile(64, 32, 8, 2), Tile(64, 32, 8, 1), Tile(32, 32, 8, 1))),
    ),
}
for _kind in ("sm90", "sm100", "gfx942"):
    _TABLE[_kind, 4] = _TABLE["sm80", 4]
# Its compiler spills in deeper pipelines and larger steps of the backward kernels.
_TABLE["gfx942", 2] = (
    (64, Tiles(Tile(128, 64, 8, 3), Tile(128, 32, 8, 1), Tile(32, 64, 4, 2))),
    (128, Tiles(Tile(128, 32, 8, 2), Tile(64, 32, 8, 1), Tile(16, 64, 4, 1))),
    _TABLE["sm80", 2][2],
)
# The interpreter's time goes by operations, whatever their size; small tiles meet more edges in small tests.
_INTERPRETED = Tiles(Tile(64, 64, 1, 1), Tile(64, 64, 1, 1), Tile(64, 64, 1, 1))


def choose_tiles(kind: str, itemsize: int, head_dim: int) -> Tiles:
    """The tiles for a kind of device ("sm90"; "cpu": the interpreter), bytes of an element, and the larger head dim.

    A newer or unknown kind takes the smallest tiles, which fit everywhere.
    """
    if kind == "cpu":
        return _INTERPRETED
    rows = _TABLE.get((kind, itemsize), _TABLE["sm80", itemsize])
    return next(tiles for most, tiles in rows if head_dim <= most)


def tile_kinds() -> tuple[str, ...]:
    """Generations that the table knows."""
    return tuple(dict.fromkeys(kind for kind, _ in _TABLE))
