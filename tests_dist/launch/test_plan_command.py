"""Layer 1: `cpattn plan`, `cpattn calibrate` and planning ahead."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import cpattn
from cpattn.solver import Hardware

typer_testing = pytest.importorskip("typer.testing")
HEADS = {"num_heads_q": 4, "num_heads_kv": 2, "head_dim": 8}


def run(*args: str) -> Any:
    from cpattn.launch.commands import app

    return typer_testing.CliRunner().invoke(app, ["plan", *args], env={"COLUMNS": "140"})


def report(*args: str) -> dict[str, Any]:
    done = run(*args, "--json")
    assert done.exit_code == 0, done.output
    values: dict[str, Any] = json.loads(done.stdout)
    return values


def test_table_names_balance_bounds_and_rivals() -> None:
    done = run("--seqlen", "64K", "--ranks", "8")
    assert done.exit_code == 0, done.output
    for word in ("visible pairs", "bound", "ring", "all-gather", "Ulysses", "zigzag", "min-heap"):
        assert word in done.output


def test_json_holds_the_report() -> None:
    values = report("--lengths", "8K,3000,512", "--ranks", "4", "--schedule", "keys")
    assert values["seqlen_q"] == 8192 + 3000 + 512
    assert values["kv_rows_bound"] <= values["kv_rows"]
    assert {rival["name"] for rival in values["rivals"]} >= {"ring", "Ulysses"}


def test_mixers_are_planned_beside_attention() -> None:
    """In the words of a key's description."""
    mask = ["--lengths", "8K,3000,512", "--ranks", "4"]
    options = [*mask, "--recurrence", "32:128:128:delta", "--convolution", "4:8192"]
    recurrence, convolution = report(*options)["mixers"]
    assert recurrence.startswith("delta rule, 32 heads of 128 x 128: ")
    assert " maps of 4,194,304 bytes received" in recurrence
    assert convolution.startswith("convolution of width 4, 8192 channels: ")
    assert "maps of 4,194,304 bytes received" in " ".join(run(*options).output.split())


@pytest.mark.parametrize(("tokens", "ranks"), [("1M", 1024), pytest.param("4M", 4096, marks=pytest.mark.nightly)])
def test_millions_of_tokens_on_thousands_of_ranks(tokens: str, ranks: int) -> None:
    values = report("--seqlen", tokens, "--ranks", str(ranks))
    assert values["imbalance"] < 1.03
    assert values["planning_cpu_seconds"] < 15


