"""Slices as calls of a packed variable-length kernel, the interface of the flash-attention family.

Such a kernel takes packed rows with `cu_seqlens` and a bottom-right aligned window for the whole
call; a canonical slice is such a window as it is (`window_params`), so it needs no decomposition.
Slices whose rows already follow on each other in the buffers form one call on views; short ones
of the same window are gathered into one call. Source of the window identity: solver/kernel_tiles.py.

Shape legend as in `base.py`; T packed query rows, S packed key rows, B sequences.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from cpattn.collectives import put_on, row_kernels
from cpattn.collectives.call_kernels import MOST_CALLS, CallRows, merge_calls, sum_calls
from cpattn.solver import IntArray, SliceTable, expand_counts, window_params
from cpattn.solver.rounds import colour_rounds, group_windows, square_pieces

from .base import HALF_DTYPES, Attending, KeyRows, Returning, Scoring, Turn, aligned, kernel_head_dim, pad_head_dim
from .batches import rows_of_batches
from .rows import Rows, add_rows, as_rows, first_writers, merge_rows, take_queries, take_rows, take_together

# Runs of slices with fewer rows than this are gathered with others of their window: a launch costs
# about as much time as copying some thousand rows.
GATHER_BELOW_ROWS = 8192
# Most rows that one call gathers, which bounds the memory of the copies.
MAX_GATHERED_ROWS = 1 << 16
# With more windows than this, slices are brought to three masks first.
MAX_WINDOWS = 6
# And with more than this it is not tried whether they fit into fewer.
MAX_TRIED_WINDOWS = 64


@dataclass(frozen=True, slots=True, eq=False)
class VarlenCall:
    """One call: sequences packed from the rows of the buffers, under one window.

    left, right: extent of the bottom-right aligned window, -1 unbounded.
    cu_seqlens_q, cu_seqlens_k: int32 [B + 1] on the device.
    first: in forward, no earlier call of the work writes these query rows.
    """

    left: int
    right: int
    q_rows: Rows
    k_rows: Rows
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    first: bool

    @property
    def max_seqlen_k_for_fa2(self) -> int:
        """A max_seqlen_k with which FlashAttention 2 keeps the window as it is.

        It takes an extent of max_seqlen_k or more for an open side, and puts max_seqlen_k in the place of an open
        side beside a bounded one. A sequence with more queries than keys can have a right edge that far out
        which still cuts; none reaches max_seqlen_q. What is larger than need be costs empty blocks only.
        Source: csrc/flash_attn/flash_api.cpp (v2.8.3), mha_varlen_fwd, mha_varlen_bwd and set_params_fprop; the
        copy in torch, aten/src/ATen/native/transformers/cuda/flash_attn, does the same.
        """
        return max(self.max_seqlen_q, self.max_seqlen_k)


class VarlenBatch(NamedTuple):
    """Calls whose results are taken in by one launch, and the rows that these belong to; k_rows: in backward."""

    calls: tuple[VarlenCall, ...]
    q_rows: CallRows
    k_rows: CallRows


class VarlenWork(NamedTuple):
    """The calls of forward and those of backward.

    merged, summed: the same in batches, where the results of several calls are taken in by one launch; else nothing.
    in_turn: the rows of `summed` are those of a whole backward pass: what is the first there is stored.
    """

    forward: tuple[VarlenCall, ...]
    backward: tuple[VarlenCall, ...]
    merged: tuple[VarlenBatch, ...] = ()
    summed: tuple[VarlenBatch, ...] = ()
    in_turn: bool = False


class VarlenKernel(Protocol):
    """A packed kernel. lse is [N, T], natural log, fp32; grads have the dtype of q."""

    def forward(
        self, q_TND: Tensor, k_SGD: Tensor, v_SGE: Tensor, call: VarlenCall, scoring: Scoring
    ) -> tuple[Tensor, Tensor]: ...

    def backward(
        self,
        dout_TNE: Tensor,
        q_TND: Tensor,
        k_SGD: Tensor,
        v_SGE: Tensor,
        out_TNE: Tensor,
        lse_NT: Tensor,
        call: VarlenCall,
        scoring: Scoring,
    ) -> tuple[Tensor, Tensor, Tensor]: ...


def plan_varlen(
    slices: SliceTable,
    device: torch.device,
    num_queries: int | None = None,
    num_keys: int | None = None,
    turn: Turn | None = None,
) -> VarlenWork:
    """The calls that compute a canonical slice table over buffers of so many rows (None: as many as it needs).

    turn: of the work in its backward pass; None: it is all there is, or where it comes is told at each call.
    """
    groups = group_windows(slices) if len(_windows(slices)) <= MAX_TRIED_WINDOWS else []
    if len(slices) and not 0 < len(groups) <= MAX_WINDOWS:
        groups = group_windows(square_pieces(slices).table)
    runs = _runs(groups)
    rounds = [run._replace(slices=t) for run in runs for t in _query_rounds(run.slices)]
    flags = first_writers([r.slices for r in rounds])
    forward = tuple(_call(r, device, first) for r, first in zip(rounds, flags, strict=True))
    backward = tuple(_call(run, device, False) for run in runs)
    if not row_kernels.serves(device):
        return VarlenWork(forward, backward)
    num_queries = int(slices.q1.max(initial=0)) if num_queries is None else num_queries
    sizes = num_queries, int(slices.k1.max(initial=0)) if num_keys is None else num_keys
    merged = _batches(forward, [r.slices for r in rounds], sizes, device)
    summed = _batches(backward, [r.slices for r in runs], sizes, device, turn)
    return VarlenWork(forward, backward, merged, summed, turn is not None)


def _batches(
    calls: tuple[VarlenCall, ...],
    tables: list[SliceTable],
    sizes: tuple[int, int],
    device: torch.device,
    turn: Turn | None = None,
) -> tuple[VarlenBatch, ...]:
    """Calls that follow on each other: at most eight, with results for at most twice the rows there are."""
    ends, rows = [0], 0
    for number, table in enumerate(tables):
        rows += int((table.q1 - table.q0).sum())
        if number > ends[-1] and (number - ends[-1] == MOST_CALLS or rows > 2 * sizes[0]):
            ends.append(number)
            rows = int((table.q1 - table.q0).sum())
    ends.append(len(tables))
    spans = list(itertools.pairwise(ends))
    q_rows = rows_of_batches(sizes[0], [[_index(t.q0, t.q1) for t in tables[a:b]] for a, b in spans], device, turn)
    k_rows = rows_of_batches(sizes[1], [[_index(t.k0, t.k1) for t in tables[a:b]] for a, b in spans], device)
    return tuple(VarlenBatch(calls[a:b], q, k) for (a, b), q, k in zip(spans, q_rows, k_rows, strict=True))


def _index(starts: IntArray, ends: IntArray) -> IntArray:
    """The rows of [start, end) ranges, one after the other."""
    owner, position = expand_counts(ends - starts)
    return starts[owner] + position


class _Run(NamedTuple):
    """Slices that share a call: of one window, and either neighbours in the buffers or short."""

    left: int
    right: int
    slices: SliceTable


def _windows(slices: SliceTable) -> np.ndarray:
    return np.unique(np.stack(window_params(slices)), axis=1).T


def _runs(groups: list[tuple[int, int, SliceTable]]) -> list[_Run]:
    runs: list[_Run] = []
    for left, right, group in groups:
        group = group.take(np.lexsort((group.k0, group.q0)))
        joins = (group.q0[1:] == group.q1[:-1]) & (group.k0[1:] == group.k1[:-1])
        chain = np.concatenate([[0], np.cumsum(~joins)])
        lengths = (group.q1 - group.q0) + (group.k1 - group.k0)
        short = np.bincount(chain, lengths)[chain] < GATHER_BELOW_ROWS
        runs.extend(_Run(left, right, group.take(chain == c)) for c in np.unique(chain[~short]))
        batch = np.cumsum(np.where(short, lengths, 0)) // MAX_GATHERED_ROWS
        runs.extend(_Run(left, right, group.take(short & (batch == b))) for b in np.unique(batch[short]))
    return runs


def _query_rounds(slices: SliceTable) -> list[SliceTable]:
    return [slices.take(members) for members in colour_rounds(slices, disjoint_keys=False)]


def _call(run: _Run, device: torch.device, first: bool) -> VarlenCall:
    slices = run.slices
    return VarlenCall(
        run.left,
        run.right,
        as_rows(slices.q0, slices.q1, device),
        as_rows(slices.k0, slices.k1, device),
        _cu_seqlens(slices.q1 - slices.q0, device),
        _cu_seqlens(slices.k1 - slices.k0, device),
        int((slices.q1 - slices.q0).max()),
        int((slices.k1 - slices.k0).max()),
        first,
    )


def _cu_seqlens(lengths: np.ndarray, device: torch.device) -> Tensor:
    return put_on(device, torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)))


def run_varlen_forward(
    kernel: VarlenKernel,
    queries: Attending,
    keys: KeyRows,
    work: VarlenWork,
    scoring: Scoring,
    *,
    fresh: bool,
    last: bool | None = None,
) -> Attending:
    """All forward calls. last: None merges into the queries' accumulators, else as in `PlacingBackend.attend`."""
    head_dim, head_dim_v = kernel_head_dim(*keys), keys.v.shape[-1]
    q, k, v = (aligned(pad_head_dim(t, head_dim)) for t in (queries.q, *keys))

    def run(call: VarlenCall) -> tuple[Tensor, Tensor]:
        keys_there, values_there = take_together((k, v), call.k_rows)
        out, lse = kernel.forward(take_rows(q, call.q_rows), keys_there, values_there, call, scoring)
        return out[..., :head_dim_v], lse

    if work.merged and row_kernels.serves(q.device) and (last is not None or row_kernels.fused(*queries[1:])):
        return _merge_batches(run, queries, work.merged, head_dim_v, fresh=fresh, last=last)
    if fresh:
        clear(queries)
    for call in work.forward:
        out, lse = run(call)
        merge_rows(queries.out, queries.lse, call.q_rows, out, lse.T, first=fresh and call.first)
    return queries


