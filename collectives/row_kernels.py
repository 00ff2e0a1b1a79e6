"""Work on rows in one launch each, in Triton: merge, add, pack, and 8-bit floats.

Callers ask `fused` and otherwise use torch's operators, which give the same bits where the order of operations is
theirs (sums, copies, 8-bit floats), and the same up to rounding in merges. Not yet run on hardware.

The launches are operators of torch (`cpattn::merge_rows`, ...), so that they run on tensors without data and are
counted where operators are. triton is imported at the first launch.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .devices import define_launches, put_on

# Of tensors that the kernels take; see `also_on`.
_DEVICES = {"cuda"}
_DTYPES = {torch.float32, torch.bfloat16, torch.float16}
# Columns that a program handles at a time, and pairs of rows and heads in 8-bit kernels.
_BLOCK = 1024
_PAIRS = 16
_MOST_PACKED = 4
# By name of the 8-bit format: bits of the mantissa, bias of the exponent.
_FP8 = {"e4m3": (3, 7), "e5m2": (2, 15)}
_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


def fused(*tensors: Tensor) -> bool:
    """Whether the kernels serve these tensors: on CUDA, no fp64, with triton there."""
    return all(t.dtype in _DTYPES and serves(t.device) for t in tensors)


def serves(device: torch.device) -> bool:
    """Whether the kernels run on a device, and triton is there."""
    return device.type in _DEVICES and _has_triton()


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@contextmanager
def also_on(device_type: str) -> Iterator[None]:
    """Use the kernels on another device too: "cpu" in Triton's interpreter, or to count launches without data."""
    _DEVICES.add(device_type)
    try:
        yield
    finally:
        _DEVICES.discard(device_type)


class RowSegments(NamedTuple):
    """Which parts go to which row, sorted by row: parts order[offsets[i] : offsets[i + 1]] go to rows[i], in order.

    All int64, on the device of the parts.
    """

    rows: Tensor
    offsets: Tensor
    order: Tensor

    @classmethod
    def of(cls, index: Tensor) -> RowSegments:
        """Segments of parts of which part i goes to row index[i]; parts of a row keep their order.

        index: on the CPU, or the host waits for it.
        """
        order = torch.argsort(index, stable=True)
        rows, counts = torch.unique_consecutive(index[order], return_counts=True)
        offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        return cls(rows, offsets, order)

    def on(self, device: torch.device) -> RowSegments:
        """The same on a device."""
        return RowSegments(*(put_on(device, t) for t in self))


def merge_rows(
    out_THD: Tensor,
    lse_TH: Tensor,
    part_out: Tensor,
    part_lse: Tensor,
    *,
    index: Tensor | None = None,
    segments: RowSegments | None = None,
) -> None:
    """`merge_partials` of rows, in place, in one launch.

    index: int64, distinct; part i is merged into row index[i]. segments: several parts for a row. Neither: row i.
    part_out may have any dtype, out_THD too; sums are fp32.
    """
    if part_out.numel() == 0:
        return
    rows = index if segments is None else segments.rows
    more = (None, None) if segments is None else (segments.offsets, segments.order)
    torch.ops.cpattn.merge_rows(out_THD, lse_TH, part_out, part_lse, rows, *more)


def add_rows(
    into: Sequence[Tensor],
    parts: Sequence[Tensor],
    *,
    index: Tensor | None = None,
    segments: RowSegments | None = None,
    fresh: bool = False,
) -> None:
    """Add parts to rows of one or two buffers [T, ...], in place, in one launch; `index` and `segments` as above.

    fresh: store the sum of a row's parts; rows without parts are left as they are.
    """
    if parts[0].numel() == 0:
        return
    rows = index if segments is None else segments.rows
    more = (None, None) if segments is None else (segments.offsets, segments.order)
    torch.ops.cpattn.add_rows(list(into), list(parts), rows, *more, fresh)