@pytest.mark.parametrize(
    ("mask", "tokens"),
    [
        ([3, 50, 7], 60),
        ({"lengths": [100, 28], "window": 16}, 128),
        ({"lengths": [100, 28], "window": [8, 4]}, 128),
        ({"lengths": [100, 28], "block_size": 32}, 128),
        ({"lengths": [100, 28], "prefix_lengths": [10, 0]}, 128),
        ({"lengths": [100, 28], "causal": False}, 128),
        ({"node_lengths": [64, 32, 32], "paths": [[0, 1], [0, 2]]}, 128),
        ({"seqlens_q": [60, 4], "seqlens_k": [10, 90]}, 64),
        ({"q_ranges": [[0, 64]], "k_ranges": [[0, 64]], "mask_types": ["causal"], "total_seqlen": 64}, 64),
    ],
)
def test_masks_from_json(mask: Any, tokens: int, tmp_path: Path) -> None:
    file = tmp_path / "mask.json"
    file.write_text(json.dumps(mask))
    assert report("--file", str(file), "--ranks", "3")["seqlen_q"] == tokens


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("3", "describes no mask"),
        ('{"length": [3]}', "describes no mask"),
        ('{"lengths": [3], "windows": 2}', "has windows: the fields are"),
        ('{"lengths": [3], "window": 2, "block_size": 2}', "do not go together"),
        ('{"lengths": [3], "causal": "false"}', 'causal is "false": write true or false'),
        ('{"lengths": [3], "causal": null}', "causal is null: write true or false"),
        ('{"lengths": [3], "causal": false, "window": 2}', "causal and window do not go together"),
        ('{"seqlens_q": [3], "seqlens_k": [3], "causal": 1}', "causal is 1: write true or false"),
        ("[" * 100_000, "is not JSON"),
        ("[3, NaN]", "NaN is no number of JSON"),
        ("[1e999]", "1e999 is beyond every float"),
        ("[true, 5]", "lengths holds true where a number belongs"),
        ('{"node_lengths": [3], "paths": [[false]]}', "paths holds false where a number belongs"),
        ('{"lengths": [3], "lengths": [5]}', "the key 'lengths' is given twice"),
        ("[9999999999999999999999]", "expected integers|more than 63 bits"),
        ('{"q_ranges": [[0, 99999999999999999999]], "k_ranges": [[0, 3]], "mask_types": ["full"], "total_seqlen": 4}',
         "range needs"),
        ('{"lengths": [-3]}', "lengths are at least 0"),
        ('{"lengths": "abc"}', "lengths|expected|seqlens"),
        ('{"node_lengths": [3]}', "'paths' is missing"),
        ('{"q_ranges": [[0, 9]], "k_ranges": [[0, 3]], "mask_types": ["full"], "total_seqlen": 4}', "range needs"),
    ],
)
def test_malformed_files_are_refused(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mask.json"
    file.write_text(text)
    done = run("--file", str(file))
    assert done.exit_code == 2
    assert any(part in done.output.replace("\n", " ") for part in message.split("|")), done.output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "give the tokens once"),
        (("--seqlen", "1K", "--lengths", "3"), "give the tokens once"),
        (("--seqlen", "1Q"), "is not a number of tokens"),
        (("--seqlen", "1K", "--ranks", "0"), "--ranks is 0"),
        (("--seqlen", "1K", "--ranks", "12", "--ranks-per-node", "5"), "nodes must be of equal size"),
        (("--seqlen", "1K", "--heads", "5:2"), "multiple of key heads"),
        (("--seqlen", "1K", "--heads", "5"), "give query and key heads"),
        (("--seqlen", "1K", "--recurrence", "32:128"), "give whole numbers above 0 as heads:dim_k:dim_v"),
        (("--seqlen", "1K", "--convolution", "4:0"), "give whole numbers above 0 as width:channels"),
        (("--seqlen", "1K", "--mask", "window"), "needs --window"),
        (("--seqlen", "1K", "--layout", "contiguous", "--imbalance", "1.1"), "above --imbalance 1.1"),
        (("--seqlen", "1K", "--imbalance", "0.5"), "at least 1"),
        (("--seqlen", "1K", "--hardware", "no_such_file.json"), "a file that `cpattn calibrate"),
        (("--seqlen", "1K", "--hardware", "[/x]"), "hardware is '[/x]'"),
        (("--seqlen", "1K", "--search-effort", "-1"), "search_effort is -1: it must be an int of at least 0"),
        (("--seqlen", "1K", "--mask", "full", "--window", "9"), "they do not go together"),
        (("--file", "mask.json", "--window", "9"), "leave --mask, --window and --block away"),
        (("--file", "mask.json", "--block", "9"), "leave --mask, --window and --block away"),
        (("--seqlen", "1K", "--block", "9"), "--block 9 goes with --mask block-causal"),
        (("--seqlen", "1K", "--imbalance", "nan"), "--imbalance is nan"),
        (("--seqlen", "99999999G"), "its pairs cannot be counted in 64 bits"),
        (("--seqlen", "1K", "--plot", f"{__file__}/pictures"), "where nothing can be written"),
        (("--seqlen", "1K", "--plot", __file__), "which is a file: give a folder"),
        (("--file", "no_such_file.json"), "cannot be read"),
        (("--seqlen", "1K", "--num-stages", "99"), "num_stages is 99"),
        (("--seqlen", "1K", "--heads", "9999999999999999999999:1"), "none of them may exceed 65,536"),
        (("--seqlen", "99999999999999999999999"), "cannot be counted in 64 bits"),
        (("--seqlen", "1G", "--chunk-size", "1"), "--chunk-size is 1: 1,073,741,824 tokens have more than"),
        (("--seqlen", "1K", "--ranks", "100000"), "at most 16,384"),
        (("--seqlen", "1K", "--limit", "inf"), "--limit is inf: give at most 10,000,000 seconds"),
        (("--file", "/dev/zero"), "is a device: give a regular file"),
        (("--seqlen", "1K", "--hardware", "/dev/zero"), "is a device: give a regular file"),
        (("--seqlen", "4M", "--ranks", "4096", "--search-effort", "999999999", "--limit", "0.2"), "within 0.2"),
    ],
)
def test_bad_options_are_refused(args: tuple[str, ...], message: str) -> None:
    done = run(*args)
    assert done.exit_code == 2
    assert message in done.output.replace("\n", " "), done.output


