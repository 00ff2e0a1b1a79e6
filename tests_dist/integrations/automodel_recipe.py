"""NeMo Automodel's own finetuning recipe, from its own YAML, on CPU ranks; "magi" is this project.

    python -m tests_dist.integrations.automodel_recipe /tmp/tiny      # two tiny random checkpoints: llama and moe
    torchrun --nproc-per-node 2 -m tests_dist.integrations.automodel_recipe \\
        --config tests_dist/integrations/automodel_recipe.yaml --distributed.cp_size 2 \\
        --model.pretrained_model_name_or_path /tmp/tiny/llama --checkpoint.checkpoint_dir /tmp/tiny/run

With `--own` this project is not installed: the recipe as it is (with `--model.attn_implementation sdpa`).
The recipe writes training.jsonl and validation.jsonl into checkpoint_dir, this program the weights beside them.

Nothing of this project stands between it and Automodel but `install()`. Automodel 0.7.0 has no configuration without
CUDA, though: it calls these whatever the backend of `dist_env` is, and `use_cpu` answers in their place,

- `torch.cuda.reset_peak_memory_stats()`: recipes/llm/train_ft.py, 561 (first line of `setup`) and 1860;
- `torch.cuda.current_device()` for the model's device: _transformers/auto_model.py, 886 and 498;
- `torch.device(f"cuda:{...}")` for buffers: components/models/qwen3_moe/model.py, 226 and 356;

and of its Triton kernels those of LoRA do not load under Triton 3.9, so Triton is hidden, as it is on machines without.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

CPU = torch.device("cpu")
MODULES = (
    "nemo_automodel.recipes.llm.train_ft",
    "nemo_automodel._transformers.auto_model",
    "nemo_automodel.components.models.qwen3_moe.model",
)
SIZES = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "pad_token_id": 0}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


class _CpuOfCuda:
    """`torch.cuda` whose current device is the CPU."""

    def current_device(self) -> torch.device:
        return CPU

    def reset_peak_memory_stats(self) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


class _CpuTorch(ModuleType):
    """`torch` for a module that asks for CUDA devices."""

    cuda = _CpuOfCuda()

    def device(self, kind: Any, *index: Any) -> torch.device:
        return CPU if str(kind).startswith("cuda") else torch.device(kind, *index)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def use_cpu() -> None:
    """Let Automodel's modules find the CPU where they ask for a CUDA device."""
    for name in MODULES:
        importlib.import_module(name).torch = _CpuTorch("torch")  # type: ignore[attr-defined]


def make_checkpoints(folder: Path) -> None:
    """Tiny random checkpoints with a tokenizer: `llama`, and `moe`.

    Without a balance loss: Automodel takes it over a rank's own tokens, so it depends on their number.
    """
    import transformers as hf
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    experts = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.0}
    torch.manual_seed(0)
    models = {
        "llama": hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, **HEADS)),
        "moe": hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**SIZES, **HEADS, **experts)),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def run_recipe() -> None:
    """The recipe that the command line's YAML describes."""
    sys.modules["triton"] = None  # type: ignore[assignment]
    if "--own" in sys.argv:
        sys.argv.remove("--own")
    else:
        from cpattn.automodel import install

        install()
    use_cpu()
    from nemo_automodel.components.config._arg_parser import parse_args_and_load_config
    from nemo_automodel.recipes.llm.train_ft import TrainFinetuneRecipeForNextTokenPrediction
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    config = parse_args_and_load_config()
    recipe = TrainFinetuneRecipeForNextTokenPrediction(config)
    recipe.setup()
    recipe.run_train_validation_loop()
    (model,) = recipe.model_parts
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if recipe.dist_env.is_main:
        folder = Path(config.checkpoint.checkpoint_dir)
        torch.save(whole, folder / "weights.pt")
        steps = [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]
        print([(step["loss"], step["grad_norm"]) for step in steps])


if __name__ == "__main__":
    if len(sys.argv) == 2:
        make_checkpoints(Path(sys.argv[1]))
    else:
        run_recipe()