def _merge_batches(
    run: Callable[[VarlenCall], tuple[Tensor, Tensor]],
    queries: Attending,
    batches: tuple[VarlenBatch, ...],
    head_dim_v: int,
    *,
    fresh: bool,
    last: bool | None,
) -> Attending:
    q, num_rows = queries.q, len(queries.q)
    so_far = None if fresh and last is not None else queries
    for number, batch in enumerate(batches):
        parts = [run(call) for call in batch.calls]
        if not parts and not fresh:
            continue
        if so_far is None and _is_whole(batch, num_rows) and parts[0][0].is_contiguous():
            so_far = Attending(q, parts[0][0], parts[0][1].T)
            continue
        final, so_far_out = last is True and number == len(batches) - 1, None if so_far is None else so_far.out
        out, before = _target(so_far_out, (*q.shape[:2], head_dim_v), q, final, in_place=last is None)
        lse = q.new_empty(q.shape[:2], dtype=torch.float32) if so_far is None else so_far.lse
        merge_calls(out, lse, parts, batch.q_rows, fresh=fresh, before=before)
        so_far = Attending(q, out, lse)
        parts.clear()  # before the next batch makes its own
    assert so_far is not None
    return so_far


def _target(
    so_far: Tensor | None, shape: tuple[int, ...], q: Tensor, final: bool, *, in_place: bool
) -> tuple[Tensor, Tensor | None]:
    """Where a launch puts its sums, and where it reads those so far, if elsewhere.

    In fp32, but the final ones in the dtype of q; in place where they lie in that dtype already.
    """
    if so_far is not None and (in_place or so_far.dtype == (q.dtype if final else torch.float32)):
        return so_far, None
    return q.new_empty(shape, dtype=q.dtype if final else torch.float32), so_far


