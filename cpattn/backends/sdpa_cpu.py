"""`sdpa` on CPU: torch's own flash kernel with log-sum-exp, few large calls.

The kernel (`aten::_scaled_dot_product_flash_attention_for_cpu`) knows full and top-left causal
masks and additive float masks. What it gets wrong is handled here: it crashes on empty inputs and
returns lse = 0 for rows that see nothing (no tile has either), reads garbage where the last
dimension is strided, and refuses values whose head dim differs from that of the keys. It computes
what a mask hides, so masks are left to the edges of bands; and small tiles of one shape at equal
distances, such as equal documents or the blocks of a window, go into one call as a batch of
(overlapping) views.

Shape legend as in `base.py`; B tiles of a call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from cpattn.solver import BANDED, CAUSAL, FULL, INV_CAUSAL, KernelTile, SliceTable, kernel_tiles

from .base import FLOAT_DTYPES, HALF_DTYPES, Attending, KeyRows, Problem, Returning, Scoring, pad_head_dim, refuse_dtype
from .nonfinite import contained_backward, contained_forward
from .rows import merge_rows

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# Tiles with more pairs than this are called one by one: a call costs nothing beside them, and the copies
# around a call (turned inputs, gradients to add) stay in the cache.
_MAX_BATCHED_PAIRS = 1 << 19
# Rows of queries and keys in one call, for the same reason.
_MAX_BATCHED_ROWS = 1 << 13
# From so many rows of queries and of keys on, a tile's heads are called one by one, with copies of q, k and v in which
# the rows of a head lie side by side: 2 to 3 % faster at 4096 rows, while at 2048 the copies cost what they bring.
_MANY_ROWS, _MANY_KEYS = 3072, 512
# Windows from this width on are cut into triangles, by whether the dtype is half, and whether this is
# backward. Half-precision products of backward are slow on few rows, so triangles pay earlier there
# (measured, launch/benchmarks/sdpa_cpu.py).
_MASK_BELOW = {(False, False): 1536, (False, True): 1536, (True, False): 1536, (True, True): 768}


# The kernel adds gradients up in the dtype of its inputs: those of queries over blocks of keys, those of keys over
# blocks of queries and over the query heads that share them. In 16 bits every addition rounds. So a tile of backward
# has at most eight blocks of 256 rows and four of 512 keys, and what tiles give is added in fp32: the error is at most
# some 1.7 times that of one product in 16 bits, however many rows there are.
_MAX_HALF_ROWS, _MAX_HALF_KEYS = 2048, 2048
_MAX_HALF_SUMS = 8


class _Call(NamedTuple):
    """Tiles of one shape at equal distances: tile b lies q_step * b rows and k_step * b keys on.

    first: no earlier call of the work writes these query rows.
    """

    tile: KernelTile
    num_tiles: int
    q_step: int
    k_step: int
    first: bool

    @property
    def num_rows(self) -> int:
        return self.tile.q1 - self.tile.q0

    @property
    def num_keys(self) -> int:
        return self.tile.k1 - self.tile.k0

    @property
    def one_rectangle(self) -> bool:
        """Whether the tiles are parts of one, cut between rows: they share all keys and no row."""
        return self.num_tiles == 1 or (self.k_step == 0 and self.q_step == self.num_rows)

    @property
    def large(self) -> bool:
        rows = self.num_tiles * self.num_rows
        return self.one_rectangle and rows >= _MANY_ROWS and self.num_keys >= _MANY_KEYS


@dataclass(slots=True)
class _Work:
    """A slice table and its calls, made at first use for each width of dtype and each direction."""

    slices: SliceTable
    num_queries: int
    planned: dict[tuple[bool, bool], tuple[_Call, ...]] = field(default_factory=dict)

    def calls(self, dtype: torch.dtype, *, backward: bool = False) -> tuple[_Call, ...]:
        kind = (dtype in HALF_DTYPES, backward)
        if kind not in self.planned:
            tiles = kernel_tiles(self.slices, mask_below=_MASK_BELOW[kind])
            if all(kind):
                tiles = [part for tile in tiles for part in _cut(tile)]
            self.planned[kind] = _batch_tiles(tiles, self.num_queries)
        return self.planned[kind]


def _slices_of(work: _Work) -> SliceTable:
    return work.slices


class CpuSdpaBackend:
    """torch's CPU flash attention over kernel tiles."""

    name = "sdpa"
    kernel = "torch's CPU flash attention"

    def refusal(self, problem: Problem) -> str | None:
        if problem.device_type != "cpu":
            return f"this kernel runs on cpu, the tensors are on {problem.device_type}"
        if problem.softcap:
            return "torch's CPU flash kernel has no softcap"
        return refuse_dtype(problem, FLOAT_DTYPES)

    def prepare(self, slices: SliceTable, num_queries: int, num_keys: int, device: torch.device) -> _Work:
        return _Work(slices, num_queries)

    def writes_once(self, work: _Work) -> bool:
        return all(c.first for dtype in (torch.float32, torch.bfloat16) for c in work.calls(dtype))

    def heaviest(self, work: _Work, dtype: torch.dtype) -> _Work:
        """A work of few calls that takes as much memory: of each kind of call those that no other outgrows."""
        calls = {backward: work.calls(dtype, backward=backward) for backward in (False, True)}
        planned = {(dtype in HALF_DTYPES, backward): _outgrown_by_none(some) for backward, some in calls.items()}
        return _Work(work.slices, work.num_queries, planned)

    @contained_forward(_slices_of)
    def forward(
        self, queries: Attending, keys: KeyRows, work: _Work, scoring: Scoring, *, fresh: bool = False
    ) -> None:
        (q_QND, out_QNE, lse_QN), (k_KGD, v_KGE) = queries, keys
        if not len(work.slices):
            return
        q, k, v = _same_head_dim(q_QND, k_KGD, v_KGE)
        for call in work.calls(q.dtype):
            for n, g in _heads_of_calls(call, q.shape[1], k.shape[1]):
                inputs = (q[:, n], k[:, g], v[:, g])
                _add_forward(call, *inputs, scoring.scale, out_QNE[:, n], lse_QN[:, n], fresh=fresh and call.first)

    @contained_backward(_slices_of)
    def backward(
        self, queries: Returning, keys: KeyRows, work: _Work, scoring: Scoring, dkeys: KeyRows
    ) -> None:
        (dout_QNE, q_QND, out_QNE, lse_QN, dq_QND), (k_KGD, v_KGE), (dk_KGD, dv_KGE) = queries, keys, dkeys
        if not len(work.slices):
            return
        q, k, v = _same_head_dim(q_QND, k_KGD, v_KGE)
        dout, out = (pad_head_dim(t.to(q.dtype), q.shape[-1]) for t in (dout_QNE, out_QNE))
        for call in work.calls(q.dtype, backward=True):
            for n, g in _heads_of_backward(call, q.dtype, q.shape[1], k.shape[1]):
                inputs = (dout[:, n], q[:, n], k[:, g], v[:, g], out[:, n], lse_QN[:, n])
                _add_backward(call, *inputs, scoring.scale, (dq_QND[:, n], dk_KGD[:, g], dv_KGE[:, g]))


