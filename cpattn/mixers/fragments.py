"""Fragments: what a placement leaves of each document on each rank, and what a fragment needs of those before it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cpattn.collectives import RowRoutes
from cpattn.keys.key import AttnKey
from cpattn.masks.spec import lower_mask
from cpattn.ops.layout import cached_tensor
from cpattn.runtime.bound import bind_exchange
from cpattn.solver import (
    Intervals,
    Placement,
    SliceTable,
    exchange_of,
    expand_counts,
    make_routes,
    merge_intervals,
    received_runs,
)

IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class FragmentTable:
    """Runs of consecutive tokens of one document on one rank, of all ranks, in token order.

    ranks: owner of each, [n]. starts, ends: its tokens. rows: its first row among the owner's.
    documents: start of its document. firsts: number of its document's first fragment.
    """

    cp_size: int
    ranks: IntArray = field(repr=False)
    starts: IntArray = field(repr=False)
    ends: IntArray = field(repr=False)
    rows: IntArray = field(repr=False)
    documents: IntArray = field(repr=False)
    firsts: IntArray = field(repr=False)

    @classmethod
    def of(cls, placement: Placement, starts: IntArray, ends: IntArray) -> FragmentTable:
        """The fragments of documents [starts, ends), none of them empty, that tile the sequence."""
        first = np.searchsorted(ends, placement.starts, side="right")
        last = np.searchsorted(starts, placement.ends, side="left")
        run, nth = expand_counts(last - first)
        document = first[run] + nth
        begin = np.maximum(placement.starts[run], starts[document])
        end = np.minimum(placement.ends[run], ends[document])
        return cls(
            placement.cp_size,
            placement.owners[run],
            begin,
            end,
            placement.local_starts[run] + begin - placement.starts[run],
            starts[document],
            np.searchsorted(document, document, side="left"),
        )

    def __len__(self) -> int:
        return len(self.ranks)

    def of_rank(self, rank: int) -> IntArray:
        """Numbers of one rank's fragments, in the order of its rows."""
        return np.flatnonzero(self.ranks == rank)

    def is_last(self) -> NDArray[np.bool_]:
        """Whether each is the last of its document, [n]."""
        return np.append(self.firsts[1:] != self.firsts[:-1], True)[: len(self)]

    def maps_needed(self) -> tuple[Intervals, Placement, IntArray]:
        """What is known of each fragment that is not the last of its document, as a row of its owner: those that each
        rank needs (of all fragments before its own in their documents), where they lie, and for each fragment [n] the
        number of such rows before it.
        """
        passes_on = ~self.is_last()
        before: np.ndarray = np.cumsum(passes_on) - passes_on
        placement = Placement.from_runs(
            np.arange(1, passes_on.sum() + 1), self.ranks[passes_on], cp_size=self.cp_size
        )
        return merge_intervals(self.ranks, before[self.firsts], before), placement, before

    def rows_before(self, reach: int) -> Intervals:
        """Tokens that each rank needs: up to `reach` before each of its fragments, of the same document."""
        return merge_intervals(self.ranks, np.maximum(self.starts - reach, self.documents), self.starts)


def fragments_of(key: AttnKey, call: str) -> FragmentTable:
    """The fragments of the documents of the key's mask.

    Raises:
        ValueError: the mask has no documents, or is one of cross-attention or of a prefix tree.
    """

    def make() -> FragmentTable:
        documents = key.spec.documents
        if key.spec.is_cross or documents is None:
            raise ValueError(
                f"{call}: the mask does not say which tokens follow each other: use self-attention with documents "
                f"(AttnMaskSpec.varlen, or documents=[(start, end), ...])"
            )
        starts, ends = np.array([d[:2] for d in documents if d.end > d.start], dtype=np.int64).reshape(-1, 2).T
        _refuse_other_documents(lower_mask(key.spec), ends, call)
        return FragmentTable.of(key.q_placement, starts, ends)

    return cached_tensor(key, ("fragments",), make)  # type: ignore[no-any-return]


def _refuse_other_documents(slices: SliceTable, ends: IntArray, call: str) -> None:
    """A document that sees another continues it (a prefix tree); its state would begin where that one ends."""
    first, last = (np.searchsorted(ends, side, side="right") for side in (slices.q0, slices.q1 - 1))
    first_k, last_k = (np.searchsorted(ends, side, side="right") for side in (slices.k0, slices.k1 - 1))
    other = (first != last) | (first_k != last_k) | (first != first_k)
    if other.any():
        raise ValueError(
            f"{call}: token {int(slices.q0[other][0])} sees tokens of other documents than its own (a prefix tree): "
            f"recurrent layers and convolutions need whole documents; give each sample its own copy of the prefix"
        )


def routes_of(needed: Intervals, placement: Placement, rank: int, device: torch.device) -> RowRoutes:
    """The exchange that brings each rank the rows that it needs and does not own."""
    return bind_exchange(exchange_of(make_routes(needed, placement), placement, rank), device)


def locate(tokens: IntArray, needed: Intervals, placement: Placement, rank: int) -> IntArray:
    """Where tokens lie among [own rows, received rows] of a rank; -1 for those that are in neither."""
    received = received_runs(make_routes(needed, placement), rank)
    own = placement.tokens_of(rank)
    row = np.searchsorted(own, tokens).clip(max=max(len(own) - 1, 0))
    found = np.full(len(tokens), -1, dtype=np.int64)
    mine = own[row] == tokens if len(own) else np.zeros(len(tokens), dtype=bool)
    found[mine] = row[mine]
    run = np.searchsorted(received.ends, tokens, side="right")
    at_hand = ~mine & (run < len(received.ends))
    run = run[at_hand]
    inside = tokens[at_hand] >= received.starts[run]
    landed = len(own) + received.offsets[run] + tokens[at_hand] - received.starts[run]
    found[at_hand] = np.where(inside, landed, -1)
    return found


def index_tensor(rows: IntArray, device: torch.device) -> Tensor:
    """Row numbers int64 on a device."""
    return torch.from_numpy(np.ascontiguousarray(rows, dtype=np.int64)).to(device)
