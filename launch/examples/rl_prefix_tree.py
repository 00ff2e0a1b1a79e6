"""Policy gradient on a group of completions of one prompt, the prompt computed once, over all ranks.

    torchrun --nproc-per-node 4 -m cpattn.launch.examples.rl_prefix_tree

A GRPO-like step: the group is folded into a prefix tree, so that what completions share is stored and
computed once; the log-probabilities are those that each sample has alone. The toy reward is how many
tokens of a completion are even, and the policy learns to make them so.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cpattn.integrations.prefix_tree import fold_samples
from cpattn.integrations.transformers import ContextParallel, register_attention

VOCAB, PROMPT, COMPLETION, GROUP = 32, 96, 12, 8


def make_policy() -> Any:
    """A tiny Llama, the same on all ranks."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="cpattn")


def sample_group(model: Any, prompt: Tensor, seed: int) -> list[Tensor]:
    """Completions, sampled alike on all ranks. Outside a shard the model generates by itself."""
    torch.manual_seed(seed)
    rows = prompt.expand(GROUP, -1)
    mask = torch.ones_like(rows)
    out = model.generate(rows, attention_mask=mask, max_new_tokens=COMPLETION, do_sample=True, pad_token_id=0)
    return list(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=15)
    options = parser.parse_args()
    dist.init_process_group("gloo")
    register_attention()
    model = make_policy()
    parallel = ContextParallel(model, dist.group.WORLD)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    prompt = torch.arange(PROMPT) % VOCAB
    for step in range(options.steps):
        samples = sample_group(model, prompt, seed=step)
        rewards = torch.stack([(sample[PROMPT:] % 2 == 0).float().mean() for sample in samples])
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)

        tree = fold_samples(samples)
        out = parallel(tree.batch(), spec=tree.spec)  # the tree's tokens, spread over the ranks
        places, tokens, owner = tree.targets(first=PROMPT)  # what predicts each completion's tokens
        logprobs = parallel.token_logprobs(out, places, tokens)  # whole, on every rank
        loss = -(advantages[owner] * logprobs).sum() / len(tokens)  # the same on every rank
        loss.backward()
        parallel.reduce_gradients()
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0:
            saved = tree.num_saved_tokens / tree.num_sample_tokens
            print(f"step {step:3d}  reward {rewards.mean():.3f}  {saved:.0%} of the tokens saved", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
