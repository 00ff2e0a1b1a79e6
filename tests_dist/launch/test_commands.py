"""Layer 1: what all commands of `cpattn` have in common, and the ranks that they start."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

typer_testing = pytest.importorskip("typer.testing")
COMMANDS = ("plan", "check", "bench", "calibrate", "doctor", "demo", "docs", "version")
SMALL = ("--lengths", "300,200", "--heads", "2:1", "--head-dim", "16", "--dtype", "float32")


def run(*args: str, columns: int = 80) -> Any:
    from cpattn.launch.commands import app

    return typer_testing.CliRunner().invoke(app, args, env={"COLUMNS": str(columns)})


def options() -> dict[str, dict[str, Any]]:
    """The options of each command, by name."""
    import typer

    from cpattn.launch.commands import app

    group: Any = typer.main.get_command(app)
    return {name: {o: p for p in command.params for o in p.opts} for name, command in group.commands.items()}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_by_both_names(command: str) -> None:
    assert run(command, "-h").exit_code == 0
    assert run(command, "-h").stdout == run(command, "--help").stdout


def test_version() -> None:
    import cpattn

    assert run("--version").stdout == f"cpattn {cpattn.__version__}\n"
    assert json.loads(run("version", "--json").stdout)["cpattn"] == cpattn.__version__


def test_an_option_means_the_same_everywhere() -> None:
    """One name, one help text; but --ranks, which plan does not start, and the demo's own."""
    seen: dict[str, set[str]] = defaultdict(set)
    for command, found in options().items():
        for name, option in found.items():
            if command != "demo" and (command, name) != ("plan", "--ranks"):
                seen[name].add(option.help)
    different = {name for name, meanings in seen.items() if len(meanings) > 1}
    assert different <= {"--hardware", "--tokens", "--chunk-size"}
    assert {name for name, found in options().items() if "--json" not in found} == {"demo", "docs"}


def test_check_and_bench_take_the_same_layer() -> None:
    both = options()
    own = {"--samples", "--seed", "--repeats", "--hardware", "--trace"}
    assert both["check"].keys() - own == both["bench"].keys() - own


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_tables_keep_their_digits(columns: int) -> None:
    args = ("plan", "--lengths", "8K,3000,512", "--ranks", "4")
    report, table = json.loads(run(*args, "--json").stdout), run(*args, columns=columns).stdout
    for value in ("area", "kv_rows", "kv_rows_bound", "tokens_max"):
        shown = report[value] if value != "area" else report[value] // 4
        assert f"{shown:,}" in table
    assert "…" not in table
    assert "\u2026" not in run("doctor", "--device", "cpu", columns=columns).stdout


ON_A_TERMINAL = [
    ("planning", ["plan", "--seqlen", "64K", "--ranks", "16"]),
    ("trying", ["doctor", "--device", "cpu", "--backend", "fastest"]),
    ("calibrating", ["calibrate", "--tokens", "1024"]),
    ("measuring", ["bench", "--seqlen", "64", "--hardware", "cpu", "--repeats", "1"]),
]


@pytest.mark.parametrize("shown", [True, False])
@pytest.mark.parametrize(
    ("word", "args"),
    [each if each[0] == "planning" else pytest.param(*each, marks=pytest.mark.nightly) for each in ON_A_TERMINAL],
)
def test_a_terminal_sees_that_work_goes_on(word: str, args: list[str], shown: bool) -> None:
    """On a terminal only, and not where a program reads the answer."""
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "cpattn.launch.cli", *args, *(() if shown else ("--json",))]
    env = {**os.environ, "TERM": "xterm"}
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, check=True, env=env)
    written = os.read(ours, 1 << 16) if select.select([ours], [], [], 0)[0] else b""
    os.close(theirs)
    os.close(ours)
    assert (word.encode() in written) == shown
    assert b"\x1b" not in done.stdout


def test_words_wrap_and_numbers_do_not() -> None:
    from rich.console import Console

    from cpattn.launch.tables import Grid, show

    grid = Grid(("name", "a number", "note"), words=("note",))
    grid.add("bytes", "1,234,567,890 kB", "some words that [are] longer than what is left")
    console = Console(width=50, force_terminal=True, color_system=None)
    with console.capture() as captured:
        show([grid], console=console)
    lines = captured.get().splitlines()
    assert any("1,234,567,890 kB" in line for line in lines)
    assert max(map(len, lines)) <= 50
    assert "[are]" in captured.get()


def test_doctor_as_json() -> None:
    found = json.loads(run("doctor", "--device", "cpu", "--json").stdout)
    assert found["choice"].startswith("sdpa")
    assert {entry["backend"] for entry in found["backends"]} > {"sdpa", "reference", "te"}