def _is_whole(batch: VarlenBatch, num_rows: int) -> bool:
    """Whether it is one call that has a result for each row, in order: what it gives can stay as it is."""
    return len(batch.calls) == 1 and batch.calls[0].q_rows == slice(0, num_rows)


def clear(queries: Attending) -> None:
    """As if nothing had been seen."""
    queries.out.zero_()
    queries.lse.fill_(-torch.inf)


def run_varlen_backward(
    kernel: VarlenKernel,
    queries: Returning,
    keys: KeyRows,
    work: VarlenWork,
    scoring: Scoring,
    dkeys: KeyRows,
    *,
    fresh: tuple[bool, bool],
    last: bool | None = None,
) -> Tensor:
    """All backward calls; gives dq. fresh: whether those of queries, and of keys, are stored. last: as in forward."""
    dtype, d, e, head_dim = queries.q.dtype, keys.k.shape[-1], keys.v.shape[-1], kernel_head_dim(*keys)
    q, k, v = (aligned(pad_head_dim(t, head_dim)) for t in (queries.q, *keys))
    dout, out = (aligned(pad_head_dim(t.to(dtype), head_dim)) for t in (queries.dout, queries.out))

    def run(call: VarlenCall) -> tuple[Tensor, Tensor, Tensor]:
        dout_, q_, out_, lse_ = take_queries(dout, q, out, queries.lse, call.q_rows)
        k_, v_ = take_together((k, v), call.k_rows)
        dq, dk, dv = kernel.backward(dout_, q_, k_, v_, out_, lse_, call, scoring)
        return dq[..., :d], dk[..., :d], dv[..., :e]

    if work.summed and row_kernels.fused(*dkeys):
        totals = [_wide(t, len(work.summed)) for t in dkeys]
        dq = _sum_batches(run, queries, work, totals, fresh=fresh, last=last)
    else:
        totals = [_wide(t, len(work.backward)) for t in dkeys]
        dq = _wide(queries.dq, len(work.backward))
        _add_calls(run, (dq, *totals), work.backward, fresh)
    for total, target in zip((dq, *totals), (dq if last is not None else queries.dq, *dkeys), strict=True):
        if total is not target:
            target.copy_(total)
    return dq if last is not None else queries.dq


