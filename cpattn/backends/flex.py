"""`flex`: torch.nn.attention.flex_attention over block masks that are built straight from slices.

The keys that a row sees are at most `MAX_INTERVALS` intervals, held in a tensor [2 R, Q] that the mask
function reads; what more there are go into another pass. Tensors are padded to buckets of lengths,
and R is 1, 2 or 4, so a new mask of the same shape class runs the same compiled code.

Backward on CUDA goes through autograd, with gradients into both results of the part. Let w = exp(lse
of the part - lse of the whole), per row. With dout_part = w * dout and
dlse_part = w * (dout . out_part - dout . out), flex's own formula
p * (dout_part . v - dout_part . out_part + dlse_part) is p w (dout . v - dout . out): the part of the
whole's gradient, exactly. It costs a second forward of the part. The alternative, calling the
higher-order op `flex_attention_backward` with the whole's out and lse, would save that, but its
arguments are traced graphs and change between torch releases; this needs public API only.

On CPU torch (2.13) compiles no log-sum-exp and has no backward: forward runs uncompiled, a block of
rows at a time, and backward is computed here from the same intervals.

Shape legend as in `base.py`; R intervals of a row, P and L rows of queries and keys after padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from cpattn.collectives import put_on
from cpattn.solver import SliceTable

from .base import (
    FLOAT_DTYPES,
    HALF_DTYPES,
    Attending,
    KeyRows,
    Problem,
    Returning,
    Scoring,
    bucket,
    pad_head_dim,
    refuse_dtype,
)
from .nonfinite import (
    Sight,
    contained_backward,
    contained_forward,
    per_key_head,
    per_query_head,
    row_intervals,
    unfinite_rows,
    zeroed,
)
from .rows import merge_rows

# score, batch, head, query row, key row -> score, after scaling and the softcap.
ScoreMod: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

BLOCK = 128
MAX_INTERVALS = 4
# Scores of a block of rows, over all heads, that the CPU path holds at a time.
_CPU_BLOCK_SCORES = 1 << 22


class Pass(NamedTuple):
    """One call: a block mask over padded rows.

    bounds: int32 [2 R, P]: first keys of the R intervals of each row, then their ends.
    kinds: int8 [P / BLOCK, L / BLOCK]: blocks that are hidden (0), seen in part (1) or whole (2).
    blocks: the `BlockMask` of the whole call.
    """

    bounds: Tensor
    kinds: np.ndarray
    blocks: Any

    @property
    def sight(self) -> Sight:
        """What the padded rows see; rows with fewer intervals see empty ones."""
        intervals, num_rows = len(self.bounds) // 2, self.bounds.shape[1]
        rows = torch.arange(num_rows, device=self.bounds.device).repeat(intervals)
        first, end = self.bounds.long().split(intervals)
        return Sight(rows, first.flatten(), end.flatten())


@dataclass(slots=True)
class _Work:
    slices: SliceTable
    num_queries: int
    num_keys: int
    device: torch.device
    cached: list[Pass] | None = field(default=None, repr=False)

    @property
    def passes(self) -> list[Pass]:
        if self.cached is None:
            self.cached = make_passes(self.slices, self.num_queries, self.num_keys, self.device)
        return self.cached


def _slices_of(work: _Work) -> SliceTable:
    return work.slices


@dataclass(frozen=True, slots=True)
class FlexBackend:
    """flex_attention; compiled on CUDA.

    score_mod: changes scores as flex_attention's does; row numbers are those of the local buffers.
        It must be differentiable in the score, and take index tensors that broadcast with it.
    """

    score_mod: ScoreMod | None = None
    name: str = "flex"
    kernel: str = "torch's flex_attention (compiled on CUDA)"

    def refusal(self, problem: Problem) -> str | None:
        if problem.device_type not in ("cuda", "cpu"):
            return f"flex_attention runs on cuda and cpu, the tensors are on {problem.device_type}"
        accepted = FLOAT_DTYPES if problem.device_type == "cpu" else (*HALF_DTYPES, torch.float32)
        return refuse_dtype(problem, accepted)

    def prepare(self, slices: SliceTable, num_queries: int, num_keys: int, device: torch.device) -> _Work:
        return _Work(slices, num_queries, num_keys, device)

    def warm(self, work: _Work, problem: Problem) -> None:
        """Make the passes and their tables of blocks."""
        _ = work.passes

    def writes_once(self, work: _Work) -> bool:
        return len(work.passes) <= 1

    @contained_forward(_slices_of, but_on="cuda")
    def forward(
        self, queries: Attending, keys: KeyRows, work: _Work, scoring: Scoring, *, fresh: bool = False
    ) -> None:
        (q_QND, out_QNE, lse_QN), (k_KGD, v_KGE) = queries, keys
        scale, score_mod = scoring.scale, self._score_mod(scoring.softcap)
        # Inside an operation of `torch.library` they still require gradients, and flex_attention looks at that.
        q, k, v = (t.detach() for t in (q_QND, k_KGD, v_KGE))
        run = _forward_cpu if q.device.type == "cpu" else _forward_cuda
        for number, step in enumerate(work.passes):
            out, lse = run(q, k, v, step, scale, score_mod)
            part_out = out[0, :, : len(q), : v.shape[-1]].transpose(0, 1)
            part_lse = lse[0, :, : len(q)].transpose(0, 1)
            first = fresh and number == 0
            merge_rows(out_QNE, lse_QN, slice(0, len(q)), part_out, part_lse, first=first)

    @contained_backward(_slices_of, but_on="cuda")
    def backward(
        self, queries: Returning, keys: KeyRows, work: _Work, scoring: Scoring, dkeys: KeyRows
    ) -> None:
        score_mod = self._score_mod(scoring.softcap)
        run = _backward_cpu if queries.q.device.type == "cpu" else _backward_cuda
        for step in work.passes:
            grads = run(queries, keys, step, scoring.scale, score_mod)
            for total, grad in zip((queries.dq, *dkeys), grads, strict=True):
                total.add_(grad)

    def _score_mod(self, softcap: float | None) -> ScoreMod | None:
        if softcap is None:
            return self.score_mod
        return _softcap(softcap, self.score_mod)


@lru_cache(maxsize=32)
def _softcap(cap: float, then: ScoreMod | None) -> ScoreMod:
    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        score = cap * torch.tanh(score / cap)
        return score if then is None else then(score, b, h, q, k)

    return score_mod


def make_passes(slices: SliceTable, num_queries: int, num_keys: int, device: torch.device) -> list[Pass]:
    """Block masks for a canonical slice table: one, unless rows see more than MAX_INTERVALS intervals."""
    rows, first, end = row_intervals(slices)
    starts = np.flatnonzero(np.append(True, rows[1:] != rows[:-1])) if len(rows) else np.zeros(0, np.int64)
    nth = np.arange(len(rows)) - np.repeat(starts, np.diff(np.append(starts, len(rows))))
    passes = []
    for number in range(int(nth.max(initial=-1)) // MAX_INTERVALS + 1):
        mine = nth // MAX_INTERVALS == number
        intervals = (rows[mine], first[mine], end[mine], nth[mine] % MAX_INTERVALS)
        passes.append(_make_pass(*intervals, bucket(num_queries), bucket(num_keys), device))
    return passes


def _make_pass(
    rows: np.ndarray,
    first: np.ndarray,
    end: np.ndarray,
    slot: np.ndarray,
    num_queries: int,
    num_keys: int,
    device: torch.device,
) -> Pass:
    intervals = 1 << int(slot.max(initial=0)).bit_length()
    bounds = np.zeros((2 * intervals, num_queries), dtype=np.int32)
    bounds[slot, rows] = first
    bounds[intervals + slot, rows] = end
    counts = _pairs_by_block(rows, first, end, num_queries // BLOCK, num_keys // BLOCK)
    kinds = ((counts > 0).astype(np.int8) + (counts == BLOCK * BLOCK)).astype(np.int8)
    on_device = put_on(device, torch.from_numpy(bounds))
    return Pass(on_device, kinds, _block_mask(kinds, on_device))


def _block_mask(kinds: np.ndarray, bounds: Tensor) -> Any:
    """The `BlockMask` of blocks of these kinds and rows of these bounds.

    Made from its tables: `BlockMask.from_kv_blocks` derives those of the keys under vmap, which fails in a compiled
    graph that calls attention.
    """
    from torch.nn.attention.flex_attention import BlockMask

    tables = [_block_table(k == kind, bounds.device) for k in (kinds, kinds.T) for kind in (1, 2)]
    (kv_num, kv_index), (full_kv_num, full_kv_index), (q_num, q_index), (full_q_num, full_q_index) = tables
    return BlockMask(
        seq_lengths=(kinds.shape[0] * BLOCK, kinds.shape[1] * BLOCK),
        kv_num_blocks=kv_num,
        kv_indices=kv_index,
        full_kv_num_blocks=full_kv_num,
        full_kv_indices=full_kv_index,
        q_num_blocks=q_num,
        q_indices=q_index,
        full_q_num_blocks=full_q_num,
        full_q_indices=full_q_index,
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=_interval_mask(bounds),
    )


def _block_table(blocks: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """How many blocks of each row of blocks, [1, 1, rows], and which come first, [1, 1, rows, columns]."""
    index = np.argsort(~blocks, axis=1, kind="stable").astype(np.int32)
    count = blocks.sum(1).astype(np.int32)
    on_device = [put_on(device, torch.from_numpy(x))[None, None] for x in (count, index)]
    return on_device[0], on_device[1]


def _pairs_by_block(
    rows: np.ndarray, first: np.ndarray, end: np.ndarray, q_blocks: int, k_blocks: int
) -> np.ndarray:
    """Visible pairs in every block, [q_blocks, k_blocks]; work by intervals and blocks, not pairs."""
    # The pairs before key x add BLOCK to all blocks left of x's and the rest to its own.
    spans = np.zeros((q_blocks, k_blocks + 1), dtype=np.int64)
    rest = np.zeros((q_blocks, k_blocks + 1), dtype=np.int64)
    for keys, sign in ((end, 1), (first, -1)):
        np.add.at(spans, (rows // BLOCK, keys // BLOCK), sign)
        np.add.at(rest, (rows // BLOCK, keys // BLOCK), sign * (keys % BLOCK))
    passed = spans[:, ::-1].cumsum(1)[:, ::-1][:, 1:]  # ends minus starts beyond each block
    counts: np.ndarray = passed * BLOCK + rest[:, :-1]
    return counts


def _interval_mask(bounds: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    intervals = bounds.shape[0] // 2

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = (k >= bounds[0, q]) & (k < bounds[intervals, q])
        for r in range(1, intervals):
            seen = seen | ((k >= bounds[r, q]) & (k < bounds[intervals + r, q]))
        return seen

    return mask_mod


def _padded(q_QND: Tensor, k_KGD: Tensor, v_KGE: Tensor, step: Pass) -> list[Tensor]:
    """[1, heads, rows, dim] with rows up to the buckets, and head dims that Triton takes."""
    lengths = (*step.blocks.seq_lengths, step.blocks.seq_lengths[1])
    padded = []
    for x, rows in zip((q_QND, k_KGD, v_KGE), lengths, strict=True):
        x = pad_head_dim(x, -(-x.shape[-1] // 16) * 16)
        if len(x) < rows:
            x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, rows - len(x)))
        padded.append(x.transpose(0, 1)[None])
    return padded


@lru_cache(maxsize=2)
def _compiled(backend: str) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, backend=backend, dynamic=False, fullgraph=True)


def _call(
    q: Tensor, k: Tensor, v: Tensor, step: Pass, scale: float, score_mod: ScoreMod | None
) -> tuple[Tensor, Tensor]:
    """(out [1, N, P, E], lse [1, N, P]) through the compiled function, or on CPU the traced one."""
    from torch.nn.attention.flex_attention import AuxRequest

    # One code object serves all shape classes, so its cache must hold them all.
    limits = torch._dynamo.config.patch(recompile_limit=1024, accumulated_recompile_limit=4096)
    with limits, _with_keys(_VMAP_KEYS):  # its mask function runs under vmap
        out, aux = _compiled("inductor" if q.device.type == "cuda" else "eager")(
            q,
            k,
            v,
            score_mod=score_mod,
            block_mask=step.blocks,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
            return_aux=AuxRequest(lse=True),
        )
    return out, aux.lse


def _forward_cuda(
    q_QND: Tensor, k_KGD: Tensor, v_KGE: Tensor, step: Pass, scale: float, score_mod: ScoreMod | None
) -> tuple[Tensor, Tensor]:
    """What is not finite is 0 to the kernel, and its results are NaN in the rows that see it."""
    bad_k, bad_v = unfinite_rows(k_KGD), unfinite_rows(v_KGE)
    q, k, v = _padded(q_QND, zeroed(k_KGD, bad_k), zeroed(v_KGE, bad_v), step)
    out, lse = _call(q, k, v, step, scale, score_mod)
    sight, num_heads = step.sight, q.shape[1]
    hit_k, hit = (
        per_query_head(sight.sees_any(bad, q.shape[2]), num_heads).T[None] for bad in (bad_k, bad_k | bad_v)
    )
    return out.masked_fill(hit.unsqueeze(-1), torch.nan), lse.masked_fill(hit_k, torch.nan)


def _backward_cuda(
    queries: Returning, keys: KeyRows, step: Pass, scale: float, score_mod: ScoreMod | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Through autograd, with the gradients of out and lse that the file's docstring derives.

    What is not finite is 0 to the kernel, and its results are NaN for what sees it or is seen by it.
    """
    rows, e = len(queries.q), keys.v.shape[-1]
    bad_keys = unfinite_rows(*keys)
    bad_rows = unfinite_rows(queries.q, queries.dout, queries.out) | queries.lse.isnan()
    k_KGD, v_KGE = (zeroed(t, bad_keys) for t in keys)
    q_QND, dout_QNE, out_QNE = (zeroed(t, bad_rows) for t in (queries.q, queries.dout, queries.out))
    lse_QN = queries.lse.masked_fill(bad_rows, torch.inf)  # probabilities of 0
    with _autograd():
        leaves = [t.detach().requires_grad_() for t in (q_QND, k_KGD, v_KGE)]
        q, k, v = _padded(leaves[0], leaves[1], leaves[2], step)
        out, lse = _call(q, k, v, step, scale, score_mod)
    dout = dout_QNE.float().transpose(0, 1)
    weight = torch.exp(lse[0, :, :rows] - lse_QN.T).unsqueeze(-1)
    apart = out.detach()[0, :, :rows, :e].float() - out_QNE.float().transpose(0, 1)
    dlse = torch.zeros_like(lse)
    dlse[0, :, :rows] = (weight * dout * apart).sum(-1)
    dpart = torch.zeros_like(out)
    dpart[0, :, :rows, :e] = weight * dout
    with _autograd():
        dq, dk, dv = torch.autograd.grad([out, lse], leaves, [dpart, dlse])
    num_heads, num_heads_kv = q_QND.shape[1], k_KGD.shape[1]
    hit_rows = bad_rows | per_query_head(step.sight.sees_any(bad_keys, q.shape[2])[:rows], num_heads)
    padded = torch.nn.functional.pad(bad_rows, (0, 0, 0, q.shape[2] - rows))
    hit_keys = bad_keys | step.sight.seen_by_any(per_key_head(padded, num_heads_kv), len(k_KGD))
    hits = (hit_rows, hit_keys, hit_keys)
    dq, dk, dv = (g.masked_fill(hit.unsqueeze(-1), torch.nan) for g, hit in zip((dq, dk, dv), hits, strict=True))
    return dq, dk, dv


