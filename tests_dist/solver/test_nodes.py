"""Solver layer: placement on networks of two levels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpattn import AttnMaskSpec
from cpattn.launch.benchmarks.workloads import document_lengths
from cpattn.masks.spec import lower_mask
from cpattn.solver import DEFAULT_HARDWARE, Plan, SliceTable, dispatch, make_dispatch_plan, simulate, two_level_routes
from cpattn.solver.dispatch import keys_schedule
from cpattn.solver.draft import DEFAULT_COSTS, Draft, assemble_plan
from cpattn.solver.place.balance import AREA_LIMIT
from cpattn.solver.place.measure import rank_areas
from cpattn.solver.place.nodes import place_on_nodes
from tests_dist.solver.test_balance import random_masks

TOTAL, RANKS, PER_NODE = 1 << 18, 32, 8
MASKS = {
    "documents": AttnMaskSpec.varlen(document_lengths(TOTAL)),
    "causal": AttnMaskSpec.causal(TOTAL),
    "window": AttnMaskSpec.sliding_window(TOTAL, 4096),
}


@given(random_masks(), st.sampled_from([(4, 2), (6, 3), (8, 2), (8, 4)]), st.integers(1, 12))
def test_tokens_are_even_for_any_mask(mask, sizes, chunk_size):
    table, total = mask
    cp_size, per_node = sizes
    options = {"cp_size": cp_size, "chunk_size": chunk_size, "ranks_per_node": per_node}
    placements = list(place_on_nodes(table, total_seqlen=total, **options))
    assert bool(placements) == (chunk_size > 2 and total > 0)
    for placement in placements:
        assert placement.cp_size == cp_size
        assert placement.total_seqlen == placement.num_tokens.sum() == total
        assert np.ptp(placement.num_tokens) <= chunk_size
        np.testing.assert_array_equal(placement.starts[1:], placement.ends[:-1])


@pytest.mark.parametrize("name", MASKS)
def test_areas_are_even(name: str) -> None:
    table = lower_mask(MASKS[name])
    options = {"cp_size": RANKS, "chunk_size": 512, "ranks_per_node": PER_NODE}
    for placement in place_on_nodes(table, total_seqlen=TOTAL, **options):
        areas = rank_areas(table, placement)
        assert areas.max() <= (AREA_LIMIT + 0.002) * areas.mean()


def plans(table: SliceTable) -> tuple[Plan, Plan]:
    """As on one level, whose rows then cross once per node; and as planned for two."""
    flat = make_dispatch_plan(table, total_seqlen=TOTAL, cp_size=RANKS, schedule="keys", relays=False)
    schedule = keys_schedule(table, flat.q_placement)
    flat = assemble_plan(*schedule, flat.q_placement, flat.k_placement, ranks_per_node=PER_NODE)
    two = make_dispatch_plan(table, total_seqlen=TOTAL, cp_size=RANKS, schedule="keys", ranks_per_node=PER_NODE)
    return flat, two


def test_nodes_may_be_larger_than_the_hardware_says() -> None:
    """Three nodes of six ranks on hardware of four: the hops go by the plan's nodes."""
    table = lower_mask(AttnMaskSpec.causal(1800))
    hardware = replace(DEFAULT_HARDWARE, ranks_per_node=4)
    options = {"total_seqlen": 1800, "cp_size": 18, "chunk_size": 32, "ranks_per_node": 6}
    plan = make_dispatch_plan(table, schedule="auto", hardware=hardware, **options)
    assert plan.ranks_per_node == 6
    assert simulate(plan, hardware).seconds > 0


def test_documents_stay_inside_nodes() -> None:
    flat, two = plans(lower_mask(MASKS["documents"]))
    rows = [two_level_routes(plan.kv_routes, PER_NODE).across.num_rows() for plan in (flat, two)]
    assert rows[1] < 0.2 * rows[0]
    assert simulate(two).seconds < 0.75 * simulate(flat).seconds


@pytest.mark.parametrize("name", MASKS)
def test_two_levels_are_no_slower_for_being_known(name: str) -> None:
    flat, two = plans(lower_mask(MASKS[name]))
    assert simulate(two).seconds < 1.05 * simulate(flat).seconds


def test_beginnings_that_many_nodes_need_are_sent_by_many_ranks() -> None:
    """1M tokens of documents, one of 79K: with more runs for each rank, the busiest sends less between nodes."""
    total, ranks = 1 << 20, 128
    table = lower_mask(AttnMaskSpec.varlen(document_lengths(total)))
    sent = []
    for placement in place_on_nodes(
        table, total_seqlen=total, cp_size=ranks, chunk_size=512, ranks_per_node=PER_NODE
    ):
        plan = assemble_plan(*keys_schedule(table, placement), placement, placement, ranks_per_node=PER_NODE)
        sent.append(int(two_level_routes(plan.kv_routes, PER_NODE).across.rows_sent(ranks).max()))
    assert len(sent) == 3
    assert min(sent[1:]) < 0.8 * sent[0]


@pytest.mark.parametrize("name", ["documents", "window"])
@pytest.mark.parametrize("simulated", [True, False])
def test_the_fastest_placement_is_taken(name: str, simulated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all candidates, by simulation; by the estimate where there are too many routes."""
    if not simulated:
        monkeypatch.setattr(dispatch, "_MOST_SIMULATED", 0)
    table = lower_mask(MASKS[name])
    flat, two = plans(table)
    options = {"cp_size": RANKS, "chunk_size": 512, "ranks_per_node": PER_NODE}
    row_ms = dispatch.row_ms(DEFAULT_COSTS, DEFAULT_HARDWARE, PER_NODE)
    candidates = list(place_on_nodes(table, total_seqlen=TOTAL, **options, row_ms=row_ms))
    if name == "window":  # one component: the placement for one level takes part
        candidates.append(flat.q_placement)
    seconds = {}
    for placement in candidates:
        draft = Draft.of(keys_schedule(table, placement), placement, placement)
        staging = draft.staging(DEFAULT_COSTS, DEFAULT_HARDWARE, PER_NODE, None, None)
        plan = draft.plan(staging, PER_NODE)
        where = placement.ends.tobytes(), placement.owners.tobytes()
        seconds[where] = simulate(plan).seconds if simulated else staging.seconds
    # Several may be as fast.
    taken = two.q_placement
    assert seconds[taken.ends.tobytes(), taken.owners.tobytes()] == min(seconds.values())
