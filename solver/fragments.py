"""Fragments: what a placement leaves of each document on each rank, and what layers that mix tokens in order move."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .placement import Placement
from .routes import Intervals, make_routes, merge_intervals
from .slices import IntArray, expand_counts


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

    def maps_received(self) -> IntArray:
        """Maps of fragments that a recurrence brings to each rank, [cp_size]."""
        needed, owners, _ = self.maps_needed()
        return make_routes(needed, owners).rows_received(self.cp_size)

    def convolution_rows_received(self, width: int, placement: Placement) -> IntArray:
        """Rows that a convolution of that width brings to each rank, [cp_size]."""
        return make_routes(self.rows_before(width - 1), placement).rows_received(self.cp_size)

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


class Mixer(Protocol):
    """A kind of layer that mixes tokens in order, in its sizes: `Recurrence` or `Convolution`."""

    def line(self, table: FragmentTable, placement: Placement, itemsize: int) -> str:
        """What one such layer moves, in words. itemsize: bytes of an element of rows."""
        ...


@dataclass(frozen=True, slots=True)
class Recurrence:
    """A linear recurrence in its sizes.

    num_heads: value heads. dim_k, dim_v: head dims of k and v (of B and x in Mamba-2). delta: whether the rule is the
    delta rule, whose factor is a matrix. by_channel: a decay for each channel.
    """

    num_heads: int
    dim_k: int
    dim_v: int
    delta: bool = False
    by_channel: bool = False

    @property
    def map_bytes(self) -> int:
        """Of the map of one fragment as it travels, in fp32: the state, and what it is multiplied with."""
        factor = self.dim_k * self.dim_k if self.delta else self.dim_k if self.by_channel else 1
        return 4 * self.num_heads * (factor + self.dim_k * self.dim_v)

    def line(self, table: FragmentTable, placement: Placement, itemsize: int) -> str:
        """Maps and their bytes; the state is in fp32 whatever the rows are."""
        maps = table.maps_received()
        kind = "delta rule" if self.delta else "recurrence"
        return (
            f"{kind}, {self.num_heads} heads of {self.dim_k} x {self.dim_v}: {len(table)} fragments, {maps.sum()} maps "
            f"of {self.map_bytes:,} bytes received, forward, {maps.max(initial=0) * self.map_bytes:,} bytes on the "
            f"busiest; 1 stage, behind the reading of own rows"
        )


@dataclass(frozen=True, slots=True)
class Convolution:
    """A short causal convolution: its width, and the channels of a row."""

    width: int
    channels: int

    def line(self, table: FragmentTable, placement: Placement, itemsize: int) -> str:
        """Rows and their bytes."""
        rows = table.convolution_rows_received(self.width, placement)
        row = self.channels * itemsize
        return (
            f"convolution of width {self.width}, {self.channels} channels: {rows.sum()} rows received, forward, "
            f"{rows.max(initial=0) * row:,} bytes on the busiest; 1 stage, before it"
        )
