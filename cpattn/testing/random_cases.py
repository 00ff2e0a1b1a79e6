"""Random masks and random options of keys and calls, from a numpy generator: one seed, one case, on every rank alike.

Small on purpose: every way in which rectangles and bands can meet occurs within a few dozen tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from cpattn import AttnMaskSpec, LayerKind
from cpattn.masks.spec import RECT_TYPES
from cpattn.solver import HARDWARE, LAYOUTS

from .masks import MASKS, Window


def random_spec(
    rng: np.random.Generator, length: int = 40, max_size: int = 7, total: int | None = None
) -> AttnMaskSpec:
    """Overlapping rectangles of all types: gaps, blind rows, empty rectangles, also no rectangle.

    Args:
        rng: the source.
        length: most tokens. max_size: most rectangles. total: tokens, if they are given.
    """
    total = int(rng.integers(0, length + 1)) if total is None else total
    rects = []
    for _ in range(rng.integers(0, max_size + 1)):
        q, k = (sorted(rng.integers(0, total + 1, 2).tolist()) for _ in range(2))
        rects.append((q, k, str(rng.choice(RECT_TYPES))))
    return spec_of_rects(rects, total)


def spec_of_rects(rects: list[tuple[Any, Any, str]], total: int) -> AttnMaskSpec:
    """The spec of (query range, key range, type) rectangles."""
    return AttnMaskSpec(
        q_ranges=[list(q) for q, _, _ in rects],
        k_ranges=[list(k) for _, k, _ in rects],
        mask_types=[kind for _, _, kind in rects],
        total_seqlen=total,
    )


class Case(NamedTuple):
    """A mask, heads, head dims of q and k and of v, and options of `make_key` and of `attention`."""

    spec: AttnMaskSpec
    heads: tuple[int, int]
    head_dims: tuple[int, int]
    key_options: dict[str, Any]
    scale: float | None
    call: dict[str, Any]


def random_case(rng: np.random.Generator, cp_size: int) -> Case:
    """Anything that `make_key` does not refuse."""
    spec = random_mask(rng)
    num_kv = int(rng.integers(1, 4))
    num_q = num_kv * int(rng.integers(1, 5))
    options = random_plan_options(rng, spec, cp_size)
    divisors = [n for n in range(1, cp_size + 1) if cp_size % n == 0]
    degrees: Any = [1, 1, "auto", *(n for n in divisors if n <= num_q)]
    degree: Any = rng.choice(degrees)
    degree = "auto" if degree == "auto" else int(degree)
    per_node = int(rng.choice(divisors))
    if degree != "auto" and per_node % degree and degree % per_node:
        per_node = cp_size
    options |= {
        "keep_kv": bool(rng.integers(2)),
        "transport": str(rng.choice(["all_to_all", "p2p", "auto"])),
        "head_degree": degree,
        "ranks_per_node": None if rng.integers(2) else (cp_size if degree == "auto" else per_node),
        "hardware": str(rng.choice(list(HARDWARE))),
        "backend": str(rng.choice(["auto", "reference"])),
        "window": random_window(rng, spec),
    }
    if options["schedule"] != "tiles" and not spec.is_cross and rng.integers(3) == 0:
        options["num_layers"] = float(rng.integers(1, 6))
        options["also"] = [random_layer(rng, spec) for _ in range(rng.integers(1, 3))]
    call: dict[str, Any] = {}
    if rng.integers(3) == 0:
        import torch  # here: masks and plans are drawn in processes that load no torch

        call["sink"] = torch.from_numpy(rng.normal(size=num_q))
    if rng.integers(3) == 0:
        call["softcap"] = float(rng.uniform(0.5, 5))
    head_dims = int(rng.choice([4, 5, 8])), int(rng.choice([4, 6, 12]))
    return Case(spec, (num_q, num_kv), head_dims, options, [None, 0.3, -0.2][rng.integers(3)], call)


def random_plan_options(rng: np.random.Generator, spec: AttnMaskSpec, cp_size: int) -> dict[str, Any]:
    """Of `make_plan` and `make_key`, what steers plans: chunks, layout, schedule, stages, nodes, search, shards."""
    layout = str(rng.choice(LAYOUTS)) if rng.integers(3) == 0 else "balanced"
    schedules = ["keys", "tiles", "auto"] if layout == "balanced" and not spec.is_cross else ["keys"]
    divisors = [n for n in range(1, cp_size + 1) if cp_size % n == 0]
    divisible = spec.total_seqlen % cp_size == 0 == spec.seqlen_k % cp_size
    return {
        "chunk_size": int(rng.integers(1, rng.choice([9, 40]))),
        "layout": layout,
        "schedule": str(rng.choice(schedules)),
        "num_stages": [None, 1, 2, 3, 4, 8][rng.integers(6)],
        "ranks_per_node": None if rng.integers(2) else int(rng.choice(divisors)),
        "search_effort": int(rng.integers(4) == 0),
        "equal_shards": bool(rng.integers(2)) and divisible,
    }


def random_mask(rng: np.random.Generator) -> AttnMaskSpec:
    """Overlapping rectangles, documents, cross-attention, a tree, or one of MASKS."""
    kind = rng.integers(5)
    if kind == 0:
        return random_spec(rng, length=90)
    if kind == 1:
        return MASKS[str(rng.choice(list(MASKS)))]
    if kind == 2:
        return AttnMaskSpec.varlen(rng.integers(0, 60, rng.integers(1, 9)).tolist(), causal=bool(rng.integers(2)))
    if kind == 3:
        lengths, keys = rng.integers(0, 40, (2, rng.integers(1, 6))).tolist()
        return AttnMaskSpec.cross(lengths, keys, causal=bool(rng.integers(2)))
    lengths = rng.integers(0, 25, rng.integers(1, 8)).tolist()
    paths = [[0]]
    for node in range(1, len(lengths)):
        paths.append([*paths[rng.integers(node)], node])
    leaves = [path for path in paths if not any(other[:-1] == path for other in paths)]
    return AttnMaskSpec.prefix_tree(lengths, leaves)[0]


def random_window(rng: np.random.Generator, spec: AttnMaskSpec) -> Window:
    """None, or a window of any form (self-attention only)."""
    if spec.is_cross or rng.integers(2):
        return None
    left, right = (int(n) for n in rng.integers(0, 16, 2))
    return (left + 1, (left, right), (left, None), (None, right))[rng.integers(4)]


def random_layer(rng: np.random.Generator, spec: AttnMaskSpec) -> LayerKind:
    """Further layers over the same tokens: another mask, the same with a window, or both."""
    other = random_spec(rng, total=spec.total_seqlen) if rng.integers(2) else None
    return LayerKind(other, random_window(rng, spec), float(rng.integers(1, 6)))