@pytest.mark.parametrize(
    "args",
    [("plan", "--seqlen", "64", "--plot", "out"), ("bench", "--seqlen", "64", "--trace", "out"), ("demo",)],
    ids=lambda args: args[0],
)
def test_what_is_missing_is_said_before_the_work(
    args: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    def never(*args: Any, **options: Any) -> None:
        raise AssertionError("work began")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("cpattn.launch.plan_command._answer", never)
    monkeypatch.setattr("cpattn.launch.bench_command.launched_ranks", never)
    done = run(*args)
    assert done.exit_code == 2, done.output
    assert "which is not installed: run pip install 'cpattn[plot]'" in done.output.replace("\n", " ")


def test_heads_split_among_ranks() -> None:
    """--head-degree plans what the model takes for it, and auto the fastest that it tried, 1 where that is near."""
    args = ("plan", "--seqlen", "64K", "--ranks", "8", "--json")
    one, four, auto = (json.loads(run(*args, "--head-degree", degree).stdout) for degree in ("1", "4", "auto"))
    assert (one["cp_size"], four["cp_size"]) == (8, 2)
    seconds = {int(degree): value for degree, value in auto["head_degree_seconds"].items()}
    assert seconds[1] == pytest.approx(one["seconds"])
    assert seconds[4] == pytest.approx(four["seconds"])
    assert auto["seconds"] == pytest.approx(seconds[auto["head_degree"]])
    assert auto["head_degree"] == 1 or auto["seconds"] == pytest.approx(min(seconds.values()))
    assert 0.99 * auto["seconds"] <= min(seconds.values())
    assert [rival["seconds"] for rival in four["rivals"]] == [rival["seconds"] for rival in one["rivals"]]


def test_a_faster_rival_is_named() -> None:
    text = run("plan", "--seqlen", "64K", "--ranks", "8").stdout
    assert "The cost model puts Ulysses ahead here" in text
    assert "--head-degree auto" in text
    assert "ahead here" not in run("plan", "--lengths", "4K,4K", "--ranks", "2").stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("check", "--seqlen", "64", "--ranks", "2", "--head-degree", "3"), "head_degree is 3 and the group has 2"),
        (("check", "--seqlen", "64", "--ranks", "2", "--wire", "int8"), "wire is 'int8'"),
        (("bench", "--seqlen", "64", "--ranks", "2", "--num-stages", "99"), "num_stages is 99"),
        (("bench", "--seqlen", "64", "--ranks", "2", "--hardware", "abacus"), "hardware is 'abacus'"),
        (("calibrate", "--ranks", "2", "--out", "."), "give a file in a folder that exists"),
        (("plan", "--seqlen", "64", "--ranks", "4", "--head-degree", "3"), "--head-degree is 3 and --ranks 4"),
        (("docs", "no_such_page"), "there is no page 'no_such_page'"),
    ],
)
def test_refused_before_any_rank_starts(args: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpattn.launch.session.run_on_ranks", None)
    done = run(*args)
    assert done.exit_code == 2, done.output
    assert message in done.output.replace("\n", " ")


def test_ranks_under_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "1")
    done = run("check", "--seqlen", "64", "--ranks", "2")
    assert done.exit_code == 2
    assert "rank 1: error: --ranks is 2 and torchrun has started 3" in done.output.replace("\n", " ")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_said_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a file that is asked for, and of the output itself; what was in the file stays."""
    from cpattn.launch.session import write_whole

    refused = run("plan", *SMALL, "--ranks", "2", "--html", "/dev/full")
    assert refused.exit_code == 2
    assert "/dev/full could not be written: No space left on device" in refused.stderr
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "cpattn.launch.cli", "version"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "error: the output could not be written: No space left on device\n")

    def no_room(path: Path, text: str) -> int:
        path.write_bytes(text.encode()[:3])
        raise OSError(28, "No space left on device")

    (tmp_path / "hardware.json").write_text("as it was")
    monkeypatch.setattr(Path, "write_text", no_room)
    with pytest.raises(OSError, match="No space"):
        write_whole(tmp_path / "hardware.json", "the new one")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"as it was"]


def test_docs_are_there() -> None:
    assert "planning" in run("docs").stdout
    assert run("docs", "planning").stdout.startswith("# Planning")


def ranks(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cpattn.launch.cli", *args], capture_output=True, text=True, timeout=280
    )


@pytest.mark.nightly  # by default test_pages.py runs the README's `cpattn check --ranks 2`
def test_check_starts_its_ranks() -> None:
    done = ranks("check", *SMALL, "--ranks", "2", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)  # of one rank only
    assert report["ok"] is True


@pytest.mark.nightly
def test_bench_and_calibrate_start_their_ranks() -> None:
    done = ranks("bench", *SMALL, "--ranks", "2", "--hardware", "h100", "--repeats", "1", "--json")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["ranks"]) == 2
    done = ranks("calibrate", "--tokens", "256", "--ranks", "2", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["transports"]