def test_pictures_are_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = run("--lengths", "3000,1000,96", "--ranks", "5", "--plot", str(tmp_path / "out"))
    assert done.exit_code == 0, done.output
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"plan.png", "plan.pdf"}
    assert (tmp_path / "out/plan.png").stat().st_size > 20_000


def test_the_mask_picture_shows_who_computes() -> None:
    pytest.importorskip("matplotlib")
    from cpattn.launch.plan_pictures import mask_image, rank_colours

    options: dict[str, Any] = {**HEADS, "layout": "contiguous", "schedule": "keys"}
    plan = cpattn.make_plan(cpattn.AttnMaskSpec.causal(32), cp_size=2, **options).plan
    image, colours = mask_image(plan, 32), rank_colours(2)
    assert (image[0, 1] == 1).all()
    assert (image[3, 2] == colours[0]).all()
    assert (image[20, 2] == colours[1]).all()


def test_planning_needs_no_torch() -> None:
    """The plan command and ready-made plans work where torch is not loaded."""
    code = (
        "import sys; sys.argv = ['cpattn', 'plan', '--seqlen', '4K', '--json']\n"
        "import cpattn.launch.commands, cpattn.planning.ready\n"
        "assert 'torch' not in sys.modules\n"
        "try: cpattn.launch.commands.app()\n"
        "except SystemExit as end: assert not end.code\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_calibration_fits_and_writes(tmp_path: Path) -> None:
    from cpattn.launch.commands import app

    file = tmp_path / "hardware.json"
    done = typer_testing.CliRunner().invoke(app, ["calibrate", "--tokens", "256", "--out", str(file)])
    assert done.exit_code == 0, done.output
    hardware = Hardware.from_json(file.read_text())
    assert 1e8 < hardware.forward_flops < 1e16
    assert "links not measured" in hardware.source
    assert report("--seqlen", "4K", "--hardware", str(file))["seconds"] > 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--heads", "8"), "give query and key heads as 32:8"),
        (("--heads", "5:2"), "multiple of key"),
        (("--tokens", "-5"), "--tokens is -5: give at least 256, or 0"),
        (("--out", "no_such_folder/x.json"), "give a file in a folder that exists"),
        (("--out", "."), "give a file in a folder that exists"),
    ],
)
def test_calibrate_refuses_before_it_measures(args: tuple[str, ...], message: str) -> None:
    from cpattn.launch.commands import app

    done = typer_testing.CliRunner().invoke(app, ["calibrate", *args])
    assert done.exit_code == 2
    assert message in done.output, done.output


def causal(seqlen: int) -> cpattn.AttnMaskSpec:
    return cpattn.AttnMaskSpec.causal(seqlen)


@pytest.mark.parametrize("workers", ["thread", "process"])
def test_plans_come_in_order_and_are_taken(workers: Any) -> None:
    lengths = [64, 100, 7, 300]
    seen = []
    for seqlen, ready in cpattn.plan_ahead(lengths, causal, workers=workers, cp_size=1, **HEADS):
        key = cpattn.make_key(causal(seqlen), plan=ready, **HEADS)
        assert key.plan.fingerprint == cpattn.make_plan(causal(seqlen), cp_size=1, **HEADS).plan.fingerprint
        seen.append(seqlen)
    assert seen == lengths


def test_a_ready_plan_pickles() -> None:
    ready = cpattn.make_plan(causal(100), cp_size=4, **HEADS)
    assert pickle.loads(pickle.dumps(ready)).plan.fingerprint == ready.plan.fingerprint


