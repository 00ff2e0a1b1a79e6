"""A padded or packed batch as one sequence of its real tokens, and the masks of that sequence.

Padding is not computed at all: the real tokens of a [B, S] batch are laid out one row after the other,
each row (or each packed document of a row) a *text* that sees only itself. Ranks share that sequence.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cpattn.masks.spec import AttnMaskSpec, Document, lower_mask

IGNORE_INDEX = -100


class MaskTerm(NamedTuple):
    """One term of a layer's mask within a text; a mask is the union of its terms.

    causal: keys up to the query only. left, right: limit on the distance in positions, None for no
    limit. chunk: queries and keys of the same chunk of so many positions only. blocks: [B, S] ints;
    queries and keys of the same block only, -1 is no block.
    """

    causal: bool = False
    left: int | None = None
    right: int | None = None
    chunk: int | None = None
    blocks: Tensor | None = None

    @property
    def window(self) -> tuple[int | None, int | None] | None:
        """(left, right) as `make_key` takes it; None where neither side is limited."""
        return None if self.left is None and self.right is None else (self.left, self.right)


class MaskPlan(NamedTuple):
    """A layer's mask in the terms of `AttnKey.with_mask`."""

    spec: AttnMaskSpec
    window: tuple[int | None, int | None] | None


@dataclass(frozen=True, eq=False)
class BatchLayout:
    """Which tokens of a [rows, columns] batch are real, and which of them form a text.

    Attributes:
        rows, columns: shape of the batch.
        index: int64 [T], for each real token its place row * columns + column.
        texts: [start, end) of each text in the sequence of real tokens.
        documents: runs of neighbouring columns; a text with holes has several. Positions within a
            text differ as the columns do.
        spec: the mask that a causal layer without a window has.
        explicit: the mask was given whole (as a 4-D mask or as a spec): layers have no say.
    """

    rows: int
    columns: int
    index: NDArray[np.int64]
    texts: tuple[tuple[int, int], ...]
    documents: tuple[Document, ...]
    spec: AttnMaskSpec
    explicit: bool = False
    _on_device: dict[torch.device, Tensor] = field(default_factory=dict, repr=False)

    @property
    def num_tokens(self) -> int:
        """Real tokens."""
        return len(self.index)

    @property
    def longest_text(self) -> int:
        """Tokens of the longest text, holes included."""
        spans = [self.index[end - 1] - self.index[start] + 1 for start, end in self.texts if end > start]
        return int(max(spans, default=0))

    def positions(self) -> NDArray[np.int64]:
        """int64 [T], each token's position as its document has it."""
        spans = [np.arange(d.end - d.start) + d.first_position for d in self.documents]
        return np.concatenate(spans) if spans else np.zeros(0, dtype=np.int64)

    def index_on(self, device: torch.device) -> Tensor:
        """`index` as a tensor."""
        if device not in self._on_device:
            self._on_device[device] = torch.from_numpy(self.index).to(device)
        return self._on_device[device]

    def plan_of(self, terms: Sequence[MaskTerm]) -> MaskPlan:
        """The mask that is the union of the terms.

        Raises:
            ValueError: the terms have different windows, or they ask for chunks or blocks where the
                mask was given whole.
        """
        if self.explicit:
            term = terms[0] if len(terms) == 1 else None
            if term is None or not term.causal or term.chunk or term.blocks is not None:
                raise ValueError(
                    f"the layer's mask is {[_brief_term(t) for t in terms]} and the batch came with a "
                    f"mask of its own: only causal layers, with or without a window, take one"
                )
            return MaskPlan(self.spec, term.window)
        windows = {term.window for term in terms}
        if len(windows) > 1:
            raise ValueError(
                f"the layer's mask is a union of terms with different windows "
                f"({[_brief_term(t) for t in terms]}): a window must hold for all of a layer's mask"
            )
        if len(terms) == 1 and terms[0].causal and terms[0].chunk is None and terms[0].blocks is None:
            return MaskPlan(self.spec, windows.pop())
        rects = [rect for term in terms for rect in self._rects(term)]
        spec = AttnMaskSpec(
            [list(q) for q, _, _ in rects],
            [list(k) for _, k, _ in rects],
            [kind for _, _, kind in rects],
            self.num_tokens,
            documents=list(self.documents),
        )
        return MaskPlan(spec, windows.pop())

    def _rects(self, term: MaskTerm) -> list[tuple[tuple[int, int], tuple[int, int], str]]:
        kind = "causal" if term.causal else "full"
        if term.blocks is not None:
            if term.causal or term.chunk:
                raise ValueError(f"the layer's mask {_brief_term(term)} limits blocks further: not supported")
            return [(q, k, "full") for runs in self._block_runs(term.blocks) for q in runs for k in runs]
        spans = self.texts if term.chunk is None else self._chunks(term.chunk)
        return [(span, span, kind) for span in spans]

    def _chunks(self, chunk: int) -> list[tuple[int, int]]:
        """Texts cut where the distance from their first token reaches a multiple of `chunk`."""
        spans = []
        for start, end in self.texts:
            number = (self.index[start:end] - self.index[start]) // chunk
            cuts = start + np.flatnonzero(np.diff(number, prepend=-1))
            spans += list(zip(cuts.tolist(), [*cuts[1:].tolist(), end], strict=True))
        return spans

    def _block_runs(self, blocks: Tensor) -> list[list[tuple[int, int]]]:
        """For each block of each text its runs of neighbouring tokens."""
        if tuple(blocks.shape) != (self.rows, self.columns):
            raise ValueError(
                f"the layer's mask has blocks of shape {tuple(blocks.shape)}, the batch is "
                f"{(self.rows, self.columns)}: the mask was made after the batch was sharded"
            )
        ids = blocks.detach().cpu().numpy().astype(np.int64).ravel()[self.index]
        found: list[list[tuple[int, int]]] = []
        for start, end in self.texts:
            cuts = start + np.flatnonzero(np.diff(ids[start:end], prepend=-2))
            runs: dict[int, list[tuple[int, int]]] = {}
            for a, b in zip(cuts.tolist(), [*cuts[1:].tolist(), end], strict=True):
                if ids[a] >= 0:
                    runs.setdefault(int(ids[a]), []).append((a, b))
            found += runs.values()
        return found


