"""How TransformerEngine lays out q, k and v, and where each sequence's rows lie.

A layout name such as `thd_thd_thd` or `paged_kv_bshd_sbhd_sbhd` gives the format of q and that of k and v; `3` and
`2` mark tensors that are interleaved in one buffer. Formats: `bshd`, `sbhd`, `bhsd` are padded batches and `thd` is
packed tokens. Everything here turns them into rows [R, heads, dim] in which sequence i occupies
[start[i], start[i] + len[i]): the form that this project's kernels take.

Shape legend: R rows, N heads, D head dim, B sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

FORMATS = ("bshd", "sbhd", "bhsd", "thd")


@dataclass(frozen=True, slots=True)
class QKVLayout:
    """A parsed layout name.

    q_format, kv_format: one of FORMATS.
    interleave: how gradients are stored: "" separately; "3hd" and "h3d" q, k, v in one buffer, "2hd" and "h2d" k and
        v in one buffer; the position of the number is that of the extra dimension.
    paged: k and v are pages that a page table strings together.
    """

    name: str
    q_format: str
    kv_format: str
    interleave: str
    paged: bool


def _layouts() -> dict[str, QKVLayout]:
    layouts = {}

    def add(name: str, q_format: str, kv_format: str, interleave: str = "", paged: bool = False) -> None:
        layouts[name] = QKVLayout(name, q_format, kv_format, interleave, paged)

    for token in ("sb", "bs", "t"):
        fmt = f"{token}hd"
        for interleave in ("3hd", "h3d"):
            add(f"{token}{interleave}", fmt, fmt, interleave)
        for interleave in ("2hd", "h2d"):
            add(f"{fmt}_{token}{interleave}", fmt, fmt, interleave)
    for fmt in FORMATS:
        add(f"{fmt}_{fmt}_{fmt}", fmt, fmt)
    for q_format, kv_format in (("sbhd", "bshd"), ("bshd", "sbhd"), ("thd", "bshd"), ("thd", "sbhd")):
        add(f"{q_format}_{kv_format}_{kv_format}", q_format, kv_format)
    for q_format in ("bshd", "sbhd", "thd"):
        for kv_format in ("bshd", "sbhd"):
            add(f"paged_kv_{q_format}_{kv_format}_{kv_format}", q_format, kv_format, paged=True)
    return layouts


LAYOUTS = _layouts()


def parse_layout(name: str) -> QKVLayout:
    """The layout of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in LAYOUTS:
        raise ValueError(f"qkv_layout {name!r} is unknown: use one of {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


class Rows(NamedTuple):
    """Where sequences lie: int64 [B] first rows and lengths, in rows [num_rows, heads, dim]."""

    start: np.ndarray
    length: np.ndarray
    num_rows: int


def batch_and_length(x: Tensor, fmt: str) -> tuple[int, int]:
    """(B, S) of a padded format."""
    dims = {"bshd": (0, 1), "sbhd": (1, 0), "bhsd": (0, 2)}[fmt]
    return x.shape[dims[0]], x.shape[dims[1]]


def to_rows(x: Tensor, fmt: str) -> Tensor:
    """Rows [R, N, D]: a view for thd and bshd, a copy for sbhd and bhsd."""
    if fmt == "thd":
        return x
    if fmt == "sbhd":
        x = x.transpose(0, 1)
    elif fmt == "bhsd":
        x = x.transpose(1, 2)
    return x.reshape(-1, *x.shape[2:])


def from_rows(rows: Tensor, fmt: str, batch: int) -> Tensor:
    """The inverse of `to_rows`, contiguous. rows may have any dimensions after the first two."""
    if fmt == "thd":
        return rows
    padded = rows.unflatten(0, (batch, -1))
    if fmt == "sbhd":
        padded = padded.transpose(0, 1)
    elif fmt == "bhsd":
        padded = padded.transpose(1, 2)
    return padded.contiguous()


def page_rows(page_table: Tensor, lengths: np.ndarray, pages: Tensor, fmt: str) -> tuple[Tensor, np.ndarray]:
    """Rows of a paged tensor gathered sequence by sequence, and the first row of each.

    Args:
        page_table: int32 [B, max_pages]; entry p of row i is the page of positions p * page_size and on.
        lengths: tokens of each sequence.
        pages: [num_pages, page_size, N, D] (bshd) or [page_size, num_pages, N, D] (sbhd).

    Raises:
        ValueError: a page number that is used lies outside the container, or a sequence is longer than its pages.
    """
    num_pages, page_size = batch_and_length(pages, fmt)
    table = page_table.cpu().numpy().astype(np.int64)
    room = table.shape[1] * page_size
    if lengths.max(initial=0) > room:
        raise ValueError(
            f"a sequence has {lengths.max()} keys and its {table.shape[1]} pages of {page_size} hold {room}"
        )
    ends = np.cumsum(lengths)
    start = ends - lengths
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    position = np.arange(len(sequence)) - start[sequence]
    page = table[sequence, position // page_size]
    if len(page) and (page.min() < 0 or page.max() >= num_pages):
        raise ValueError(f"the page table names page {page.max()}: the container has pages 0 to {num_pages - 1}")
    index = torch.from_numpy(page * page_size + position % page_size).to(pages.device)
    return to_rows(pages, fmt).index_select(0, index), start


def sequence_lengths(cu_seqlens: Tensor, name: str) -> np.ndarray:
    """Lengths int64 [B] from int32 prefix sums [B + 1]; reads them on the host.

    Raises:
        ValueError: not int32, not one-dimensional, or decreasing.
    """
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or len(cu_seqlens) < 1:
        raise ValueError(
            f"{name} has dtype {cu_seqlens.dtype} and shape {tuple(cu_seqlens.shape)}: expected int32 prefix sums "
            f"[batch_size + 1]"
        )
    lengths = np.diff(cu_seqlens.detach().cpu().numpy().astype(np.int64))
    if lengths.min(initial=0) < 0:
        raise ValueError(f"{name} decreases at entry {int(lengths.argmin()) + 1}: prefix sums of lengths never do")
    return lengths


def locate(
    x: Tensor, fmt: str, cu_seqlens: Tensor, cu_padded: Tensor | None, *, padding: bool, max_seqlen: int, side: str
) -> Rows:
    """Rows of the sequences of one tensor.

    Args:
        x: in format `fmt`.
        cu_seqlens: int32 [B + 1]: lengths by difference. Ignored without `padding` (then sequences fill the batch).
        cu_padded: int32 [B + 1], thd only: the first row of each sequence; None is `cu_seqlens`.
        padding: whether the mask limits sequences to their lengths.
        max_seqlen: the longest length that is allowed; in padded formats the padded length itself.
        side: "q" or "kv", for messages.

    Raises:
        ValueError: a sequence is longer than max_seqlen or reaches outside x, or shapes disagree. TransformerEngine
            reads and writes out of bounds there.
    """
    lengths = sequence_lengths(cu_seqlens, f"cu_seqlens_{side}")
    batch = len(lengths)
    if lengths.max(initial=0) > max_seqlen:
        raise ValueError(f"a {side} sequence has {lengths.max()} tokens: max_seqlen_{side} is {max_seqlen}")
    if fmt != "thd":
        if batch_and_length(x, fmt) != (batch, max_seqlen):
            raise ValueError(
                f"{side} has batch and sequence length {batch_and_length(x, fmt)} in format {fmt}: expected "
                f"{(batch, max_seqlen)} from cu_seqlens_{side} and max_seqlen_{side}"
            )
        start = np.arange(batch) * max_seqlen
        return Rows(start, lengths if padding else np.full(batch, max_seqlen), batch * max_seqlen)
    padded = cu_seqlens if cu_padded is None else cu_padded
    if padded.dtype != torch.int32 or padded.shape != cu_seqlens.shape:
        raise ValueError(
            f"cu_seqlens_{side}_padded has dtype {padded.dtype} and shape {tuple(padded.shape)}: expected int32 "
            f"{tuple(cu_seqlens.shape)}"
        )
    start = padded.detach().cpu().numpy().astype(np.int64)[:batch]
    filled = lengths > 0
    if (start[filled] < 0).any() or (start + lengths)[filled].max(initial=0) > x.shape[0]:
        raise ValueError(
            f"the {side} sequences reach from row {start[filled].min()} to {(start + lengths)[filled].max()}: "
            f"the tensor has rows 0 to {x.shape[0]}; check cu_seqlens_{side}_padded"
        )
    return Rows(start, lengths, x.shape[0])


def check_disjoint(rows: Rows, what: str) -> None:
    """Raise if two sequences share rows that are to be written."""
    filled = rows.length > 0
    start, length = rows.start[filled], rows.length[filled]
    order = np.argsort(start, kind="stable")
    start, end = start[order], (start + length)[order]
    if (start[1:] < end[:-1]).any():
        at = int(np.flatnonzero(start[1:] < end[:-1])[0])
        raise ValueError(
            f"{what}: rows {start[at + 1]} to {min(end[at], end[at + 1])} belong to two sequences, and one would "
            f"overwrite the other"
        )


def packed_like(layout: QKVLayout, parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """q, k, v gradients stored as the layout stores q, k and v; interleaved ones are views of one buffer."""
    dq, dk, dv = parts
    at = -3 if layout.interleave.endswith("hd") else -2
    if "3" in layout.interleave:
        return torch.stack([dq, dk, dv], dim=at).unbind(at)
    if "2" in layout.interleave:
        return (dq, *torch.stack([dk, dv], dim=at).unbind(at))
    return dq, dk, dv
