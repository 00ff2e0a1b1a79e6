"""Solver layer: rows that travel on over those who need them, in hops."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cpattn import AttnMaskSpec, make_plan
from cpattn.launch.benchmarks.workloads import document_lengths
from cpattn.masks.spec import lower_mask
from cpattn.solver import DEFAULT_HARDWARE, Heads, Plan, RouteTable, make_dispatch_plan, relays, simulate
from cpattn.solver.draft import Draft
from cpattn.solver.estimate import Staging
from cpattn.solver.schedule import Schedule
from cpattn.testing.plans import require_exact_plan
from tests_dist.support.strategies import random_spec

LONG = AttnMaskSpec.varlen(document_lengths(1 << 19))
HEADS = {"num_heads_q": 4, "num_heads_kv": 2, "head_dim": 64}


def planned(spec: AttnMaskSpec, cp_size: int, **options: Any) -> Plan:
    return make_plan(spec, cp_size=cp_size, chunk_size=4, **HEADS, **options).plan


def test_a_root_that_seven_ranks_need_is_passed_on_by_them() -> None:
    """Rank 0 has 112 rows that the seven others need: each gets 16 of them first, and sends them to the other six."""
    none = np.zeros(7, dtype=np.int64)
    routes = RouteTable(np.arange(1, 8), none, none, none + 112, none)
    first, second = relays.hop_tables(routes, cp_size=8, ranks_per_node=8, relays=True)
    assert first.rows_sent(8).tolist() == [112] + [0] * 7
    assert first.rows_received(8).tolist() == [0] + [16] * 7
    assert second.rows_received(8).tolist() == [0] + [112] * 7
    to_others = np.bincount(second.srcs, (second.ends - second.starts) * (second.srcs != second.dsts), 8)
    assert to_others.tolist() == [0] + [16 * 6] * 7
    assert (second.srcs == second.dsts).sum() == 7, "what has come is kept for the delivery"


@pytest.mark.parametrize(("cp_size", "per_node"), [(4, None), (6, 1), (8, None), (8, 2), (12, 3)])
def test_random_plans_are_exact(cp_size: int, per_node: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row is followed hop by hop, parts of single rows among them."""
    monkeypatch.setattr(relays, "_LEAST_PART", 1)
    relayed = 0
    for seed in range(12):
        rng = np.random.default_rng(1000 * cp_size + seed)
        spec = random_spec(rng)
        schedule = "tiles" if seed % 4 == 3 and not spec.is_cross else "keys"
        layout = "balanced" if schedule == "tiles" else ("contiguous", "zigzag", "balanced")[seed % 3]
        plan = planned(
            spec, cp_size, ranks_per_node=per_node, num_stages=1 + seed % 3, layout=layout, schedule=schedule,
            relays=True,
        )  # fmt: skip
        assert plan.relays or not len(plan.kv_routes)
        require_exact_plan(plan, spec)
        relayed += any(len(plan.hops(routes)[0]) for routes in (plan.kv_routes, plan.q_routes)) and plan.relays
    assert relayed >= 3


@pytest.mark.parametrize(("per_node", "total"), [(None, 1 << 19), (8, 1 << 19), (8, 1 << 18)])
def test_no_rank_sends_much_more_than_any_receives(per_node: int | None, total: int) -> None:
    """64 ranks: documents whose beginnings a few ranks own; predicted faster than without relays."""
    table = lower_mask(AttnMaskSpec.varlen(document_lengths(total)))
    hardware = DEFAULT_HARDWARE if per_node else replace(DEFAULT_HARDWARE, ranks_per_node=1)
    options = {"total_seqlen": total, "cp_size": 64, "schedule": "keys", "hardware": hardware}
    plain = make_dispatch_plan(table, **options, relays=False)
    plan = make_dispatch_plan(table, **options)
    assert plan.relays
    assert plan.ranks_per_node == (per_node or 64)
    assert len(plan.hops(plan.kv_routes)) == (3 if per_node else 2)
    for each, at_most in ((plain, 3.0), (plan, 1.3)):
        received, sent = each.key_rows_moved()
        assert at_most / 2 < sent.max() / received.max() <= at_most
    assert plan.kv_routes.num_rows() == plain.kv_routes.num_rows()
    assert simulate(plan, hardware).seconds < simulate(plain, hardware).seconds


