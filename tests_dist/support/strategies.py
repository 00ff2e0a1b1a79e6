"""Random masks for property tests, as hypothesis strategies; `random_spec` draws the same from a numpy generator.

Small on purpose: every way in which rectangles and bands can meet occurs within a dozen tokens.
"""

from __future__ import annotations

from hypothesis import strategies as st

from cpattn import AttnMaskSpec
from cpattn.masks.spec import RECT_TYPES
from cpattn.solver import UNBOUNDED, MaskSlice, SliceTable, TokenRange
from cpattn.testing.random_cases import random_spec, spec_of_rects

__all__ = ["mask_slices", "random_spec", "slice_tables", "spans", "specs"]


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
    return spec_of_rects(rects, total)
