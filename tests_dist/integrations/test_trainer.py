"""Layer 2: transformers' own Trainer on context-parallel groups, against the same Trainer on one process."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

pytest.importorskip("accelerate", reason="the Trainer of transformers needs accelerate (pip install cpattn[trainers])")
pytest.importorskip("transformers")

from tests_dist.support.harness import run_on_ranks
from tests_dist.support.hf_models import make_model
from tests_dist.support.trainer_cases import IMPORTS_S, Outcome, as_torchrun, padded, require_same, rows, weights_of


def metrics(predicted: Any) -> dict[str, float]:
    """Of logits and labels, whole and in order: a number that changes if a row is lost, doubled or moved."""
    logits, labels = predicted
    shifted = labels[:, 1:]
    right = (logits[:, :-1].argmax(-1) == shifted) & (shifted != -100)
    in_order = np.arange(1, len(labels) + 1)[:, None] * np.where(shifted == -100, 0, logits[:, :-1].sum(-1))
    return {"right": float(right.sum()), "rows": float(len(labels)), "in_order": float(in_order.mean())}


def train(folder: Path | None, cp_size: int, *, resume: bool = False, **changes: Any) -> Outcome:
    """Six steps of two micro-batches, with evaluation after each three."""
    from transformers import Trainer, TrainingArguments

    from cpattn.integrations.trainer import context_parallel

    ranks = dist.get_world_size() if dist.is_initialized() else 1
    replicas = max(ranks // cp_size, 1)
    with as_torchrun():
        settings = {
            "output_dir": str(folder), "use_cpu": True, "per_device_train_batch_size": 4 // replicas,
            "per_device_eval_batch_size": 4 // replicas, "gradient_accumulation_steps": 2, "learning_rate": 1e-2,
            "max_steps": 3, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 3, "max_grad_norm": 0.5,
            "save_strategy": "steps" if resume else "no", "save_steps": 2, "report_to": [], "optim": "sgd",
            "remove_unused_columns": False, "include_num_input_tokens_seen": "non_padding",
        }  # fmt: skip
        args = TrainingArguments(**{**settings, **changes})
        kind = context_parallel(Trainer, cp_size=cp_size) if cp_size > 1 else Trainer
        model = make_model("llama", "eager" if cp_size == 1 else "cpattn")
        datasets = {"train_dataset": rows(24), "eval_dataset": rows(8, seed=1)}
        trainer = kind(model=model, args=args, data_collator=padded, compute_metrics=metrics, **datasets)
        trainer.train()
        if resume:  # from the checkpoint of step 2, with other weights in the model
            again = make_model("llama", "eager" if cp_size == 1 else "cpattn", seed=5)
            trainer = kind(model=again, args=args, data_collator=padded, compute_metrics=metrics, **datasets)
            trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
            model = again
        predicted = trainer.predict(rows(6, seed=2))
        in_order = metrics((predicted.predictions, predicted.label_ids))["in_order"]
        return Outcome(copy.deepcopy([*trainer.state.log_history, {"in_order": in_order}]), weights_of(model))


def compare_on_rank(want: Outcome, folder: Path, cp_size: int, changes: dict[str, Any]) -> None:
    require_same(train(folder, cp_size, **changes), want)


@pytest.mark.parametrize(("ranks", "cp_size"), [(2, 2), (4, 2)])
def test_three_steps_equal_one_process(tmp_path, ranks, cp_size):
    """Losses, gradient norms after clipping, tokens seen, weights, evaluation and prediction."""
    run_on_ranks(ranks, compare_on_rank, train(tmp_path, 1), tmp_path, cp_size, {}, timeout=IMPORTS_S)


def test_resuming_equals_one_process(tmp_path):
    want, changes = train(tmp_path / "one", 1, resume=True), {"resume": True}
    run_on_ranks(2, compare_on_rank, want, tmp_path / "two", 2, changes, timeout=IMPORTS_S)


def test_a_loss_of_ones_own_and_label_smoothing(tmp_path):
    """They read whole logits; and targets counted by replica, not over all."""
    changes = {"label_smoothing_factor": 0.1, "average_tokens_across_devices": False}
    run_on_ranks(2, compare_on_rank, train(tmp_path, 1, **changes), tmp_path, 2, changes, timeout=IMPORTS_S)


def forgotten_on_rank(folder: Path) -> None:
    from transformers import Trainer, TrainingArguments

    with as_torchrun():
        args = TrainingArguments(output_dir=str(folder), use_cpu=True, report_to=[])
        Trainer(make_model("llama", "cpattn"), args, padded, rows(8)).train()


def test_a_forgotten_group_is_an_error(tmp_path):
    with pytest.raises(Exception, match="2 ranks train a model with attn_implementation='cpattn' and none"):
        run_on_ranks(2, forgotten_on_rank, tmp_path, timeout=IMPORTS_S)
