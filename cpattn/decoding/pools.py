"""Pages of a rank for the layers of one window: which sequence has which, where new tokens go, what can be let go.

The prompt's pages belong to documents, and a sequence has those of the documents on its path: sequences that begin
alike share them. What a sequence adds goes to pages of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .pages import Ints

# Page 0 takes the writes of tokens that belong to other ranks; no sequence's table reaches its slots as visible.
_SCRATCH = 0
# The position of a slot that holds no token: later than any query.
NEVER = torch.iinfo(torch.int64).max
# Pages by which the reach of decoding grows, where shapes may change.
_PAGE_STEP = 8


class Prompt(NamedTuple):
    """The prompt's tokens on this rank, ascending, and which documents each sequence is made of.

    documents, positions: int64, of each token, the position within its sequences. paths: of each sequence. lengths:
    int64, tokens of each sequence over all ranks.
    """

    documents: Ints
    positions: Ints
    paths: list[list[int]]
    lengths: Ints

    def seen_again(self, window: int | None) -> Ints:
        """Numbers of the tokens that a later query of some sequence can see."""
        if window is None:
            return np.arange(len(self.positions))
        earliest = np.full(1 + max((d for path in self.paths for d in path), default=0), NEVER)
        for path, length in zip(self.paths, self.lengths, strict=True):
            earliest[path] = np.minimum(earliest[path], length - window)
        return np.flatnonzero(self.positions > earliest[self.documents])


@dataclass(eq=False)
class Pool:
    """The pages of all layers that have the same window, on this rank.

    pages: the pages of each sequence in order. users: how many sequences have a page. room: slots of each sequence's
    last page that it may still write to. page_last: position of the newest token of each page. table: int32 [B, P],
    padded with the scratch page. positions: int64 [num_pages, page_size]. rows: int64, where this step's tokens are
    written. index: rows of the prefill that are kept, at `slots`.
    """

    window: int | None
    layers: list[int]
    page_size: int
    free: list[int]
    pages: list[list[int]]
    users: Ints
    room: Ints
    page_last: Ints
    table: Tensor
    positions: Tensor
    rows: Tensor
    index: Tensor = field(repr=False)
    slots: Tensor = field(repr=False)

    @property
    def num_used(self) -> int:
        """Pages that hold tokens."""
        return int((self.users > 0).sum())

    def reach(self, static: bool) -> Tensor:
        """The table: of the pages that there may ever be, or of those in use, in steps."""
        if static:
            return self.table
        used = max((len(p) for p in self.pages), default=0)
        return self.table[:, : -(-used // _PAGE_STEP) * _PAGE_STEP]

    def place(self, sequences: Ints, positions: Ints, mine: np.ndarray) -> Ints:
        """Rows of new tokens: of those that are mine in pages of their sequences, of the others in the scratch page."""
        rows = np.full(len(sequences), _SCRATCH * self.page_size, dtype=np.int64)
        for n in np.flatnonzero(mine):
            b = int(sequences[n])
            if not self.room[b]:
                page = self.free.pop()
                self.pages[b].append(page)
                self.users[page], self.room[b] = 1, self.page_size
                self._write_table(b)
            page = self.pages[b][-1]
            rows[n] = (page + 1) * self.page_size - self.room[b]
            self.room[b] -= 1
            self.page_last[page] = positions[n]
        return rows

    def drop_before(self, b: int, position: int) -> None:
        """Let go of the pages of a sequence whose tokens no query from a position on can see."""
        if self.window is None:
            return
        gone, pages = 0, self.pages[b]
        # The last page is kept while it has room, since tokens are still to come to it.
        while gone < len(pages) and self.page_last[pages[gone]] <= position - self.window:
            if gone == len(pages) - 1 and self.room[b]:
                break
            gone += 1
        if gone:
            self.forget(b, gone)

    def forget(self, b: int, count: int) -> None:
        """Let go of a sequence's first pages; those that no other sequence has are free again."""
        old = self.pages[b][:count]
        del self.pages[b][:count]
        self.room[b] = self.room[b] if self.pages[b] else 0
        self.users[old] -= 1
        freed = [page for page in old if not self.users[page]]
        self.free += freed
        self.positions[torch.tensor(freed, dtype=torch.int64, device=self.positions.device)] = NEVER
        self._write_table(b)

    def _write_table(self, b: int) -> None:
        row = torch.full((self.table.shape[1],), _SCRATCH, dtype=torch.int32)
        row[: len(self.pages[b])] = torch.tensor(self.pages[b], dtype=torch.int32)
        self.table[b].copy_(row, non_blocking=True)


def make_pool(
    prompt: Prompt, layers: Sequence[int], *, window: int | None, growth: int, page_size: int, device: torch.device
) -> Pool:
    """Pages for the prompt's rows that a later query can see, and for `growth` tokens of each sequence on this rank."""
    index = prompt.seen_again(window)
    documents, positions = prompt.documents[index], prompt.positions[index]
    batch = len(prompt.paths)
    counts = np.bincount(documents, minlength=1 + max((d for path in prompt.paths for d in path), default=0))
    num_pages = -(-counts // page_size)
    first = 1 + np.cumsum(num_pages) - num_pages
    own = 1 + -(-growth // page_size)
    total = 1 + int(num_pages.sum()) + batch * own
    starts = np.cumsum(counts) - counts
    slots = first[documents] * page_size + np.arange(len(documents)) - starts[documents]
    held = np.full(total * page_size, NEVER)
    held[slots] = positions
    last = np.full(total, -1)
    np.maximum.at(last, slots // page_size, positions)
    pages = [[p for d in path for p in range(first[d], first[d] + num_pages[d])] for path in prompt.paths]
    users = np.bincount([page for mine in pages for page in mine], minlength=total)
    pool = Pool(
        window=window,
        layers=list(layers),
        page_size=page_size,
        free=list(range(total - 1, total - 1 - batch * own, -1)),
        pages=pages,
        users=users,
        room=np.array([_room(mine, held, users, page_size) for mine in pages], dtype=np.int64),
        page_last=last,
        table=torch.zeros(batch, max(map(len, pages), default=0) + own, dtype=torch.int32, device=device),
        positions=torch.from_numpy(held).view(total, page_size).to(device),
        rows=torch.zeros(batch, dtype=torch.int64, device=device),
        index=torch.from_numpy(index).to(device),
        slots=torch.from_numpy(slots).to(device),
    )
    for b in range(batch):
        pool._write_table(b)
    return pool


def _room(pages: list[int], held: np.ndarray, users: Ints, page_size: int) -> int:
    """Free slots of a sequence's last page, if no other sequence has it."""
    if not pages or users[pages[-1]] > 1:
        return 0
    return int((held[pages[-1] * page_size : (pages[-1] + 1) * page_size] == NEVER).sum())
