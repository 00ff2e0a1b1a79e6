"""Solver layer: timelines. Against the clock they are held in tests_dist/ranks/test_simulate.py."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from cpattn import AttnMaskSpec
from cpattn.masks.spec import lower_mask
from cpattn.solver import LATE_SHARE, Hardware, Heads, Link, make_dispatch_plan, simulate, traffic_matrix
from tests_dist.support.masks import MASKS

SLOW = Hardware("slow", 1e9, 1e9, 0.0, 0.0, 1e15, Link(0.0, 1e6), Link(0.0, 1e6), 1)
FREE_LINKS = Hardware("free", 1e9, 2e9, 0.0, 0.0, 1e15, Link(0.0, 1e18), Link(0.0, 1e18), 1)


def plan(spec: AttnMaskSpec, ranks: int, **options: object):  # type: ignore[no-untyped-def]
    return make_dispatch_plan(lower_mask(spec), total_seqlen=spec.total_seqlen, cp_size=ranks, chunk_size=8, **options)  # type: ignore[arg-type]


def test_two_ranks_by_hand() -> None:
    """Contiguous causal halves of 8 tokens, one stage: rank 1 fetches 4 rows while it computes its own triangle."""
    heads = Heads(1, 1, 1, 1, itemsize=2)
    step = simulate(plan(AttnMaskSpec.causal(8), 2, layout="contiguous", num_stages=1), SLOW, heads)
    forward = step.forward
    # 10 pairs of 4 FLOP, then 16 pairs; the rows take 4 * 4 bytes / 1e6.
    triangle, square, rows = 10 * 4 / 1e9, 16 * 4 / 1e9, 16 / 1e6
    assert forward.compute[0].ends.tolist() == pytest.approx([triangle, triangle])
    (keys,) = forward.transfers
    assert keys.ends[1] == pytest.approx(rows)
    assert forward.seconds[1] == pytest.approx(max(rows, triangle) + square)


def test_a_transfer_delays_the_work_that_hides_it() -> None:
    """The plan above: what waiting does not pay comes on top of the next kernel."""
    heads = Heads(1, 1, 1, 1, itemsize=2)
    mine = plan(AttnMaskSpec.causal(8), 2, layout="contiguous", num_stages=1)
    triangle, square, rows = 10 * 4 / 1e9, 16 * 4 / 1e9, 16 / 1e6
    for load, rate in ((0.5, 1e9), (1.0, 1e9), (0.5, 1e5)):
        scale = 1e9 / rate
        hardware = replace(SLOW, forward_flops=rate, transfer_load=load)
        forward = simulate(mine, hardware, heads).forward
        own = triangle * scale + load * rows
        assert forward.compute[0].ends[1] == pytest.approx(own)
        assert forward.seconds[1] == pytest.approx(max(rows, own) + square * scale)


def test_adding_to_earlier_stages_takes_time() -> None:
    """Rank 1 merges its 4 rows of out once, behind the second stage."""
    heads = Heads(1, 1, 1, 1, itemsize=2)
    mine = plan(AttnMaskSpec.causal(8), 2, layout="contiguous", num_stages=1)
    slow = replace(SLOW, copy_bytes_per_s=1e3)
    (_, plain), (_, merging) = (simulate(mine, hardware, heads).forward.compute for hardware in (SLOW, slow))
    added = (merging.ends - merging.starts) - (plain.ends - plain.starts)
    assert added.tolist() == pytest.approx([0.0, 4 * 4 / 1e3])


@pytest.mark.parametrize("schedule", ["keys", "tiles"])
@pytest.mark.parametrize("per_node", [None, 2])
def test_compute_adds_up_and_free_links_hide(schedule: str, per_node: int | None) -> None:
    """Stage works partition the area; with free links only the work is left."""
    spec, heads = MASKS["prefix_tree"], Heads(2, 1, 4, 4)
    mine = plan(spec, 4, schedule=schedule, ranks_per_node=per_node, num_stages=3)
    step = simulate(mine, FREE_LINKS, heads)
    np.testing.assert_allclose(step.forward.busy, mine.areas() * heads.forward_flop / 1e9)
    np.testing.assert_allclose(step.backward.busy, mine.areas() * heads.backward_flop / 2e9)
    assert step.forward.exposed.max() < 1e-9 + step.forward.seconds.max() - step.forward.busy.min()


@pytest.mark.parametrize("name", [n for n, s in MASKS.items() if not s.is_cross])
def test_times_are_in_order(name: str) -> None:
    for ranks in (1, 3, 4):
        step = simulate(plan(MASKS[name], ranks, schedule="auto"), SLOW, Heads(2, 1, 4, 4))
        for timeline in step:
            for before, after in zip(timeline.compute, timeline.compute[1:], strict=False):
                assert (after.starts >= before.ends - 1e-15).all()
            for span in (*timeline.compute, *timeline.transfers):
                assert (span.ends >= span.starts).all()
            assert (timeline.exposed >= -1e-12).all()


def test_stages_hide_transfers() -> None:
    """Two ranks, half of the work (h = 8.6 ms) on own keys, a transfer m three times that.

    One stage takes m + h in forward; of four, all but the last quarter of the work hide: m + h / 4.
    """
    spec, heads = AttnMaskSpec.varlen([4096], causal=False), Heads(8, 8, 64, 64)
    hardware = Hardware("x", 1e12, 1e12, 0.0, 1e-9, 1e15, Link(0.0, 1.63e8), Link(0.0, 1.63e8), 1)
    one, four = (simulate(plan(spec, 2, layout="contiguous", num_stages=n), hardware, heads) for n in (1, 4))
    half = 2048 * 2048 * heads.forward_flop / 1e12
    assert one.forward.seconds.max() == pytest.approx(4 * half, rel=0.01)
    assert four.forward.seconds.max() == pytest.approx(3.25 * half, rel=0.01)


def test_the_last_gradients_travel_behind_own_work() -> None:
    """Two ranks, half of the work on own keys; gradients take no longer than the part of it that is left till last."""
    spec, heads = AttnMaskSpec.varlen([4096], causal=False), Heads(8, 8, 64, 64)
    half = 2048 * 2048 * heads.backward_flop / 1e12
    rate = 2048 * heads.row_bytes().dkv / (LATE_SHARE * half)
    hardware = Hardware("x", 1e12, 1e12, 0.0, 1e-9, 1e18, Link(0.0, rate), Link(0.0, rate), 1)
    backward = simulate(plan(spec, 2, layout="contiguous", num_stages=1), hardware, heads).backward
    assert backward.seconds.max() == pytest.approx(2 * half, rel=0.01)
    assert [span.name for span in backward.compute] == ["stage 0", "stage 1", "stage 0 late"]


def test_two_levels_relieve_the_slow_link() -> None:
    spec, heads = AttnMaskSpec.causal(4096), Heads()
    hardware = Hardware("x", 1e18, 1e18, 0.0, 0.0, 1e15, Link(0.0, 1e12), Link(0.0, 1e9), 4)
    flat, nodes = (simulate(plan(spec, 8, ranks_per_node=n, layout="zigzag"), hardware, heads) for n in (None, 4))
    assert nodes.forward.seconds.max() < 0.5 * flat.forward.seconds.max()


def test_hops_over_different_links_travel_at_once_where_the_hardware_says_so() -> None:
    """The hop between nodes of one stage and the hop inside them of another; those over one link take turns."""
    mine = plan(AttnMaskSpec.varlen([1024], causal=False), 4, ranks_per_node=2, num_stages=4, layout="contiguous")
    hardware = replace(SLOW, ranks_per_node=2, within=Link(0.0, 1e5), across=Link(0.0, 1e5), forward_flops=1e15)
    taking_turns, at_once = (
        simulate(mine, replace(hardware, hops_by_host=at_once), Heads(1, 1, 1, 1)).forward for at_once in (False, True)
    )
    # Of 768 rows a rank takes 256 between nodes and 512 inside: of its neighbour, and what landed there.
    row = 4 / 1e5
    assert taking_turns.seconds.max() >= 768 * row
    assert 512 * row <= at_once.seconds.max() < 768 * row


def test_traffic_matrix_counts_every_byte() -> None:
    mine, heads = plan(AttnMaskSpec.causal(1000), 5, schedule="tiles"), Heads()
    row = heads.row_bytes()
    expected = mine.kv_routes.num_rows() * (2 * row.kv + row.dkv) + mine.q_routes.num_rows() * (
        row.q + row.q_again + row.partial + row.dq
    )
    matrix = traffic_matrix(mine, heads)
    assert matrix.sum() == expected
    assert matrix.diagonal().sum() == 0
    assert traffic_matrix(mine, heads, bins=2).sum() == expected


def test_a_thousand_ranks_take_a_second() -> None:
    mine = plan(AttnMaskSpec.causal(1 << 20), 1024, schedule="tiles")
    started = time.process_time()
    step = simulate(mine)
    assert time.process_time() - started < 3
    assert len(step.forward.seconds) == 1024
