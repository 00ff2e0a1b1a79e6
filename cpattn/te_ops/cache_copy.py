"""`copy_to_kv_cache`: new keys and values into a paged or plain cache, in place."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cpattn.decoding.pages import count_rows, page_rows, write_rows

from .layouts import sequence_lengths
from .te_import import call_extension, qkv_format_enum


@torch.no_grad()  # a cache is no function of what is written to it
def copy_to_kv_cache(
    new_k: Tensor,
    new_v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    cu_new_lens: Tensor,
    cu_cached_lens: Tensor,
    qkv_format: str,
    b: int,
    max_ctx_len: int,
    max_seq_len: int,
    max_pages_per_seq: int,
    is_non_paged: bool,
    *,
    impl: str = "portable",
) -> None:
    """Append each sequence's new tokens behind those it has, in place.

    Args:
        new_k, new_v: new tokens in `qkv_format`: bshd [b, max_ctx_len, h, d], sbhd [max_ctx_len, b, h, d], or thd
            [t, h, d] packed without gaps. Head dims of k and v may differ.
        k_cache, v_cache: [num_pages, page_size, h, d]; without pages [B, max_seq_len, h, d].
        page_table: int32 [b, max_pages_per_seq], the page of positions p * page_size and on. Without pages: int32
            [b], the cache row in which each sequence lies so far (see below).
        cu_new_lens: int32 [b + 1], prefix sums of the new lengths.
        cu_cached_lens: int32 [b + 1], prefix sums of the lengths with the new tokens.
        max_ctx_len: padded length of the new tokens (ignored for thd).
        max_seq_len: room of a sequence; page_size = max_seq_len // max_pages_per_seq.
        is_non_paged: sequence i is row i of the cache. First row page_table[i]'s old tokens move to row i, for the
            leading sequences up to the last place where page_table descends (those after it have ended).

    Raises:
        ValueError: dtypes differ ("... must be of the same data type."), a sequence outgrows its room or its pages, a
            page that is written lies outside the cache, two new tokens go to one slot, the page table is not of
            integers, or shapes disagree. TransformerEngine writes out of bounds there, or one over the other.
    """
    if not new_k.dtype == new_v.dtype == k_cache.dtype == v_cache.dtype:
        raise ValueError(
            f"new_k, new_v, k_cache and v_cache must be of the same data type. They are {new_k.dtype}, "
            f"{new_v.dtype}, {k_cache.dtype} and {v_cache.dtype}"
        )
    new, cached = (_lengths(c, n, b) for c, n in ((cu_new_lens, "cu_new_lens"), (cu_cached_lens, "cu_cached_lens")))
    if (cached < new).any():
        raise ValueError("cu_cached_lens counts the new tokens too: a sequence has fewer cached than new tokens")
    if cached.max(initial=0) > max_seq_len:
        raise ValueError(f"a sequence grows to {cached.max()} tokens: max_seq_len is {max_seq_len}")
    sequence, nth, source = _sources(new_k, qkv_format, new, b, max_ctx_len)
    page_size = max_seq_len if is_non_paged else _page_size(max_seq_len, max_pages_per_seq)
    table = _table(page_table, None if is_non_paged else (b, max_pages_per_seq))
    for cache in (k_cache, v_cache):
        if cache.ndim != 4 or cache.shape[1] != page_size or not cache.is_contiguous():
            raise ValueError(
                f"a cache has shape {tuple(cache.shape)}: expected contiguous [pages, {page_size}, heads, dim]"
            )
    if impl == "te":
        tensors = (new_k, new_v, k_cache, v_cache, page_table, cu_new_lens, cu_cached_lens)
        numbers = (b, max_ctx_len, max_seq_len, max_pages_per_seq, is_non_paged)
        call_extension("copy_to_kv_cache", *tensors, qkv_format_enum(qkv_format), *numbers)
        return
    position = cached[sequence] - new[sequence] + nth
    pages = np.arange(b).reshape(b, 1) if is_non_paged else table  # without a table a sequence is a page
    rows = page_rows(pages, sequence, position, page_size)
    _check_slots(rows, page_size, sequence, k_cache.shape[0])
    if is_non_paged:
        _reindex(table, (k_cache, v_cache), cached - new)
    source_rows = torch.from_numpy(source).to(new_k.device)
    for cache, fresh in ((k_cache, new_k), (v_cache, new_v)):
        flat = fresh.reshape(-1, *fresh.shape[-2:])
        write_rows(cache, rows.to(cache.device), flat.index_select(0, source_rows))


def _page_size(max_seq_len: int, max_pages_per_seq: int) -> int:
    if max_pages_per_seq < 1 or max_seq_len % max_pages_per_seq:
        raise ValueError(
            f"max_seq_len is {max_seq_len} and max_pages_per_seq {max_pages_per_seq}: a sequence's room is a whole "
            f"number of pages of one size"
        )
    return max_seq_len // max_pages_per_seq


def _table(page_table: Tensor, shape: tuple[int, int] | None) -> np.ndarray:
    """int64 numbers of a table of that shape; of any, flattened, if that is None."""
    wanted = tuple(page_table.shape) if shape is None else shape
    if page_table.dtype not in (torch.int32, torch.int64) or page_table.numel() != np.prod(wanted):
        raise ValueError(
            f"page_table has dtype {page_table.dtype} and shape {tuple(page_table.shape)}: expected int32 {wanted}"
        )
    return page_table.detach().cpu().numpy().astype(np.int64).reshape((-1,) if shape is None else shape)


def _check_slots(rows: Tensor, page_size: int, sequence: np.ndarray, num_pages: int) -> None:
    """Raise unless each new token has a row of its own in the cache."""
    slots = rows.cpu().numpy()
    page = slots // max(page_size, 1)
    if len(page) and (page.min() < 0 or page.max() >= num_pages):
        wrong = page.min() if page.min() < 0 else page.max()
        raise ValueError(f"page {wrong} is written: the cache has pages 0 to {num_pages - 1}")
    order = np.argsort(slots, kind="stable")
    again = np.flatnonzero(slots[order][1:] == slots[order][:-1])
    if len(again):
        one, other = order[again[0]], order[again[0] + 1]
        raise ValueError(
            f"page {page[one]} takes a new token of sequence {sequence[one]} and one of sequence {sequence[other]} in "
            f"the same slot, and one would overwrite the other: give each its own page in page_table"
        )


def _lengths(cu_seqlens: Tensor, name: str, b: int) -> np.ndarray:
    lengths = sequence_lengths(cu_seqlens, name)
    if len(lengths) != b:
        raise ValueError(f"{name} has {len(lengths) + 1} entries: expected {b + 1} for b = {b}")
    return lengths


def _sources(
    new_k: Tensor, qkv_format: str, new: np.ndarray, b: int, max_ctx_len: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sequence, number within it, and flat row in the new tokens, of every token that is copied."""
    sequence, nth = count_rows(new)
    starts = np.cumsum(new) - new
    if qkv_format == "thd":
        if len(sequence) > new_k.shape[0]:
            raise ValueError(f"cu_new_lens counts {len(sequence)} tokens: new_k has {new_k.shape[0]} rows")
        return sequence, nth, starts[sequence] + nth
    if qkv_format not in ("bshd", "sbhd"):
        raise ValueError(f"qkv_format is {qkv_format!r}: use bshd, sbhd or thd")
    expected = (b, max_ctx_len) if qkv_format == "bshd" else (max_ctx_len, b)
    if tuple(new_k.shape[:2]) != expected or new.max(initial=0) > max_ctx_len:
        raise ValueError(
            f"new_k has shape {tuple(new_k.shape)} and the longest new sequence {new.max(initial=0)} tokens: expected "
            f"{expected} rows in format {qkv_format}"
        )
    return sequence, nth, sequence * max_ctx_len + nth if qkv_format == "bshd" else nth * b + sequence


def _reindex(rows: np.ndarray, caches: tuple[Tensor, Tensor], old_lengths: np.ndarray) -> None:
    """Row i takes the old tokens of row rows[i], for the leading sequences that are still alive."""
    descents = np.flatnonzero(np.diff(rows) < 0)
    alive = int(descents[-1]) + 1 if len(descents) else len(rows)
    moves = [i for i in range(alive) if rows[i] != i and old_lengths[i]]
    if any(not 0 <= rows[i] < caches[0].shape[0] for i in moves):
        raise ValueError(f"batch indices {rows.tolist()} leave the cache's {caches[0].shape[0]} rows")
    for cache in caches:
        before = {int(rows[i]): cache[int(rows[i])].clone() for i in moves}
        for i in moves:
            length = int(old_lengths[i])
            cache[i, :length] = before[int(rows[i])][:length]
