"""Layer 1: `cpattn bench` on one process, and the picture of a step of several ranks."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import cpattn
from cpattn.profiling import Call, RankTrace, Span, Trace
from cpattn.solver import HARDWARE, Heads, simulate

typer_testing = pytest.importorskip("typer.testing")
pytest.importorskip("matplotlib")

SMALL = ("--heads", "2:1", "--head-dim", "16", "--dtype", "fp32", "--repeats", "2", "--hardware", "h100")


def run(*args: str) -> Any:
    from cpattn.launch.commands import app

    return typer_testing.CliRunner().invoke(app, ["bench", *args])


def test_table_and_files(tmp_path: Path) -> None:
    done = run("--lengths", "300,200", *SMALL, "--keep-kv", "--trace", str(tmp_path / "out"))
    assert done.exit_code == 0, done.output
    for word in ("500 x 500 tokens on 1 ranks", "exposed", "median of 2", "predicted", "bytes forward"):
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
        (("--seqlen", "64", "--hardware", "no_such_file.json"), "cannot be read"),
        (("--seqlen", "64", "--backend", "nothing"), "backend 'nothing' is unknown"),
        (("--seqlen", "64", "--wire", "int8"), "wire is 'int8'"),
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
