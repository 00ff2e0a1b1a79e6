"""Layer 2: TRL's own trainers on context-parallel groups, against the same trainers on one process."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("trl", reason="TRL's trainers are tested with trl (pip install cpattn[trl])")
pytest.importorskip("datasets", reason="TRL's trainers are tested with trl and datasets (pip install cpattn[trl])")

from tests_dist.support.harness import run_on_ranks
from tests_dist.support.hf_models import make_model
from tests_dist.support.trainer_cases import IMPORTS_S, Outcome, as_torchrun, require_same, weights_of


def tokenizer() -> Any:
    """Words w0 to w96, by number."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(97)}, unk_token="w1"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "w0", "eos_token": "w2", "bos_token": "w1", "unk_token": "w1"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def words(generator: torch.Generator, least: int, most: int) -> str:
    """A text of random length."""
    count = int(torch.randint(least, most + 1, (1,), generator=generator))
    return " ".join(f"w{n}" for n in torch.randint(3, 90, (count,), generator=generator).tolist())


def texts(count: int, seed: int, kind: str) -> Any:
    """A dataset for SFT ("sft", and "sft even" to evaluate on), preferences ("dpo") or prompts ("grpo")."""
    from datasets import Dataset

    g = torch.Generator().manual_seed(seed)
    if kind.startswith("sft"):
        least, most = (3, 20) if kind == "sft" else (6, 6)  # as many targets in each row: means of means are means
        made = [{"prompt": words(g, 2, 6), "completion": " " + words(g, least, most)} for _ in range(count)]
    elif kind == "dpo":
        answers = ("chosen", "rejected")
        made = [{"prompt": words(g, 3, 8), **{a: " " + words(g, 2, 12) for a in answers}} for _ in range(count)]
    else:
        made = [{"prompt": words(g, 3, 8)} for _ in range(count)]
    return Dataset.from_list(made)


def common(folder: Path, per_device: int, **changes: Any) -> dict[str, Any]:
    settings = {
        "output_dir": str(folder), "use_cpu": True, "per_device_train_batch_size": per_device, "bf16": False,
        "per_device_eval_batch_size": per_device, "learning_rate": 1e-2, "max_steps": 3, "logging_steps": 1,
        "save_strategy": "no", "report_to": [], "optim": "sgd", "max_grad_norm": 0.5, "gradient_checkpointing": False,
    }  # fmt: skip
    return {**settings, **changes}


def finished(trainer: Any) -> Outcome:
    trainer.train()
    kept = ("train_", "epoch")
    log = [{k: v for k, v in entry.items() if not k.startswith(kept)} for entry in trainer.state.log_history]
    return Outcome(copy.deepcopy(log), weights_of(trainer.model))


def replicas_of(cp_size: int) -> int:
    return (dist.get_world_size() if dist.is_initialized() else 1) // cp_size


def kind_of(trainer: type, cp_size: int, **options: Any) -> type:
    from cpattn.integrations.trainer import context_parallel

    return context_parallel(trainer, cp_size=cp_size, **options) if cp_size > 1 else trainer


def lora() -> dict[str, Any]:
    """An adapter that does something from the start."""
    from peft import LoraConfig

    torch.manual_seed(3)  # it is drawn where it is put in
    return {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)}


