"""Fragments: what a placement leaves of each document on each rank, and what a fragment needs of those before it."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cpattn.collectives import RowRoutes
from cpattn.keys.key import AttnKey
from cpattn.masks.fragments import find_fragments
from cpattn.ops.layout import cached_tensor
from cpattn.runtime.bound import bind_exchange
from cpattn.solver import (
    FragmentTable,
    Intervals,
    Placement,
    exchange_of,
    make_routes,
    received_runs,
)

IntArray = NDArray[np.int64]


def fragments_of(key: AttnKey, call: str) -> FragmentTable:
    """The fragments of the documents of the key's mask.

    Raises:
        ValueError: the mask has no documents, or is one of cross-attention or of a prefix tree.
    """

    def make() -> FragmentTable:
        return find_fragments(key.spec, key.q_placement, call)

    return cached_tensor(key, ("fragments",), make)  # type: ignore[no-any-return]


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