def pack_rows(packed: Tensor, tensors: Sequence[Tensor], places: Sequence[int], index: Tensor | None) -> None:
    """Rows `index` (None: all) of up to four tensors [T, ...] into packed rows, in one launch.

    packed: contiguous [rows, ...]. places: byte of a packed row at which each tensor begins.
    """
    if not packed.numel():
        return
    target = packed.view(len(packed), -1).view(torch.uint8)
    sizes = [t.itemsize * math.prod(t.shape[1:]) for t in tensors]
    targets = [target[:, place : place + size] for place, size in zip(places, sizes, strict=True)]
    torch.ops.cpattn.pack_rows(targets, list(tensors), index)


def gather_rows(tensors: Sequence[Tensor], index: Tensor, *, turned: int = 0) -> list[Tensor]:
    """Rows `index` of up to four tensors that `can_pack` takes, each contiguous, in one launch.

    turned: so many of the last, [T, cols], come as transposed views of contiguous [cols, rows].
    """
    rows = len(index)
    gathered = [t.new_empty((rows, *t.shape[1:])) for t in tensors[: len(tensors) - turned]]
    gathered += [t.new_empty((t.shape[1], rows)).T for t in tensors[len(tensors) - turned :]]
    if rows:
        torch.ops.cpattn.pack_rows(gathered, list(tensors), index)
    return gathered


def can_pack(tensors: Sequence[Tensor]) -> bool:
    """Whether `pack_rows` serves them: on its devices, at most four, the last dimension contiguous."""
    fit = len(tensors) <= _MOST_PACKED and all(
        serves(t.device) and 2 <= t.ndim <= 3 and t.stride(-1) == 1 for t in tensors
    )
    return fit


def encode_fp8(x_THD: Tensor, travelling: Tensor, fmt: str) -> None:
    """What `Fp8Rows.encode` makes of x, into uint8 [T, H, D + 1], in one launch."""
    if x_THD.numel():
        torch.ops.cpattn.encode_fp8(x_THD if x_THD.stride(-1) == 1 else x_THD.contiguous(), travelling, fmt)


def decode_fp8(received: Tensor, x_THD: Tensor, fmt: str) -> None:
    """What `Fp8Rows.decode` makes of it, into a contiguous x, in one launch."""
    if x_THD.numel():
        torch.ops.cpattn.decode_fp8(received, x_THD, fmt)