def _add_calls(
    run: Callable[[VarlenCall], tuple[Tensor, Tensor, Tensor]],
    totals: tuple[Tensor, ...],
    calls: tuple[VarlenCall, ...],
    fresh: tuple[bool, bool],
) -> None:
    """With torch's operators."""
    for total, stored in zip(totals, (fresh[0], fresh[1], fresh[1]), strict=True):
        if stored:
            total.zero_()
    for call in calls:
        for total, rows, part in zip(totals, (call.q_rows, call.k_rows, call.k_rows), run(call), strict=True):
            add_rows(total, rows, part)


def _sum_batches(
    run: Callable[[VarlenCall], tuple[Tensor, Tensor, Tensor]],
    queries: Returning,
    work: VarlenWork,
    dkeys: list[Tensor],
    *,
    fresh: tuple[bool, bool],
    last: bool | None,
) -> Tensor:
    """dq; dk and dv are added to dkeys."""
    q, in_place = queries.q, _wide(queries.dq, len(work.summed)) if last is None else queries.dq
    so_far = None if fresh[0] and last is not None else in_place
    stored = fresh[0] or work.in_turn, fresh[1]
    for number, batch in enumerate(work.summed):
        parts = [run(call) for call in batch.calls]
        if not parts and not any(fresh):
            continue
        if so_far is None and _is_whole(batch, len(q)) and parts[0][0].is_contiguous():
            so_far = parts[0][0]
            sum_calls([so_far[:0], *dkeys], parts, batch.q_rows, batch.k_rows, fresh=stored)
            continue
        final = last is True and number == len(work.summed) - 1
        so_far, before = _target(so_far, tuple(q.shape), q, final, in_place=last is None)
        sum_calls([so_far, *dkeys], parts, batch.q_rows, batch.k_rows, fresh=stored, before=before)
        parts.clear()
    assert so_far is not None
    return so_far


def _wide(target: Tensor, num_sums: int) -> Tensor:
    """Where to add up what goes into a target that may be of half precision (only where it is stored, not added to)."""
    half = target.dtype in HALF_DTYPES and num_sums > 1
    return torch.empty(target.shape, dtype=torch.float32, device=target.device) if half else target


class PlacingVarlen:
    """`PlacingBackend` for a backend with a packed kernel."""

    __slots__ = ()
    takes_turns = True

    def packed_kernel(self) -> VarlenKernel:
        raise NotImplementedError

    def packed_work(self, work: Any) -> VarlenWork:
        """What `prepare` gave, for the packed kernel."""
        raise NotImplementedError

    def places(self, queries: Tensor, work: Any) -> bool:
        """Where row kernels serve."""
        packed = self.packed_work(work)
        return queries.dtype in HALF_DTYPES and bool(packed.merged) and row_kernels.serves(queries.device)

    def attend(
        self, queries: Attending, keys: KeyRows, work: Any, scoring: Scoring, *, fresh: bool, last: bool
    ) -> Attending:
        packed = self.packed_work(work)
        return run_varlen_forward(self.packed_kernel(), queries, keys, packed, scoring, fresh=fresh, last=last)

    def differentiate(
        self,
        queries: Returning,
        keys: KeyRows,
        work: Any,
        scoring: Scoring,
        dkeys: KeyRows,
        *,
        fresh: tuple[bool, bool],
        last: bool,
    ) -> Tensor:
        kernel, packed = self.packed_kernel(), self.packed_work(work)
        return run_varlen_backward(kernel, queries, keys, packed, scoring, dkeys, fresh=fresh, last=last)


def writes_once(work: VarlenWork) -> bool:
    """Whether forward writes each query row once at most."""
    return len(work.merged) == 1 or all(call.first for call in work.forward)
