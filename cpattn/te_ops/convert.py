"""Format conversions of TransformerEngine's attention extension, in plain torch on any device.

Where the originals read or write out of bounds without a word, these raise. The conversions have gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .layouts import sequence_lengths
from .te_import import call_extension


def mha_fill(tensor: Tensor, start_index: Tensor | int, value: float = 0.0) -> Tensor:
    """Set the rows from start_index on to a value, in place, without a host sync; returns the tensor.

    Args:
        tensor: [t, ...], any dtype.
        start_index: an int or a tensor of one element, on the tensor's device; rows below it stay.
        value: TransformerEngine's own fills with 0 only and demands rows of 512 bytes; this one has no such demand.

    Raises:
        ValueError: start_index has more than one element.
    """
    rows = torch.arange(tensor.shape[0], device=tensor.device)
    if isinstance(start_index, Tensor):
        if start_index.numel() != 1:
            raise ValueError(f"start_index has shape {tuple(start_index.shape)}: expected one element")
        start_index = start_index.reshape(()).to(tensor.device)
    tail = rows >= start_index
    return tensor.masked_fill_(tail.view(-1, *[1] * (tensor.ndim - 1)), value)


def convert_thd_to_bshd(
    tensor: Tensor, cu_seqlens: Tensor, b: int, max_seq_len: int, *, impl: str = "portable"
) -> Tensor:
    """Packed tokens as a padded batch, padding 0.

    Args:
        tensor: [t, h, d], sequence i at rows cu_seqlens[i] to cu_seqlens[i + 1].
        cu_seqlens: int32 [b + 1].
        b: number of sequences.
        max_seq_len: rows of each sequence in the result.
        impl: "te" calls TransformerEngine (without gradient), after the same checks.

    Returns:
        [b, max_seq_len, h, d]. Gradient: `convert_bshd_to_thd`.

    Raises:
        ValueError: a sequence is longer than max_seq_len (TransformerEngine overruns into the next row), cu_seqlens
            is not int32 [b + 1], or reaches beyond t.
    """
    index = _padded_index(tensor.shape[0], cu_seqlens, b, max_seq_len, tensor.device)
    if impl == "te":
        return call_extension("convert_thd_to_bshd", tensor, cu_seqlens, b, max_seq_len)  # type: ignore[no-any-return]
    return _ThdToBshd.apply(tensor, index, b, max_seq_len)  # type: ignore[no-any-return]


def convert_bshd_to_thd(tensor: Tensor, cu_seqlens: Tensor, t: int, *, impl: str = "portable") -> Tensor:
    """A padded batch as packed tokens; the inverse of `convert_thd_to_bshd`.

    Args:
        tensor: [b, s, h, d].
        cu_seqlens: int32 [b + 1].
        t: rows of the result; those from cu_seqlens[b] on are 0.

    Returns:
        [t, h, d]. Gradient: `convert_thd_to_bshd`.

    Raises:
        ValueError: a sequence is longer than s, cu_seqlens is not int32 [b + 1], or reaches beyond t.
    """
    b, s = tensor.shape[:2]
    index = _padded_index(t, cu_seqlens, b, s, tensor.device)
    if impl == "te":
        return call_extension("convert_bshd_to_thd", tensor, cu_seqlens, t)  # type: ignore[no-any-return]
    return _BshdToThd.apply(tensor, index, t)  # type: ignore[no-any-return]


def _padded_index(t: int, cu_seqlens: Tensor, b: int, max_seq_len: int, device: torch.device) -> Tensor:
    """For each packed token, from the first, its row in the flattened padded batch."""
    lengths = sequence_lengths(cu_seqlens, "cu_seqlens")
    if len(lengths) != b:
        raise ValueError(f"cu_seqlens has {len(lengths) + 1} entries: expected {b + 1} for b = {b}")
    first, total = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0 or total > t:
        raise ValueError(f"cu_seqlens runs from {first} to {total}: expected a start at 0 and at most t = {t}")
    if lengths.max(initial=0) > max_seq_len:
        raise ValueError(f"a sequence has {lengths.max()} tokens: it does not fit max_seq_len = {max_seq_len}")
    counts = torch.from_numpy(lengths).to(device)
    sequence = torch.repeat_interleave(torch.arange(b, device=device), counts)
    token = torch.arange(total, device=device)
    return sequence * max_seq_len + token - cu_seqlens.to(device).long()[sequence]


class _ThdToBshd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, b: int, s: int) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = x.shape[0]
        out = x.new_zeros((b * s, *x.shape[1:]))
        return out.index_copy_(0, index, x[: len(index)]).unflatten(0, (b, s))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (index,) = ctx.saved_tensors
        return _BshdToThd.apply(grad, index, ctx.rows), None, None, None


class _BshdToThd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, t: int) -> Tensor:
        ctx.save_for_backward(index)
        ctx.batch = x.shape[:2]
        out = x.new_zeros((t, *x.shape[2:]))
        out[: len(index)] = x.flatten(0, 1).index_select(0, index)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return _ThdToBshd.apply(grad, index, *ctx.batch), None, None


def fa_prepare_fwd(qkvi: Tensor) -> Tensor:
    """q, k and v of an interleaved buffer as three contiguous [b, s, n, d] tensors in one.

    Args:
        qkvi: [s, b, n, d], the q part of a contiguous [s, b, n, 3 * d] buffer: a view whose strides say so. k and v
            are read from the buffer behind the view, any d and dtype.

    Returns:
        [3, b, s, n, d]. Gradient: to qkvi (the q part) only, since k and v are not arguments; differentiate
        `interleaved` of the whole buffer instead where all three are wanted.

    Raises:
        ValueError: "Wrong stride.": not such a view, or its storage ends before the v part does.
    """
    s, b, n, d = qkvi.shape
    expected = (3 * d * n * b, 3 * d * n, 3 * d, 1)
    actual = qkvi.stride()
    if any(size > 1 and have != want for size, have, want in zip(qkvi.shape, actual, expected, strict=True)):
        raise ValueError(
            f"Wrong stride. qkvi has strides {actual}: the q part of an interleaved [s, b, n, 3 * d] buffer of this "
            f"shape has {expected}"
        )
    end = qkvi.storage_offset() + s * b * n * 3 * d
    if qkvi.untyped_storage().nbytes() < end * qkvi.element_size():
        raise ValueError("Wrong stride. The storage behind qkvi ends before its k and v parts do")
    return interleaved(qkvi.as_strided((s, b, n, 3 * d), expected))


def interleaved(qkv: Tensor) -> Tensor:
    """[s, b, n, 3 * d] as contiguous [3, b, s, n, d]; differentiable."""
    return qkv.unflatten(-1, (3, -1)).permute(3, 1, 0, 2, 4).contiguous()


def fa_prepare_bwd(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The inverse of `fa_prepare_fwd`: three [b, s, n, d] tensors interleaved as [s, b, n, 3 * d]; differentiable.

    Raises:
        ValueError: shapes or dtypes differ.
    """
    if not (q.shape == k.shape == v.shape and q.dtype == k.dtype == v.dtype and q.ndim == 4):
        raise ValueError(
            f"q, k and v have shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}: expected one shape "
            f"[b, s, n, d] and one dtype"
        )
    return torch.cat([q, k, v], dim=-1).transpose(0, 1).contiguous()