def layout_of_batch(
    rows: int,
    columns: int,
    *,
    attention_mask: Tensor | None = None,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> BatchLayout:
    """The real tokens and the texts of a batch.

    A new text starts at each row and at each entry of cu_seqlens. With positions it also starts where
    they do not go on by one (with an attention mask, where they do not grow), as in batches packed for
    Hugging Face.

    Args:
        rows, columns: the batch is [rows, columns].
        attention_mask: [rows, columns], 1 or True where a token is real; None: all are. Or
            [rows or 1, 1, columns, columns], bool (True: visible) or additive floats (0: visible):
            the whole mask; tokens that see nothing count as padding.
        positions: [rows or 1, columns] ints, or None.
        cu_seqlens: prefix sums of the documents over the rows laid end to end, padding included; or None.

    Raises:
        ValueError: a shape or value does not fit.
    """
    if attention_mask is not None and attention_mask.ndim == 4:
        return _layout_of_dense(rows, columns, attention_mask)
    if attention_mask is None:
        real = np.ones((rows, columns), dtype=bool)
    else:
        real = _real_tokens(attention_mask, rows, columns)
    starts = np.zeros((rows, columns), dtype=bool)  # a text starts here, if the token is real
    starts[:, :1] = True
    if cu_seqlens is not None:
        starts.ravel()[_document_starts(cu_seqlens, rows * columns)] = True
    index = np.flatnonzero(real.ravel())
    first = starts.ravel().copy()
    # A start that falls on padding moves to the next real token.
    text = np.cumsum(first)[index]
    new_text = np.diff(text, prepend=-1) != 0
    run_breaks = new_text | (np.diff(index, prepend=-2) != 1)
    # Without positions, those of a row are its columns, and documents of cu_seqlens begin at 0.
    base = index % max(columns, 1) if cu_seqlens is None else np.zeros_like(index)
    if positions is not None:
        base = _expand(positions, rows, columns, "position_ids").ravel()[index]
        step = np.diff(base, prepend=base[:1] - 1)
        new_text = new_text | ((step <= 0) if attention_mask is not None else (step != 1))
        run_breaks |= new_text
    text_starts = np.flatnonzero(new_text)
    texts = tuple(_spans(text_starts, len(index)))
    # Positions in a text follow the columns, counted from where its first token is.
    text_of = np.cumsum(new_text) - 1
    column = index - index[text_starts][text_of] + base[text_starts][text_of] if len(index) else index
    documents = tuple(
        Document(a, b, int(column[a])) for a, b in _spans(np.flatnonzero(run_breaks), len(index))
    )
    spec = AttnMaskSpec(
        [list(t) for t in texts],
        [list(t) for t in texts],
        ["causal"] * len(texts),
        len(index),
        documents=list(documents),
    )
    return BatchLayout(rows, columns, index, texts, documents, spec)


def layout_of_spec(rows: int, columns: int, spec: AttnMaskSpec) -> BatchLayout:
    """The layout of a batch of one row whose mask is given as a spec (a prefix tree, for example)."""
    if rows != 1 or spec.total_seqlen != columns or spec.is_cross:
        raise ValueError(
            f"the batch is {(rows, columns)} and the spec is over {spec.total_seqlen} tokens: a spec takes "
            f"a batch of one row with as many tokens, and no cross-attention"
        )
    index = np.arange(columns, dtype=np.int64)
    documents = tuple(spec.documents or [Document(0, columns)])
    return BatchLayout(1, columns, index, ((0, columns),), documents, spec, explicit=True)


def shifted_labels(labels: Tensor, layout: BatchLayout) -> Tensor:
    """Next-token targets of a batch: [B, S] labels moved left by one within each text, -100 elsewhere.

    The last token of a text and padding have no target, nor has a token whose next column is padding. In a mask that
    was given whole, a text goes on where a token sees the one before it.
    """
    if tuple(labels.shape) != (layout.rows, layout.columns):
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}, input_ids {(layout.rows, layout.columns)}: they must agree"
        )
    index = layout.index
    goes_on = np.diff(index) == 1
    goes_on[[start - 1 for start, _ in layout.texts if 0 < start < len(index)]] = False
    if layout.explicit:
        goes_on &= _sees_previous(layout.spec)[1:]
    follows = np.zeros(layout.rows * layout.columns, dtype=bool)
    follows[index[:-1][goes_on]] = True
    targets = torch.full_like(labels, IGNORE_INDEX)
    targets[:, :-1] = labels[:, 1:]
    keep = torch.from_numpy(follows.reshape(layout.rows, layout.columns)).to(labels.device)
    return targets.masked_fill(~keep, IGNORE_INDEX)