def sft(folder: Path, cp_size: int, packing: bool, adapter: bool = False, **changes: Any) -> Outcome:
    from trl import SFTConfig, SFTTrainer

    with as_torchrun():
        args = SFTConfig(
            **common(folder, 4 // replicas_of(cp_size), gradient_accumulation_steps=2), eval_strategy="steps",
            eval_steps=3, packing=packing, eval_packing=False, max_length=40, dataset_num_proc=None, **changes,
        )  # fmt: skip
        model = make_model("llama", "eager" if cp_size == 1 else "cpattn")
        data = {"train_dataset": texts(64, 0, "sft"), "eval_dataset": texts(8, 1, "sft even")}
        peft = lora() if adapter else {}
        return finished(kind_of(SFTTrainer, cp_size)(model, args, processing_class=tokenizer(), **data, **peft))


def dpo(folder: Path, cp_size: int, adapter: bool = False, **changes: Any) -> Outcome:
    from trl import DPOConfig, DPOTrainer

    with as_torchrun():
        attention = "eager" if cp_size == 1 else "cpattn"
        settings = common(folder, 2 // replicas_of(cp_size), gradient_accumulation_steps=2)
        args = DPOConfig(**settings, beta=0.3, **changes)
        model = make_model("llama", attention)
        reference = None if adapter else make_model("llama", attention, seed=4)
        data = {"train_dataset": texts(16, 0, "dpo"), "processing_class": tokenizer()}
        peft = lora() if adapter else {}
        return finished(kind_of(DPOTrainer, cp_size)(model, reference, args, **data, **peft))


def fixed_completions(prompt_ids: list[list[int]]) -> list[list[int]]:
    """One for each prompt and each of its repetitions, so that they do not depend on how prompts are spread."""
    made, seen = [], {}
    for ids in prompt_ids:
        nth = seen[tuple(ids)] = seen.get(tuple(ids), -1) + 1
        g = torch.Generator().manual_seed(sum(ids) * 31 + nth)
        made.append([*torch.randint(3, 90, (3 + nth * 2,), generator=g).tolist(), 2])
    return made


def reward(completions: list[str], **kwargs: Any) -> list[float]:
    return [len(c.split()) % 5 - 0.1 * (c.count("w1") % 3) for c in completions]


def grpo(
    folder: Path, cp_size: int, sampled: bool, trees: bool = False, sharded: bool = False, **changes: Any
) -> Outcome:
    from trl import GRPOConfig, GRPOTrainer

    from cpattn.generation import trl_rollout

    class Fixed(GRPOTrainer):
        def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
            if sampled:
                return super()._generate_single_turn(prompt_ids, images, multimodal_fields, num_generations)
            return fixed_completions(prompt_ids), None

    with as_torchrun():
        args = GRPOConfig(
            **common(folder, 8 // replicas_of(cp_size), gradient_accumulation_steps=1), num_generations=4,
            beta=0.0 if sampled else 0.1, max_completion_length=8, temperature=0.8, steps_per_generation=1, **changes,
        )  # fmt: skip
        model = make_model("llama", "eager" if cp_size == 1 and not sharded else "cpattn")
        peft = {} if sampled else lora()  # with an adapter, the reference is the model without it
        data = {"train_dataset": texts(16, 0, "grpo"), "processing_class": tokenizer()}
        data |= {"rollout_func": trl_rollout} if sharded else {}
        kind = kind_of(Fixed, cp_size, prefix_trees=True) if trees else kind_of(Fixed, cp_size)
        return finished(kind(model, reward, args, **data, **peft))


CASES = {"sft": sft, "dpo": dpo, "grpo": grpo}


def compare_on_rank(want: Outcome, which: str, folder: Path, cp_size: int, arguments: dict[str, Any]) -> None:
    require_same(CASES[which](folder, cp_size, **arguments), want, limit=2e-5)


def same_on(ranks: int, tmp_path: Path, which: str, **arguments: Any) -> None:
    want = CASES[which](tmp_path / "one", 1, **arguments)
    run_on_ranks(ranks, compare_on_rank, want, which, tmp_path / "many", 2, arguments, timeout=IMPORTS_S)


@pytest.mark.parametrize(("ranks", "packing"), [(2, True), (4, True), (2, False)])
def test_sft_equals_one_process(tmp_path, ranks, packing):
    """Entropy, token accuracy and tokens seen among what is compared."""
    same_on(ranks, tmp_path, "sft", packing=packing)


def test_sft_of_lora_equals_one_process(tmp_path):
    pytest.importorskip("peft", reason="adapters are tested with peft (pip install cpattn[trl])")
    same_on(2, tmp_path, "sft", packing=True, adapter=True)


@pytest.mark.parametrize("ranks", [2, 4])
def test_dpo_equals_one_process(tmp_path, ranks):
    same_on(ranks, tmp_path, "dpo")


def test_dpo_of_lora_equals_one_process(tmp_path):
    """Its reference is the model without its adapters."""
    pytest.importorskip("peft", reason="adapters are tested with peft (pip install cpattn[trl])")
    same_on(2, tmp_path, "dpo", adapter=True)


@pytest.mark.parametrize(("ranks", "sampled"), [(2, True), (4, False)])
def test_grpo_equals_one_process(tmp_path, ranks, sampled):
    """Completions sampled, on one replica; and given ones with an adapter and a KL term, on two."""
    pytest.importorskip("peft", reason="adapters are tested with peft (pip install cpattn[trl])")
    same_on(ranks, tmp_path, "grpo", sampled=sampled)


def test_grpo_with_a_rollout_over_the_group(tmp_path):
    """Prompts, completions and their keys on two ranks: what one rank samples, and all that is made of it."""
    same_on(2, tmp_path, "grpo", sampled=True, sharded=True, top_p=0.9)


@pytest.mark.parametrize(("changes", "name"), [({"min_p": 0.1}, "min_p"), ({"repetition_penalty": 1.2}, "repetition")])
def test_a_rollout_that_generate_does_not_know_is_refused(tmp_path, changes, name):
    with pytest.raises(ValueError, match=f"trl_rollout generates by cpattn.generate.*{name}"):
        grpo(tmp_path, 1, sampled=True, sharded=True, **changes)


def test_grpo_groups_as_prefix_trees(tmp_path):
    """The prompt of a group is computed once: the same numbers."""
    pytest.importorskip("peft", reason="adapters are tested with peft (pip install cpattn[trl])")
    same_on(2, tmp_path, "grpo", sampled=False, trees=True)


def fused(kind: str, batch: dict[str, torch.Tensor], weights: torch.Tensor) -> tuple[Any, dict[str, torch.Tensor]]:
    """TRL's fused head on one process, by itself ("eager"), served, or with rows folded ("trees"); and gradients."""
    from trl.trainer.utils import add_fused_lm_head

    from cpattn.integrations.whole_batches import WholeBatches

    model = make_model("llama", "eager" if kind == "eager" else "cpattn")
    add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy"))
    if kind == "eager":
        out = model(**batch, fused_lm_head=True)
    else:
        parallel = WholeBatches(model, None, check=False, prefix_trees=kind == "trees")
        out = parallel.run_whole({**batch, "fused_lm_head": True})
    ((out.log_probs + 0.1 * out.entropy) * weights).sum().backward()
    return out, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", ["served", "trees"])
def test_the_fused_head_of_rows_that_begin_alike(kind):
    """Groups of two prompts, one completion twice: fields and gradients, entropy's too, at another temperature."""
    g = torch.Generator().manual_seed(0)
    first, second = (torch.randint(3, 90, (n,), generator=g) for n in (7, 5))
    answers = [torch.randint(3, 90, (n,), generator=g) for n in (4, 6, 1, 5)]
    rows = [(first, answers[0]), (first, answers[1]), (first, answers[2]), (second, answers[3]), (first, answers[0])]
    ids, mask = torch.zeros(2, len(rows), 13, dtype=torch.long)
    for row, (prompt, answer) in enumerate(rows):
        where = slice(7 - len(prompt), 7 + len(answer))
        ids[row, where], mask[row, where] = torch.cat([prompt, answer]), 1
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :7] = -100
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    weights = torch.randn(len(rows), 12, generator=g)
    (got, grads), (want, wanted) = (fused(name, batch, weights) for name in (kind, "eager"))
    assert torch.equal(got.label_mask, want.label_mask)
    for name in ("loss", "log_probs", "entropy"):
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-5)
    for name, grad in wanted.items():
        assert float((grads[name] - grad).norm()) < 1e-5 * float(grad.norm()), name
