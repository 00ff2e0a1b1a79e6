"""Solver layer: the estimate of a schedule's time, the stages chosen by it, and whether queries travel."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cpattn import AttnMaskSpec
from cpattn.launch.benchmarks.workloads import document_lengths
from cpattn.masks.spec import lower_mask
from cpattn.solver import (
    DEFAULT_HARDWARE,
    Hardware,
    Heads,
    Link,
    Plan,
    Schedule,
    SliceTable,
    keys_schedule,
    make_dispatch_plan,
    make_routes,
    place_zigzag,
    simulate,
    tokens_needed,
)
from cpattn.solver.draft import Draft
from cpattn.solver.estimate import Load, Step, choose_stages
from cpattn.solver.routes import LinkRows

TOTAL = 1 << 17


def load(area: float, rows: int, cp_size: int = 16) -> Load:
    """Equal ranks that own 1000 rows each and receive `rows`."""
    each = np.full(cp_size, 1, dtype=np.int64)
    none = 0 * each
    return Load(
        areas=int(area) * each,
        own_slices=each,
        far_slices=each,
        gaps=0.0 * each,
        cuts=0.0 * each,
        own_share=1000 / (1000 + rows * each),
        guest_share=0.0 * each,
        merged=1000.0 * each,
        fetched=float(rows) * each,
        late=(0.0 * each, 0.0 * each),
        keys=LinkRows(none, rows * each),
        queries=LinkRows(none, none),
        two_level=False,
    )


def stages(area: float, rows: int, *, latency: float = 1e-5) -> tuple[int, ...]:
    hardware = Hardware("x", 1e14, 1e14, 0.0, 1e-5, 1e12, Link(latency, 1e11), Link(latency, 1e10), 16)
    return choose_stages(Step(load(area, rows), Heads(), hardware), range(1, 9)).weights


def test_stages_follow_the_transfer() -> None:
    assert len(stages(1e4, 20)) <= 2, "tiny work: launches and latencies decide"
    long = stages(2e9, 100_000)
    assert 3 <= len(long) <= 8
    assert len(stages(2e9, 100_000, latency=0.3)) < len(long), "a dear start means fewer stages"


def test_the_first_and_the_last_stage_are_small_where_nothing_hides_them() -> None:
    first, *middle, last = stages(2e9, 100_000)
    assert first == last == 1
    assert set(middle) <= {2, 4}


def test_the_number_of_stages_can_be_given() -> None:
    for count in (1, 2, 5):
        assert len(choose_stages(Step(load(2e9, 100_000), Heads(), DEFAULT_HARDWARE), (count,)).weights) == count
    assert choose_stages(Step(load(2e9, 0), Heads(), DEFAULT_HARDWARE), (0,)).weights == ()


MASKS = {
    "causal": AttnMaskSpec.causal(TOTAL),
    "window": AttnMaskSpec.sliding_window(TOTAL, 4096),
    "varlen": AttnMaskSpec.varlen(document_lengths(TOTAL)),
}


@pytest.mark.parametrize("per_node", [None, 4])
@pytest.mark.parametrize("name", MASKS)
def test_the_estimate_is_near_the_simulation(name: str, per_node: int | None) -> None:
    """And no other number of stages is simulated to be much faster than the chosen one."""
    hardware = replace(DEFAULT_HARDWARE, ranks_per_node=4)
    draft, plan = planned(lower_mask(MASKS[name]), hardware, per_node)
    seconds = simulate(plan, hardware).seconds
    assert plan.relays or per_node, "over nodes that the plan did not know"
    staging = draft.staging(Heads().row_costs(), hardware, per_node, None, plan.relays)
    assert 0.8 < staging.seconds / seconds < (1.3 if plan.relays else 1.2)
    for count in range(1, 9):
        given = draft.plan(draft.staging(Heads().row_costs(), hardware, per_node, count, plan.relays), per_node)
        assert seconds < 1.1 * simulate(given, hardware).seconds, f"{count} stages"


def planned(table: SliceTable, hardware: Hardware, per_node: int | None) -> tuple[Draft, Plan]:
    plan = make_dispatch_plan(
        table, total_seqlen=TOTAL, cp_size=16, hardware=hardware, ranks_per_node=per_node, chunk_size=512
    )
    return Draft.of(Schedule(plan.tasks, plan.task_ranks), plan.q_placement, plan.k_placement), plan


def test_plans_choose_their_stages() -> None:
    many = make_dispatch_plan(lower_mask(AttnMaskSpec.causal(1 << 20)), total_seqlen=1 << 20, cp_size=64)
    one = make_dispatch_plan(lower_mask(AttnMaskSpec.causal(512)), total_seqlen=512, cp_size=4, chunk_size=32)
    assert many.num_stages > 2
    assert one.num_stages <= 2


def test_a_plain_layout_that_auto_takes_has_one_placement() -> None:
    """Bounds, memory and the tensors of row maps are for queries and keys together where these lie alike."""
    total, table = 1 << 16, lower_mask(AttnMaskSpec.causal(1 << 16))
    plan = make_dispatch_plan(table, total_seqlen=total, cp_size=8, schedule="auto")
    np.testing.assert_array_equal(plan.q_placement.ends, place_zigzag(total, 8).ends)
    assert plan.q_placement is plan.k_placement


def test_queries_travel_where_that_is_faster() -> None:
    """Many heads on a slow link: fewer bytes win. Few key heads on a fast one: queries would wait for one another."""
    table = lower_mask(AttnMaskSpec.causal(1 << 18))

    def plans(heads: Heads, bytes_per_s: float) -> list[Plan]:
        link = Link(1e-5, bytes_per_s)
        options = {
            "total_seqlen": 1 << 18,
            "cp_size": 64,
            "costs": heads.row_costs(),
            "relays": False,
            "hardware": replace(DEFAULT_HARDWARE, within=link, across=link),
        }
        kinds = ("keys", "tiles", "auto")
        return [make_dispatch_plan(table, schedule=kind, **options) for kind in kinds]  # type: ignore[arg-type]

    for heads, rate, moves in ((Heads(32, 32), 2e9, True), (Heads(64, 8), 4e11, False)):
        keys, tiles, auto = plans(heads, rate)
        assert bool(len(auto.q_routes)) == moves
        hardware = replace(DEFAULT_HARDWARE, within=Link(1e-5, rate), across=Link(1e-5, rate))
        by_keys, by_tiles, taken = (simulate(plan, hardware, heads).seconds for plan in (keys, tiles, auto))
        assert (by_tiles < by_keys) == moves
        assert taken <= min(by_keys, by_tiles)


def test_auto_is_predicted_no_slower_than_either_schedule() -> None:
    for heads in (Heads(), Heads(16, 16)):
        for name, spec in MASKS.items():
            seconds = {}
            for kind in ("keys", "tiles", "auto"):
                plan = make_dispatch_plan(
                    lower_mask(spec), total_seqlen=TOTAL, cp_size=16, schedule=kind, costs=heads.row_costs()  # type: ignore[arg-type]
                )
                seconds[kind] = simulate(plan, heads=heads).seconds
            assert seconds["auto"] <= 1.03 * min(seconds.values()), (name, heads, seconds)


def test_every_sender_is_busy_in_every_stage() -> None:
    """A causal mask: in token order all ranks would ask the owners of the first tokens first."""
    table = lower_mask(AttnMaskSpec.causal(TOTAL))
    placement = place_zigzag(TOTAL, 16)
    _, keys = tokens_needed(*keys_schedule(table, placement))
    routes = make_routes(keys, placement, (1, 4, 4, 1))
    whole = routes.rows_sent(16)
    for stage, share in enumerate((0.1, 0.4, 0.4, 0.1)):
        assert np.abs(routes.of_stage(stage).rows_sent(16) / whole - share).max() < 0.02
