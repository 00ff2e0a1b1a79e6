"""Layer 2: the GRPO example: rollout, rewards, loss and weights of one rank, on two and three."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers")

from cpattn.launch.examples import grpo_step as example
from cpattn.nn import ContextParallel
from tests_dist.support.harness import run_on_ranks


def seldom(prompts: list, completions: list, words: list, **columns: object) -> list:
    """A reward that reads a column of the data and has nothing to say of every other sample."""
    return [len(text) / words[n] if n % 2 else None for n, text in enumerate(completions)]


def steps_on_rank(steps: int) -> list:
    """Figures and completions of each step, and the weights after the last."""
    group = dist.group.WORLD if dist.get_world_size() > 1 else None
    parallel = ContextParallel(example.make_policy(), group)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    generator, seen = torch.Generator().manual_seed(3), []
    for _ in range(steps):
        rollout = example.roll_out(
            parallel,
            ["once ", "twice upon a time "],
            [example.vowels, seldom],
            group=4,
            max_new_tokens=8,
            generator=generator,
            columns={"words": [3, 5]},
        )
        seen.append((example.grpo_step(parallel, optimizer, rollout), rollout.completions))
    return [seen, {name: p.detach().clone() for name, p in parallel.named_parameters()}]


def test_steps_are_those_of_one_rank():
    (want, weights), *_ = run_on_ranks(1, steps_on_rank, 3)
    assert all(figures.grad_norm > 0 and figures.saved_tokens >= 3 * 23 for figures, _ in want)
    for size in (2, 3):
        for seen, theirs in run_on_ranks(size, steps_on_rank, 3):
            for (figures, completions), (one, same) in zip(seen, want, strict=True):
                assert completions == same
                assert figures == pytest.approx(one, rel=1e-5, abs=1e-7)
            for name, weight in weights.items():
                torch.testing.assert_close(theirs[name], weight, rtol=1e-5, atol=1e-6)


def test_the_loss_is_the_policy_gradient_of_samples_run_alone():
    """Without tree and ranks: the gradient of -A log p, a mean over each sample's tokens and over samples."""
    parallel = ContextParallel(example.make_policy())
    options = {"group": 3, "max_new_tokens": 5, "generator": torch.Generator().manual_seed(1)}
    rollout = example.roll_out(parallel, ["ab ", "c "], [example.vowels], **options)
    model, total = example.make_policy(), 0.0
    for prompt, ids, advantage in zip(rollout.prompts, rollout.ids, rollout.advantages, strict=True):
        start = len(prompt)
        tokens = torch.cat([torch.tensor(example.encode(prompt)), ids])
        logprobs = model(input_ids=tokens[None], use_cache=False).logits[0].log_softmax(-1)
        total = total - advantage * logprobs[start - 1 : -1].gather(1, ids[:, None]).mean() / 6
    total.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    figures = example.grpo_step(parallel, torch.optim.SGD(parallel.parameters(), lr=0.0), rollout)
    assert figures.grad_norm == pytest.approx(float(norm), rel=1e-5)
