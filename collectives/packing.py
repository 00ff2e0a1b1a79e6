"""Rows of several tensors side by side, as bytes, in one buffer: how they travel."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import row_kernels

# Kernels read rows, also those that lie side by side with others, 16 bytes at a time; 8-bit codes are decoded before.
_ALIGN, _ALIGN_CODES = 16, 8


def packed_row_bytes(rows: Sequence[Tensor]) -> int:
    """Bytes of one row of several tensors side by side in a buffer, as it travels."""
    return sum(_aligned_bytes(t.shape[1:], t.dtype) for t in rows)


def unpack_rows(packed: Tensor, like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The tensors that lie side by side in a packed buffer, as views; `like` has their row shapes and dtypes."""
    return unpack(packed, [(t.shape[1:], t.dtype) for t in like])


def _row_bytes(shape: torch.Size, dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _aligned_bytes(shape: torch.Size, dtype: torch.dtype) -> int:
    """Of a row, with what keeps the next one aligned."""
    multiple = _ALIGN_CODES if dtype == torch.uint8 else _ALIGN
    return -(-_row_bytes(shape, dtype) // multiple) * multiple


def empty_packed(
    num_rows: int, shapes: Sequence[tuple[torch.Size, torch.dtype]], device: torch.device
) -> Tensor:
    """A buffer for rows of tensors side by side; a single tensor travels as it is."""
    if len(shapes) == 1:
        (shape, dtype), *_ = shapes
        return torch.empty(num_rows, *shape, dtype=dtype, device=device)
    width = sum(_aligned_bytes(shape, dtype) for shape, dtype in shapes)
    return torch.empty(num_rows, width, dtype=torch.uint8, device=device)


def gather_packed(tensors: Sequence[Tensor], index: Tensor) -> Tensor:
    """The rows `index` of several tensors side by side in one buffer, each copied once."""
    shapes = [(t.shape[1:], t.dtype) for t in tensors]
    packed = empty_packed(index.numel(), shapes, index.device)
    if row_kernels.can_pack(tensors):
        row_kernels.pack_rows(packed, [t.detach() for t in tensors], _places(shapes), index)
        return packed
    for tensor, view in zip(tensors, unpack(packed, shapes), strict=True):
        torch.index_select(tensor.detach(), 0, index, out=view)
    return packed


def _places(shapes: Sequence[tuple[torch.Size, torch.dtype]]) -> list[int]:
    """The byte of a packed row at which each tensor begins."""
    sizes = [_aligned_bytes(shape, dtype) for shape, dtype in shapes]
    return [sum(sizes[:nth]) for nth in range(len(sizes))]


def pack_side_by_side(tensors: list[Tensor]) -> Tensor:
    """Rows of several tensors side by side in one buffer."""
    if len(tensors) == 1:
        return tensors[0].contiguous()
    shapes = [(t.shape[1:], t.dtype) for t in tensors]
    packed = empty_packed(tensors[0].shape[0], shapes, tensors[0].device)
    if row_kernels.can_pack(tensors):
        row_kernels.pack_rows(packed, [t.detach() for t in tensors], _places(shapes), None)
        return packed
    for tensor, view in zip(tensors, unpack(packed, shapes), strict=True):
        view.copy_(tensor)
    return packed


def unpack(packed: Tensor, shapes: Sequence[tuple[torch.Size, torch.dtype]]) -> tuple[Tensor, ...]:
    """The tensors that lie side by side in the rows of a packed buffer, as views."""
    if len(shapes) == 1:
        return (packed,)
    views, at = [], 0
    for shape, dtype in shapes:
        nbytes = _row_bytes(shape, dtype)
        columns = packed[:, at : at + nbytes].view(dtype)
        views.append(columns.unflatten(1, shape) if shape else columns.squeeze(1))
        at += _aligned_bytes(shape, dtype)
    return tuple(views)
