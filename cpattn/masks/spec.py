"""`AttnMaskSpec`: which query sees which key, in words that do not depend on any backend or rank.

A spec is a list of rectangles of the attention matrix, each with a mask type, plus the documents
that the tokens belong to. `lower_mask` turns it into the disjoint banded rectangles that the solver
plans with; `AttnMaskSpec.to_dense` draws it directly from the definition of the four types and is
the oracle that tests compare against.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpattn.solver import UNBOUNDED, SliceTable, disjoint_union

from .reading import (
    Document,
    brief,
    int_array,
    int_list,
    one_or_more,
    read_documents,
    read_int,
    read_ranges,
    read_spans,
    read_window,
)
from .rectangles import Rect, rects_of_dense, tree_depths, tree_parents, tree_rects, window_rects

RECT_TYPES = ("full", "causal", "inv_causal", "bi_causal")


@dataclass
class AttnMaskSpec:
    """An attention mask as rectangles; pairs in no rectangle are masked, overlaps mean the union.

    For a rectangle of m queries and n keys, with i and j counted from its corner, pair (i, j) is
    visible when

        full        always
        causal      j <= i + (n - m)      (bottom-right aligned)
        inv_causal  j >= i                (top-left aligned)
        bi_causal   i <= j <= i + (n - m)

    Attributes:
        q_ranges, k_ranges: [start, end) token ranges of each rectangle, as lists of two ints.
        mask_types: "full", "causal", "inv_causal" or "bi_causal" for each rectangle.
        total_seqlen: number of query tokens (and of key tokens in self-attention).
        total_seqlen_k: number of key tokens in cross-attention; None means self-attention.
        documents: the documents of the query tokens, in order and covering all of them. The
            constructors set them; raw rectangles may pass them. `position_ids` and `roll` need them.

    Raises:
        ValueError: a range is negative, reversed or out of range, a type is unknown, the lists
            differ in length, or the documents do not tile the sequence.
    """

    q_ranges: list[list[int]]
    k_ranges: list[list[int]]
    mask_types: list[str]
    total_seqlen: int
    total_seqlen_k: int | None = None
    documents: list[Document] | None = None

    def __post_init__(self) -> None:
        self.total_seqlen = read_int("total_seqlen", self.total_seqlen, least=0)
        if self.total_seqlen_k is not None:
            self.total_seqlen_k = read_int("total_seqlen_k", self.total_seqlen_k, least=0)
        self.q_ranges = read_ranges(self.q_ranges, self.total_seqlen, "q_ranges")
        self.k_ranges = read_ranges(self.k_ranges, self.seqlen_k, "k_ranges")
        self.mask_types = list(self.mask_types)
        if not len(self.q_ranges) == len(self.k_ranges) == len(self.mask_types):
            raise ValueError(
                f"{len(self.q_ranges)} q_ranges, {len(self.k_ranges)} k_ranges and "
                f"{len(self.mask_types)} mask_types: each rectangle needs one of each"
            )
        for kind in self.mask_types:
            if kind not in RECT_TYPES:
                raise ValueError(f"mask type {kind!r} is unknown: use one of {', '.join(RECT_TYPES)}")
        if self.documents is not None:
            self.documents = read_documents(self.documents, self.total_seqlen)
        self._fingerprint: tuple[Any, ...] | None = None  # (the fields it was taken of, the fingerprint)

    @property
    def seqlen_k(self) -> int:
        """Number of key tokens."""
        return self.total_seqlen if self.total_seqlen_k is None else self.total_seqlen_k

    @property
    def is_cross(self) -> bool:
        """Whether queries and keys are different sequences."""
        return self.total_seqlen_k is not None

    def fingerprint(self) -> tuple[Any, ...]:
        """Hashable identity of the spec: equal specs have equal fingerprints.

        It is order-sensitive: the same mask written in two ways has two fingerprints. Taken again whenever
        a field has changed, in place too: comparing with a copy of the lists is exact, and ten times
        faster than reading them anew.
        """
        fields = (
            self.total_seqlen, self.q_ranges, self.k_ranges, self.mask_types, self.total_seqlen_k, self.documents
        )
        if self._fingerprint is None or self._fingerprint[0] != fields:
            copies = (
                self.total_seqlen,
                list(map(list, self.q_ranges)),
                list(map(list, self.k_ranges)),
                list(self.mask_types),
                self.total_seqlen_k,
                None if self.documents is None else [d if type(d) is Document else tuple(d) for d in self.documents],
            )
            self._fingerprint = copies, tuple(map(_hashable, copies))
        return self._fingerprint[1]  # type: ignore[no-any-return]

    @classmethod
    def causal(cls, seqlen: int) -> AttnMaskSpec:
        """One causal sequence."""
        return cls.varlen([seqlen])

    @classmethod
    def varlen(cls, seqlens: Sequence[int], causal: bool = True) -> AttnMaskSpec:
        """Packed documents that do not see each other: a block-diagonal mask.

        Args:
            seqlens: tokens of each document; zero is allowed.
            causal: each token sees the tokens of its document up to itself, else all of them.
        """
        spans = read_spans(seqlens, "seqlens")
        kind = "causal" if causal else "full"
        return cls(
            q_ranges=[list(s) for s in spans],
            k_ranges=[list(s) for s in spans],
            mask_types=[kind] * len(spans),
            total_seqlen=spans[-1][1] if spans else 0,
            documents=[Document(*s) for s in spans],
        )

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Any, causal: bool = True) -> AttnMaskSpec:
        """Packed documents from prefix sums [0, n0, n0 + n1, ...] (list, array or tensor).

        The values are read now: changing the tensor later does not change the spec.
        """
        sums = int_list(cu_seqlens, "cu_seqlens")
        if not sums or sums[0] != 0:
            raise ValueError(f"cu_seqlens is {brief(sums)}: it must start at 0")
        return cls.varlen([b - a for a, b in itertools.pairwise(sums)], causal)

    @classmethod
    def from_position_ids(cls, position_ids: Any, causal: bool = True) -> AttnMaskSpec:
        """Packed documents from per-token positions, as Hugging Face ships a packed batch.

        Args:
            position_ids: [S] or [B, S] ints; a document starts wherever a position is not its
                predecessor plus one, and at every row. Rows are laid out one after the other.
        """
        positions = np.atleast_2d(int_array(position_ids, "position_ids"))
        if positions.ndim != 2:
            raise ValueError(f"position_ids has shape {positions.shape}: expected [S] or [B, S]")
        if positions.size and positions.min() < 0:
            raise ValueError(f"position_ids has {positions.min()}: positions are at least 0")
        starts = np.ones(positions.shape, dtype=bool)
        starts[:, 1:] = np.diff(positions, axis=1) != 1
        cuts = np.append(np.flatnonzero(starts.ravel()), positions.size)
        spec = cls.varlen(np.diff(cuts).tolist(), causal)
        first = positions.ravel()[cuts[:-1]].tolist()
        spec.documents = [Document(s, e, p) for (s, e), p in zip(spec.q_ranges, first, strict=True)]
        return spec

    @classmethod
    def sliding_window(
        cls, seqlens: Sequence[int] | int, window: int | tuple[int, int]
    ) -> AttnMaskSpec:
        """Packed documents in which each token sees only its neighbourhood.

        Args:
            seqlens: tokens of each document, or one int for a single sequence.
            window: an int W: causal, each token sees W keys, itself included. A pair (left, right):
                each token sees `left` keys before it, itself, and `right` keys after it.
        """
        spans = read_spans(one_or_more(seqlens), "seqlens")
        left, right = read_window(window, ahead=0)
        assert left is not None
        assert right is not None
        rects = [rect for start, end in spans for rect in window_rects(start, end, left, right)]
        return cls._of_rects(rects, spans[-1][1] if spans else 0, [Document(*s) for s in spans])

    @classmethod
    def block_causal(cls, seqlens: Sequence[int] | int, block_size: int) -> AttnMaskSpec:
        """Packed documents cut into blocks; a token sees its own block and all before it.

        Args:
            seqlens: tokens of each document, or one int for a single sequence.
            block_size: tokens of a block (the last of a document may be shorter); blocks of one token are causal.
        """
        block_size = read_int("block_size", block_size)
        if block_size == 1:
            return cls.varlen(one_or_more(seqlens))
        spans = read_spans(one_or_more(seqlens), "seqlens")
        rects = [
            (at, min(at + block_size, end), start, min(at + block_size, end), "full")
            for start, end in spans
            for at in range(start, end, block_size)
        ]
        return cls._of_rects(rects, spans[-1][1] if spans else 0, [Document(*s) for s in spans])

    @classmethod
    def prefix_lm(cls, prefix_lengths: Sequence[int], seqlens: Sequence[int]) -> AttnMaskSpec:
        """Packed documents whose first tokens see each other fully and whose rest is causal.

        Args:
            prefix_lengths: tokens of each document's bidirectional prefix.
            seqlens: tokens of each document, prefix included.
        """
        prefixes = int_list(prefix_lengths, "prefix_lengths")
        spans = read_spans(seqlens, "seqlens")
        if len(prefixes) != len(spans):
            raise ValueError(
                f"{len(prefixes)} prefix_lengths and {len(spans)} seqlens: each document needs both"
            )
        spec = cls([], [], [], spans[-1][1] if spans else 0, documents=[Document(*s) for s in spans])
        for prefix, (start, end) in zip(prefixes, spans, strict=True):
            if not 0 <= prefix <= end - start:
                raise ValueError(
                    f"prefix length {prefix} of a document of {end - start} tokens: "
                    f"a prefix has 0 to {end - start} tokens"
                )
            spec.q_ranges += [[start, start + prefix], [start + prefix, end]]
            spec.k_ranges += [[start, start + prefix], [start, end]]
            spec.mask_types += ["full", "causal"]
        return spec

    @classmethod
    def cross(
        cls, seqlens_q: Sequence[int], seqlens_k: Sequence[int], causal: bool = False
    ) -> AttnMaskSpec:
        """Cross-attention: the queries of document d see the keys of document d.

        Args:
            seqlens_q, seqlens_k: query and key tokens of each document.
            causal: bottom-right aligned causal within each document, else full.
        """
        q_spans, k_spans = read_spans(seqlens_q, "seqlens_q"), read_spans(seqlens_k, "seqlens_k")
        if len(q_spans) != len(k_spans):
            raise ValueError(
                f"{len(q_spans)} seqlens_q and {len(k_spans)} seqlens_k: each document needs both"
            )
        return cls(
            q_ranges=[list(s) for s in q_spans],
            k_ranges=[list(s) for s in k_spans],
            mask_types=["causal" if causal else "full"] * len(q_spans),
            total_seqlen=q_spans[-1][1] if q_spans else 0,
            total_seqlen_k=k_spans[-1][1] if k_spans else 0,
            documents=[Document(*s) for s in q_spans],
        )

    @classmethod
    def prefix_tree(
        cls, node_lengths: list[int], sample_paths: list[list[int]]
    ) -> tuple[AttnMaskSpec, list[list[list[int]]]]:
        """Samples that share prefixes, each shared prefix stored and computed once.

        Each node sees all of its ancestors and itself causally, so a sample's tokens see what they
        would see if the sample stood alone. A small tree has a rectangle for each node and ancestor; a large one
        (over 1024 of these) has as few as its order allows: about two for each node if it lies depth first.

        Args:
            node_lengths: tokens of each node, in the order in which the nodes lie in the sequence.
            sample_paths: the nodes of each sample, root first.

        Returns:
            The spec, and for each sample the [start, end) of every node on its path. Each node is
            a document whose first position is the length of its ancestors, so `position_ids` gives
            a token the position that it has in its sample.

        Raises:
            ValueError: a path is empty, repeats a node or leaves the range, a node is on none, or it has
                two parents (it would then see the union of both lines of ancestors: a leak); or the nodes lie
                in an order in which the mask takes over a million rectangles.
        """
        spans = read_spans(node_lengths, "node_lengths")
        parents = tree_parents(sample_paths, len(spans))
        lost = [node for node, (start, end) in enumerate(spans) if end > start and node not in parents]
        if lost:
            raise ValueError(f"node {lost[0]} is on no path: its {node_lengths[lost[0]]} tokens would see nothing")
        first = tree_depths(spans, parents)
        documents = [Document(start, end, first.get(node, 0)) for node, (start, end) in enumerate(spans)]
        spec = cls._of_rects(tree_rects(spans, parents), spans[-1][1] if spans else 0, documents)
        return spec, [[list(spans[node]) for node in path] for path in sample_paths]

    @classmethod
    def from_dense(cls, mask: Any) -> AttnMaskSpec:
        """Spec of a boolean matrix [seqlen_q, seqlen_k] (True = visible), for small masks.

        Runs of visible keys that stay, grow or move by one key from row to row become one
        rectangle. A square matrix gives self-attention.
        """
        dense = np.asarray(mask.cpu() if hasattr(mask, "cpu") else mask)
        if dense.ndim != 2 or dense.dtype != np.bool_:
            raise ValueError(
                f"mask has shape {dense.shape} and dtype {dense.dtype}: "
                f"expected a boolean matrix [seqlen_q, seqlen_k], True where visible"
            )
        seqlen_q, seqlen_k = dense.shape
        return cls._of_rects(rects_of_dense(dense), seqlen_q, None, None if seqlen_q == seqlen_k else seqlen_k)

    @classmethod
    def _of_rects(
        cls, rects: Sequence[Rect], seqlen: int, documents: list[Document] | None, seqlen_k: int | None = None
    ) -> AttnMaskSpec:
        q_ranges, k_ranges = [[q0, q1] for q0, q1, *_ in rects], [[k0, k1] for _, _, k0, k1, _ in rects]
        return cls(q_ranges, k_ranges, [kind for *_, kind in rects], seqlen, seqlen_k, documents)

    def __or__(self, other: AttnMaskSpec) -> AttnMaskSpec:
        """The union: a pair is visible when it is in either spec.

        Both must be over the same sequences. Documents are kept when both agree or one has none.
        """
        if not isinstance(other, AttnMaskSpec):
            return NotImplemented
        mine, theirs = (
            (s.total_seqlen, s.total_seqlen_k) for s in (self, other)
        )
        if mine != theirs:
            raise ValueError(
                f"union of specs over (total_seqlen, total_seqlen_k) {mine} and {theirs}: "
                f"both must describe the same sequences"
            )
        if self.documents is not None and other.documents is not None:
            documents = self.documents if self.documents == other.documents else None
        else:
            documents = self.documents if other.documents is None else other.documents
        return AttnMaskSpec(
            self.q_ranges + other.q_ranges,
            self.k_ranges + other.k_ranges,
            self.mask_types + other.mask_types,
            self.total_seqlen,
            self.total_seqlen_k,
            documents,
        )

    def to_dense(self) -> NDArray[np.bool_]:
        """The mask as a boolean matrix [total_seqlen, seqlen_k], True where visible.

        Drawn from the definition of the mask types, without the solver. Takes O(S^2) memory.
        """
        dense = np.zeros((self.total_seqlen, self.seqlen_k), dtype=bool)
        for (q0, q1), (k0, k1), kind in zip(self.q_ranges, self.k_ranges, self.mask_types, strict=True):
            i = np.arange(q1 - q0)[:, None]
            j = np.arange(k1 - k0)[None, :]
            visible = np.ones((q1 - q0, k1 - k0), dtype=bool)
            if kind in ("causal", "bi_causal"):
                visible &= j <= i + (k1 - k0) - (q1 - q0)
            if kind in ("inv_causal", "bi_causal"):
                visible &= j >= i
            dense[q0:q1, k0:k1] |= visible
        return dense


def lower_mask(
    spec: AttnMaskSpec, window: tuple[int | None, int | None] | None = None
) -> SliceTable:
    """The disjoint banded rectangles of a spec; overlapping rectangles mean the union.

    Args:
        spec: the mask.
        window: (left, right) limit in positions of the documents on top of the mask: a query at
            position p sees keys at positions p - left .. p + right only; None on a side: no limit.

    Raises:
        ValueError: the mask is over 2**62 pairs or more, which 64 bits do not count; or over two million pairs of
            its rectangles may overlap.
    """
    if spec.total_seqlen * spec.seqlen_k >= 1 << 62:
        raise ValueError(
            f"the mask is over {spec.total_seqlen} x {spec.seqlen_k} tokens: its pairs cannot be counted in 64 bits"
        )
    if not spec.q_ranges:
        return SliceTable.empty()
    q0, q1 = np.array(spec.q_ranges, dtype=np.int64).T
    k0, k1 = np.array(spec.k_ranges, dtype=np.int64).T
    has_lo = np.array([kind in ("inv_causal", "bi_causal") for kind in spec.mask_types])
    has_hi = np.array([kind in ("causal", "bi_causal") for kind in spec.mask_types])
    lo = np.where(has_lo, k0 - q0, -UNBOUNDED)
    hi = np.where(has_hi, k1 - q1, UNBOUNDED)
    table = disjoint_union(SliceTable.from_columns(q0, q1, k0, k1, lo, hi))
    return table if window is None else _windowed(table, spec, window)


def _windowed(
    table: SliceTable, spec: AttnMaskSpec, window: tuple[int | None, int | None]
) -> SliceTable:
    """Slices limited to a window of positions.

    Between two documents positions and tokens differ by a constant, so the limit is a band there.
    """
    documents = [d for d in spec.documents or [Document(0, spec.total_seqlen)] if d.end > d.start]
    starts = np.array([d.start for d in documents], dtype=np.int64)
    to_position = np.array([d.first_position - d.start for d in documents], dtype=np.int64)
    cut, _ = table.split_q(starts[1:])
    cut, _ = cut.split_k(starts[1:])
    q_shift, k_shift = (
        to_position[np.searchsorted(starts, tokens, side="right") - 1] for tokens in (cut.q0, cut.k0)
    )
    left, right = window
    offset = q_shift - k_shift  # positions differ by j - i - offset
    lo = cut.lo if left is None else np.maximum(cut.lo, offset - left)
    hi = cut.hi if right is None else np.minimum(cut.hi, offset + right)
    return SliceTable.from_columns(cut.q0, cut.q1, cut.k0, cut.k1, lo, hi)


def _hashable(field: Any) -> Any:
    """A field of a spec in a form whose hash Python computes once: bytes of numbers, text of names."""
    if not isinstance(field, list):
        return field
    if field and isinstance(field[0], str):
        return ",".join(field)
    array = np.array(field)
    return array.shape, array.dtype.str, array.tobytes()
