"""Masks to test with: every constructor, odd lengths, empty documents, blind rows."""

from __future__ import annotations

import numpy as np

from cpattn import AttnMaskSpec

Window = int | tuple[int | None, int | None] | None


def _holes() -> AttnMaskSpec:
    """Raw rectangles that overlap, leave gaps, and leave rows 50 to 69 blind."""
    return AttnMaskSpec(
        q_ranges=[[0, 50], [20, 50], [70, 131], [80, 120], [100, 131]],
        k_ranges=[[0, 50], [10, 90], [30, 131], [0, 60], [3, 77]],
        mask_types=["causal", "full", "bi_causal", "inv_causal", "causal"],
        total_seqlen=131,
    )


def _dense() -> AttnMaskSpec:
    rng = np.random.default_rng(3)
    return AttnMaskSpec.from_dense(rng.random((37, 37)) < 0.3)


def _tree() -> AttnMaskSpec:
    lengths = [61, 17, 5, 0, 33, 12, 9]
    paths = [[0, 1, 2], [0, 1, 4, 5], [0, 1, 4, 6], [0, 3]]
    return AttnMaskSpec.prefix_tree(lengths, paths)[0]


MASKS: dict[str, AttnMaskSpec] = {
    "causal": AttnMaskSpec.causal(301),
    "varlen": AttnMaskSpec.varlen([5, 0, 190, 1, 77]),
    "varlen_full": AttnMaskSpec.varlen([101, 3, 0, 130], causal=False),
    "sliding_window": AttnMaskSpec.sliding_window([211, 13, 40], 32),
    "two_sided_window": AttnMaskSpec.sliding_window([150, 9, 61], (19, 7)),
    "block_causal": AttnMaskSpec.block_causal([157, 50], 24),
    "prefix_lm": AttnMaskSpec.prefix_lm([30, 0, 11], [140, 61, 11]),
    "prefix_tree": _tree(),
    "cross": AttnMaskSpec.cross([70, 1, 90], [33, 5, 120]),
    "cross_causal": AttnMaskSpec.cross([60, 41], [100, 20], causal=True),
    "from_position_ids": AttnMaskSpec.from_position_ids([*range(90), *range(3), *range(71)]),
    "from_dense": _dense(),
    "union": AttnMaskSpec.sliding_window(163, 20) | AttnMaskSpec.block_causal(163, 50),
    "holes": _holes(),
    "all_blind": AttnMaskSpec([], [], [], 45),
    "empty": AttnMaskSpec.varlen([]),
    "one_token": AttnMaskSpec.causal(1),
}


def within_window(spec: AttnMaskSpec, window: Window) -> AttnMaskSpec:
    """The mask under a window, pair by pair from the definition: a limit in positions of the documents."""
    if window is None:
        return spec
    left, right = (window - 1, None) if isinstance(window, int) else window
    position = np.arange(spec.total_seqlen)
    for document in spec.documents or []:
        position[document.start : document.end] -= document.start - document.first_position
    back = position[:, None] - position
    visible = spec.to_dense()
    visible &= True if left is None else back <= left
    visible &= True if right is None else back >= -right
    return AttnMaskSpec.from_dense(visible)
