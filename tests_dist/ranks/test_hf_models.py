"""Runtime layer: transformers models over ranks against the single-process eager model.

Logits at real tokens, loss and every parameter gradient within 1e-5 by norm.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("transformers")

from tests_dist.harness import run_on_ranks
from tests_dist.hf_models import (
    MODELS,
    VISION_MODELS,
    assert_same_step,
    eager_step,
    real_tokens,
    text_batch,
    vision_batch,
)
from tests_dist.hf_rank_cases import parallel_steps

LAYOUTS = ("plain", "packed", "right", "left")


def text_cases(name, layouts, rows):
    return {f"{name} {kind} batch {n}": (name, [text_batch(kind, n)]) for kind in layouts for n in rows}


def check(cp_size, cases, **options):
    results = run_on_ranks(cp_size, parallel_steps, cases, **options)[0]
    for what, (name, batches) in cases.items():
        batch = batches[-1]
        truth = eager_step(name, batch, by_document=name == "gpt_oss" and "packed" in what)
        assert_same_step(results[what], truth, real_tokens(batch), f"{what} cp {cp_size}")


@pytest.mark.parametrize("name", MODELS)
def test_equals_eager_in_one_process(name):
    """Every model: one row packed on 4 ranks, three rows padded on 2."""
    check(4, text_cases(name, ["packed"], [1]))
    check(2, text_cases(name, ["left"], [3]))


@pytest.mark.nightly
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("cp_size", [2, 4])
def test_equals_eager_all_layouts(cp_size, name):
    check(cp_size, text_cases(name, LAYOUTS, [1, 3]))


@pytest.mark.parametrize("name", VISION_MODELS)
def test_vision_model_equals_eager(name):
    """Image tokens are bidirectional in Gemma 3; the vision tower runs whole on every rank."""
    check(2, {"left": (name, [vision_batch(name, "left", rows=3)])})
    check(4, {"plain": (name, [vision_batch(name)])})


@pytest.mark.nightly
@pytest.mark.parametrize("name", VISION_MODELS)
@pytest.mark.parametrize("cp_size", [2, 4])
def test_vision_model_all_layouts(cp_size, name):
    kinds = [(kind, n) for kind in ("plain", "right", "left") for n in (1, 3)]
    check(cp_size, {f"{kind} {n}": (name, [vision_batch(name, kind, rows=n)]) for kind, n in kinds})


@pytest.mark.nightly
@pytest.mark.parametrize("example", ["hf_finetune", "rl_prefix_tree", "fsdp2_custom"])
def test_example_runs_and_learns(example):
    """Under torchrun on four CPU ranks; the number that each prints first gets better."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    command += ["-m", f"cpattn.launch.examples.{example}", "--steps", "12"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    values = [float(line.split()[3]) for line in done.stdout.splitlines() if line.startswith("step")]
    assert len(values) == 12
    better = values[-1] > values[0] if example == "rl_prefix_tree" else values[-1] < values[0]
    assert better, values
