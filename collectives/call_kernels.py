"""What several calls of an attention kernel have for the same rows, merged or added up in one launch, in Triton.

A kernel that knows one window a call gives its results part by part. Taken one by one each part reads and writes the
accumulators; here up to four are read beside one another, and the accumulators once. Operators of torch, as in
`row_kernels.py`, whose `fused` says where they serve.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .devices import put_on

# Calls of which one launch takes the results.
MOST_CALLS = 4
_BLOCK = 1024


class CallRows(NamedTuple):
    """What calls have for the rows of a buffer: row i gets entries order[offsets[i] : offsets[i + 1]], in that order.

    offsets int32 [rows + 1], order int32: 4 * (row of the call's result) + (number of the call).
    """

    offsets: Tensor
    order: Tensor

    @classmethod
    def of(cls, num_rows: int, rows_of_calls: Sequence[Tensor], device: torch.device) -> CallRows:
        """rows_of_calls: int64 on the CPU, for each call the rows that its results belong to; a row may occur again."""
        none = torch.zeros(0, dtype=torch.int64)
        entries = [MOST_CALLS * torch.arange(len(r)) + number for number, r in enumerate(rows_of_calls)]
        rows, at = torch.sort(torch.cat([none, *rows_of_calls]), stable=True)
        offsets = torch.searchsorted(rows, torch.arange(num_rows + 1))
        return cls(*(put_on(device, x.to(torch.int32)) for x in (offsets, torch.cat([none, *entries])[at])))


def merge_calls(
    out_THD: Tensor, lse_TH: Tensor, outs: Sequence[Tensor], lses: Sequence[Tensor], rows: CallRows, *, fresh: bool
) -> None:
    """Merge results [R, H, D] and [H, R] of up to four calls into rows, in one launch; fresh: store, in every row."""
    if out_THD.numel():
        torch.ops.cpattn.merge_calls(out_THD, lse_TH, list(outs), list(lses), *rows, fresh)


def sum_calls(
    into: Sequence[Tensor],
    parts: Sequence[Sequence[Tensor]],
    q_rows: CallRows,
    k_rows: CallRows,
    *,
    fresh_q: bool,
    fresh_k: bool,
) -> None:
    """Add the gradients (dq, dk, dv) of up to four calls to theirs, in one launch; fresh: store, in every row."""
    if any(t.numel() for t in into):
        flat = [t for of_call in parts for t in of_call]
        torch.ops.cpattn.sum_calls(list(into), flat, *q_rows, *k_rows, fresh_q, fresh_k)


def _four(tensors: Sequence[Tensor], like: Tensor) -> list[Tensor]:
    """Pointers that a kernel may not read still have to be something."""
    return [*tensors, *[like] * (MOST_CALLS - len(tensors))]


def _width(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _launch_merge(
    out: Tensor, lse: Tensor, outs: list[Tensor], lses: list[Tensor], offsets: Tensor, order: Tensor, fresh: bool
) -> None:
    from .row_kernels_triton import merge_calls_kernel

    num_heads, dim = out.shape[1:]
    outs, lses = _alike(outs), [t.contiguous() for t in lses]
    strides = [*out.stride()[:2], *lse.stride()[:2], *(outs[0].stride()[:2] if outs else (0, 0))]
    num_rows = [t.shape[1] for t in lses]
    merge_calls_kernel[(len(out),)](
        out, lse, *_four(outs, out), *_four(lses, lse), offsets, order, num_heads, *strides,
        *num_rows, *[0] * (MOST_CALLS - len(lses)), dim=dim, width=_width(dim), heads=_width(num_heads),
        count=max(1, len(outs)), fresh=fresh,
    )  # fmt: skip


def _launch_sum(
    into: list[Tensor], parts: list[Tensor], q_offsets: Tensor, q_order: Tensor, k_offsets: Tensor, k_order: Tensor,
    fresh_q: bool, fresh_k: bool,
) -> None:  # fmt: skip
    from .row_kernels_triton import sum_calls_kernel

    by_buffer = [_alike(parts[nth::3]) for nth in range(3)]
    numbers, most = [], 1
    for total, mine in zip(into, by_buffer, strict=True):
        cols = math.prod(total.shape[1:])
        numbers += [total.stride(0), cols, max(1, total.shape[-1]), *(mine[0].stride()[:2] if mine else (0, 0))]
        most = max(most, -(-cols // _BLOCK))
    pointers = [p for total, mine in zip(into, by_buffer, strict=True) for p in _four(mine, total)]
    sum_calls_kernel[(len(into[0]) + len(into[1]), most)](
        *into, *pointers, q_offsets, q_order, k_offsets, k_order, len(into[0]), *numbers,
        count=max(1, len(by_buffer[0])), fresh_q=fresh_q, fresh_k=fresh_k, block=_BLOCK,
    )  # fmt: skip


def _alike(parts: list[Tensor]) -> list[Tensor]:
    """Parts with the same strides, the last dimension contiguous; kernels give them so."""
    same = len({t.stride() for t in parts}) <= 1 and all(t.stride(-1) == 1 for t in parts)
    return parts if same else [t.contiguous() for t in parts]


_library = torch.library.Library("cpattn", "FRAGMENT")
for _name, _arguments, _launch in (
    (
        "merge_calls",
        "Tensor(a!) out, Tensor(b!) lse, Tensor[] outs, Tensor[] lses, Tensor offsets, Tensor order, bool fresh",
        _launch_merge,
    ),
    (
        "sum_calls",
        "Tensor(a!)[] into, Tensor[] parts, Tensor q_offsets, Tensor q_order, Tensor k_offsets, Tensor k_order, "
        "bool fresh_q, bool fresh_k",
        _launch_sum,
    ),
):
    _library.define(f"{_name}({_arguments}) -> ()")
    for _device in ("CPU", "CUDA"):
        _library.impl(_name, _launch, _device)
    _library.impl(_name, lambda *_: None, "Meta")