# What torch leaves out below an operation of `torch.library`, and all of it below one in a compiled graph.
_AUTOGRAD_KEYS = ("AutogradFunctionality", "AutogradOther", "ADInplaceOrView")
_VMAP_KEYS = (
    "FuncTorchDynamicLayerFrontMode",
    "FuncTorchDynamicLayerBackMode",
    "FuncTorchBatched",
    "FuncTorchVmapMode",
    "FuncTorchGradWrapper",
    "PythonTLSSnapshot",
)


@contextmanager
def _with_keys(names: tuple[str, ...]) -> Iterator[None]:
    """Dispatch to these keys again where an operation has left them out."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for name in names:
        excluded = excluded.remove(getattr(torch._C.DispatchKey, name))
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded):
        yield


@contextmanager
def _autograd() -> Iterator[None]:
    """Autograd, also inside an operation of `torch.library`."""
    with _with_keys(_AUTOGRAD_KEYS), torch.enable_grad():
        yield


def _row_blocks(step: Pass, num_heads: int) -> list[slice]:
    num_queries, num_keys = step.blocks.seq_lengths
    size = max(BLOCK, _CPU_BLOCK_SCORES // (num_keys * num_heads) // BLOCK * BLOCK)
    return [slice(a, min(a + size, num_queries)) for a in range(0, num_queries, size)]


def _forward_cpu(
    q_QND: Tensor, k_KGD: Tensor, v_KGE: Tensor, step: Pass, scale: float, score_mod: ScoreMod | None
) -> tuple[Tensor, Tensor]:
    """A block of rows at a time: uncompiled flex_attention holds all scores."""
    q, k, v = _padded(q_QND, k_KGD, v_KGE, step)
    outs, sums = [], []
    for rows in _row_blocks(step, q.shape[1]):
        shift = rows.start
        kinds, bounds = step.kinds[shift // BLOCK : rows.stop // BLOCK], step.bounds[:, rows].contiguous()
        part = Pass(bounds, kinds, _block_mask(kinds, bounds))
        moved = score_mod
        if score_mod is not None and shift:
            moved = _shifted(score_mod, shift)
        out, lse = _call(q[:, :, rows].contiguous(), k, v, part, scale, moved)
        outs.append(out)
        sums.append(lse)
    return torch.cat(outs, 2), torch.cat(sums, 2)


@lru_cache(maxsize=256)
def _shifted(score_mod: ScoreMod, shift: int) -> ScoreMod:
    def moved(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score_mod(score, b, h, q + shift, k)

    return moved


def _backward_cpu(
    queries: Returning, keys: KeyRows, step: Pass, scale: float, score_mod: ScoreMod | None
) -> tuple[Tensor, Tensor, Tensor]:
    """By the formulas, a block of rows at a time, in the dtype of lse."""
    dtype, groups = queries.lse.dtype, queries.q.shape[1] // keys.k.shape[1]
    q, dout, out = (t.to(dtype) for t in (queries.q, queries.dout, queries.out))
    k, v = (t.to(dtype).repeat_interleave(groups, 1) for t in keys)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    mask = step.blocks.mask_mod
    at_keys = torch.arange(len(k))
    for block in _row_blocks(step, q.shape[1]):
        rows = slice(block.start, min(block.stop, len(q)))
        if rows.start >= len(q):
            break
        at_rows = torch.arange(rows.start, rows.stop)[:, None]
        visible = mask(at_rows[:1], at_rows[:1], at_rows, at_keys)
        scores = torch.einsum("qnd,knd->nqk", q[rows], k) * scale
        slope = None
        if score_mod is not None:
            scores, slope = _with_slope(score_mod, scores, at_rows, at_keys)
        p = torch.exp(scores.masked_fill(~visible, -torch.inf) - queries.lse[rows].T[..., None])
        delta = (dout[rows] * out[rows]).sum(-1).T[..., None]
        ds = p * (torch.einsum("qne,kne->nqk", dout[rows], v) - delta) * scale
        if slope is not None:
            ds = ds * slope
        dq[rows] = torch.einsum("nqk,knd->qnd", ds, k)
        dk += torch.einsum("nqk,qnd->knd", ds, q[rows])
        dv += torch.einsum("nqk,qne->kne", p, dout[rows])
    return dq, dk.unflatten(1, (-1, groups)).sum(2), dv.unflatten(1, (-1, groups)).sum(2)


def _with_slope(score_mod: ScoreMod, scores: Tensor, rows: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """The changed scores and their derivative by the score."""
    heads = torch.arange(len(scores))[:, None, None]
    with _autograd():
        leaf = scores.detach().requires_grad_()
        changed = score_mod(leaf, torch.zeros((), dtype=torch.int64), heads, rows, keys)
        (slope,) = torch.autograd.grad(changed.sum(), leaf)
    return changed.detach(), slope
