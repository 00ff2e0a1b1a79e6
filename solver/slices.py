"""Banded rectangles: the one shape that every mask is made of.

A `MaskSlice` is a rectangle of (query, key) pairs crossed by a diagonal band:

    pair (i, j) is visible  iff  q.start <= i < q.end,  k.start <= j < k.end,  lo <= j - i <= hi

in global token indices. Full, causal, inverse-causal and bi-causal rectangles and all sliding
windows are of this shape, and so is every sub-rectangle of one: cropping intersects the ranges and
keeps the band. Chunking, sharding and stage-splitting therefore need no case analysis.

A `SliceTable` holds many of them as numpy columns; every operation on it is vectorised, because a
plan for a million tokens and a thousand ranks has to be made in milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

IntArray = NDArray[np.int64]

# An unbounded band edge. Far outside any token index, and the sum of two still fits int64.
UNBOUNDED = 1 << 60

# Columns of SliceTable.data.
Q0, Q1, K0, K1, LO, HI = range(6)


@dataclass(frozen=True, slots=True, order=True)
class TokenRange:
    """Half-open range of token indices [start, end)."""

    start: int
    end: int

    def __post_init__(self) -> None:
        if self.start < 0 or self.end < self.start:
            raise ValueError(
                f"token range [{self.start}, {self.end}) is not valid: "
                f"a range needs 0 <= start <= end"
            )

    def __len__(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class MaskSlice:
    """A banded rectangle of the mask.

    Query i sees key j iff both lie in their ranges and lo <= j - i <= hi. The defaults leave the
    band open, which makes the slice a full rectangle.
    """

    q: TokenRange
    k: TokenRange
    lo: int = -UNBOUNDED
    hi: int = UNBOUNDED


class Cropped(NamedTuple):
    """Slices cut out of others, each with the index of the slice that it came from."""

    table: SliceTable
    parent: IntArray


@dataclass(frozen=True, slots=True, eq=False)
class SliceTable:
    """Banded rectangles as rows of an int64 array [n, 6]: q0, q1, k0, k1, lo, hi.

    Build it with `from_slices` or `from_columns`, which bring every row to its canonical form: no
    row is empty, the rectangle is the bounding box of its visible pairs, and the band is clamped to
    it (so bands are always finite and a row is a full rectangle iff its band spans all of it).
    Rows keep their order. The array must not be written to.
    """

    data: IntArray = field(repr=False)

    @classmethod
    def from_slices(cls, slices: Iterable[MaskSlice]) -> SliceTable:
        """Table of the non-empty ones among `slices`, in order."""
        rows = [(s.q.start, s.q.end, s.k.start, s.k.end, s.lo, s.hi) for s in slices]
        return cls(np.array(rows, dtype=np.int64).reshape(-1, 6)).canonical().table

    @classmethod
    def from_columns(
        cls, q0: ArrayLike, q1: ArrayLike, k0: ArrayLike, k1: ArrayLike, lo: ArrayLike, hi: ArrayLike
    ) -> SliceTable:
        """Table of the non-empty rows of six columns (arrays or scalars that broadcast)."""
        columns = np.broadcast_arrays(*(np.asarray(column) for column in (q0, q1, k0, k1, lo, hi)))
        return cls(np.stack(columns, axis=-1).astype(np.int64).reshape(-1, 6)).canonical().table

    @classmethod
    def empty(cls) -> SliceTable:
        """Table without rows."""
        return cls(np.zeros((0, 6), dtype=np.int64))

    @classmethod
    def concat(cls, tables: Iterable[SliceTable]) -> SliceTable:
        """The rows of all tables, one after the other."""
        return cls(np.concatenate([np.zeros((0, 6), np.int64), *(t.data for t in tables)]))

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[MaskSlice]:
        for q0, q1, k0, k1, lo, hi in self.data.tolist():
            yield MaskSlice(TokenRange(q0, q1), TokenRange(k0, k1), lo, hi)

    @property
    def q0(self) -> IntArray:
        return self.data[:, Q0]

    @property
    def q1(self) -> IntArray:
        return self.data[:, Q1]

    @property
    def k0(self) -> IntArray:
        return self.data[:, K0]

    @property
    def k1(self) -> IntArray:
        return self.data[:, K1]

    @property
    def lo(self) -> IntArray:
        return self.data[:, LO]

    @property
    def hi(self) -> IntArray:
        return self.data[:, HI]

    def take(self, index: NDArray[np.int64] | NDArray[np.bool_]) -> SliceTable:
        """Rows chosen by an index array or a boolean mask."""
        return SliceTable(self.data[index])

    def canonical(self) -> Cropped:
        """Tight rectangles and clamped bands; empty rows dropped.

        Row i of a slice sees keys [max(k0, i + lo), min(k1, i + hi + 1)), which is not empty iff
        k0 - hi <= i < k1 - lo; both ends are monotone in i, so the extreme rows give the extreme keys.
        """
        q0, q1, k0, k1, lo, hi = self.data.T
        rows_start = np.maximum(q0, k0 - hi)
        rows_end = np.minimum(q1, k1 - lo)
        keys_start = np.maximum(k0, rows_start + lo)
        keys_end = np.minimum(k1, rows_end + hi)
        band = np.maximum(lo, keys_start - rows_end + 1), np.minimum(hi, keys_end - 1 - rows_start)
        out = _in_columns(rows_start, rows_end, keys_start, keys_end, *band)
        keep = (q1 > q0) & (k1 > k0) & (lo <= hi) & (rows_end > rows_start)
        parent = np.flatnonzero(keep)
        return Cropped(SliceTable(out[parent]), parent)

    def areas(self) -> IntArray:
        """Visible pairs of each row, [n], in closed form."""
        q0, q1, k0, k1, lo, hi = self.data.T
        shift = k0 - q0
        return _pairs_in_band(q1 - q0, k1 - k0, lo - shift, hi - shift)

    def area(self) -> int:
        """Visible pairs of all rows together (rows are taken to be disjoint)."""
        return int(self.areas().sum())

    def is_full(self) -> NDArray[np.bool_]:
        """Which rows are full rectangles, [n]."""
        q0, q1, k0, k1, lo, hi = self.data.T
        full: NDArray[np.bool_] = (lo <= k0 - q1 + 1) & (hi >= k1 - 1 - q0)
        return full

    def crop(self, parent: IntArray, q0: IntArray, q1: IntArray, k0: IntArray, k1: IntArray) -> Cropped:
        """Row parent[i] cut to the rectangle [q0[i], q1[i]) x [k0[i], k1[i]); empty results dropped."""
        rows = self.data[parent]
        rows[:, Q0] = np.maximum(rows[:, Q0], q0)
        rows[:, Q1] = np.minimum(rows[:, Q1], q1)
        rows[:, K0] = np.maximum(rows[:, K0], k0)
        rows[:, K1] = np.minimum(rows[:, K1], k1)
        table, kept = SliceTable(rows).canonical()
        return Cropped(table, parent[kept])

    def split_q(self, cuts: IntArray) -> Cropped:
        """Rows cut at the query indices `cuts` (sorted); pieces of a row stay together, in order."""
        first = np.searchsorted(cuts, self.q0, side="right")
        last = np.searchsorted(cuts, self.q1, side="left")
        parent, nth = expand_counts(last - first + 1)
        bounds = np.concatenate([[-UNBOUNDED], cuts, [UNBOUNDED]])
        at = first[parent] + nth
        rows = self.data[parent]
        rows[:, Q0] = np.maximum(rows[:, Q0], bounds[at])
        rows[:, Q1] = np.minimum(rows[:, Q1], bounds[at + 1])
        table, kept = SliceTable(rows).canonical()
        return Cropped(table, parent[kept])

    def in_row_parts(self, shares: Sequence[float], grain: int) -> list[SliceTable]:
        """Tables of the rows between a few cuts, with about these shares of the pairs (they sum to 1).

        Cuts are where a slice begins, or at multiples of `grain`.
        """
        end = int(self.q1.max(initial=0))
        places = distinct(np.concatenate([self.q0, np.arange(0, end, grain), [end]]))
        pieces = self.split_q(places).table
        below = np.zeros(len(places) + 1)
        at = np.searchsorted(places, pieces.q0, side="right")
        below[1:] = np.cumsum(np.bincount(at, pieces.areas(), len(places)))
        wanted = np.cumsum(shares)[:-1] * below[-1]
        cuts = places[np.abs(below[1:, None] - wanted).argmin(axis=0)]
        parts = self.split_q(cuts).table
        nth = np.searchsorted(cuts, parts.q0, side="right")
        return [SliceTable(parts.data[nth == number]) for number in range(len(shares))]

    def split_k(self, cuts: IntArray) -> Cropped:
        """Rows cut at the key indices `cuts` (sorted)."""
        table, parent = self.transpose().split_q(cuts)
        return Cropped(table.transpose(), parent)

    def transpose(self) -> SliceTable:
        """The mask with queries and keys exchanged."""
        q0, q1, k0, k1, lo, hi = self.data.T
        return SliceTable(_in_columns(k0, k1, q0, q1, -hi, -lo))

    def shift(self, dq: IntArray | int, dk: IntArray | int) -> SliceTable:
        """Rows moved by dq queries and dk keys; the band moves by dk - dq."""
        q0, q1, k0, k1, lo, hi = self.data.T
        band = np.asarray(dk) - np.asarray(dq)
        return SliceTable(_in_columns(q0 + dq, q1 + dq, k0 + dk, k1 + dk, lo + band, hi + band))

    def to_dense(self, seqlen_q: int, seqlen_k: int) -> NDArray[np.bool_]:
        """The mask as a boolean matrix [seqlen_q, seqlen_k]; for tests and pictures of small masks."""
        dense = np.zeros((seqlen_q, seqlen_k), dtype=bool)
        for q0, q1, k0, k1, lo, hi in self.data.tolist():
            diff = np.arange(k0, k1)[None, :] - np.arange(q0, q1)[:, None]
            dense[q0:q1, k0:k1] |= (diff >= lo) & (diff <= hi)
        return dense


def _in_columns(*columns: IntArray) -> IntArray:
    """The columns of a table side by side, [n, 6]; for few rows in half the time of `np.stack`."""
    data = np.empty((len(columns[0]), len(columns)), dtype=np.int64)
    for nth, column in enumerate(columns):
        data[:, nth] = column
    return data


def _pairs_in_band(rows: IntArray, keys: IntArray, lo: IntArray, hi: IntArray) -> IntArray:
    """Number of (i, j) with 0 <= i < rows, 0 <= j < keys, lo <= j - i <= hi.

    It is the sum over i of clamp(hi + i + 1, 0, keys) less that of clamp(lo + i, 0, keys), each a difference of two
    prefix sums.
    """
    ends = np.array([hi + rows, hi, lo + (rows - 1), lo - 1])
    inside = np.minimum(np.maximum(ends, 0), keys)
    sums = (inside * (inside + 1) >> 1) + np.maximum(ends - keys, 0) * keys
    result: IntArray = (sums[0] - sums[1]) - (sums[2] - sums[3])
    return result


def pairs_in_rows(table: SliceTable, end: IntArray) -> IntArray:
    """Visible pairs of each row of the table whose query is before `end` (one for each row), [n]."""
    q0, q1, k0, k1, lo, hi = table.data.T
    shift = k0 - q0
    return _pairs_in_band(np.minimum(np.maximum(end, q0), q1) - q0, k1 - k0, lo - shift, hi - shift)


def expand_counts(counts: IntArray) -> tuple[IntArray, IntArray]:
    """For counts [2, 0, 3]: owners [0, 0, 2, 2, 2] and positions within each owner [0, 1, 0, 1, 2]."""
    counts = np.maximum(counts, 0)
    owner = np.repeat(np.arange(len(counts)), counts)
    ends = np.cumsum(counts)
    position = np.arange(len(owner)) - np.repeat(ends - counts, counts)
    return owner, position


def distinct(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The values in ascending order, each once, [n] -> [m]: tens of times as fast as `np.unique`, which hashes them."""
    values = np.sort(values)
    result: np.ndarray[Any, Any] = values[np.append(True, values[1:] != values[:-1])[: len(values)]]
    return result


