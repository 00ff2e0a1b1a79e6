"""Runtime layer: what a profile records. Structure, order and counts; never how long anything took."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import cpattn
from cpattn import AttnMaskSpec
from cpattn.runtime import recording
from cpattn.runtime.recording import Pass, recorded
from cpattn.runtime.trace import Call, RankTrace, Span, Trace, transfer_lanes
from tests_dist.support.harness import run_on_ranks

HEADS, DIM = (4, 2), 16
# Times are taken in whole nanoseconds and shifted, which rounds.
ROUNDING = 1e-10


def key_for(spec: AttnMaskSpec, **options: Any) -> cpattn.AttnKey:
    group = dist.group.WORLD if dist.is_initialized() else None
    heads = {"num_heads_q": HEADS[0], "num_heads_kv": HEADS[1], "head_dim": DIM}
    return cpattn.make_key(spec, **heads, cp_group=group, chunk_size=16, **options)


def step(key: cpattn.AttnKey) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(key.cp_rank)
    sizes = ((key.num_tokens, HEADS[0]), (key.num_keys, HEADS[1]), (key.num_keys, HEADS[1]))
    q, k, v = (torch.randn(n, h, DIM, generator=generator).requires_grad_() for n, h in sizes)
    out = cpattn.attention(q, k, v, key)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), (q, k, v))]


def trace_on_rank(options: dict[str, Any], steps: int = 2) -> Trace | None:
    """A profile of some steps; profiled or not, the results are the same bits."""
    key = key_for(AttnMaskSpec.causal(301), **options)
    plain = step(key)
    with cpattn.profile() as profile:
        for _ in range(steps):
            for ours, expected in zip(step(key), plain, strict=True):
                assert torch.equal(ours, expected)
    return profile.gather(dist.group.WORLD)


def trace_of(size: int, **options: Any) -> Trace:
    """Rank 0's trace; the others have none."""
    first, *others = run_on_ranks(size, trace_on_rank, options)
    assert others == [None] * (size - 1)
    assert isinstance(first, Trace)
    return first


def names(call: Call, thread: str) -> Counter[str]:
    return Counter(span.name for span in call.spans if span.thread == thread)


def check_order(trace: Trace) -> None:
    """Spans are closed, inside their call, and one thing at a time in each thread."""
    for rank in trace.ranks:
        before = 0.0
        for call in rank.calls:
            assert call.start >= before - ROUNDING
            before = call.end
            # compute and wait are one thread of the program
            busy = [(s.start, s.end) for s in call.spans if s.thread != "transfer"]
            for (start, end), (following, _) in zip(busy, [*busy[1:], (call.end, call.end)], strict=True):
                assert call.start - ROUNDING <= start <= end <= following + ROUNDING
            assert call.seconds_of("compute") + call.seconds_of("wait") <= call.seconds + ROUNDING
            lanes: dict[int, float] = {}
            for span, lane in zip(call.spans, transfer_lanes(call), strict=True):
                if span.thread == "transfer":
                    assert lanes.get(lane, call.start) - ROUNDING <= span.start <= span.end <= call.end + ROUNDING
                    lanes[lane] = span.end
            for span in call.spans:
                if span.thread == "wait":  # it ends when what it waits for is here
                    sent = [s for s in call.spans if s.thread == "transfer" and s.name == span.name]
                    assert any(s.start <= span.start + ROUNDING and s.end <= span.end + ROUNDING for s in sent)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("num_stages", [1, 3])
def test_keys_travel(size, num_stages):
    trace = trace_of(size, schedule="keys", num_stages=num_stages)
    check_order(trace)
    keys = Counter(f"keys {n}" for n in range(1, num_stages + 1))
    home = Counter(f"gradients {n}" for n in range(1, num_stages + 1))
    assert [r.rank for r in trace.ranks] == list(range(size))
    for rank in trace.ranks:
        assert [call.name for call in rank.calls] == ["forward", "backward"] * 2
        for call in rank.calls:
            moved = keys if call.name == "forward" else keys + home
            assert names(call, "transfer") == names(call, "wait") == moved
            copies = {"pack": moved.total(), "reduce": home.total() if call.name == "backward" else 0}
            # Backward leaves a part of the work on own keys till last.
            late = [0] if call.name == "backward" else []
            assert names(call, "compute") == Counter({"kernel": num_stages + 1 + len(late)} | copies)
            stages = [s.stage for s in call.spans if s.name == "kernel"]
            assert stages == list(range(num_stages + 1)) + late