def _sees_previous(spec: AttnMaskSpec) -> NDArray[np.bool_]:
    """Whether each token sees the one before it, [total_seqlen]."""
    table = lower_mask(spec)
    first, last = np.maximum(table.q0, table.k0 + 1), np.minimum(table.q1, table.k1 + 1)
    shown = (table.lo <= -1) & (table.hi >= -1) & (first < last)
    steps = np.zeros(spec.total_seqlen + 1, dtype=np.int64)
    np.add.at(steps, first[shown], 1)
    np.add.at(steps, last[shown], -1)
    seen: NDArray[np.bool_] = np.cumsum(steps)[:-1] > 0
    return seen


def _layout_of_dense(rows: int, columns: int, mask: Tensor) -> BatchLayout:
    if mask.shape[0] not in (1, rows) or mask.shape[1] != 1 or tuple(mask.shape[2:]) != (columns, columns):
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}: a 4-D mask is [{rows}, 1, {columns}, {columns}], "
            f"the same for all heads"
        )
    visible = (mask if mask.dtype == torch.bool else mask == 0).detach().cpu().numpy()
    if mask.dtype != torch.bool and bool(((mask != 0) & (mask > torch.finfo(mask.dtype).min / 2)).any()):
        raise ValueError("attention_mask adds values other than 0 and the dtype's minimum: a bias is not supported")
    visible = np.broadcast_to(visible[:, 0], (rows, columns, columns))
    parts, index, at = [], [], 0
    texts, documents = [], []
    for row in range(rows):
        real = np.flatnonzero(visible[row].any(axis=1))
        spec = AttnMaskSpec.from_dense(np.ascontiguousarray(visible[row][np.ix_(real, real)]))
        if visible[row][real].sum() != visible[row][np.ix_(real, real)].sum():
            raise ValueError(f"row {row} of attention_mask shows tokens that see nothing themselves: not supported")
        parts.append((spec, at))
        index.append(row * columns + real)
        texts.append((at, at + len(real)))
        documents += [Document(at + i, at + i + 1, int(c)) for i, c in enumerate(real)]
        at += len(real)
    spec = AttnMaskSpec(
        [[a + s, b + s] for p, s in parts for a, b in p.q_ranges],
        [[a + s, b + s] for p, s in parts for a, b in p.k_ranges],
        [kind for p, _ in parts for kind in p.mask_types],
        at,
        documents=_merged(documents),
    )
    tokens = np.concatenate(index).astype(np.int64)
    return BatchLayout(rows, columns, tokens, tuple(texts), tuple(spec.documents or ()), spec, explicit=True)


