"""Runtime layer: transformers models over ranks against the single-process eager model.

Logits at real tokens, loss and every parameter gradient within 1e-5 by norm.
"""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch.distributed as dist

pytest.importorskip("transformers")

from cpattn import AttnMaskSpec
from cpattn.integrations.batch_layout import layout_of_batch, layout_of_spec
from cpattn.integrations.transformers import ContextParallel, layer_kinds, register_attention
from tests_dist.support.harness import run_on_ranks
from tests_dist.support.hf_models import (
    MODELS,
    VISION_MODELS,
    assert_same_step,
    eager_step,
    make_model,
    real_tokens,
    text_batch,
    vision_batch,
)
from tests_dist.support.hf_rank_cases import parallel_steps

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


def layer_plans_on_rank(name, batch):
    """Layers with their plans as the key has them, and the plans that the model's layers ran with."""
    register_attention()
    parallel = ContextParallel(make_model(name, "cpattn"), dist.group.WORLD)
    shard = parallel(batch).shard
    planned = {layers.window: (layers.num_layers, plan.fingerprint) for layers, plan in shard.key.layer_plans}
    return planned, {mask.window: mask.key.plan.fingerprint for mask in shard._masks.values()}


@pytest.mark.parametrize(("name", "window"), [("gemma2", 8), ("gemma3", 8), ("gpt_oss", 6), ("qwen2", 9)])
def test_layers_of_hybrid_models_are_planned_together(name, window):
    planned, used = run_on_ranks(2, layer_plans_on_rank, name, text_batch("packed"))[0]
    assert {(window - 1, None), None} == set(planned) == set(used)
    for kind, (num_layers, fingerprint) in planned.items():
        assert num_layers == 1
        assert used[kind] == fingerprint


def test_kinds_of_layers_are_counted():
    """Layer types of the config as masks; limits wider than all texts make no kind of their own."""
    layout = layout_of_batch(2, 40)
    types = ["sliding_attention"] * 5 + ["full_attention"] + ["chunked_attention"] * 2
    config = SimpleNamespace(layer_types=types, sliding_window=8, attention_chunk_size=16)
    sliding, full, chunked = layer_kinds(config, layout)
    assert (sliding.spec, sliding.window, sliding.num_layers) == (layout.spec, (7, None), 5)
    assert (full.spec, full.window, full.num_layers) == (layout.spec, None, 1)
    assert (chunked.window, chunked.num_layers) == (None, 2)
    assert chunked.spec.fingerprint()[1] == AttnMaskSpec.varlen([16, 16, 8] * 2).fingerprint()[1]
    wide = SimpleNamespace(layer_types=types, sliding_window=40, attention_chunk_size=41)
    assert layer_kinds(wide, layout) == [(layout.spec, None, 8)]
    tree, _ = AttnMaskSpec.prefix_tree([40, 5, 7], [[0, 1], [0, 2]])
    given = layout_of_spec(1, 52, tree)
    assert layer_kinds(config, given) == [(tree, (7, None), 5), (tree, None, 3)]
    assert layer_kinds(SimpleNamespace(is_causal=False), given) == [(tree, None, 1)]
    assert layer_kinds(SimpleNamespace(sliding_window=8), layout) == [(layout.spec, (7, None), 1)]
    off = SimpleNamespace(sliding_window=8, use_sliding_window=False)
    assert layer_kinds(off, layout) == [(layout.spec, None, 1)]


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
