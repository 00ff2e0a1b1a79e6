"""A call of fused attention, read: where its sequences lie and what each of them sees.

Shape legend: R rows, N query heads, B sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cpattn.solver import UNBOUNDED, SliceTable

from . import dense
from .layouts import (
    QKVLayout,
    Rows,
    batch_and_length,
    check_disjoint,
    locate,
    page_rows,
    parse_layout,
    sequence_lengths,
    to_rows,
)
from .orders import FORMATS


class RowTensors(NamedTuple):
    """q, k, v as rows, and the dtype that they accumulate in."""

    q: Tensor
    k: Tensor
    v: Tensor
    accumulator: torch.dtype


@dataclass(frozen=True, slots=True, eq=False)
class FusedCall:
    """A checked call: where its sequences lie and what they see."""

    layout: QKVLayout
    batch: int
    scale: float
    q_rows: Rows
    k_rows: Rows
    table: SliceTable
    parent: np.ndarray  # the sequence of each slice

    @classmethod
    def make(cls, q: Tensor, k: Tensor, v: Tensor, a: dict[str, Any]) -> FusedCall:
        """
        Raises:
            ValueError: shapes, lengths or offsets do not fit.
        """
        layout = parse_layout(a["qkv_layout"])
        mask = a["attn_mask_type"]
        padding = "padding" in mask
        q_rows = locate(
            q,
            layout.q_format,
            a["cu_seqlens_q"],
            a["cu_seqlens_q_padded"],
            padding=padding,
            max_seqlen=a["max_seqlen_q"],
            side="q",
        )
        check_disjoint(q_rows, "out")
        if layout.paged:
            k_rows = _paged_rows(k, layout, a)
        else:
            k_rows = locate(
                k,
                layout.kv_format,
                a["cu_seqlens_kv"],
                a["cu_seqlens_kv_padded"],
                padding=padding,
                max_seqlen=a["max_seqlen_kv"],
                side="kv",
            )
        if len(q_rows.length) != len(k_rows.length):
            raise ValueError(f"cu_seqlens_q has {len(q_rows.length)} sequences and cu_seqlens_kv {len(k_rows.length)}")
        table, parent = _slices(q_rows, k_rows, mask, a["window_size"], a["bottom_right_diagonal"])
        scale = a["attn_scale"]
        scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
        return cls(layout, len(q_rows.length), scale, q_rows, k_rows, table, parent)

    @property
    def num_rows(self) -> int:
        return self.q_rows.num_rows

    def format_of(self, name: str, asked: str | None) -> str:
        """The format that an argument asks for; None is q's.

        Raises:
            ValueError: it is none, or packs tokens where q does not, or the other way round.
        """
        own = self.layout.q_format
        if asked is None or asked == own:
            return own
        if asked not in FORMATS or "thd" in (asked, own):
            raise ValueError(f"{name} is {asked!r} and q has {own!r}: use that, or one of sbhd, bshd, bhsd for another")
        return asked

    def gradient_layout(self, asked: str | None) -> tuple[QKVLayout, tuple[str, str, str]]:
        """The layout that dqkv_layout asks for, and the formats of dq, dk and dv; None is that of q, k and v.

        Raises:
            ValueError: it is unknown, or packs tokens where q, k and v do not.
        """
        layout = self.layout if asked is None else parse_layout(asked)
        for own, fmt in ((self.layout.q_format, layout.q_format), (self.layout.kv_format, layout.kv_format)):
            if own != fmt and "thd" in (own, fmt):
                what = f"dqkv_layout is {asked!r}, qkv_layout {self.layout.name!r}"
                raise ValueError(f"{what}: both pack tokens, or none")
        return layout, (layout.q_format, layout.kv_format, layout.kv_format)

    def rows(self, q: Tensor, k: Tensor, v: Tensor, table_k: Tensor | None, table_v: Tensor | None) -> RowTensors:
        """The operands as rows; paged ones are gathered."""
        layout = self.layout
        if layout.paged:
            assert table_k is not None
            lengths = self.k_rows.length
            k, _ = page_rows(table_k, lengths, k, layout.kv_format)
            v, _ = page_rows(table_k if table_v is None else table_v, lengths, v, layout.kv_format)
        else:
            k, v = to_rows(k, layout.kv_format), to_rows(v, layout.kv_format)
        q = to_rows(q, layout.q_format)
        q, k, v = (t if t.stride(-1) == 1 and 0 not in t.stride() else t.contiguous() for t in (q, k, v))
        return RowTensors(q, k, v, torch.float64 if q.dtype == torch.float64 else torch.float32)

    def sequences(self) -> list[dense.SequenceSlices]:
        return dense.split_by_sequence(self.table, self.parent, self.q_rows.start, self.k_rows.start)

    def valid_rows(self, device: torch.device) -> Tensor:
        """[R, 1], True in rows that belong to a sequence."""
        valid = np.zeros((self.num_rows, 1), dtype=bool)
        for start, length in zip(self.q_rows.start.tolist(), self.q_rows.length.tolist(), strict=True):
            valid[start : start + length] = True
        return torch.from_numpy(valid).to(device)

    def stats(self, lse_RN: Tensor) -> Tensor:
        """The log-sum-exp in TransformerEngine's shape."""
        if self.layout.q_format == "thd":
            return lse_RN.unsqueeze(-1)
        return lse_RN.unflatten(0, (self.batch, -1)).transpose(1, 2).unsqueeze(-1).contiguous()

    def stats_to_rows(self, stats: Tensor) -> Tensor:
        """The inverse of `stats`."""
        if self.layout.q_format == "thd":
            return stats.squeeze(-1)
        return stats.squeeze(-1).transpose(1, 2).flatten(0, 1)


