"""`triton`: a kernel of our own that takes slices as they are, on any GPU that Triton knows.

One launch for out and lse; two for the gradients, one over blocks of queries (dq) and one over blocks of keys (dk and
dv). Blocks walk lists of key spans (`cpattn.solver.block_lists`) in the buffers, so whatever the mask, nothing is
gathered and no partial result is merged; no atomics, so results repeat bit for bit. `triton_kernels.py` has the
kernels. Not yet run on hardware.

Without a GPU it runs in Triton's interpreter, for tests: set TRITON_INTERPRET=1 before triton is imported.

The launches are operators of torch (`cpattn::triton_forward`, ...), so that they run on tensors without data and are
counted where operators are. Shape legend as in `base.py`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cpattn.collectives import define_launches, put_on
from cpattn.solver import SliceTable
from cpattn.solver.block_lists import BlockLists, make_block_lists

from .base import HALF_DTYPES, Attending, KeyRows, Problem, Returning, Scoring, refuse_dtype
from .installed import device_capability, missing_package
from .triton_tiles import Tile, Tiles, choose_tiles

_LN2 = 0.6931471805599453
_MOST_HEAD_DIM = 256


def interpreting() -> bool:
    """Whether Triton runs its kernels on the CPU, an operation at a time."""
    return os.environ.get("TRITON_INTERPRET", "") in ("1", "true", "True")


@dataclass(frozen=True, slots=True, eq=False)
class DeviceLists:
    """Block lists on a device. packed: int32, of which blocks, full and edges are views."""

    blocks: Tensor
    full: Tensor
    edges: Tensor
    num_blocks: int
    num_busy: int
    mixed: bool


@dataclass(frozen=True, slots=True, eq=False)
class TritonWork:
    """A slice table over buffers of num_queries and num_keys rows, and its lists by tile, made at their first use."""

    table: SliceTable
    num_queries: int
    num_keys: int
    device: torch.device
    lists: dict[tuple[bool, int, int], DeviceLists] = field(default_factory=dict, repr=False)

    def by_query(self, tile: Tile) -> DeviceLists:
        """Blocks of query rows and the keys that they walk."""
        return self._lists(False, tile.rows, tile.keys)

    def by_key(self, tile: Tile) -> DeviceLists:
        """Blocks of key rows and the queries that they walk."""
        return self._lists(True, tile.keys, tile.rows)

    def _lists(self, turned: bool, tile_rows: int, tile_keys: int) -> DeviceLists:
        made = self.lists.get((turned, tile_rows, tile_keys))
        if made is None:
            table = self.table.transpose() if turned else self.table
            rows = self.num_keys if turned else self.num_queries
            host = make_block_lists(table, rows, tile_rows=tile_rows, tile_keys=tile_keys)
            made = self.lists[turned, tile_rows, tile_keys] = lists_on(self.device, host)
        return made


def lists_on(device: torch.device, host: BlockLists) -> DeviceLists:
    """Block lists on a device, in one tensor."""
    packed = put_on(device, torch.from_numpy(host.packed()))
    blocks, full, edges = packed.split([host.blocks.size, host.full.size, host.edges.size])
    return DeviceLists(blocks, full, edges, len(host.blocks), host.num_busy, host.mixed)


class TritonBackend:
    """Attention over banded rectangles, one launch for a stage's slices; two in backward."""

    name = "triton"
    kernel = "this package's Triton kernels"
    stores_first = True

    def refusal(self, problem: Problem) -> str | None:
        if problem.device_type != "cuda" and not interpreting():
            return (
                f"Triton compiles for GPUs and the tensors are on {problem.device_type} (its interpreter runs on the "
                f"CPU, slowly: set TRITON_INTERPRET=1 before triton is imported)"
            )
        missing = missing_package("triton", "triton")
        if missing is not None:
            return missing
        widest = max(problem.head_dim, problem.head_dim_v)
        if widest > _MOST_HEAD_DIM:
            return f"head_dim {widest} is more than its tiles hold ({_MOST_HEAD_DIM})"
        return refuse_dtype(problem, (*HALF_DTYPES, torch.float32))

    def prepare(self, slices: SliceTable, num_queries: int, num_keys: int, device: torch.device) -> TritonWork:
        return TritonWork(slices, num_queries, num_keys, device)

    def warm(self, work: TritonWork, problem: Problem) -> None:
        """Make the lists that both passes will walk."""
        widest = max(problem.head_dim, problem.head_dim_v)
        tiles = choose_tiles(_kind(work.device.type), problem.dtype.itemsize, widest)
        work.by_query(tiles.forward), work.by_query(tiles.dq), work.by_key(tiles.dkv)

    def writes_once(self, work: TritonWork) -> bool:
        return True

    def forward(
        self, queries: Attending, keys: KeyRows, work: TritonWork, scoring: Scoring, *, fresh: bool = False
    ) -> None:
        (q_QND, out_QNE, lse_QN), (k_KGD, v_KGE) = queries, keys
        tile = _tiles(q_QND, v_KGE).forward
        lists = work.by_query(tile)
        inputs = tuple(_rows_contiguous(t) for t in (q_QND, k_KGD, v_KGE))
        _run("forward", (*inputs, out_QNE, lse_QN), lists, tile, scoring, fresh)

    def backward(
        self,
        queries: Returning,
        keys: KeyRows,
        work: TritonWork,
        scoring: Scoring,
        dkeys: KeyRows,
        *,
        fresh_dq: bool = False,
        fresh_dkv: bool = False,
    ) -> None:
        (dout_QNE, q_QND, out_QNE, lse_QN, dq_QND), (k_KGD, v_KGE) = queries, keys
        tiles = _tiles(q_QND, v_KGE)
        inputs = tuple(_rows_contiguous(t) for t in (dout_QNE, q_QND, k_KGD, v_KGE))
        delta = torch.empty(lse_QN.shape[::-1], dtype=torch.float32, device=lse_QN.device)
        by_query, by_key = work.by_query(tiles.dq), work.by_key(tiles.dkv)
        tensors = (*inputs, _rows_contiguous(out_QNE), lse_QN, delta, dq_QND)
        _run("dq", tensors, by_query, tiles.dq, scoring, fresh_dq)
        _run("dkv", (*inputs, lse_QN, delta, *dkeys), by_key, tiles.dkv, scoring, fresh_dkv)


