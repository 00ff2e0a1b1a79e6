"""What several calls of an attention kernel have for the same rows, merged or added up in one launch, in Triton.

A kernel that knows one window a call gives its results part by part. Taken one by one each part reads and writes the
accumulators; here up to eight are read beside one another, and the accumulators once, in or out of half precision on
the way. Operators of torch, as in `row_kernels.py`, whose `fused` says where they serve.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .devices import define_launches

# Calls of which one launch takes the results.
MOST_CALLS = 8
# Entries: ROW * (row of the call's result) + FIRST * (first of its row) + (number of the call, NONE: of none).
NONE, FIRST, ROW = 15, 16, 32
_BLOCK = 1024


class CallRows(NamedTuple):
    """What calls have for the rows of a buffer: row i gets entries order[offsets[i] : offsets[i + 1]], in that order.

    offsets int32 [rows + 1], order int32. A row's first entry in any launch of a work says so, and where rows are to be
    written whose calls have nothing for them, there is an entry of none.
    """

    offsets: Tensor
    order: Tensor


def merge_calls(
    out_THD: Tensor,
    lse_TH: Tensor,
    parts: Sequence[tuple[Tensor, Tensor]],
    rows: CallRows,
    *,
    fresh: bool,
    before: Tensor | None = None,
) -> None:
    """Merge results ([R, H, D], [H, R]) of up to eight calls into rows, in one launch.

    fresh: rows hold nothing before their first entry, and the first launch writes those without any too. before: out so
    far, in another dtype; then all rows of out are written, and lse stays where it is.
    """
    if out_THD.numel():
        outs, lses = [out for out, _ in parts], [lse for _, lse in parts]
        torch.ops.cpattn.merge_calls(out_THD, lse_TH, before, outs, lses, *rows, fresh)


def sum_calls(
    into: Sequence[Tensor],
    parts: Sequence[Sequence[Tensor]],
    q_rows: CallRows,
    k_rows: CallRows,
    *,
    fresh: tuple[bool, bool],
    before: Tensor | None = None,
) -> None:
    """Add the gradients (dq, dk, dv) of up to eight calls to theirs, in one launch; fresh, before: as in `merge_calls`.

    fresh: of dq, and of dk and dv. before: of dq. A dq of no rows is left out.
    """
    if any(t.numel() for t in into):
        flat = [t for of_call in parts for t in of_call]
        torch.ops.cpattn.sum_calls(list(into), before, flat, *q_rows, *k_rows, *fresh)


def _width(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _launch_merge(
    out: Tensor, lse: Tensor, before: Tensor | None, outs: list[Tensor], lses: list[Tensor], offsets: Tensor,
    order: Tensor, fresh: bool,
) -> None:  # fmt: skip
    from .row_kernels_triton import merge_calls_kernel

    num_heads, dim = out.shape[1:]
    outs, lses, before_ = _alike(outs), [t.contiguous() for t in lses], out if before is None else before
    strides = [s for t in (out, before_, lse, *outs[:1]) for s in t.stride()[:2]]
    num_rows = tuple(t.shape[1] for t in lses)
    merge_calls_kernel[(len(out),)](
        out, lse, before_, tuple(outs) or (out,), tuple(lses) or (lse,), num_rows or (0,), offsets, order, num_heads,
        *strides, *(() if outs else (0, 0)), dim=dim, width=_width(dim), heads=_width(num_heads), count=len(outs),
        fresh=fresh, converts=before is not None, num_warps=8,
    )  # fmt: skip


def _launch_sum(
    into: list[Tensor], before: Tensor | None, parts: list[Tensor], q_offsets: Tensor, q_order: Tensor,
    k_offsets: Tensor, k_order: Tensor, fresh_q: bool, fresh_k: bool,
) -> None:  # fmt: skip
    from .row_kernels_triton import sum_calls_kernel

    by_buffer = [_alike(parts[nth::3]) for nth in range(3)]
    numbers, most = [], 1
    for total, mine in zip(into, by_buffer, strict=True):
        cols = math.prod(total.shape[1:])
        numbers += [total.stride(0), cols, max(1, total.shape[-1]), *(mine[0].stride()[:2] if mine else (0, 0))]
        most = max(most, -(-cols // _BLOCK))
    before_ = into[0] if before is None else before
    sum_calls_kernel[(len(into[0]) + len(into[1]), most)](
        *into, before_, *(tuple(mine) or (before_,) for mine in by_buffer), q_offsets, q_order, k_offsets, k_order,
        len(into[0]), *numbers, before_.stride(0), count=len(by_buffer[0]), fresh_q=fresh_q, fresh_k=fresh_k,
        converts=before is not None, block=_BLOCK,
    )  # fmt: skip


def _alike(parts: list[Tensor]) -> list[Tensor]:
    """Parts with the same strides, the last dimension contiguous; kernels give them so."""
    same = len({t.stride() for t in parts}) <= 1 and all(t.stride(-1) == 1 for t in parts)
    return parts if same else [t.contiguous() for t in parts]


_ROWS = "Tensor offsets, Tensor order"
_library = define_launches(
    (
        (
            "merge_calls",
            f"Tensor(a!) out, Tensor(b!) lse, Tensor? before, Tensor[] outs, Tensor[] lses, {_ROWS}, bool fresh",
            _launch_merge,
        ),
        (
            "sum_calls",
            "Tensor(a!)[] into, Tensor? before, Tensor[] parts, Tensor q_offsets, Tensor q_order, Tensor k_offsets, "
            "Tensor k_order, bool fresh_q, bool fresh_k",
            _launch_sum,
        ),
    )
)
