"""How many ranks share a context rank's rows, by the cost model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from cpattn.masks.spec import AttnMaskSpec, lower_mask
from cpattn.solver import (
    Hardware,
    Heads,
    Placement,
    head_exchange_seconds,
    place_contiguous,
    simulate,
    split_heads,
    step_time_bound,
)

from .options import PlanOptions
from .ready import LayerPlan, PlannedMask, plan_layers

# Head sharding must bring the step below this share of that without: the prediction is not exact, and no exchange of
# it hides behind work.
_GAIN = 0.99


class DegreeChoice(NamedTuple):
    """A head degree with its plans, and what it was chosen from.

    seconds: (degree, predicted seconds of one attention call, forward and backward, in the mean over layers) for each
        degree that was planned; the others cannot be faster.
    """

    head_degree: int
    plans: tuple[LayerPlan, ...]
    seconds: tuple[tuple[int, float], ...]


def most_heads(heads: Heads, head_degree: int) -> Heads:
    """Heads of the part with the most query heads; the same on all ranks."""
    most = max(split_heads(heads.num_q, heads.num_kv, head_degree), key=lambda part: part.num_q)
    return replace(heads, num_q=most.num_q, num_kv=len(most.kv))


def choose_head_degree(
    masks: Sequence[tuple[PlannedMask, AttnMaskSpec]], heads: Heads, options: PlanOptions, *, cp_size: int
) -> DegreeChoice:
    """Plan for every divisor of cp_size that leaves each rank a head; take the fastest, 1 unless another is clearly so.

    The same on all ranks, as everything it is computed from is. It costs the planning of each degree, but for those
    whose head exchanges and share of the work alone take longer than a smaller degree.

    Args:
        masks: as `plan_layers` takes them.
        heads: of all ranks together.
        options, cp_size: of the whole group.
    """
    spec = masks[0][1]
    area, hardware = _mean_area(masks), options.hardware
    found: dict[int, tuple[float, tuple[LayerPlan, ...]]] = {}
    for degree in range(1, min(cp_size, heads.num_q) + 1):
        if cp_size % degree or not _blocks_fit(options.ranks_per_node, degree):
            continue
        contexts = cp_size // degree
        even = place_contiguous(spec.total_seqlen, contexts), place_contiguous(spec.seqlen_k, contexts)
        least = _least_seconds(area, even, heads, degree, hardware)
        if found and least >= min(seconds for seconds, _ in found.values()):
            continue
        inner = most_heads(heads, degree)
        plans = plan_layers(masks, inner, options.for_contexts(degree), cp_size=contexts)
        found[degree] = (_mean_seconds(plans, heads, degree, hardware), plans)
    best = min(found, key=lambda degree: found[degree][0])
    chosen = best if found[best][0] < _GAIN * found[1][0] else 1
    return DegreeChoice(chosen, found[chosen][1], tuple((degree, seconds) for degree, (seconds, _) in found.items()))


def _mean_area(masks: Sequence[tuple[PlannedMask, AttnMaskSpec]]) -> float:
    """Visible pairs, in the mean over layers."""
    weights = [layers.num_layers for layers, _ in masks]
    return float(np.average([lower_mask(mask, layers.window).area() for layers, mask in masks], weights=weights))


def _blocks_fit(ranks_per_node: int | None, degree: int) -> bool:
    return ranks_per_node is None or ranks_per_node % degree == 0 or degree % ranks_per_node == 0


def _least_seconds(
    area: float, rows: tuple[Placement, Placement], heads: Heads, degree: int, hardware: Hardware
) -> float:
    """A bound below `_mean_seconds` for any plan: even work, no keys to wait for, and the head exchanges.

    area: visible pairs, in the mean over layers. rows: even placements of queries and keys over the context ranks.
    """
    inner, context_ranks = most_heads(heads, degree), rows[0].cp_size
    work = sum(
        step_time_bound(
            area=area, cp_size=context_ranks, worst_bytes=0.0, heads=inner, hardware=hardware, backward=backward
        )
        for backward in (False, True)
    )
    return work + head_exchange_seconds(rows, split_heads(heads.num_q, heads.num_kv, degree), heads, hardware)


def _mean_seconds(plans: tuple[LayerPlan, ...], heads: Heads, degree: int, hardware: Hardware) -> float:
    parts, inner = split_heads(heads.num_q, heads.num_kv, degree), most_heads(heads, degree)
    between = between_context_ranks(hardware, degree)
    total = weight = 0.0
    for layers, plan in plans:
        exchanged = head_exchange_seconds((plan.q_placement, plan.k_placement), parts, heads, hardware)
        total += layers.num_layers * (simulate(plan, between, inner).seconds + exchanged)
        weight += layers.num_layers
    return total / weight


def between_context_ranks(hardware: Hardware, degree: int) -> Hardware:
    """The hardware as context ranks of `degree` ranks each see it: so many fewer of them share a node."""
    return replace(hardware, ranks_per_node=max(hardware.ranks_per_node // degree, 1))
