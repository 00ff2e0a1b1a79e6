"""Fingerprints: a digest of all that a plan is, by which ranks know that they hold the same."""

from __future__ import annotations

import hashlib

import numpy as np

from .placement import Placement
from .routes import RouteTable
from .slices import IntArray, SliceTable

# Odd, about 2**61 over the golden ratio: weights of neighbouring rows differ in all bits (int64 wraps round).
_MIX = 0x13C6EF372FE94F83


def fingerprint_of(*parts: SliceTable | IntArray | Placement | RouteTable | int) -> str:
    """Hex digest of 32 letters; equal for equal parts in the same order."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, Placement):
            arrays = [np.array([part.cp_size, part.total_seqlen]), part.ends, part.owners]
        elif isinstance(part, RouteTable):
            # They follow from the rest, and at a thousand ranks there are millions: a weighted sum will do.
            columns = (part.dsts, part.srcs, part.starts, part.ends, part.stages)
            position = np.arange(1, len(part) + 1) * _MIX
            arrays = [np.array([len(part), *(int(column @ position) for column in columns)])]
        else:
            arrays = [part.data if isinstance(part, SliceTable) else np.asarray(part)]
        for array in arrays:
            digest.update(np.array(array.shape, dtype=np.int64).tobytes())
            digest.update(np.ascontiguousarray(array, dtype=np.int64).tobytes())
    return digest.hexdigest()
