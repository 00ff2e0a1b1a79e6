"""Pages of a cache: where a token of a sequence lies, and how rows are written there.

A cache is [num_pages, page_size, heads, dim]; its rows are the slots of all pages, one page after the other.

Shape legend: B sequences, M queries of each, P pages of a sequence, S slots of its pages, N query heads, G key heads,
R = N / G, D and E head dims of q/k and of v.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cpattn.runtime.execute import accumulator_dtype

Ints = NDArray[np.int64]


def count_rows(lengths: Ints) -> tuple[Ints, Ints]:
    """Sequence of each row, and its number within it, of sequences one after the other."""
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    starts = np.cumsum(lengths) - lengths
    return sequence, np.arange(len(sequence)) - starts[sequence]


def page_rows(table_BP: Ints, sequence: Ints, position: Ints, page_size: int) -> Tensor:
    """int64 row of the cache at which each token lies.

    Args:
        table_BP: the page of positions p * page_size and on, of each sequence.
        sequence, position: of each token.
    """
    pages = table_BP[sequence, position // page_size].astype(np.int64)
    return torch.from_numpy(pages * page_size + position % page_size)


def write_rows(cache: Tensor, rows: Tensor, fresh: Tensor) -> None:
    """Put [n, heads, dim] into those rows of a cache, in place."""
    cache.view(-1, *cache.shape[2:]).index_copy_(0, rows, fresh)


class PagedKeys(NamedTuple):
    """Keys and values of sequences in pages.

    k, v: [num_pages, page_size, G, D] and [..., E]. table_BP: int32, the pages of each sequence in order.
    positions: int64 [num_pages, page_size] of the slots.
    """

    k: Tensor
    v: Tensor
    table_BP: Tensor
    positions: Tensor


def paged_partial(
    q_BMND: Tensor,
    keys: PagedKeys,
    queries_BM: Tensor,
    *,
    window: int | None,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of a few queries per sequence over the pages of this rank.

    Args:
        keys: a slot is visible iff its position is at most the query's and, with a window W, within W of it. What is in
            slots that none of a sequence's queries sees, NaN included, has no part.
        queries_BM: int64 [B, M], positions of the queries; -1 sees nothing.

    Returns:
        out [B, M, N, E] and lse [B, M, N], natural log, in fp32 (fp64 for fp64); 0 and -inf where nothing is visible.
    """
    dtype = accumulator_dtype(q_BMND.dtype)
    index = keys.table_BP.long()
    k, v = (pages[index].flatten(1, 2).to(dtype) for pages in (keys.k, keys.v))
    position_BS = keys.positions[index].flatten(1)
    visible = position_BS[:, None] <= queries_BM[..., None]
    if window is not None:
        visible &= position_BS[:, None] > queries_BM[..., None] - window
    # A probability of 0 times NaN is NaN: slots that no query sees may hold anything.
    v = v.masked_fill(~visible.any(1)[..., None, None], 0.0)
    q = q_BMND.to(dtype).unflatten(2, (k.shape[2], -1))
    scores = torch.einsum("bmgrd,bsgd->bmgrs", q, k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible[:, :, None, None, :], -math.inf)
    lse = torch.logsumexp(scores, dim=-1)
    p = torch.exp(scores - lse.masked_fill(lse == -math.inf, math.inf)[..., None])
    return torch.einsum("bmgrs,bsge->bmgre", p, v).flatten(2, 3), lse.flatten(2)