def test_the_level_of_each_stage() -> None:
    """Every stage's hops send about what its busiest receiver takes, and the plan counts what it sends in all."""
    table = lower_mask(AttnMaskSpec.varlen(document_lengths(1 << 18)))
    hardware = replace(DEFAULT_HARDWARE, ranks_per_node=1)
    plan = make_dispatch_plan(table, total_seqlen=1 << 18, cp_size=64, num_stages=3, hardware=hardware, relays=True)
    total = np.zeros(64, dtype=np.int64)
    for stage, hops in enumerate(plan.key_hops()):
        routes = plan.kv_routes.of_stage(stage)
        sent = np.zeros(64, dtype=np.int64)
        for hop in hops:
            away = hop.srcs != hop.dsts
            sent += np.bincount(hop.srcs[away], (hop.ends - hop.starts)[away], 64).astype(np.int64)
        assert sent.max() <= 1.1 * routes.rows_received(64).max()
        total += sent
    np.testing.assert_array_equal(total, plan.key_rows_moved().sent)


def test_plans_that_relay_differ_from_those_that_do_not() -> None:
    spec = AttnMaskSpec.varlen([300, 40, 20])
    plain, plan = (planned(spec, 4, relays=relays_, num_stages=2, schedule="keys") for relays_ in (False, True))
    assert plan.fingerprint != plain.fingerprint
    copy = pickle.loads(pickle.dumps(plan))
    copy.require_whole()
    assert copy.relays
    with pytest.raises(ValueError, match="was damaged or changed"):
        replace(plan, relays=False).require_whole()


def test_what_sends_no_more_than_it_receives_is_left_alone() -> None:
    """One causal sequence, zigzag: every row goes to nearly all, and every rank sends as much as any receives."""
    plan = planned(AttnMaskSpec.causal(4096), 8, layout="zigzag", schedule="keys")
    assert not plan.relays
    with pytest.raises(ValueError, match="relays is 2: True or False, or None"):
        planned(AttnMaskSpec.causal(64), 2, relays=2)


def test_more_hops_take_longer_where_nothing_is_gained() -> None:
    """The simulation pays each hop's latency."""
    spec = AttnMaskSpec.varlen([300, 40, 20])
    seconds = [
        simulate(planned(spec, 4, relays=on, num_stages=2, schedule="keys"), heads=Heads(4, 2, 64, 64)).seconds
        for on in (False, True)
    ]
    assert seconds[0] < seconds[1]


def test_ranks_that_need_the_same_share_a_node() -> None:
    """Placed as on one level, on hardware with nodes: numbered by need, fewer rows leave nodes; exact as before."""
    plain = make_dispatch_plan(lower_mask(LONG), total_seqlen=LONG.total_seqlen, cp_size=64, relays=False)
    draft = Draft.of(Schedule(plain.tasks, plain.task_ranks), plain.q_placement, plain.k_placement)
    across = []
    for each in (draft, draft.renumbered()):
        plan = each.plan(Staging((1,), 0.0, relays=8), None)
        across.append(plan.hops(plan.kv_routes)[1].num_rows())
    assert across[1] < 0.75 * across[0]
    spec = AttnMaskSpec.varlen([90, 3, 40, 11, 60, 7])
    small = planned(spec, 8, relays=False, schedule="keys")
    draft = Draft.of(Schedule(small.tasks, small.task_ranks), small.q_placement, small.k_placement).renumbered()
    assert sorted(draft.q_placement.num_tokens) == sorted(small.q_placement.num_tokens)
    require_exact_plan(draft.plan(Staging((1, 2), 0.0, relays=2), None), spec)
