"""Exactly as many tokens for each rank, by shifting the edges of its runs."""

from __future__ import annotations

import numpy as np

from ..placement import Placement
from ..slices import IntArray, SliceTable
from .balance import AREA_LIMIT_ONE_COMPONENT
from .density import DensityProfile
from .even import even_out
from .measure import rank_areas

# Tokens by which ranks may differ before they are made equal, as a part of a rank's share: few change hands then.
_PART_OF_A_SHARE = 64


def require_divisible(total: int, cp_size: int) -> None:
    """Check that so many tokens can be shared equally.

    Raises:
        ValueError: they cannot.
    """
    if total % cp_size:
        padded = -(-total // cp_size) * cp_size
        raise ValueError(
            f"equal_shards is set and {total} tokens are no multiple of {cp_size} ranks: pad the sequence to {padded}, "
            f"with a document of {padded - total} tokens that the others do not see, or leave equal_shards out"
        )


def chunk_of_equal(total: int, cp_size: int, chunk_size: int) -> int:
    """The grain of a placement that is to be made equal."""
    return max(1, min(chunk_size, total // (_PART_OF_A_SHARE * cp_size)))


def equal_shards(placement: Placement) -> Placement:
    """The placement with as many tokens for each rank, where their number is a multiple of the ranks.

    First the edges between neighbours move, which leaves the number of runs as it is; what is over then goes from the
    end of a rank's longest run to the ranks that lack it.
    """
    share = placement.total_seqlen // placement.cp_size
    over = placement.num_tokens - share
    if not over.any():
        return placement
    lengths, owners = placement.ends - placement.starts, placement.owners
    for i in range(len(owners) - 1):
        for giver, taker in ((i, i + 1), (i + 1, i)):
            a, b = owners[giver], owners[taker]
            count = min(over[a], -over[b], lengths[giver])
            if count > 0:
                lengths[giver], lengths[taker] = lengths[giver] - count, lengths[taker] + count
                over[a], over[b] = over[a] - count, over[b] + count
    return _hand_over(np.cumsum(lengths), owners, over, placement.cp_size)


def equal_and_even(slices: SliceTable, placement: Placement) -> Placement:
    """The same, with areas no less even than before, where exchanges of as many tokens bring them there."""
    equal = equal_shards(placement)
    if equal is placement or not placement.total_seqlen:
        return equal
    before = rank_areas(slices, placement)
    limit = max(float(before.max()), AREA_LIMIT_ONE_COMPONENT * float(before.mean()))
    profile = DensityProfile.from_table(slices, placement.total_seqlen)
    return even_out(equal, profile, limit=limit, max_exchanges=2 * placement.cp_size)


def _hand_over(ends: IntArray, owners: IntArray, over: IntArray, cp_size: int) -> Placement:
    """The runs with what is over cut off the ends of ranks' longest runs and given to those that lack it."""
    lengths = np.diff(ends, prepend=0)
    runs = [[[int(n), int(r)]] for n, r in zip(lengths, owners, strict=True)]  # each with the pieces cut off it
    lacking = [[int(r), int(-over[r])] for r in np.flatnonzero(over < 0)]
    for rank in np.flatnonzero(over > 0):
        left = int(over[rank])
        for i in sorted(np.flatnonzero(owners == rank), key=lambda i: -int(lengths[i])):
            while left and runs[i][0][0]:
                taker, missing = lacking[-1]
                count = min(left, missing, runs[i][0][0])
                runs[i][0][0] -= count
                runs[i].append([count, taker])
                left -= count
                lacking[-1][1] -= count
                if not lacking[-1][1]:
                    lacking.pop()
    table = np.array([piece for pieces in runs for piece in pieces], dtype=np.int64).reshape(-1, 2)
    return Placement.from_runs(np.cumsum(table[:, 0]), table[:, 1], cp_size=cp_size)
