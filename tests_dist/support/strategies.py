"""Random masks for property tests: hypothesis strategies, and the same from a numpy generator for the ranks.

Small on purpose: every way in which rectangles and bands can meet occurs within a dozen tokens.
"""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from cpattn import AttnMaskSpec
from cpattn.masks.spec import RECT_TYPES
from cpattn.solver import UNBOUNDED, MaskSlice, SliceTable, TokenRange


def spans(length: int) -> st.SearchStrategy[tuple[int, int]]:
    """[start, end) within [0, length], empty ones too."""
    ends = st.tuples(st.integers(0, length), st.integers(0, length))
    return ends.map(lambda pair: (min(pair), max(pair)))


def mask_slices(length: int = 12) -> st.SearchStrategy[MaskSlice]:
    """Banded rectangles, empty and unbounded ones too."""
    edges = st.integers(-length - 2, length + 2)
    return st.builds(
        lambda q, k, lo, hi: MaskSlice(TokenRange(*q), TokenRange(*k), lo, hi),
        spans(length),
        spans(length),
        st.one_of(edges, st.just(-UNBOUNDED)),
        st.one_of(edges, st.just(UNBOUNDED)),
    )


def slice_tables(length: int = 12, max_size: int = 5) -> st.SearchStrategy[SliceTable]:
    """Tables of slices that may overlap."""
    return st.lists(mask_slices(length), max_size=max_size).map(SliceTable.from_slices)


@st.composite
def specs(draw: st.DrawFn, length: int = 12, max_size: int = 6) -> AttnMaskSpec:
    """Self-attention specs of overlapping rectangles, empty ones and all types."""
    total = draw(st.integers(0, length))
    rect = st.tuples(spans(total), spans(total), st.sampled_from(RECT_TYPES))
    rects = draw(st.lists(rect, max_size=max_size))
    return _spec_of(rects, total)


def random_spec(
    rng: np.random.Generator, length: int = 40, max_size: int = 7, total: int | None = None
) -> AttnMaskSpec:
    """The same from a numpy generator: overlaps, gaps, blind rows, empty rectangles, also no rectangle."""
    total = int(rng.integers(0, length + 1)) if total is None else total
    rects = []
    for _ in range(rng.integers(0, max_size + 1)):
        q, k = (sorted(rng.integers(0, total + 1, 2).tolist()) for _ in range(2))
        rects.append((q, k, str(rng.choice(RECT_TYPES))))
    return _spec_of(rects, total)


def _spec_of(rects: list, total: int) -> AttnMaskSpec:
    return AttnMaskSpec(
        q_ranges=[list(q) for q, _, _ in rects],
        k_ranges=[list(k) for _, k, _ in rects],
        mask_types=[kind for _, _, kind in rects],
        total_seqlen=total,
    )
