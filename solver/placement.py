"""Placement: which rank owns which tokens.

A `Placement` cuts the sequence into runs and gives each to a rank; a rank's rows are its runs in
global order. Runs may have any length and ranks any number of rows, also none.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .slices import IntArray


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """Owner of every token, as runs.

    starts, ends, owners: int64 [num_runs]; runs are sorted, contiguous and cover [0, total_seqlen);
    neighbouring runs have different owners. local_starts[i] is the first row of run i among its
    owner's rows. num_tokens: int64 [cp_size].
    """

    cp_size: int
    total_seqlen: int
    starts: IntArray = field(repr=False)
    ends: IntArray = field(repr=False)
    owners: IntArray = field(repr=False)
    local_starts: IntArray = field(repr=False)
    num_tokens: IntArray

    @classmethod
    def from_runs(cls, ends: IntArray, owners: IntArray, *, cp_size: int) -> Placement:
        """Placement from consecutive runs: run i is [ends[i-1], ends[i]) and belongs to owners[i].

        Empty runs are dropped and neighbours of one owner are joined.
        """
        ends = np.asarray(ends, dtype=np.int64)
        owners = np.asarray(owners, dtype=np.int64)
        lengths = np.diff(ends, prepend=0)
        assert (lengths >= 0).all(), "run ends must not decrease"
        ends, owners = ends[lengths > 0], owners[lengths > 0]
        last_of_owner = np.append(owners[1:] != owners[:-1], True)[: len(owners)]
        ends, owners = ends[last_of_owner], owners[last_of_owner]
        starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)[: len(ends)]
        lengths = ends - starts
        num_tokens = np.bincount(owners, weights=lengths, minlength=cp_size).astype(np.int64)
        assert len(num_tokens) == cp_size, "an owner lies outside the group"
        # Exclusive prefix sum of lengths within each owner, in run order.
        by_owner = np.argsort(owners, kind="stable")
        before = np.cumsum(lengths[by_owner]) - lengths[by_owner]
        first_row = np.cumsum(num_tokens) - num_tokens
        local_starts = np.empty_like(lengths)
        local_starts[by_owner] = before - first_row[owners[by_owner]]
        total = int(ends[-1]) if len(ends) else 0
        return cls(cp_size, total, starts, ends, owners, local_starts, num_tokens)

    def runs_of(self, rank: int) -> IntArray:
        """Runs of one rank, [n, 2]: global start and end, in order."""
        mine = self.owners == rank
        return np.stack([self.starts[mine], self.ends[mine]], axis=-1)

    def runs_by_rank(self) -> list[list[list[int]]]:
        """Runs of every rank, each a [start, end], in order."""
        runs: list[list[list[int]]] = [[] for _ in range(self.cp_size)]
        for start, end, owner in zip(self.starts.tolist(), self.ends.tolist(), self.owners.tolist(), strict=True):
            runs[owner].append([start, end])
        return runs

    def owner_of(self, tokens: IntArray) -> IntArray:
        """Rank that owns each token."""
        return self.owners[np.searchsorted(self.ends, tokens, side="right")]

    def tokens_of(self, rank: int) -> IntArray:
        """Global indices of one rank's rows, [num_tokens[rank]], ascending."""
        runs = self.runs_of(rank)
        if not len(runs):
            return np.zeros(0, dtype=np.int64)
        return np.concatenate([np.arange(start, end) for start, end in runs.tolist()])


def place_contiguous(total_seqlen: int, cp_size: int) -> Placement:
    """Rank r owns the r-th of cp_size equal pieces (lengths differ by at most one)."""
    ends = np.arange(1, cp_size + 1) * total_seqlen // cp_size
    return Placement.from_runs(ends, np.arange(cp_size), cp_size=cp_size)


def place_zigzag(total_seqlen: int, cp_size: int) -> Placement:
    """Rank r owns pieces r and 2 * cp_size - 1 - r of 2 * cp_size: even area under one causal mask."""
    pieces = 2 * cp_size
    ends = np.arange(1, pieces + 1) * total_seqlen // pieces
    ranks = np.arange(cp_size)
    return Placement.from_runs(ends, np.concatenate([ranks, ranks[::-1]]), cp_size=cp_size)
