"""Layer 2: NeMo Automodel 0.7's own recipe and YAML, three steps and an evaluation, against its own attention."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("nemo_automodel", reason="tested with nemo-automodel (pip install cpattn[automodel])")
pytest.importorskip("torchao", reason="Automodel's recipes need torchao")

from tests_dist.integrations.automodel_recipe import make_checkpoints

HERE = Path(__file__).parent
MODULE = "tests_dist.integrations.automodel_recipe"
LIMIT_S = 240
BACKEND = "--model.backend."
MOE = [
    *("--model.force_hf", "false", "--model.attn_implementation", "eager"),
    *(f"{BACKEND}_target_", "nemo_automodel.components.models.common.BackendConfig"),
    *(f"{BACKEND}linear", "torch", f"{BACKEND}rms_norm", "torch", f"{BACKEND}rope_fusion", "false"),
    *(f"{BACKEND}experts", "torch", f"{BACKEND}dispatcher", "torch", f"{BACKEND}gate_precision", "float32"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe")
    make_checkpoints(path)
    return path


def run(folder: Path, name: str, model: str, ranks: int, *overrides: str) -> dict[str, Any]:
    """What the recipe logged, and the weights after its last step."""
    out = folder / name
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["-m", MODULE, "--config", str(HERE / "automodel_recipe.yaml")]
    command += ["--model.pretrained_model_name_or_path", str(folder / model), "--checkpoint.checkpoint_dir", str(out)]
    # What a rank's harness left in the environment is not the recipe's.
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    done = subprocess.run(
        [*command, *overrides], cwd=HERE.parents[1], env=env, capture_output=True, text=True, timeout=LIMIT_S
    )
    assert done.returncode == 0, done.stderr[-3000:]
    logs = {name: _lines(out / f"{name}.jsonl") for name in ("training", "validation")}
    assert [len(lines) for lines in logs.values()] == [3, 1]
    return {**logs, "weights": torch.load(out / "weights.pt")}


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def compare(got: dict[str, Any], want: dict[str, Any]) -> None:
    for ours, theirs in zip(got["training"], want["training"], strict=True):
        assert ours["num_label_tokens"] == theirs["num_label_tokens"]
        for name in ("loss", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=2e-6), (name, ours["step"])
    assert got["validation"][0]["val_loss"] == pytest.approx(want["validation"][0]["val_loss"], rel=2e-6)
    for name, weight in want["weights"].items():
        torch.testing.assert_close(got["weights"][name], weight, rtol=0, atol=2e-5, msg=name)


def test_a_transformers_model(folder):
    """Padded batches, accumulation over two, clipping, FSDP2; cp 2 also under its activation checkpointing."""
    want = run(folder, "own", "llama", 1, "--own", "--model.attn_implementation", "sdpa")
    compare(run(folder, "cp1", "llama", 1), want)
    cp2 = ("--distributed.cp_size", "2")
    compare(run(folder, "cp2", "llama", 2, *cp2), want)
    compare(run(folder, "checkpointed", "llama", 2, *cp2, "--distributed.activation_checkpointing", "true"), want)


def test_two_groups_of_two(folder):
    want = run(folder, "own2", "llama", 2, "--own", "--model.attn_implementation", "sdpa")
    compare(run(folder, "dp2cp2", "llama", 4, "--distributed.cp_size", "2"), want)


def test_its_own_mixture_of_experts(folder):
    want = run(folder, "moe_own", "moe", 1, "--own", *MOE, f"{BACKEND}attn", "sdpa")
    compare(run(folder, "moe_cp1", "moe", 1, *MOE, f"{BACKEND}attn", "magi"), want)
    compare(run(folder, "moe_cp2", "moe", 2, *MOE, f"{BACKEND}attn", "magi", "--distributed.cp_size", "2"), want)
