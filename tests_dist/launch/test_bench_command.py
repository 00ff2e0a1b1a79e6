"""`cpattn bench` on one process, and the picture and prediction of a step of several ranks."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import cpattn
from cpattn.runtime.trace import Call, RankTrace, Span, Trace
from cpattn.solver import HARDWARE, Heads, simulate
from tests_dist.support.harness import run_on_ranks

typer_testing = pytest.importorskip("typer.testing")
pytest.importorskip("matplotlib")

SMALL = ("--heads", "2:1", "--head-dim", "16", "--dtype", "fp32", "--repeats", "2", "--hardware", "h100")


def run(*args: str) -> Any:
    from cpattn.launch.commands import app

    return typer_testing.CliRunner().invoke(app, ["bench", *args])


def test_table_and_files(tmp_path: Path) -> None:
    done = run("--lengths", "300,200", *SMALL, "--keep-kv", "--trace", str(tmp_path / "out"))
    assert done.exit_code == 0, done.output
    for word in ("500 x 500 tokens on 1 rank", "exposed", "median of 2", "predicted", "bytes forward"):
        assert word in done.output
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"trace.json", "report.json", "timeline.png", "timeline.pdf"}
    events = json.loads((tmp_path / "out/trace.json").read_text())["traceEvents"]
    assert sum(event["name"] == "kernel" for event in events) == 2 * 2
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert len(report["steps_s"]) == 2
    assert report["options"]["keep_kv"] is True
    assert report["plan"]["seqlen_q"] == 500
    assert report["memory_of_rank_0"]["forward"] > 0
    assert [share["rank"] for share in report["ranks"]] == [0]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "give the tokens once"),
        (("--seqlen", "64", "--heads", "5:2"), "multiple of key heads"),
        (("--seqlen", "64", "--hardware", "no_such_file.json"), "a file that `cpattn calibrate"),
        (("--seqlen", "64", "--backend", "nothing"), "backend 'nothing' is unknown"),
        (("--seqlen", "64", "--backend", "te"), "backend 'te' cannot run in this process"),
        (("--seqlen", "64", "--trace", f"{__file__}/trace"), "where nothing can be written"),
        (("--seqlen", "64", "--wire", "int8"), "wire is 'int8'"),
        (("--seqlen", "64", "--head-degree", "2"), "head_degree is 2 and the group has 1 ranks"),
    ],
)
def test_bad_options_are_refused(args: tuple[str, ...], message: str) -> None:
    done = run(*SMALL, *args)
    assert done.exit_code == 2
    assert message in done.output.replace("\n", " "), done.output


def test_picture_shows_the_median_step() -> None:
    """Of three steps the middle one, in seconds from the moment at which its first rank began."""
    from cpattn.launch.trace_pictures import WAIT, measured_step

    def call(name: Any, start: float, seconds: float) -> Call:
        wait = Span("wait", "keys 1", 1, "", start, start + 0.25 * seconds)
        return Call(name, "key", start, start + seconds, (wait,))

    def rank(number: int, late: float) -> RankTrace:
        calls = [
            call(name, 10 * step + start + late, seconds * (1 + step))
            for step in (2, 0, 1)
            for name, start, seconds in (("forward", 0.0, 1.0), ("backward", 5.0, 0.5))
        ]
        return RankTrace(number, "host", 0, tuple(calls))

    forward, backward = measured_step(Trace((rank(0, 0.0), rank(1, 0.125))))
    assert forward.seconds == pytest.approx(2.125)
    assert backward.seconds == pytest.approx(1.125)
    assert forward.waited == pytest.approx(0.5)
    assert [bars[0].start for bars in forward.ranks] == pytest.approx([0.0, 0.125])
    assert {bar.colour for bars in forward.ranks for bar in bars} == {WAIT}


def test_predicted_bars_fill_each_rank() -> None:
    """Kernels, copies and waits of a rank follow on each other from 0 to its end."""
    from cpattn.launch.trace_pictures import WAIT, predicted_bars

    options: dict[str, Any] = {"num_heads_q": 4, "num_heads_kv": 2, "head_dim": 8}
    spec = cpattn.AttnMaskSpec.causal(4096)
    plan = cpattn.make_plan(spec, cp_size=4, schedule="tiles", num_stages=2, **options).plan
    step = simulate(plan, HARDWARE["h100"], Heads(4, 2, 8, 8))
    for timeline in step:
        drawn = predicted_bars(timeline)
        for rank, bars in enumerate(drawn.ranks):
            thread = [bar for bar in bars if not bar.on_link]
            assert thread[0].start == 0.0
            for before, after in pairwise(thread):
                assert after.start == pytest.approx(before.end, abs=1e-12)
            assert thread[-1].end == pytest.approx(timeline.seconds[rank])
            waited = sum(bar.end - bar.start for bar in thread if bar.colour == WAIT)
            copied = sum(float(span.ends[rank] - span.starts[rank]) for span in timeline.copies)
            assert waited + copied == pytest.approx(timeline.exposed[rank])
        assert sum(bar.on_link for bar in drawn.ranks[0]) == len(timeline.transfers)


def test_head_exchanges_are_predicted_around_attention(tmp_path: Path) -> None:
    """Each context rank's bars are those of its parts, later by the first exchange; all wait for the second."""
    from cpattn.launch.predict import Prediction
    from cpattn.launch.trace_pictures import (
        HEAD_EXCHANGES,
        WAIT,
        around_attention,
        draw_step,
        measured_bars,
        predicted_bars,
    )

    spec, heads = cpattn.AttnMaskSpec.causal(4096), Heads(4, 2, 8, 8)
    plan = cpattn.make_plan(spec, cp_size=2, num_stages=1, num_heads_q=4, num_heads_kv=2, head_dim=8).plan
    step = simulate(plan, HARDWARE["h100"], heads)
    attention = predicted_bars(step[0])
    before, after = attention.seconds, 0.5 * attention.seconds
    whole = around_attention(attention, before, after, degree=2)
    assert whole.seconds == pytest.approx(2.5 * attention.seconds)
    assert [whole.ranks[0], whole.ranks[2]] == [whole.ranks[1], whole.ranks[3]]
    for bars, inside in zip(whole.ranks[::2], attention.ranks, strict=True):
        assert [bar.start for bar in bars[1 : len(inside) + 1]] == [bar.start + before for bar in inside]
        exchanges = [(bar.start, bar.end) for bar in bars if bar.colour == HEAD_EXCHANGES]
        assert exchanges == [(0.0, before), (before + attention.seconds, whole.seconds)]
    waited = [sum(bar.end - bar.start for bar in rank if bar.colour == WAIT) for rank in whole.ranks]
    assert whole.waited == pytest.approx(sum(waited) / 4)
    assert around_attention(attention, 0.0, 0.0, degree=1) == attention

    def call(name: Any) -> Call:
        spans = (Span("transfer", "heads of q", None, "", 0.0, 1.0), Span("compute", "kernel", 0, "own", 1.0, 2.0))
        return Call(name, "key", 0.0, 2.0, spans)

    calls = (call("forward"), call("backward"))
    assert [bar.colour == HEAD_EXCHANGES for bar in measured_bars(calls[:1]).ranks[0]] == [True, False]
    trace = Trace(tuple(RankTrace(rank, "host", 0, calls) for rank in range(4)))
    predicted = Prediction(step, heads, 2, ((before, after), (after, before)))
    assert predicted.seconds == pytest.approx(step.seconds + 2 * (before + after))
    assert all(path.exists() for path in draw_step(trace, predicted, tmp_path, machine="none"))


def test_prediction_has_the_head_exchanges_by_which_a_degree_is_chosen() -> None:
    """Shared out by what travels: of equally many heads q, k and v go in and out comes back."""
    predicted, chosen_by = run_on_ranks(2, predicted_on_rank)[0]
    assert predicted.seconds == pytest.approx(chosen_by)
    (before, after), backward = predicted.head_seconds
    assert before == pytest.approx(3 * after)
    assert backward == (after, before)
    assert predicted.heads.num_q == 2


def predicted_on_rank() -> tuple[Any, float]:
    """The prediction for degree 2, and the seconds that the choice of a degree has for it."""
    from cpattn.launch.predict import predict

    options: dict[str, Any] = {"num_heads_q": 4, "num_heads_kv": 4, "head_dim": 8, "cp_group": dist.group.WORLD}
    hardware, spec = HARDWARE["h100"], cpattn.AttnMaskSpec.causal(4096)
    key = cpattn.make_key(spec, head_degree=2, hardware=hardware, **options)
    choice = cpattn.make_key(spec, head_degree="auto", hardware=hardware, **options)
    return predict(key.plan, 2, hardware, Heads(4, 4, 8, 8)), dict(choice.degree_seconds)[2]
