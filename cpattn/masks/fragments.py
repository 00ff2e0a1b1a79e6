"""The fragments of a mask's documents."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cpattn.solver import FragmentTable, Mixer, Placement, SliceTable

from .spec import AttnMaskSpec, lower_mask

IntArray = NDArray[np.int64]


def find_fragments(spec: AttnMaskSpec, placement: Placement, call: str) -> FragmentTable:
    """What a placement leaves of the documents of a mask.

    Raises:
        ValueError: the mask has no documents, or is one of cross-attention or of a prefix tree; `call` is named.
    """
    if spec.is_cross or spec.documents is None:
        raise ValueError(
            f"{call}: the mask does not say which tokens follow each other: use self-attention with documents "
            f"(AttnMaskSpec.varlen, or documents=[(start, end), ...])"
        )
    starts, ends = np.array([d[:2] for d in spec.documents if d.end > d.start], dtype=np.int64).reshape(-1, 2).T
    _refuse_other_documents(lower_mask(spec), ends, call)
    return FragmentTable.of(placement, starts, ends)


def mixer_lines(
    spec: AttnMaskSpec, placement: Placement, mixers: Sequence[Mixer], itemsize: int, call: str
) -> list[str]:
    """What layers that mix tokens in order move over a placement, a line each; itemsize: bytes of an element.

    Raises:
        ValueError: there are mixers, and the mask has no documents for them; `call` is named.
    """
    if not mixers:
        return []
    table = find_fragments(spec, placement, call)
    return [mixer.line(table, placement, itemsize) for mixer in mixers]


def _refuse_other_documents(slices: SliceTable, ends: IntArray, call: str) -> None:
    """A document that sees another continues it (a prefix tree); its state would begin where that one ends."""
    first, last = (np.searchsorted(ends, side, side="right") for side in (slices.q0, slices.q1 - 1))
    first_k, last_k = (np.searchsorted(ends, side, side="right") for side in (slices.k0, slices.k1 - 1))
    other = (first != last) | (first_k != last_k) | (first != first_k)
    if other.any():
        raise ValueError(
            f"{call}: token {int(slices.q0[other][0])} sees tokens of other documents than its own (a prefix tree): "
            f"recurrent layers and convolutions need whole documents; give each sample its own copy of the prefix"
        )