def test_a_plan_for_something_else_is_refused() -> None:
    ready = cpattn.make_plan(causal(100), cp_size=1, **HEADS)
    other: list[tuple[Callable[[], object], str]] = [
        (lambda: cpattn.make_key(causal(99), plan=ready, **HEADS), "another mask"),
        (lambda: cpattn.make_key(causal(100), plan=ready, **{**HEADS, "head_dim": 16}), "heads and head dims"),
        (lambda: cpattn.make_key(causal(100), plan=ready, window=5, **HEADS), "window"),
        (
            lambda: cpattn.make_key(causal(100), plan=cpattn.make_plan(causal(100), cp_size=2, **HEADS), **HEADS),
            "made for cp_size 2 and the group has 1 ranks: give make_plan cp_size=1",
        ),
    ]
    for make, message in other:
        with pytest.raises(ValueError, match=message):
            make()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"wire": "int8"}, "wire is 'int8': use 'e4m3', 'e5m2' or None"),
        ({"num_heads_q": 3, "num_heads_kv": 2}, "num_heads_q is 3 and num_heads_kv is 2: query heads must"),
        ({"num_heads_kv": 0}, "num_heads_kv is 0: it must be an int of at least 1"),
        ({"search_effort": -1}, "search_effort is -1: it must be an int of at least 0"),
        ({"search_effort": 1.5}, "search_effort is 1.5: it must be an int"),
        ({"num_stages": "2"}, "num_stages is '2': it must be an int"),
        ({"window": True}, "window is True: give an int"),
        ({"also": [cpattn.LayerKind([10, 40])]}, r"a mask in also is \[10, 40\]: expected an AttnMaskSpec"),
        ({"hardware": "abacus"}, "hardware is 'abacus': give one of h100, "),
    ],
)
def test_plans_are_refused_as_keys_are(options: dict[str, Any], message: str) -> None:
    for make in (cpattn.make_key, lambda *of, **how: cpattn.make_plan(*of, cp_size=2, **how)):
        with pytest.raises(ValueError, match=message):
            make(causal(64), **{**HEADS, **options})


def test_errors_of_a_worker_reach_the_caller() -> None:
    items = cpattn.plan_ahead([64], causal, workers="thread", cp_size=0, **HEADS)
    with pytest.raises(ValueError, match="cp_size is 0"):
        next(items)
    for options in ({"depth": 0}, {"depth": "2"}, {"num_workers": 0}, {"workers": "fork"}):
        (name,) = options
        with pytest.raises(ValueError, match=f"{name} is {options[name]!r}"):
            cpattn.plan_ahead([64], causal, cp_size=1, **options, **HEADS)
    with pytest.raises(ValueError, match=r"spec is \[64\]: expected an AttnMaskSpec"):
        cpattn.make_plan([64], cp_size=2, **HEADS)
    with pytest.raises(ValueError, match="plan is 5: give what make_plan or plan_ahead returned"):
        cpattn.make_key(causal(64), plan=5, **HEADS)


def test_a_process_that_may_start_none_plans_in_threads() -> None:
    """As a worker of a DataLoader."""
    daemon = mock.patch.object(multiprocessing.current_process(), "_config", {"daemon": True})
    with daemon, pytest.raises(ValueError, match="use workers='thread', or make_plan"):
        cpattn.plan_ahead([64], causal, cp_size=1, **HEADS)


def test_a_key_describes_its_plan_against_bounds() -> None:
    text = cpattn.make_key(causal(100), **HEADS).describe()
    assert "received, forward and backward" in text


def test_plan_ahead_in_a_script_without_a_main_guard(tmp_path: Path) -> None:
    """Workers do not run the script again, as spawned processes otherwise do."""
    script = tmp_path / "train.py"
    script.write_text(
        "import cpattn\n"
        "print('ran')\n"
        "spec_of = lambda n: cpattn.AttnMaskSpec.causal(n)\n"
        "for n, ready in cpattn.plan_ahead([64, 65], spec_of, cp_size=2, num_heads_q=2, num_heads_kv=1, head_dim=8):\n"
        "    print(n, ready.plan.cp_size)\n"
    )
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300)
    assert run.stdout.split() == ["ran", "64", "2", "65", "2"], run.stderr
