"""Pages of a cache: where a token of a sequence lies, and how rows are written there.

A cache is [num_pages, page_size, heads, dim]; its rows are the slots of all pages, one page after the other.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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
