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

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cpattn.keys.key import AttnKey, require_key
from cpattn.masks.reading import read_int
from cpattn.masks.spec import AttnMaskSpec, Document, lower_mask
from cpattn.ops.attention import check_numbers
from cpattn.runtime.execute import accumulator_dtype

from .merge import MergeMethod, broadcast, check_merge, choose_merge, merge_costs, merge_over_ranks
from .pages import Ints, PagedKeys, count_rows, paged_partial, write_rows
from .pools import NEVER, Pool, Prompt, make_pool

# Most tokens that a sequence may grow by in one step: pages of windowed layers are counted for it.
MOST_AT_ONCE = 16


class _Step(NamedTuple):
    """The tokens of a step. queries: int64 [R] positions; sequences: int64 [R], None for one of each sequence."""

    queries: Tensor
    sequences: Ints | None


class PagedKVCache:
    """Keys and values of a batch of sequences, over the ranks of a key's group.

    Args:
        key: of the prefill; its documents are the sequences, its placement says which rank holds which tokens. No
            document may see another, and each begins at position 0.
        paths: for a key of a prefix tree, the documents that each sequence is made of, root first: sequences that begin
            alike share the pages of what they share. None: each document is a sequence.
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
        paths: Sequence[Sequence[int]] | None = None,
    ) -> None:
        require_key(key, "PagedKVCache")
        documents = _documents_of(key.spec) if paths is None else key.spec.documents or []
        page_size = read_int("page_size", page_size)
        max_new_tokens = read_int("max_new_tokens", max_new_tokens, least=0)
        if not isinstance(windows, Iterable):
            raise ValueError(f"windows is {windows!r}: give one entry for each layer, a window or None")
        windows = tuple(windows)  # of numpy too
        if not windows:
            raise ValueError("windows is empty: give one entry for each layer, a window or None")
        windows = tuple(None if window is None else read_int("a layer's window", window) for window in windows)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
            raise ValueError(f"dtype is {dtype}: keys and values are floating-point numbers of at least 16 bits")
        self.key, self.page_size, self.static_shapes = key, page_size, static_shapes
        self.group, self.cp_size, self.cp_rank = key.cp_group, key.cp_size, key.cp_rank
        self.windows, self.max_new_tokens = windows, max_new_tokens
        self.dtype, self.device = dtype, torch.device(device)
        prompt = _prompt_of(key, documents, paths)
        self._lengths = prompt.lengths.copy()
        self._limits = self._lengths + max_new_tokens
        self._prefilled: set[int] = set()
        self._step: _Step | None = None
        self._queries = torch.zeros(self.batch_size, dtype=torch.int64, device=self.device)
        self._pools = [
            make_pool(
                prompt,
                [layer for layer, mine in enumerate(self.windows) if mine == w],
                window=w,
                growth=self._growth(w),
                page_size=page_size,
                device=self.device,
            )
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
        """Positions of this step's tokens, int64 [B] on the device; a buffer that `advance` overwrites.

        After `advance(counts)`: int64 [sum(counts)].
        """
        return self._queries if self._step is None else self._step.queries

    def pages_in_use(self, layer: int) -> int:
        """Pages of this rank that hold tokens of a layer."""
        return self._pool_of[layer].num_used

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
        if self._step is not None:
            raise RuntimeError(f"prefill of layer {layer} after advance: prefill all layers before the first step")
        self._prefilled.add(layer)
        pool = self._pool_of[layer]
        for cache, fresh in ((self._keys[layer], k_TGD), (self._values[layer], v_TGE)):
            write_rows(cache, pool.slots, fresh.detach().to(self.dtype).index_select(0, pool.index))

    def advance(self, counts: Sequence[int] | None = None) -> Tensor:
        """Begin a step in which every sequence grows by one token, or by `counts` tokens; returns `positions`.

        Host work and copies to the device only: picks the rank and the slot of each new token, takes and drops pages.

        Args:
            counts: tokens that each sequence grows by, 0 to 16; the rows of `decode` are then these tokens, sequence by
                sequence.

        Raises:
            ValueError: counts are not one for each sequence, or out of range.
            RuntimeError: a layer lacks the prompt's keys, or a sequence would outgrow max_new_tokens.
        """
        missing = sorted(set(range(len(self.windows))) - self._prefilled)
        if missing and self._step is None and self._lengths.any():
            raise RuntimeError(f"layers {missing} have not been prefilled: give the cache the prompt's keys first")
        grown = np.ones(self.batch_size, dtype=np.int64) if counts is None else self._checked_counts(counts)
        if (self._lengths + grown > self._limits).any():
            raise RuntimeError(f"a sequence has grown by max_new_tokens = {self.max_new_tokens}: the cache is full")
        sequences, nth = count_rows(grown)
        positions = self._lengths[sequences] + nth
        # New tokens go round the ranks, each sequence from another one on.
        mine = (positions + sequences) % self.cp_size == self.cp_rank
        for pool in self._pools:
            for b in np.flatnonzero(grown):
                pool.drop_before(int(b), int(self._lengths[b]))
            self._write_rows(pool, torch.from_numpy(pool.place(sequences, positions, mine)), counts is None)
            held = torch.from_numpy(np.where(mine, positions, NEVER)).to(self.device, non_blocking=True)
            pool.positions.view(-1).index_copy_(0, pool.rows, held)
        self._step = self._new_step(torch.from_numpy(positions), None if counts is None else sequences)
        self._lengths += grown
        return self._step.queries

    def _checked_counts(self, counts: Sequence[int]) -> Ints:
        grown = np.array([read_int("a count of advance", n, least=0) for n in counts], dtype=np.int64)
        if len(grown) != self.batch_size or grown.max(initial=0) > MOST_AT_ONCE:
            raise ValueError(
                f"advance: counts are {list(counts)}: one for each of {self.batch_size} sequences is needed, each at "
                f"most {MOST_AT_ONCE}"
            )
        return grown

    def _write_rows(self, pool: Pool, rows: Tensor, in_place: bool) -> None:
        """In place where every sequence has one row, so that a CUDA graph reads them."""
        if in_place and len(pool.rows) == len(rows):
            pool.rows.copy_(rows, non_blocking=True)
        else:
            pool.rows = rows.to(self.device)

    def _new_step(self, positions: Tensor, sequences: Ints | None) -> _Step:
        if sequences is None:
            self._queries.copy_(positions, non_blocking=True)
            return _Step(self._queries, None)
        return _Step(positions.to(self.device), sequences)

    def _growth(self, window: int | None) -> int:
        """Most tokens of a sequence that were decoded and that this rank holds at a time."""
        new = -(-self.max_new_tokens // self.cp_size)
        return new if window is None else min(new, -(-(window + MOST_AT_ONCE) // self.cp_size) + self.page_size)

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
            q_BND, k_BGD, v_BGE: of the new tokens, the same on all ranks (every rank runs the model on them); after
                `advance(counts)` B is the number of tokens.
            softmax_scale, softcap, sink: as in `attention`.
            source: a rank of the group, if only that rank has q, k and v; the others pass tensors of the same shape,
                and get the values from it.
            merge: "gather" sends every partial result to every rank; "scatter" merges a share of the rows on each
                rank and gathers the merged ones; "auto" takes what moves fewer bytes.

        Returns:
            out [B, N, E] in q's dtype, equal bit for bit on all ranks.

        Raises:
            ValueError: a layer, shape, number or name does not fit, or ranks are in different calls; before any
                collective.
            RuntimeError: `advance` has not been called.
            LostRankError: a rank of the group raised, died or did not come.
        """
        scale = self.key.head_dim**-0.5 if softmax_scale is None else float(softmax_scale)
        with self.key.checking("decode"):
            self._check_step(layer, q_BND, k_BGD, v_BGE, source)
            check_numbers(self.key, scale, softcap, sink)
            check_merge(merge)
        said = {"layer": layer, "lengths": self.lengths, "q": (tuple(q_BND.shape), q_BND.dtype), "scale": scale}
        said |= {"softcap": softcap, "sink": sink is not None, "source": source, "merge": merge}
        with self._calling(q_BND.device, said):
            if source is not None and self.group is not None:
                q_BND, k_BGD, v_BGE = broadcast((q_BND, k_BGD, v_BGE), source, self.group)
            pool = self._pool_of[layer]
            for cache, new in ((self._keys[layer], k_BGD), (self._values[layer], v_BGE)):
                write_rows(cache, pool.rows, new.to(self.dtype))
            out, lse = self._attend(layer, q_BND, scale, softcap)
            return merge_over_ranks(out, lse, self.group, dtype=q_BND.dtype, sink=sink, method=merge)

    def _calling(self, device: torch.device, said: dict[str, Any]) -> AbstractContextManager[int]:
        """Tell the other ranks of a layer's step; a CUDA graph that is being captured holds no messages."""
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return nullcontext(-1)
        return self.key.calling("decode", device, **said)

    def _attend(self, layer: int, q: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
        """This rank's part of the step's rows; those of one sequence side by side, so that its pages are read once."""
        pool, step = self._pool_of[layer], self._step
        assert step is not None
        keys = PagedKeys(self._keys[layer], self._values[layer], pool.reach(self.static_shapes), pool.positions)
        if step.sequences is None:
            numbers: dict[str, Any] = {"window": pool.window, "scale": scale, "softcap": softcap}
            out, lse = paged_partial(q[:, None], keys, step.queries[:, None], **numbers)
            return out[:, 0], lse[:, 0]
        growing, group, counts = np.unique(step.sequences, return_inverse=True, return_counts=True)
        most = int(counts.max(initial=0))
        at = torch.from_numpy(group * most + count_rows(counts)[1]).to(self.device)
        size = len(growing) * most
        padded = q.new_zeros(size, *q.shape[1:]).index_copy(0, at, q).unflatten(0, (len(growing), most))
        queries = step.queries.new_full((size,), -1).index_copy(0, at, step.queries).view(len(growing), most)
        keys = keys._replace(table_BP=keys.table_BP[torch.from_numpy(growing).to(self.device)])
        out, lse = paged_partial(padded, keys, queries, window=pool.window, scale=scale, softcap=softcap)
        return out.flatten(0, 1)[at], lse.flatten(0, 1)[at]

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
        if self._step is None:
            raise RuntimeError("decode before advance: the step of the new tokens begins with advance()")
        for name, tensor, shape in (
            ("q", q, (self.key.num_heads_q, self.key.head_dim)),
            ("k", k, (self.key.num_heads_kv, self.key.head_dim)),
            ("v", v, (self.key.num_heads_kv, self.key.head_dim_v)),
        ):
            _check_shape(name, tensor, (len(self._step.queries), *shape))
        if source is not None and source not in range(self.cp_size):
            raise ValueError(f"source is {source}: the group has ranks 0 to {self.cp_size - 1}")

    def _check_layer(self, layer: int) -> None:
        if layer not in self._pool_of:
            raise ValueError(f"layer is {layer}: the cache has layers 0 to {len(self.windows) - 1}, as windows says")

    def release(self, b: int) -> None:
        """Free all pages of a sequence that has ended; what it decodes from now on is of no use.

        Raises:
            ValueError: the cache has no sequence of that number.
        """
        if not isinstance(b, (int, np.integer)) or isinstance(b, bool) or not 0 <= b < self.batch_size:
            raise ValueError(f"release: sequence is {b!r}: the cache has sequences 0 to {self.batch_size - 1}")
        for pool in self._pools:
            if pool.pages[b]:
                pool.forget(b, len(pool.pages[b]))


def _prompt_of(key: AttnKey, documents: Sequence[Document], paths: Sequence[Sequence[int]] | None) -> Prompt:
    """
    Raises:
        ValueError: paths are not of these documents, or one's documents do not follow each other's positions.
    """
    chosen = [[d] for d in range(len(documents))] if paths is None else [list(path) for path in paths]
    lengths = []
    for path in chosen:
        length = 0
        for d in path:
            if not 0 <= d < len(documents) or documents[d].first_position != length:
                raise ValueError(f"paths: document {d} does not follow the {length} tokens before it in path {path}")
            length += documents[d].end - documents[d].start
        lengths.append(length)
    tokens = key.k_placement.tokens_of(key.cp_rank)
    starts = np.array([d.start for d in documents], dtype=np.int64)
    first = np.array([d.first_position for d in documents], dtype=np.int64)
    # Empty documents share their start with the next one: the last of those at or before a token holds it.
    document = np.searchsorted(starts, tokens, side="right") - 1
    position = tokens - starts[document] + first[document]
    return Prompt(document, position, chosen, np.array(lengths, dtype=np.int64))


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