def test_queries_travel():
    trace = trace_of(4, schedule="tiles", num_stages=2)
    check_order(trace)
    for rank in trace.ranks:
        for call in rank.calls:
            sides = [(s.stage, s.side) for s in call.spans if s.name == "kernel"]
            late = [(0, "own")] if call.name == "backward" else []
            assert sides == [(0, "own"), (0, "guest"), (1, "guest"), (1, "own"), (2, "guest"), (2, "own"), *late]
            travelled = names(call, "transfer")
            assert travelled["queries"] == travelled["results"] == 1
            assert travelled["keys 1"] == travelled["keys 2"] == 1


def test_two_levels_are_two_transfers():
    trace = trace_of(4, schedule="keys", num_stages=1, ranks_per_node=2)
    check_order(trace)
    for rank in trace.ranks:
        assert names(rank.calls[0], "transfer") == {"keys 1": 2}
        assert names(rank.calls[1], "transfer") == {"keys 1": 2, "gradients 1": 2}


def test_eight_bit_rows_are_encoded_and_unpacked():
    trace = trace_of(2, schedule="keys", num_stages=2, wire="e4m3")
    check_order(trace)
    for rank in trace.ranks:
        for call in rank.calls:
            assert names(call, "compute")["encode"] == 1
            assert names(call, "compute")["unpack"] == 2


def test_kept_keys_do_not_travel_in_backward():
    trace = trace_of(2, schedule="keys", num_stages=2, keep_kv=True)
    for rank in trace.ranks:
        assert names(rank.calls[0], "transfer") == {"keys 1": 1, "keys 2": 1}
        assert names(rank.calls[1], "transfer") == {"gradients 1": 1, "gradients 2": 1}


@pytest.mark.parametrize("degree", [2, 4])
def test_head_exchanges_belong_to_the_pass(degree):
    """Rows for heads before attention, and back after it; waited for in the order in which they left."""
    trace = trace_of(4, head_degree=degree, num_stages=1, schedule="keys")
    check_order(trace)
    inside = {"forward": ["keys 1"], "backward": ["keys 1", "gradients 1"]}
    around = {
        "forward": (["heads of q", "heads of k", "heads of v"], ["rows of out"]),
        "backward": (["heads of dout"], ["rows of dq", "rows of dk", "rows of dv"]),
    }
    for rank in trace.ranks:
        assert [call.name for call in rank.calls] == ["forward", "backward"] * 2
        for call in rank.calls:
            before, after = around[call.name]
            travel = inside[call.name] if degree < 4 else []  # a block of all ranks has all keys
            assert f"heads {HEADS[0]}:{HEADS[1]} " in call.key, "all heads, not those of this rank"
            for thread in ("transfer", "wait"):
                assert [s.name for s in call.spans if s.thread == thread] == [*before, *travel, *after]
            kernels = [s for s in call.spans if s.name == "kernel"]
            assert all(s.end <= kernels[0].start for s in call.spans if s.name in before)
            assert all(s.start >= kernels[-1].end for s in call.spans if s.name in after)
            copies = names(call, "compute")
            assert copies["pack"] == len([*before, *travel, *after])
            assert copies["unpack"] == len(after)


def test_two_calls_of_a_key_with_head_exchanges_stay_two():
    """And the exchange of lse belongs to the call as that of out does."""
    calls = run_on_ranks(2, two_calls_with_lse_on_rank)[0]
    assert [call.name for call in calls] == ["forward", "forward", "backward"]
    for call in calls[:2]:
        assert names(call, "transfer")["rows of out"] == names(call, "transfer")["rows of lse"] == 1


def two_calls_with_lse_on_rank() -> tuple[Call, ...]:
    key = key_for(AttnMaskSpec.causal(64), head_degree=2)
    q, k, v = (torch.randn(key.num_tokens, h, DIM, requires_grad=True) for h in (HEADS[0], HEADS[1], HEADS[1]))
    with cpattn.profile() as profile:
        cpattn.attention(q, k, v, key, return_lse=True)
        out, _ = cpattn.attention(q, k, v, key, return_lse=True)
        out.sum().backward()
    return profile.calls()