# The arguments that describe the attention itself, of either direction.
_COMMON = (
    "max_seqlen_q", "max_seqlen_kv", "cu_seqlens_q", "cu_seqlens_kv", "q", "k", "v", "attn_bias",
    "cu_seqlens_q_padded", "cu_seqlens_kv_padded", "page_table_k", "page_table_v", "attn_scale", "dropout",
    "qkv_layout", "attn_bias_type", "attn_mask_type", "softmax_type", "window_size", "bottom_right_diagonal",
    "softmax_offset", "cuda_graph",
)  # fmt: skip


def common_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that describe the attention itself, of either direction."""
    return {name: arguments.get(name) for name in _COMMON}


def _paged_rows(k: Tensor, layout: QKVLayout, a: dict[str, Any]) -> Rows:
    _, page_size = batch_and_length(k, layout.kv_format)
    lengths = sequence_lengths(a["cu_seqlens_kv"], "cu_seqlens_kv")
    num_pages = a["page_table_k"].shape[1]
    room = num_pages * page_size
    if a["max_seqlen_kv"] != room:
        raise ValueError(
            f"max_seqlen_kv is {a['max_seqlen_kv']}: the page table's {num_pages} pages of {page_size} hold {room}"
        )
    start = np.cumsum(lengths) - lengths
    return Rows(start, lengths, int(lengths.sum()))


def _slices(
    q: Rows, k: Rows, mask: str, window: tuple[int, int], bottom_right: bool | None
) -> tuple[SliceTable, np.ndarray]:
    """What each sequence sees, in rows, and the sequence of each slice."""
    bottom_right = mask.endswith("bottom_right") if bottom_right is None else bottom_right
    left, right = window[0], 0 if "causal" in mask else window[1]
    diagonal = k.start - q.start + ((k.length - q.length) if bottom_right else 0)
    columns = np.stack(
        [
            q.start,
            q.start + q.length,
            k.start,
            k.start + k.length,
            np.full_like(diagonal, -UNBOUNDED) if left < 0 else diagonal - left,
            np.full_like(diagonal, UNBOUNDED) if right < 0 else diagonal + right,
        ],
        axis=-1,
    ).astype(np.int64)
    table, parent = SliceTable(columns.reshape(-1, 6)).canonical()
    return table, parent
