"""The demo job: its data, pictures and verdict in one process, then the whole job in small on two ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from cpattn import AttnMaskSpec
from cpattn.launch.demo.data import batches
from cpattn.masks.spec import lower_mask
from cpattn.solver import make_dispatch_plan

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from cpattn.launch.demo.pictures import STRIPES, WIDTH, draw_plan, mask_image
from cpattn.launch.demo.report import failures, least_kv_rows
from cpattn.launch.plan_pictures import rank_colours


def write_files(folder: Path, texts: dict[str, bytes]) -> Path:
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text)
    return folder


def test_batches_of_the_standard_library_vary_and_repeat():
    first, second = (batches(None, num_tokens=16384, seed=0) for _ in range(2))
    lengths = []
    for _ in range(8):
        a, b = next(first), next(second)
        assert a.seqlens == b.seqlens
        assert a.tokens.equal(b.tokens)
        assert sum(a.seqlens) == len(a.tokens) == 16384
        assert a.num_labels == 16384 - len(a.seqlens)
        lengths += a.seqlens
    assert len(set(lengths)) > 10
    assert min(lengths) < 1024
    assert max(lengths) > 4096


def test_batches_of_a_folder_are_its_text(tmp_path):
    """Files come again when all are used; binary, hidden and empty ones never do."""
    texts = {"a.txt": b"abc", "deep/b.md": b"defgh", "bin": b"x\0y", ".hidden": b"hidden", "empty": b"", "one": b"1"}
    batch = next(batches(write_files(tmp_path, texts), num_tokens=16, seed=1))
    text = bytes(batch.tokens.tolist())
    assert text in (b"abcdefghabcdefgh", b"defghabcdefghabc", b"abcdefghdefghabc", b"defghabcabcdefgh")
    assert batch.seqlens in ([3, 5, 3, 5], [5, 3, 5, 3], [3, 5, 5, 3], [5, 3, 3, 5])


def test_a_document_longer_than_the_batch_is_cut(tmp_path):
    batch = next(batches(write_files(tmp_path, {"a": b"x" * 100}), num_tokens=16, seed=0))
    assert batch.seqlens == [16]


@pytest.mark.parametrize(
    ("texts", "message"),
    [(None, "does not exist"), ({}, "holds no files"), ({"a": b"\0\0", "b": b""}, "holds no text")],
)
def test_a_folder_without_text_is_refused(tmp_path, texts, message):
    folder = tmp_path / "nothing" if texts is None else write_files(tmp_path, texts)
    with pytest.raises(ValueError, match=message):
        next(batches(folder, num_tokens=16, seed=0))


def plan_of(spec: AttnMaskSpec, cp_size: int):
    return make_dispatch_plan(
        lower_mask(spec),
        total_seqlen=spec.total_seqlen,
        total_seqlen_k=spec.total_seqlen_k,
        cp_size=cp_size,
        chunk_size=4,
    )


@pytest.mark.parametrize(
    "spec",
    [AttnMaskSpec.varlen([20, 1, 43]), AttnMaskSpec.sliding_window([40, 24], 7), AttnMaskSpec.cross([20, 12], [9, 30])],
)
def test_picture_shows_the_mask_and_only_the_mask(spec):
    """One pixel for each pair: coloured exactly where the spec is visible."""
    image = mask_image(plan_of(spec, 3), resolution=1024)
    assert ((image < 1).any(-1) == spec.to_dense()).all()


def test_picture_colours_pairs_by_rank():
    """Full colour where the key lies on the computing rank, striped where it is sent."""
    plan = plan_of(AttnMaskSpec.causal(64), 2)
    image = mask_image(plan, resolution=64)
    owners = plan.q_placement.owner_of(np.arange(64))
    stripes = np.add.outer(np.arange(64), np.arange(64)) % STRIPES < WIDTH
    light = stripes & (owners[:, None] != owners[None, :])
    assert np.tril(light).any()
    for rank, colour in enumerate(rank_colours(2)):
        full = np.isclose(image, colour).all(-1)
        assert (full == np.tril(~light & (owners[:, None] == rank))).all()


def test_picture_of_a_large_plan(tmp_path):
    draw_plan(plan_of(AttnMaskSpec.varlen([3000, 40_000, 7001]), 20), tmp_path / "mask.png")
    assert (tmp_path / "mask.png").stat().st_size > 10_000


def steps_with_losses(losses: list[float]) -> list[dict]:
    return [{"loss": loss} for loss in losses]


@pytest.mark.parametrize(
    ("spread", "message"),
    [
        ([5.0, 4.0 * (1 + 5e-5), 3.0], None),
        ([5.0 * (1 + 2e-6), 4.0, 3.0], "at step 1: the limit is 1e-06"),
        ([5.0, 4.0 * (1 + 2e-4), 3.0], "at step 2: the limit is 0.0001"),
        ([5.0, float("nan"), 3.0], "at step 2"),
    ],
)
def test_verdict_on_differences(spread, message):
    found = failures(steps_with_losses(spread), steps_with_losses([5.0, 4.0, 3.0]), must_learn=True)
    assert (not found) if message is None else (message in found[0])


def test_verdict_on_learning():
    flat = steps_with_losses([5.0] * 30)
    assert "should fall by a third" in failures(flat, flat, must_learn=True)[0]
    assert not failures(flat, flat, must_learn=False)


def test_least_kv_rows_of_a_causal_sequence():
    """Two ranks: the second half of the work is the queries from S / sqrt(2) on, which need all keys before."""
    assert least_kv_rows([10_000], 2) == pytest.approx(10_000 / 2**0.5, rel=1e-3)
    assert least_kv_rows([500, 500, 500, 500], 4) == 0


def demo_command(out: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "cpattn.launch.demo", "--out", str(out), "--ranks", "2", *options]


@pytest.mark.nightly  # by default test_checkpoint.py runs the job, one of whose ranks is killed on the way
def test_the_job_in_small(tmp_path):
    data = write_files(tmp_path / "data", {str(n): bytes(range(32, 32 + n)) * 7 for n in (1, 5, 40, 64)})
    command = demo_command(tmp_path / "out", "--data", str(data), "--steps", "3", "--tokens", "600")
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "the losses agree" in result.stdout
    steps = json.loads((tmp_path / "out" / "steps_ranks.json").read_text())
    assert len(steps) == 3
    for step in steps:
        assert sum(step["seqlens"]) == sum(step["plan"]["tokens"]) == 600
    for picture in ("mask_by_rank.png", "loss.png"):
        assert (tmp_path / "out" / picture).stat().st_size > 10_000


def processes_with(text: str) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if text in entry.read_bytes().decode(errors="replace"):
                found.append(int(entry.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc")
@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.nightly), signal.SIGKILL])
def test_interrupted_job_leaves_no_process(tmp_path, number):
    """Ctrl-C takes the way of SIGTERM; SIGKILL leaves the job no time to clean up."""
    out = tmp_path / "out"
    process = subprocess.Popen(
        demo_command(out, "--tokens", "512", "--steps", "100000"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    assert any("step 1/" in line for line in process.stdout), "the job ended before its first step"
    assert len(processes_with(str(out))) >= 4  # the job, torchrun and two ranks
    process.send_signal(number)
    assert process.wait(60) != 0
    deadline = time.monotonic() + 30
    while (left := processes_with(str(out))) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left