def _merged(documents: list[Document]) -> list[Document]:
    """Neighbouring tokens at neighbouring positions as one document."""
    merged: list[Document] = []
    for doc in documents:
        last = merged[-1] if merged else None
        if last and doc.first_position == last.first_position + last.end - last.start:
            merged[-1] = Document(last.start, doc.end, last.first_position)
        else:
            merged.append(doc)
    return merged


def _real_tokens(mask: Tensor, rows: int, columns: int) -> NDArray[np.bool_]:
    if tuple(mask.shape) != (rows, columns):
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}: expected {(rows, columns)}, or 4-D for a whole mask"
        )
    values = mask.detach().cpu().numpy()
    if values.dtype != np.bool_ and not np.isin(values, (0, 1)).all():
        raise ValueError(
            "attention_mask has values other than 0 and 1: pass document numbers as restarting position_ids "
            "or as cu_seq_lens_q, and a bias not at all"
        )
    return values.astype(bool)


def _document_starts(cu_seqlens: Tensor, total: int) -> NDArray[np.int64]:
    sums = cu_seqlens.detach().cpu().numpy().astype(np.int64).ravel()
    if not len(sums) or sums[0] != 0 or sums[-1] != total or (np.diff(sums) < 0).any():
        raise ValueError(
            f"cu_seqlens goes from {sums[:1]} to {sums[-1:]} and the batch has {total} tokens: it must grow from 0 "
            f"to the number of tokens"
        )
    return sums[:-1][np.diff(sums) > 0]


def _expand(values: Tensor, rows: int, columns: int, name: str) -> NDArray[np.int64]:
    if values.ndim != 2 or values.shape[0] not in (1, rows) or values.shape[1] != columns:
        raise ValueError(f"{name} has shape {tuple(values.shape)}: expected {(rows, columns)}")
    array = values.detach().cpu().numpy().astype(np.int64)
    return np.ascontiguousarray(np.broadcast_to(array, (rows, columns)))


def _spans(starts: NDArray[Any], end: int) -> list[tuple[int, int]]:
    return list(itertools.pairwise([*starts.tolist(), end]))


def _brief_term(term: MaskTerm) -> str:
    words = ["causal" if term.causal else "bidirectional"]
    if term.window:
        words.append(f"window {term.window}")
    if term.chunk:
        words.append(f"chunks of {term.chunk}")
    if term.blocks is not None:
        words.append("blocks")
    return " ".join(words)
