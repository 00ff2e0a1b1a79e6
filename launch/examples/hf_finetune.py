"""Fine-tune a Hugging Face model with each batch spread over all ranks.

    torchrun --nproc-per-node 4 -m cpattn.launch.examples.hf_finetune
    torchrun --nproc-per-node 4 -m cpattn.launch.examples.hf_finetune --tiny hybrid
    torchrun --nproc-per-node 4 -m cpattn.launch.examples.hf_finetune --model Qwen/Qwen2.5-0.5B --tokens 8192

Without --model a tiny one is trained from scratch on CPU, a Gemma 3 (sliding-window and full layers) or a hybrid,
Qwen3.5 (gated delta rule and full layers): packed documents in one row, two micro-batches a step, some of them with few
labels. What differs from training on one device is marked with "cp:".
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cpattn.integrations.transformers import ContextParallel, register_attention


def load_model(name: str | None, tiny: str) -> Any:
    """A pretrained model, or a tiny one that is the same on all ranks."""
    import transformers

    if name:
        return transformers.AutoModelForCausalLM.from_pretrained(name, attn_implementation="cpattn")  # cp: the name
    sizes: dict[str, Any] = {
        "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    }  # fmt: skip
    config: Any
    if tiny == "hybrid":
        sizes |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
        sizes |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
        config = transformers.Qwen3_5TextConfig(**sizes, layer_types=["linear_attention", "full_attention"])
    else:
        sizes |= {"layer_types": ["sliding_attention", "full_attention"]}
        config = transformers.Gemma3TextConfig(**sizes, sliding_window=64)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="cpattn")


def packed_batch(tokens: int, seed: int) -> dict[str, Tensor]:
    """Documents that count upwards from a random number, packed into one row; the same on all ranks."""
    generator = torch.Generator().manual_seed(seed)
    cuts = [0, *sorted(torch.randint(1, tokens, (4,), generator=generator).tolist()), tokens]
    lengths = [b - a for a, b in pairwise(cuts) if b > a]
    first = torch.randint(0, 100, (len(lengths),), generator=generator).tolist()
    positions = torch.cat([torch.arange(n) for n in lengths])
    ids = torch.cat([(torch.arange(n) + f) % 100 for n, f in zip(lengths, first, strict=True)])
    return {"input_ids": ids[None], "position_ids": positions[None], "labels": ids[None].clone()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="name or folder of a pretrained causal language model")
    parser.add_argument("--tiny", choices=("gemma3", "hybrid"), default="gemma3", help="trained without --model")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a micro-batch")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()

    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if torch.cuda.is_available():
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    register_attention()  # cp: before the model is loaded
    model = load_model(options.model, options.tiny).to("cuda" if torch.cuda.is_available() else "cpu")
    parallel = ContextParallel(model, dist.group.WORLD)  # cp: all ranks share each batch
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4 if options.model else 3e-3)
    for step in range(options.steps):
        batches = [packed_batch(options.tokens, seed=2 * step + micro) for micro in range(2)]
        batches = [{name: x.to(model.device) for name, x in batch.items()} for batch in batches]
        num_targets = parallel.count_targets(batches)  # cp: one mean over both micro-batches and all ranks
        total = 0.0
        for batch in batches:
            loss = parallel(batch, num_targets=num_targets).loss  # cp: shards, runs, sums
            assert loss is not None, "the batch has labels"
            loss.backward()
            total += loss.item()
        parallel.reduce_gradients()  # cp: or let FSDP2 or DDP do it (see fsdp2_custom)
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0:
            print(f"step {step:3d}  loss {total:.4f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