def test_chrome_trace_and_table(tmp_path: Path):
    """Valid JSON; a process for each rank with named threads; the table's parts add up to the step."""
    trace = trace_of(3, schedule="keys", num_stages=2)
    trace.save(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    named = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert {e["pid"] for e in events} == {0, 1, 2}
    for pid in range(3):
        assert {"attention calls", "compute", "wait", "transfer"} <= {n for (p, _), n in named.items() if p == pid}
    open_until: dict[tuple[int, int], float] = {}
    complete = sorted((e for e in events if e["ph"] == "X"), key=lambda e: e["ts"])
    spans = sum(len(call.spans) + 1 for rank in trace.ranks for call in rank.calls)
    assert len(complete) == spans
    for event in complete:
        thread = (event["pid"], event["tid"])
        assert thread in named
        assert event["dur"] >= 0
        assert event["ts"] >= open_until.get(thread, 0.0) - 1e6 * ROUNDING
        open_until[thread] = event["ts"] + event["dur"]
    assert {e["args"]["stage"] for e in complete if e["name"] == "kernel"} == {0, 1, 2}
    for share in trace.shares():
        parts = share.compute + share.copies + share.wait + share.other
        assert parts == pytest.approx(share.step)
        assert share.other >= -ROUNDING * 100
        assert 0 <= share.exposed <= 1
    lines = trace.table().splitlines()
    assert [line.split()[0] for line in lines] == ["rank", "0", "1", "2", "ms"]


def test_one_rank_needs_no_group():
    key = key_for(AttnMaskSpec.causal(64))
    with cpattn.profile() as profile:
        step(key)
    trace = profile.gather()
    assert trace is not None
    check_order(trace)
    assert [call.name for call in trace.ranks[0].calls] == ["forward", "backward"]
    assert all(not names(call, "transfer") for call in trace.ranks[0].calls)


def test_nothing_is_recorded_outside():
    key = key_for(AttnMaskSpec.causal(64))
    with cpattn.profile() as profile:
        pass
    step(key)
    assert profile.calls() == ()
    assert recording._active is None
    plan = key.bind(torch.device("cpu"), torch.float32)
    with recorded(Pass("forward", key, key), plan, torch.device("cpu")) as same:
        assert same is plan, "a pass runs the plan itself"


def test_errors_leave_no_recorder_behind():
    """Neither an error in the block nor one in a call; the call that failed is left out."""
    key = key_for(AttnMaskSpec.causal(64))
    with pytest.raises(ArithmeticError), cpattn.profile():
        failing_pass()
    assert recording._active is None
    with cpattn.profile() as profile:
        q = torch.randn(64, HEADS[0], DIM)
        with pytest.raises(ValueError, match="the key expects"):
            cpattn.attention(q, q, q, key)
        with pytest.raises(RuntimeError, match="inside"), cpattn.profile():
            pass
        plan = key.bind(q.device, q.dtype)
        with pytest.raises(ArithmeticError), recorded(Pass("forward", key, key), plan, q.device):
            failing_pass()
        step(key)
    assert [call.name for call in profile.calls()] == ["forward", "backward"]


def failing_pass(*args: Any) -> None:
    raise ArithmeticError("a kernel failed")


def test_overlapping_transfers_get_lanes_of_their_own():
    def transfer(name: str, start: float, end: float) -> Span:
        return Span("transfer", name, 1, "", start, end)

    kernel = Span("compute", "kernel", 0, "own", 0.0, 9.0)
    spans = (kernel, transfer("keys 1", 0.0, 4.0), transfer("gradients 1", 2.0, 5.0), transfer("keys 2", 4.0, 6.0))
    call = Call("forward", "key", 0.0, 9.0, spans)
    assert transfer_lanes(call) == [0, 0, 1, 0]
    trace = Trace((RankTrace(0, "host", 0, (call,)),))
    threads = {e["args"]["name"] for e in trace.to_chrome()["traceEvents"] if e["name"] == "thread_name"}
    assert threads == {"attention calls", "compute", "wait", "transfer", "transfer 2"}
