"""The masks on which plans are compared: one sequence of a given length, several shapes of mask; and plans of ours."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from cpattn.masks.spec import AttnMaskSpec
from cpattn.solver import Hardware, Heads, Plan, ScheduleKind, SliceTable, make_dispatch_plan


def document_lengths(total: int, *, seed: int = 0, mean: float = 4096, sigma: float = 1.2) -> list[int]:
    """Lognormal document lengths that sum to `total`; the last is cut to fit."""
    rng = np.random.default_rng(seed)
    lengths: list[int] = []
    left = total
    while left:
        n = min(left, max(1, int(rng.lognormal(math.log(mean) - sigma**2 / 2, sigma))))
        lengths.append(n)
        left -= n
    return lengths


def prefix_tree(total: int, *, branches: int = 16, leaves: int = 4) -> AttnMaskSpec:
    """A root of total / 8 tokens, branches below it and leaves below each, laid out depth first.

    Every node but the root has the same length; the last leaf takes the remainder.
    """
    root = total // 8
    node = (total - root) // (branches * (leaves + 1))
    lengths, paths = [root], []
    for _ in range(branches):
        branch = len(lengths)
        lengths.append(node)
        for _ in range(leaves):
            paths.append([0, branch, len(lengths)])
            lengths.append(node)
    lengths[-1] += total - sum(lengths)
    return AttnMaskSpec.prefix_tree(lengths, paths)[0]


WORKLOADS: dict[str, Callable[[int], AttnMaskSpec]] = {
    "causal": AttnMaskSpec.causal,
    "varlen causal": lambda total: AttnMaskSpec.varlen(document_lengths(total)),
    "varlen full": lambda total: AttnMaskSpec.varlen(document_lengths(total), causal=False),
    "window": lambda total: AttnMaskSpec.sliding_window(total, 4096),
    "prefix tree": prefix_tree,
}


def plan_on_nodes(
    mask: SliceTable, tokens: int, ranks: int, heads: Heads, hardware: Hardware, schedule: ScheduleKind = "auto"
) -> Plan:
    """As `make_key` plans self-attention under torchrun: it knows the nodes, if the ranks are more than one has."""
    return make_dispatch_plan(
        mask,
        total_seqlen=tokens,
        cp_size=ranks,
        schedule=schedule,
        costs=heads.row_costs(),
        ranks_per_node=hardware.ranks_per_node if ranks > hardware.ranks_per_node else None,
        hardware=hardware,
    )
