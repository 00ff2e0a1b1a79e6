"""GRPO from end to end, context-parallel: rollout, rewards, advantages, log-probabilities, an optimizer step.

    torchrun --nproc-per-node 2 -m cpattn.launch.examples.grpo_step        # the same figures on any number of ranks

1. Rollout: `cpattn.generate` over the ranks; the completions of one prompt share its keys.
2. Rewards: functions as TRL's GRPOTrainer takes them, `reward(prompts, completions, **columns) -> list[float | None]`.
3. Advantages: rewards of a prompt's group, centred and scaled.
4. Log-probabilities: all samples as one prefix tree, so each prompt is computed once, over all ranks.
5. Loss: clipped ratios, a mean over each sample's tokens and then over samples; one optimizer step.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import cpattn
from cpattn.integrations.prefix_tree import PrefixTree, fold_samples
from cpattn.integrations.transformers import ContextParallel

LETTERS = "_.abcdefghijklmnopqrstuvwxyz "  # token 0 pads, token 1 ends
END, EPSILON = 1, 0.2

RewardFunction = Callable[..., Sequence[float | None]]


class Rollout(NamedTuple):
    """Completions of prompts, `group` of each, side by side. advantages: fp32 [samples]."""

    prompts: list[str]
    completions: list[str]
    ids: list[Tensor]
    rewards: Tensor
    advantages: Tensor


class Figures(NamedTuple):
    """What a step reports, the same on all ranks."""

    loss: float
    reward: float
    grad_norm: float
    saved_tokens: int


def encode(text: str) -> list[int]:
    return [LETTERS.index(letter) for letter in text]


def decode(ids: Tensor) -> str:
    return "".join(LETTERS[i] for i in ids.tolist() if i > END)


def vowels(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """A toy reward: the share of vowels."""
    return [sum(letter in "aeiou" for letter in text) / max(len(text), 1) for text in completions]


def ends_in_time(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """Another: whether the completion came to its end."""
    return [0.2 * float(END in ids) for ids in completion_ids]


def roll_out(
    parallel: ContextParallel,
    prompts: list[str],
    rewards: Sequence[RewardFunction],
    *,
    group: int,
    max_new_tokens: int,
    generator: torch.Generator,
    columns: dict[str, list[Any]] | None = None,
) -> Rollout:
    """Sample a group of completions for each prompt, and what they are worth within their group."""
    repeated = [prompt for prompt in prompts for _ in range(group)]
    given = {name: [value for value in values for _ in range(group)] for name, values in (columns or {}).items()}
    ids = cpattn.generate(
        parallel,
        [encode(prompt) for prompt in repeated],
        max_new_tokens=max_new_tokens,
        eos_token_id=END,
        temperature=1.0,
        generator=generator,
    )
    completions = [decode(tokens) for tokens in ids]
    given |= {"prompts": repeated, "completions": completions, "completion_ids": [tokens.tolist() for tokens in ids]}
    total = _on_first_rank(parallel, lambda: _score(rewards, given))
    by_group = total.view(-1, group)
    centred = by_group - by_group.mean(1, keepdim=True)
    advantages = (centred / (by_group.std(1, keepdim=True) + 1e-4)).flatten()
    return Rollout(repeated, completions, ids, total, advantages)


def _score(rewards: Sequence[RewardFunction], given: dict[str, Any]) -> Tensor:
    """Sums over the functions; None is a sample that a function says nothing of."""
    values = [[float("nan") if value is None else value for value in reward(**given)] for reward in rewards]
    return torch.tensor(values).nansum(0)


def _on_first_rank(parallel: ContextParallel, make: Callable[[], Tensor]) -> Tensor:
    """A reward may ask a service or draw at random: the first rank's counts."""
    if parallel.cp_group is None:
        return make()
    first = dist.get_global_rank(parallel.cp_group, 0)
    made = [make() if dist.get_rank() == first else None]
    dist.broadcast_object_list(made, first, group=parallel.cp_group)
    assert made[0] is not None
    return made[0]


def log_probabilities(parallel: ContextParallel, tree: PrefixTree, first: list[int]) -> tuple[Tensor, Tensor]:
    """Of every completion token [N], and which sample it belongs to, int64 [N]; on every rank, with gradient."""
    places, tokens, owners = tree.targets(first=first)
    out = parallel(tree.batch(), spec=tree.spec)
    return parallel.token_logprobs(out, places, tokens), owners


def grpo_loss(logprobs: Tensor, old: Tensor, owners: Tensor, advantages: Tensor) -> Tensor:
    """Clipped policy gradient: a mean over each sample's tokens, and over samples."""
    ratio, advantage = torch.exp(logprobs - old), advantages[owners]
    worst = torch.minimum(ratio * advantage, ratio.clamp(1 - EPSILON, 1 + EPSILON) * advantage)
    counts = torch.bincount(owners, minlength=len(advantages))
    return -(worst / counts[owners]).sum() / len(advantages)


def grpo_step(parallel: ContextParallel, optimizer: torch.optim.Optimizer, rollout: Rollout) -> Figures:
    """One optimizer step on a rollout."""
    first = [len(encode(prompt)) for prompt in rollout.prompts]
    samples = [
        torch.cat([torch.tensor(encode(prompt)), ids]) for prompt, ids in zip(rollout.prompts, rollout.ids, strict=True)
    ]
    tree = fold_samples(samples)
    logprobs, owners = log_probabilities(parallel, tree, first)
    # With one step a rollout, the policy that sampled is the one that learns. Every rank has the whole loss.
    loss = grpo_loss(logprobs, logprobs.detach(), owners, rollout.advantages)
    optimizer.zero_grad()
    loss.backward()
    parallel.reduce_gradients()
    norm = torch.nn.utils.clip_grad_norm_(parallel.parameters(), 1.0)
    optimizer.step()
    return Figures(loss.item(), rollout.rewards.mean().item(), norm.item(), tree.num_saved_tokens)


def make_policy() -> Any:
    """A tiny Llama, the same on all ranks."""
    import transformers

    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    tokens: dict[str, Any] = {"vocab_size": len(LETTERS), "pad_token_id": 0, "eos_token_id": END, "bos_token_id": 2}
    config = transformers.LlamaConfig(num_hidden_layers=2, **sizes, **tokens)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="cpattn")


def train(group: Any, steps: int) -> list[Figures]:
    """Some steps over a group of ranks; None is one rank."""
    parallel = ContextParallel(make_policy(), group)
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    figures = []
    for _ in range(steps):
        prompts = ["the sea is ", "a long letter began with "]
        rollout = roll_out(
            parallel, prompts, [vowels, ends_in_time], group=6, max_new_tokens=12, generator=generator
        )
        figures.append(grpo_step(parallel, optimizer, rollout))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=15)
    options = parser.parse_args()
    dist.init_process_group("gloo")
    figures = train(dist.group.WORLD, options.steps)
    if dist.get_rank() == 0:
        for step, (loss, reward, norm, saved) in enumerate(figures):
            print(f"step {step}: loss {loss:+.6f}, reward {reward:.4f}, gradient {norm:.5f}, {saved} tokens saved")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
