"""A paged key-value cache that stays sharded: keys live on the rank that computed them, and queries come to them.

Prefill runs the distributed attention and leaves each rank's keys where they are. In decoding every rank computes the
attention of the new queries over its own pages, and the partial results merge by log-sum-exp: per token and layer a
few kilobytes move, whatever the length of the context. New keys go to the ranks in turn.

The device side of a decoding step (`PagedKVCache.decode`) reads nothing back to the host and has fixed shapes, so it
can be captured in a CUDA graph; the host side (`advance`) knows lengths and pages without asking the device.

Shape legend: B sequences, T rows of this rank in prefill, P pages of a sequence, N query heads, G key heads, D and E
head dims of q/k and of v.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cpattn.keys.key import AttnKey
from cpattn.masks.reading import read_int
from cpattn.masks.spec import AttnMaskSpec, Document, lower_mask
from cpattn.ops.attention import check_numbers
from cpattn.runtime.execute import accumulator_dtype

from .merge import MergeMethod, broadcast, check_merge, choose_merge, merge_costs, merge_over_ranks
from .pages import PagedKeys, count_rows, page_rows, paged_partial, write_rows

# Page 0 takes the writes of tokens that belong to other ranks; no sequence's table reaches its slots as visible.
_SCRATCH = 0
# The position of a slot that holds no token: later than any query.
_NEVER = torch.iinfo(torch.int64).max
# Pages by which the reach of decoding grows, where shapes may change.
_PAGE_STEP = 8


@dataclass(eq=False)
class _Pool:
    """The pages of all layers that have the same window, on this rank.

    host_pages: the pages of each sequence in order. host_slots: tokens of each sequence that are held here, less those
    of dropped pages. page_last: position of the newest token of each page. first_page: pages dropped so far.
    table: int32 [B, P], padded with the scratch page. positions: int64 [num_pages, page_size]. rows: int64 [B], where
    this step's tokens are written.
    """

    window: int | None
    layers: list[int]
    free: list[int]
    host_pages: list[list[int]]
    host_slots: np.ndarray
    page_last: np.ndarray
    table: Tensor
    positions: Tensor
    rows: Tensor
    row_positions: Tensor
    index: Tensor = field(repr=False)  # local rows of the prefill that are kept, sequence by sequence
    kept: np.ndarray = field(repr=False)  # how many of them each sequence has


class PagedKVCache:
    """Keys and values of a batch of sequences, over the ranks of a key's group.

    Args:
        key: of the prefill; its documents are the sequences, its placement says which rank holds which tokens. No
            document may see another, and each begins at position 0.
        windows: for each layer the number of keys that a query sees, itself included, or None for all. Layers with a
            window keep only pages that a later query can still see.
        max_new_tokens: tokens that each sequence may grow by.
        page_size: tokens of a page.
        dtype, device: of keys and values.
        static_shapes: attend to all pages that there may ever be, so that every step has the same shapes (for CUDA
            graphs); else to those in use.

    Raises:
        ValueError: the key's mask is not one of separate documents, or a number is out of range.
    """

    def __init__(
        self,
        key: AttnKey,
        *,
        windows: Sequence[int | None],
        max_new_tokens: int,
        page_size: int = 64,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        static_shapes: bool = False,
    ) -> None:
        documents = _documents_of(key.spec)
        page_size = read_int("page_size", page_size)
        max_new_tokens = read_int("max_new_tokens", max_new_tokens, least=0)
        windows = tuple(windows)  # of numpy too
        if not windows:
            raise ValueError("windows is empty: give one entry for each layer, a window or None")
        windows = tuple(None if window is None else read_int("a layer's window", window) for window in windows)
        if not dtype.is_floating_point:
            raise ValueError(f"dtype is {dtype}: keys and values are floating-point numbers")
        self.key, self.page_size, self.static_shapes = key, page_size, static_shapes
        self.group, self.cp_size, self.cp_rank = key.cp_group, key.cp_size, key.cp_rank
        self.windows, self.max_new_tokens = windows, max_new_tokens
        self.dtype, self.device = dtype, torch.device(device)
        self._lengths = np.array([d.end - d.start for d in documents], dtype=np.int64)
        self._limits = self._lengths + max_new_tokens
        self._prefilled: set[int] = set()
        self._advanced = False
        self._queries = torch.zeros(self.batch_size, dtype=torch.int64, device=self.device)
        self._pools = [
            self._make_pool(w, [layer for layer, mine in enumerate(self.windows) if mine == w])
            for w in dict.fromkeys(self.windows)
        ]
        self._pool_of = {layer: pool for pool in self._pools for layer in pool.layers}
        self._keys, self._values = [], []
        for layer in range(len(self.windows)):
            pages = self._pool_of[layer].positions.shape[0]
            shape = (pages, page_size, key.num_heads_kv)
            self._keys.append(torch.zeros(*shape, key.head_dim, dtype=dtype, device=self.device))
            self._values.append(torch.zeros(*shape, key.head_dim_v, dtype=dtype, device=self.device))

    @property
    def batch_size(self) -> int:
        """Number of sequences."""
        return len(self._lengths)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence so far, over all ranks."""
        return [int(n) for n in self._lengths]

    @property
    def positions(self) -> Tensor:
        """Positions of this step's tokens, int64 [B] on the device; a buffer that `advance` overwrites."""
        return self._queries

    def pages_in_use(self, layer: int) -> int:
        """Pages of this rank that hold tokens of a layer."""
        return sum(len(pages) for pages in self._pool_of[layer].host_pages)

    def prefill(self, layer: int, k_TGD: Tensor, v_TGE: Tensor) -> None:
        """Keep this rank's keys and values of the prompt; nothing moves between ranks.

        Args:
            layer: each layer once, before the first `advance`.
            k_TGD, v_TGE: this rank's rows, in the key's order, as `attention` takes them.

        Raises:
            ValueError: the layer has been filled already or is none of the cache's, or shapes do not fit.
            RuntimeError: `advance` has been called.
        """
        self._check_layer(layer)
        rows = (self.key.num_keys, self.key.num_heads_kv)
        _check_shape("k", k_TGD, (*rows, self.key.head_dim))
        _check_shape("v", v_TGE, (*rows, self.key.head_dim_v))
        if layer in self._prefilled:
            raise ValueError(f"layer {layer} has been prefilled already")
        if self._advanced:
            raise RuntimeError(f"prefill of layer {layer} after advance: prefill all layers before the first step")
        self._prefilled.add(layer)
        pool = self._pool_of[layer]
        sequence, position = count_rows(pool.kept)
        table = pool.table.cpu().numpy()
        slots = page_rows(table, sequence, position, self.page_size).to(self.device)
        for cache, fresh in ((self._keys[layer], k_TGD), (self._values[layer], v_TGE)):
            write_rows(cache, slots, fresh.detach().to(self.dtype).index_select(0, pool.index))

    def advance(self) -> Tensor:
        """Begin a step in which every sequence grows by one token; returns `positions`.

        Host work and copies to the device only: picks the rank and the slot of each new token, takes and drops pages.

        Raises:
            RuntimeError: a layer lacks the prompt's keys, or a sequence would outgrow max_new_tokens.
        """
        missing = sorted(set(range(len(self.windows))) - self._prefilled)
        if missing and not self._advanced and self._lengths.any():
            raise RuntimeError(f"layers {missing} have not been prefilled: give the cache the prompt's keys first")
        if (self._lengths >= self._limits).any():
            raise RuntimeError(f"a sequence has grown by max_new_tokens = {self.max_new_tokens}: the cache is full")
        position = self._lengths.copy()
        # New tokens go round the ranks, each sequence from another one on.
        mine = (position + np.arange(self.batch_size)) % self.cp_size == self.cp_rank
        for pool in self._pools:
            self._drop_pages(pool, position)
            self._place_tokens(pool, position, mine)
        self._queries.copy_(torch.from_numpy(position), non_blocking=True)
        self._lengths += 1
        self._advanced = True
        return self._queries

    @torch.no_grad()
    def decode(
        self,
        layer: int,
        q_BND: Tensor,
        k_BGD: Tensor,
        v_BGE: Tensor,
        *,
        softmax_scale: float | None = None,
        softcap: float | None = None,
        sink: Tensor | None = None,
        source: int | None = None,
        merge: MergeMethod = "auto",
    ) -> Tensor:
        """Attention of each sequence's new token over all its keys, its own included; stores that key and value.

        No host sync, and no gradient. Call it on all ranks, after `advance`, once for each layer.

        Args:
            q_BND, k_BGD, v_BGE: of the new tokens, the same on all ranks (every rank runs the model on them).
            softmax_scale, softcap, sink: as in `attention`.
            source: a rank of the group, if only that rank has q, k and v; the others pass tensors of the same shape,
                and get the values from it.
            merge: "gather" sends every partial result to every rank; "scatter" merges a share of the rows on each
                rank and gathers the merged ones; "auto" takes what moves fewer bytes.

        Returns:
            out [B, N, E] in q's dtype, equal bit for bit on all ranks.

        Raises:
            ValueError: a layer, shape, number or name does not fit; before any collective.
            RuntimeError: `advance` has not been called.
        """
        self._check_step(layer, q_BND, k_BGD, v_BGE, source)
        scale = self.key.head_dim**-0.5 if softmax_scale is None else softmax_scale
        check_numbers(self.key, scale, softcap, sink)
        check_merge(merge)
        if source is not None and self.group is not None:
            q_BND, k_BGD, v_BGE = broadcast((q_BND, k_BGD, v_BGE), source, self.group)
        pool = self._pool_of[layer]
        for cache, new in ((self._keys[layer], k_BGD), (self._values[layer], v_BGE)):
            write_rows(cache, pool.rows, new.to(self.dtype))
        keys = PagedKeys(self._keys[layer], self._values[layer], self._table_in_reach(pool), pool.positions)
        out, lse = paged_partial(q_BND, keys, self._queries, window=pool.window, scale=scale, softcap=softcap)
        return merge_over_ranks(out, lse, self.group, dtype=q_BND.dtype, sink=sink, method=merge)

    def bytes_per_step(self, *, merge: MergeMethod = "auto", itemsize: int | None = None) -> int:
        """Bytes that one rank sends and receives, each, for one token of every sequence, over all layers.

        itemsize: of the model's activations; None is that of the cache.
        """
        check_merge(merge)
        rows = self.batch_size * self.key.num_heads_q
        itemsize = self.dtype.itemsize if itemsize is None else itemsize
        accumulator = accumulator_dtype(self.dtype).itemsize
        costs = merge_costs(rows, self.key.head_dim_v, self.cp_size, accumulator, itemsize)
        return costs[choose_merge(costs, merge)] * len(self.windows)

    def bytes_to_gather_cache(self) -> int:
        """Bytes that one rank would receive if the others sent it the keys and values that it lacks, at this length."""
        row = self.key.num_heads_kv * (self.key.head_dim + self.key.head_dim_v) * self.dtype.itemsize
        total = 0
        for window in self.windows:
            seen = self._lengths if window is None else np.minimum(self._lengths, window)
            total += int(seen.sum()) * (self.cp_size - 1) // self.cp_size * row
        return total

    def _check_step(self, layer: int, q: Tensor, k: Tensor, v: Tensor, source: int | None) -> None:
        self._check_layer(layer)
        if not self._advanced:
            raise RuntimeError("decode before advance: the step of the new tokens begins with advance()")
        for name, tensor, shape in (
            ("q", q, (self.key.num_heads_q, self.key.head_dim)),
            ("k", k, (self.key.num_heads_kv, self.key.head_dim)),
            ("v", v, (self.key.num_heads_kv, self.key.head_dim_v)),
        ):
            _check_shape(name, tensor, (self.batch_size, *shape))
        if source is not None and source not in range(self.cp_size):
            raise ValueError(f"source is {source}: the group has ranks 0 to {self.cp_size - 1}")

    def _table_in_reach(self, pool: _Pool) -> Tensor:
        """Pages that there may ever be, or those in use, in steps."""
        if self.static_shapes:
            return pool.table
        used = max((len(p) for p in pool.host_pages), default=0)
        return pool.table[:, : -(-used // _PAGE_STEP) * _PAGE_STEP]

    def _check_layer(self, layer: int) -> None:
        if layer not in self._pool_of:
            raise ValueError(f"layer is {layer}: the cache has layers 0 to {len(self.windows) - 1}, as windows says")

    def _make_pool(self, window: int | None, layers: list[int]) -> _Pool:
        """Pages for the prompt's rows that a later query can see, and for this rank's share of new tokens."""
        documents = self.key.spec.documents or []
        tokens = self.key.k_placement.tokens_of(self.cp_rank)
        starts = np.array([d.start for d in documents], dtype=np.int64)
        # Empty documents share their start with the next one: the last of those at or before a token holds it.
        sequence = np.searchsorted(starts, tokens, side="right") - 1
        position = tokens - starts[sequence]
        if window is not None:
            keep = position > self._lengths[sequence] - window
            sequence, position = sequence[keep], position[keep]
            index = np.flatnonzero(keep)
        else:
            index = np.arange(len(tokens))
        kept = np.bincount(sequence, minlength=self.batch_size)
        new = -(-self.max_new_tokens // self.cp_size)
        most = kept + (new if window is None else min(new, -(-window // self.cp_size) + self.page_size))
        per_sequence = -(-most // self.page_size) + 1
        num_pages = 1 + int(per_sequence.sum())
        first = np.cumsum(kept) - kept
        slots = np.full((num_pages, self.page_size), _NEVER, dtype=np.int64)
        page_last = np.full(num_pages, -1, dtype=np.int64)
        free = list(range(num_pages - 1, _SCRATCH, -1))
        pages = [[free.pop() for _ in range(-(-int(n) // self.page_size))] for n in kept]
        for b, mine in enumerate(pages):
            own = position[first[b] : first[b] + kept[b]]
            for nth, page in enumerate(mine):
                part = own[nth * self.page_size : (nth + 1) * self.page_size]
                slots[page, : len(part)] = part
                page_last[page] = part[-1]
        table = torch.full((self.batch_size, int(per_sequence.max(initial=1))), _SCRATCH, dtype=torch.int32)
        for b, mine in enumerate(pages):
            table[b, : len(mine)] = torch.tensor(mine, dtype=torch.int32)
        zeros = torch.zeros(self.batch_size, dtype=torch.int64, device=self.device)
        return _Pool(
            window=window,
            layers=layers,
            free=free,
            host_pages=pages,
            host_slots=kept.astype(np.int64),
            page_last=page_last,
            table=table.to(self.device),
            positions=torch.from_numpy(slots).to(self.device),
            rows=zeros,
            row_positions=zeros.clone(),
            index=torch.from_numpy(index).to(self.device),
            kept=kept,
        )

    def _drop_pages(self, pool: _Pool, position: np.ndarray) -> None:
        """Free the pages whose newest token lies outside the window of all queries to come."""
        if pool.window is None:
            return
        for b, pages in enumerate(pool.host_pages):
            gone = 0
            # The last page is kept while it has room, since tokens are still to come to it.
            while gone < len(pages) and pool.page_last[pages[gone]] <= position[b] - pool.window:
                if gone == len(pages) - 1 and pool.host_slots[b] % self.page_size:
                    break
                gone += 1
            if gone:
                self._forget(pool, b, gone)

    def _forget(self, pool: _Pool, b: int, count: int) -> None:
        pages = pool.host_pages[b]
        old = pages[:count]
        del pages[:count]
        pool.host_slots[b] -= min(count * self.page_size, int(pool.host_slots[b]))
        pool.free += old
        pool.positions[torch.tensor(old, device=self.device)] = _NEVER
        self._write_table(pool, b)

    def _place_tokens(self, pool: _Pool, position: np.ndarray, mine: np.ndarray) -> None:
        rows = np.full(self.batch_size, _SCRATCH * self.page_size, dtype=np.int64)
        for b in np.flatnonzero(mine):
            slot = int(pool.host_slots[b]) % self.page_size
            pages = pool.host_pages[b]
            if int(pool.host_slots[b]) == len(pages) * self.page_size:
                pages.append(pool.free.pop())
                self._write_table(pool, int(b))
            rows[b] = pages[-1] * self.page_size + slot
            pool.page_last[pages[-1]] = position[b]
            pool.host_slots[b] += 1
        pool.rows.copy_(torch.from_numpy(rows), non_blocking=True)
        where = torch.from_numpy(np.where(mine, position, _NEVER))
        pool.row_positions.copy_(where, non_blocking=True)
        pool.positions.view(-1).index_copy_(0, pool.rows, pool.row_positions)

    def _write_table(self, pool: _Pool, b: int) -> None:
        row = torch.full((pool.table.shape[1],), _SCRATCH, dtype=torch.int32)
        row[: len(pool.host_pages[b])] = torch.tensor(pool.host_pages[b], dtype=torch.int32)
        pool.table[b].copy_(row, non_blocking=True)

    def release(self, b: int) -> None:
        """Free all pages of a sequence that has ended; what it decodes from now on is of no use.

        Raises:
            ValueError: the cache has no sequence of that number.
        """
        if not isinstance(b, (int, np.integer)) or isinstance(b, bool) or not 0 <= b < self.batch_size:
            raise ValueError(f"release: sequence is {b!r}: the cache has sequences 0 to {self.batch_size - 1}")
        for pool in self._pools:
            if pool.host_pages[b]:
                self._forget(pool, b, len(pool.host_pages[b]))


def _documents_of(spec: AttnMaskSpec) -> list[Document]:
    """The sequences; checks that new tokens may see all of theirs and nothing else, at the positions that follow."""
    rule = "a cache needs a self-attention mask of separate documents, AttnMaskSpec.varlen(lengths)"
    if spec.documents is None or spec.is_cross:
        raise ValueError(f"{rule}: this one " + ("is cross-attention" if spec.is_cross else "has no documents"))
    late = next((d for d in spec.documents if d.first_position and d.end > d.start), None)
    if late is not None:
        raise ValueError(f"{rule}: the one at token {late.start} begins at position {late.first_position}, not at 0")
    table, starts = lower_mask(spec), np.array([d.start for d in spec.documents], dtype=np.int64)
    first, *others = (
        np.searchsorted(starts, tokens, side="right") for tokens in (table.q0, table.q1 - 1, table.k0, table.k1 - 1)
    )
    mixed = np.flatnonzero(np.any([first != other for other in others], axis=0))
    if len(mixed):
        raise ValueError(f"{rule}: here query {table.q0[mixed[0]]} sees tokens of another document")
    return spec.documents


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}: the cache expects {shape}")


__all__ = ["PagedKVCache", "merge_over_ranks", "paged_partial"]