def _width(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _launch_merge(
    out: Tensor,
    lse: Tensor,
    part_out: Tensor,
    part_lse: Tensor,
    rows: Tensor | None,
    offsets: Tensor | None,
    order: Tensor | None,
) -> None:
    from .row_kernels_triton import merge_kernel

    num_heads, dim = out.shape[1:]
    strides = [s for t in (out, lse, part_out, part_lse) for s in t.stride()[:2]]
    merge_kernel[(len(part_out) if rows is None else len(rows),)](
        out, lse, part_out, part_lse, *_places(lse, rows, offsets, order), num_heads, *strides,
        dim=dim, width=_width(dim), heads=_width(num_heads), indexed=rows is not None, segmented=order is not None,
    )  # fmt: skip


def _places(like: Tensor, *places: Tensor | None) -> list[Tensor]:
    """Pointers that a kernel may not read still have to be something."""
    return [like if t is None else t for t in places]


def _launch_add(
    into: list[Tensor],
    parts: list[Tensor],
    rows: Tensor | None,
    offsets: Tensor | None,
    order: Tensor | None,
    fresh: bool,
) -> None:
    from .row_kernels_triton import add_kernel

    numbers = []
    for total, part in zip((into[0], into[-1]), (parts[0], parts[-1]), strict=True):
        cols = math.prod(total.shape[1:])
        numbers.append((total.stride(0), part.stride(0), cols, -(-cols // _BLOCK)))
    (*a, a_blocks), (*b, b_blocks) = numbers
    blocks = a_blocks + (b_blocks if len(into) == 2 else 0)
    add_kernel[(len(parts[0]) if rows is None else len(rows), blocks)](
        into[0], parts[0], into[-1], parts[-1], *_places(parts[0], rows, offsets, order), *a, a_blocks, *b,
        block=_BLOCK, indexed=rows is not None, segmented=order is not None, fresh=fresh,
    )  # fmt: skip


def _launch_pack(targets: list[Tensor], tensors: list[Tensor], index: Tensor | None) -> None:
    from .row_kernels_triton import pack_kernel

    assert len(tensors) <= _MOST_PACKED, f"{len(tensors)} tensors are more than one launch packs ({_MOST_PACKED})"
    size = math.gcd(8, *(n for t in (*targets, *tensors) for n in _word_sizes(t)))
    words, into = ([_in_words(t, size) for t in some] for some in (tensors, targets))
    pack_kernel[(len(targets[0]),)](
        tuple(into), tuple(words), targets[0] if index is None else index,
        tuple(t.stride(0) for t in into),
        tuple(t.stride(-1) if t.ndim == 2 else 1 for t in into),
        tuple(t.stride(0) for t in words),
        tuple(math.prod(t.shape[1:]) for t in words),
        tuple(t.shape[-1] if t.ndim > 1 else 1 for t in words),
        tuple(t.stride(1) if t.ndim == 3 else 0 for t in words),
        count=len(words), indexed=index is not None, block=_BLOCK,
    )  # fmt: skip


def _word_sizes(t: Tensor) -> list[int]:
    """Bytes that a word must divide to read or write a tensor's rows."""
    if t.ndim > 1 and t.stride(-1) != 1:  # column by column
        return [t.itemsize]
    counts: tuple[Any, ...] = (t.shape[-1], *t.stride()[:-1], t.storage_offset())
    return [n * t.itemsize for n in counts]


def _in_words(t: Tensor, size: int) -> Tensor:
    """A view of it in words; column by column a word is an element."""
    assert t.stride(-1) == 1 or t.itemsize == size, f"{t.dtype} column by column is not moved in words of {size} bytes"
    return t.view(_WORDS[size])


def _launch_encode(x: Tensor, travelling: Tensor, fmt: str) -> None:
    from .row_kernels_triton import encode_kernel

    (num_rows, num_heads, dim), (mantissa, bias) = x.shape, _FP8[fmt]
    largest = torch.finfo(torch.float8_e4m3fn if fmt == "e4m3" else torch.float8_e5m2).max
    encode_kernel[(-(-num_rows * num_heads // _PAIRS),)](
        x, travelling, num_rows * num_heads, num_heads, *x.stride()[:2], largest,
        mantissa=mantissa, bias=bias, dim=dim, width=_width(dim), pairs=_PAIRS,
    )  # fmt: skip


def _launch_decode(received: Tensor, x: Tensor, fmt: str) -> None:
    from .row_kernels_triton import decode_kernel

    (num_rows, num_heads, dim), (mantissa, bias) = x.shape, _FP8[fmt]
    decode_kernel[(-(-num_rows * num_heads // _PAIRS),)](
        received, x, num_rows * num_heads, num_heads, *received.stride()[:2],
        mantissa=mantissa, bias=bias, largest=torch.finfo(x.dtype).max, dim=dim, width=_width(dim), pairs=_PAIRS,
    )  # fmt: skip


_SEGMENTS = "Tensor? rows, Tensor? offsets, Tensor? order"
_library = define_launches(
    (
        ("merge_rows", f"Tensor(a!) out, Tensor(b!) lse, Tensor part_out, Tensor part_lse, {_SEGMENTS}", _launch_merge),
        ("add_rows", f"Tensor(a!)[] into, Tensor[] parts, {_SEGMENTS}, bool fresh", _launch_add),
        ("pack_rows", "Tensor(a!)[] targets, Tensor[] tensors, Tensor? index", _launch_pack),
        ("encode_fp8", "Tensor x, Tensor(a!) travelling, str fmt", _launch_encode),
        ("decode_fp8", "Tensor received, Tensor(a!) x, str fmt", _launch_decode),
    )
)