def _run(
    kernel: str, tensors: tuple[Tensor, ...], lists: DeviceLists, tile: Tile, scoring: Scoring, fresh: bool
) -> None:
    """One launch; none where there is nothing to do. fresh: rows that see nothing are written too."""
    num_blocks = lists.num_blocks if fresh else lists.num_busy
    if num_blocks:
        getattr(torch.ops.cpattn, f"triton_{kernel}")(
            *tensors, lists.blocks, lists.full, lists.edges, num_blocks,
            scoring.scale, scoring.softcap or 0.0, lists.mixed, fresh, list(tile),
        )  # fmt: skip


def _tiles(q: Tensor, v: Tensor) -> Tiles:
    return choose_tiles(_kind(q.device.type), q.itemsize, max(q.shape[-1], v.shape[-1]))


def _kind(device_type: str) -> str:
    """The row of the table of tiles."""
    if device_type != "cuda":
        return "cpu"
    capability = device_capability(device_type)
    if torch.version.hip:
        return "gfx942"
    return "sm80" if capability is None else f"sm{capability[0]}0"


def _rows_contiguous(x: Tensor) -> Tensor:
    """x, copied only if its last dimension is strided."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _width(head_dim: int) -> int:
    return max(16, 1 << (head_dim - 1).bit_length())


def _constants(q: Tensor, k: Tensor, v: Tensor, tile: Tile, softcap: float, mixed: bool, fresh: bool) -> dict[str, Any]:
    groups, options = q.shape[1] // k.shape[1], {"capped": softcap != 0.0, "mixed": mixed, "fresh": fresh}
    return kernel_constants(groups, k.shape[-1], v.shape[-1], tile, **options, wide=interpreting())


def kernel_constants(groups: int, head_dim: int, head_dim_v: int, tile: Tile, **options: bool) -> dict[str, Any]:
    """What a kernel is compiled for. options: capped, mixed, fresh, wide."""
    return {
        "groups": groups,
        "head_dim": head_dim,
        "head_dim_v": head_dim_v,
        "width": _width(head_dim),
        "width_v": _width(head_dim_v),
        "tile_rows": tile.rows,
        "tile_keys": tile.keys,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        **options,
    }


def _factors(scale: float, softcap: float) -> tuple[float, float]:
    """factor and cap of the kernels."""
    return (scale / softcap, softcap / _LN2) if softcap else (scale / _LN2, 0.0)


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for t in tensors for stride in t.stride()[:2]]


def _launch_forward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, blocks: Tensor, full: Tensor, edges: Tensor,
    num_blocks: int, scale: float, softcap: float, mixed: bool, fresh: bool, tile: list[int],
) -> None:  # fmt: skip
    from .triton_kernels import forward_kernel

    forward_kernel[num_blocks, q.shape[1]](
        q, k, v, out, lse, blocks, full, edges, *_factors(scale, softcap), *_strides(q, k, v, out, lse),
        **_constants(q, k, v, Tile(*tile), softcap, mixed, fresh),
    )  # fmt: skip


def _launch_dq(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, delta: Tensor, dq: Tensor, blocks: Tensor,
    full: Tensor, edges: Tensor, num_blocks: int, scale: float, softcap: float, mixed: bool, fresh: bool,
    tile: list[int],
) -> None:  # fmt: skip
    from .triton_kernels import dq_kernel

    dq_kernel[num_blocks, q.shape[1]](
        dout, q, k, v, out, lse, delta, dq, blocks, full, edges, *_factors(scale, softcap), scale, q.shape[0],
        *_strides(dout, q, k, v, out, lse, dq), **_constants(q, k, v, Tile(*tile), softcap, mixed, fresh),
    )  # fmt: skip


def _launch_dkv(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, dk: Tensor, dv: Tensor, blocks: Tensor,
    full: Tensor, edges: Tensor, num_blocks: int, scale: float, softcap: float, mixed: bool, fresh: bool,
    tile: list[int],
) -> None:  # fmt: skip
    from .triton_kernels import dkv_kernel

    dkv_kernel[num_blocks, k.shape[1]](
        dout, q, k, v, lse, delta, dk, dv, blocks, full, edges, *_factors(scale, softcap), scale, q.shape[0],
        *_strides(dout, q, k, v, lse, dk, dv), **_constants(q, k, v, Tile(*tile), softcap, mixed, fresh),
    )  # fmt: skip


_LISTS = (
    "Tensor blocks, Tensor full, Tensor edges, int num_blocks, "
    "float scale, float softcap, bool mixed, bool fresh, int[] tile"
)
_library = define_launches(
    (f"triton_{name}", f"{tensors}, {_LISTS}", launch)
    for name, tensors, launch in (
        ("forward", "Tensor q, Tensor k, Tensor v, Tensor(a!) out, Tensor(b!) lse", _launch_forward),
        (
            "dq",
            "Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor(a!) delta, Tensor(b!) dq",
            _launch_dq,
        ),
        (
            "dkv",
            "Tensor dout, Tensor q, Tensor k, Tensor v, Tensor lse, Tensor delta, Tensor(a!) dk, Tensor(b!) dv",
            _launch_dkv,
        ),
    )
)