# One call each, in a function of its own: what a call made is gone when the next one begins.


def _add_forward(
    call: _Call,
    q_QND: Tensor,
    k_KGD: Tensor,
    v_KGD: Tensor,
    scale: float,
    out_QNE: Tensor,
    lse_QN: Tensor,
    *,
    fresh: bool,
) -> None:
    """Merge what a call computes into the accumulators."""
    q, k, v = _inputs(call, q_QND, k_KGD, v_KGD)
    out, lse = _call_forward(call, q, k, v, scale)
    out, lse = out.transpose(1, 2)[..., : out_QNE.shape[-1]], lse.transpose(1, 2)
    for b in range(call.num_tiles):
        start = call.tile.q0 + b * call.q_step
        merge_rows(out_QNE, lse_QN, slice(start, start + call.num_rows), out[b], lse[b], first=fresh)


def _add_backward(
    call: _Call,
    dout_QND: Tensor,
    q_QND: Tensor,
    k_KGD: Tensor,
    v_KGD: Tensor,
    out_QND: Tensor,
    lse_QN: Tensor,
    scale: float,
    grads: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Add what a call computes to the gradients of q, k and v, whose head dims may be smaller."""
    q, k, v = _inputs(call, q_QND, k_KGD, v_KGD)
    dout, out = _queries(dout_QND, call), _queries(out_QND, call)
    lse = _queries(lse_QN.unsqueeze(-1), call).squeeze(-1)
    parts = _call_backward(call, dout, q, k, v, out, lse, scale)
    starts = ((call.tile.q0, call.q_step), (call.tile.k0, call.k_step), (call.tile.k0, call.k_step))
    for b in range(call.num_tiles):
        for grad, part, (start, step) in zip(grads, parts, starts, strict=True):
            rows = slice(start + b * step, start + b * step + part.shape[2])
            grad[rows].add_(part[b, ..., : grad.shape[-1]].transpose(0, 1))


def _forward_scratch(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> int:
    """Bytes that the forward kernel takes beyond its results: blocks of scores, for each thread.

    Source: aten/src/ATen/native/cpu/FlashAttentionKernel.cpp (2.13), `cpu_flash_attention`.
    """
    rows, keys = _kernel_block(q, k)
    elements = rows * (keys + q.shape[-1] + 2)
    reduced = rows * keys * q.itemsize if q.dtype in HALF_DTYPES else 0
    packed = 0
    if _packs_keys(q.dtype):  # all keys and values as the matrix units want them, and a block of keys for each thread
        packed, reduced = k.nbytes + v.nbytes, reduced + keys * q.shape[-1] * q.itemsize
    return packed + torch.get_num_threads() * (elements * _opmath_bytes(q) + reduced)


@functools.cache
def _packs_keys(dtype: torch.dtype) -> bool:
    """Whether this CPU has matrix units (AMX) for the dtype, for which the forward kernel packs keys and values.

    Source: aten/src/ATen/native/CPUBlas.cpp (2.13), `could_pack`.
    """
    units = {torch.bfloat16: "_is_amx_tile_supported", torch.float16: "_is_amx_fp16_supported"}
    return dtype in units and bool(getattr(torch.cpu, units[dtype], lambda: False)())


def _backward_scratch(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> int:
    """The same of the backward kernel, which also copies dout unless its rows lie side by side.

    Source: as above, `cpu_flash_attention_backward`.
    """
    rows, keys = _kernel_block(q, k)
    copied = 0 if dout.transpose(1, 2).is_contiguous() else dout.numel() * dout.itemsize
    elements = rows * (2 * keys + 1)
    # What oneDNN packs for a half-precision product of a whole block, as measured with AVX-512 BF16.
    reduced = 2 * rows * keys * q.itemsize + 640 * rows + 66688 if q.dtype in HALF_DTYPES else 0
    return copied + torch.get_num_threads() * (elements * _opmath_bytes(q) + reduced)


def _kernel_block(q: Tensor, k: Tensor) -> tuple[int, int]:
    """Rows of queries and of keys in a block of the kernel."""
    return _query_block(q.shape[2]), min(512, k.shape[2])


def _query_block(num_rows: int) -> int:
    return min(256 if num_rows >= 768 else 64 if num_rows >= 192 else 32, num_rows)


def _opmath_bytes(x: Tensor) -> int:
    return 8 if x.dtype == torch.float64 else 4


# What the kernels allocate where no dispatcher sees it, in bytes, from the arguments of a call.
SCRATCH: dict[Any, Callable[..., int]] = {_forward.default: _forward_scratch, _backward.default: _backward_scratch}


def _call_forward(call: _Call, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    tile = call.tile
    if tile.kind == INV_CAUSAL:
        # Turned by 180 degrees, an inverse-causal square is a causal one.
        out, lse = _forward(q.flip(2), k.flip(2), v.flip(2), 0.0, True, scale=scale)
        return out.flip(2), lse.flip(2)
    mask = _band_mask(tile, q.dtype) if tile.kind == BANDED else None
    out, lse = _forward(q, k, v, 0.0, tile.kind == CAUSAL, attn_mask=mask, scale=scale)
    return out, lse


def _call_backward(
    call: _Call, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    tile = call.tile
    if tile.kind == INV_CAUSAL:
        turned = (t.flip(2) for t in (dout, q, k, v, out, lse))
        dq, dk, dv = _backward(*turned, 0.0, True, scale=scale)
        return dq.flip(2), dk.flip(2), dv.flip(2)
    mask = _band_mask(tile, q.dtype) if tile.kind == BANDED else None
    dq, dk, dv = _backward(
        dout, q, k, v, out, lse, 0.0, tile.kind == CAUSAL, attn_mask=mask, scale=scale
    )
    return dq, dk, dv


def _queries(x_QND: Tensor, call: _Call) -> Tensor:
    return _stacked(x_QND, call.tile.q0, call.num_rows, call.num_tiles, call.q_step)


def _keys(x_KGD: Tensor, call: _Call) -> Tensor:
    return _stacked(x_KGD, call.tile.k0, call.num_keys, call.num_tiles, call.k_step)


def _heads_of_calls(call: _Call, num_q: int, num_kv: int) -> Iterator[tuple[slice, slice]]:
    """Query heads and the key heads they go with that share a call of the kernel.

    Of a large call one key head for each thread: the kernel's results and the copies of its inputs are then those of a
    few heads and stay in the cache. Else all heads.
    """
    together = torch.get_num_threads() if call.large else num_kv
    group = num_q // num_kv
    for first in range(0, num_kv, together):
        last = min(first + together, num_kv)
        yield slice(first * group, last * group), slice(first, last)


def _heads_of_backward(call: _Call, dtype: torch.dtype, num_q: int, num_kv: int) -> Iterator[tuple[slice, slice]]:
    """The same for backward: one query head of each key head where a call of all of them would add too often."""
    group = num_q // num_kv
    sums = group * -(-call.num_rows // _query_block(call.num_rows))
    apart = group if dtype in HALF_DTYPES and sums > _MAX_HALF_SUMS else 1
    for n, g in _heads_of_calls(call, num_q, num_kv):
        for nth in range(apart):
            yield slice(n.start + nth, n.stop, apart), g


def _inputs(call: _Call, q_QND: Tensor, k_KGD: Tensor, v_KGD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a call, [B, heads, rows, D]; where it pays, copies with a head's rows side by side.

    The kernel reads each of them for every block of the others, and brings 16-bit keys into an order of its own each
    time. Tiles that share a call may share rows, which a copy would multiply.
    """
    q, k, v = _queries(q_QND, call), _keys(k_KGD, call), _keys(v_KGD, call)
    if call.large or (k.dtype in HALF_DTYPES and call.one_rectangle):
        k, v = (t[:1].contiguous().expand_as(t) for t in (k, v))
    return q.contiguous() if call.large else q, k, v


def _stacked(x_TND: Tensor, start: int, length: int, count: int, step: int) -> Tensor:
    """[B, N, length, D] view of `count` runs of rows, `step` rows apart; runs may overlap."""
    row, head, dim = x_TND.stride()
    shape = (count, x_TND.shape[1], length, x_TND.shape[2])
    return x_TND[start:].as_strided(shape, (step * row, head, row, dim))


def _cut(tile: KernelTile) -> Iterator[KernelTile]:
    """The pairs of a tile in tiles of few enough rows and keys for 16 bits; parts of the same keys are neighbours."""
    kind, q0, q1, k0, k1, lo, hi = tile
    if kind in (FULL, BANDED):
        for k in range(k0, k1, _MAX_HALF_KEYS):
            for q in range(q0, q1, _MAX_HALF_ROWS):
                rows, keys = min(_MAX_HALF_ROWS, q1 - q), min(_MAX_HALF_KEYS, k1 - k)
                shift = (q - q0) - (k - k0) if kind == BANDED else 0
                if kind == FULL or (lo + shift < keys and hi + shift > -rows):
                    yield KernelTile(kind, q, q + rows, k, k + keys, lo + shift, hi + shift)
    elif q1 - q0 <= _MAX_HALF_ROWS:
        yield tile
    else:  # a triangle: two of half the size, and the square between them
        half = -(-(q1 - q0) // (2 * _MAX_HALF_ROWS)) * _MAX_HALF_ROWS
        q, k = q0 + half, k0 + half
        yield from _cut(KernelTile(kind, q0, q, k0, k))
        yield from _cut(KernelTile(FULL, q, q1, k0, k) if kind == CAUSAL else KernelTile(FULL, q0, q, k, k1))
        yield from _cut(KernelTile(kind, q, q1, k, k1))


def _batch_tiles(tiles: list[KernelTile], num_queries: int) -> tuple[_Call, ...]:
    """Tiles as calls: small neighbours of one shape at equal distances share one."""
    calls: list[_Call] = []
    covered = np.zeros(num_queries, dtype=bool)
    for run in _equal_steps(tiles):
        first, count = run[0], len(run)
        fresh = not any(covered[t.q0 : t.q1].any() for t in run)
        for t in run:
            covered[t.q0 : t.q1] = True
        q_step, k_step = (run[1].q0 - first.q0, run[1].k0 - first.k0) if count > 1 else (0, 0)
        # Tiles of a run that share rows must be merged with each other.
        fresh = fresh and (count == 1 or abs(q_step) >= first.q1 - first.q0)
        calls.append(_Call(first, count, q_step, k_step, fresh))
    return tuple(calls)


def _outgrown_by_none(calls: tuple[_Call, ...]) -> tuple[_Call, ...]:
    # A large call, with few heads at once, may take less memory than a smaller one.
    kept: dict[tuple[int, bool, bool], dict[tuple[int, int, int], _Call]] = {}
    for call in calls:
        size = (call.num_tiles * call.num_rows, call.num_tiles * call.num_keys, call.num_rows)
        others = kept.setdefault((call.tile.kind, call.first, call.large), {})
        if any(all(a <= b for a, b in zip(size, other, strict=True)) for other in others):
            continue
        for other in [o for o in others if all(a >= b for a, b in zip(size, o, strict=True))]:
            del others[other]
        others[size] = call
    return tuple(call for others in kept.values() for call in others.values())


def _equal_steps(tiles: list[KernelTile]) -> list[list[KernelTile]]:
    runs: list[list[KernelTile]] = []
    for tile in tiles:
        if runs and _continues(runs[-1], tile):
            runs[-1].append(tile)
        else:
            runs.append([tile])
    return runs


def _continues(run: list[KernelTile], tile: KernelTile) -> bool:
    first, last = run[0], run[-1]
    rows, keys = tile.q1 - tile.q0, tile.k1 - tile.k0
    q_step, k_step = tile.q0 - last.q0, tile.k0 - last.k0
    return (
        (rows, keys) == (first.q1 - first.q0, first.k1 - first.k0)
        and (tile.kind, tile.lo, tile.hi) == (first.kind, first.lo, first.hi)
        and _fits(rows, keys, len(run) + 1, (q_step, k_step) == (rows, 0))
        and q_step >= 0
        and k_step >= 0
        and (len(run) == 1 or (q_step, k_step) == (run[1].q0 - first.q0, run[1].k0 - first.k0))
    )


def _fits(rows: int, keys: int, count: int, one_rectangle: bool) -> bool:
    """Whether so many tiles of a shape may share a call; parts of one rectangle have their keys in it once."""
    if one_rectangle:
        return rows * count <= 2 * _MAX_BATCHED_ROWS
    return rows * keys <= _MAX_BATCHED_PAIRS and (rows + keys) * count <= _MAX_BATCHED_ROWS


def _same_head_dim(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    head_dim = max(k.shape[-1], v.shape[-1])
    return pad_head_dim(q, head_dim), pad_head_dim(k, head_dim), pad_head_dim(v, head_dim)


def _band_mask(tile: KernelTile, dtype: torch.dtype) -> Tensor:
    return _additive_band(tile.q1 - tile.q0, tile.k1 - tile.k0, tile.lo, tile.hi, dtype)


@lru_cache(maxsize=32)
def _additive_band(rows: int, keys: int, lo: int, hi: int, dtype: torch.dtype) -> Tensor:
    """0 inside the band and -inf outside; blocks of one window share it.

    Always a tensor with data, also where the call it is made for is one of tensors without (`FakeTensorMode`): the
    next call with data may get it.
    """
    with _disable_current_modes():
        band = torch.ones(rows, keys, dtype=torch.bool).triu_(lo).tril_(hi)
        return torch.full((rows, keys), -torch.inf, dtype=dtype).masked_fill_(band, 0)