def stable_order(keys: IntArray) -> IntArray:
    """What sorts keys of 0 and above, equal ones as they come, in a fraction of the time of a stable `argsort`.

    Keys times their number must be less than 2**62.
    """
    bits = len(keys).bit_length()
    order = keys << bits
    order |= np.arange(len(keys))
    order.sort()
    order &= (1 << bits) - 1
    return order


def merge_neighbours(table: SliceTable) -> SliceTable:
    """The same pairs in fewer banded rectangles, for disjoint canonical rows.

    Two rows are joined when their common bounding box with their common band holds exactly as many
    pairs as both: the closed-form area decides, so no case of shapes has to be told apart. Greedy,
    along keys and then along queries in turn, until neither joins any.
    """
    if len(table) < 2:
        return table
    order = np.lexsort((table.k0, table.q0))
    boxes, minor, in_vain = _Boxes.of(table.take(order)), K0, 0
    while in_vain < 2 and len(boxes.areas) > 1:
        joined = boxes.joined()
        in_vain = in_vain + 1 if joined is boxes else 0
        # They stay sorted by the other side, so that a stable sort by this one will do.
        boxes, minor = joined.take(np.argsort(joined.low[minor // 2], kind="stable")), K0 - minor
    return boxes.take(np.argsort(boxes.low[Q0], kind="stable")).table()


class _Boxes(NamedTuple):
    """Slices by what they span, [3, n]: queries, keys and the band of differences, from `low` on and before `high`."""

    low: IntArray
    high: IntArray
    areas: IntArray

    @classmethod
    def of(cls, table: SliceTable) -> _Boxes:
        low, high = (np.ascontiguousarray(table.data[:, first::2].T) for first in (0, 1))
        high[2] += 1
        return cls(low, high, table.areas())

    def table(self) -> SliceTable:
        data = np.stack([self.low, self.high], axis=-1).transpose(1, 0, 2).reshape(-1, 6)
        data[:, HI] -= 1
        return SliceTable(data)

    def take(self, index: NDArray[np.int64] | NDArray[np.bool_]) -> _Boxes:
        return _Boxes(self.low[:, index], self.high[:, index], self.areas[index])

    def joined(self) -> _Boxes:
        """One pass over neighbours in the order given; itself where none are joined.

        A chain of rows of which any two neighbours could be joined becomes one row, or pairs where that does not fit.
        """
        # What is between two rows without touching would be in a box of both.
        touch = np.maximum(self.low[:, 1:], self.low[:, :-1]) <= np.minimum(self.high[:, 1:], self.high[:, :-1])
        near = np.flatnonzero(touch[0] & touch[1] & touch[2])
        pairs = _Boxes(
            np.minimum(self.low[:, near], self.low[:, near + 1]),
            np.maximum(self.high[:, near], self.high[:, near + 1]),
            self.areas[near] + self.areas[near + 1],
        )
        pair = near[pairs.fit()]
        if not len(pair):
            return self
        opens = np.ones(len(self.areas), dtype=bool)
        opens[pair + 1] = False
        first = np.flatnonzero(opens)
        whole = self.spanned(first)
        fit = whole.fit()
        if fit.all():
            return whole
        chain = np.cumsum(opens) - 1
        nth = np.arange(len(chain)) - first[chain]
        return self.spanned(np.flatnonzero(opens | (~fit[chain] & (nth % 2 == 0))))

    def spanned(self, first: IntArray) -> _Boxes:
        """Of each stretch of rows, from those at `first` on, the common box, with the pairs of all."""
        low, high = np.minimum.reduceat(self.low, first, axis=1), np.maximum.reduceat(self.high, first, axis=1)
        return _Boxes(low, high, np.add.reduceat(self.areas, first))

    def fit(self) -> NDArray[np.bool_]:
        """Whether a box holds no more pairs than its rows, [n]."""
        (rows, keys, _), shift = self.high - self.low, self.low[1] - self.low[0]
        result: NDArray[np.bool_] = (
            _pairs_in_band(rows, keys, self.low[2] - shift, self.high[2] - 1 - shift) == self.areas
        )
        return result
