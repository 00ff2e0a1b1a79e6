"""Runtime layer: a prefix tree over ranks against its samples run one by one."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers")

from cpattn.integrations.prefix_tree import fold_samples
from cpattn.integrations.transformers import ContextParallel, register_attention
from tests_dist.support.harness import run_on_ranks
from tests_dist.support.hf_models import gradients, make_model, relative_error

PROMPT, LENGTHS = 48, (9, 14, 5, 11, 20, 7, 16, 10)


def grpo_group(seed=0):
    """One prompt and eight completions, two of which begin alike; and their advantages."""
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(3, 90, (PROMPT,), generator=generator)
    completions = [torch.randint(3, 90, (n,), generator=generator) for n in LENGTHS]
    completions[3][:4] = completions[1][:4]
    samples = [torch.cat([prompt, c]).tolist() for c in completions]
    return samples, torch.randn(len(samples), generator=generator)


def one_by_one(name, samples, advantages):
    """Logits of each sample, the policy-gradient loss, and its gradients."""
    model = make_model(name)
    logits, total = [], torch.zeros(())
    for sample, advantage in zip(samples, advantages, strict=True):
        ids = torch.tensor([sample])
        out = model(input_ids=ids, use_cache=False)
        logprobs = torch.log_softmax(out.logits[0, :-1], -1).gather(1, ids[0, 1:, None])[PROMPT - 1 :]
        loss = -advantage * logprobs.mean() / len(samples)
        loss.backward()
        logits.append(out.logits[0].detach())
        total += loss.detach()
    return logits, total, gradients(model)


def tree_on_rank(name, samples, advantages):
    register_attention()
    model = make_model(name, "cpattn")
    parallel = ContextParallel(model, dist.group.WORLD)
    tree = fold_samples(samples)
    out = parallel(tree.batch(), spec=tree.spec)
    places, tokens, owner = tree.targets(first=PROMPT)
    logprobs = parallel.token_logprobs(out, places, tokens)
    weights = advantages[owner] / torch.bincount(owner)[owner] / len(samples)
    loss = -(weights * logprobs).sum()
    loss.backward()
    parallel.reduce_gradients()
    logits = out.shard.gather(out.logits).detach()[0]
    return [logits[p] for p in tree.places], loss.detach(), gradients(model)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss"])
def test_group_equals_its_samples_one_by_one(name):
    """One prompt, eight completions, four ranks: logits of every sample, loss, and all gradients."""
    samples, advantages = grpo_group()
    logits, loss, grads = run_on_ranks(4, tree_on_rank, name, samples, advantages)[0]
    true_logits, true_loss, true_grads = one_by_one(name, samples, advantages)
    for sample, (got, truth) in enumerate(zip(logits, true_logits, strict=True)):
        assert relative_error(got, truth) < 1e-5, f"{name}: logits of sample {sample}"
    assert abs(loss - true_loss) < 1e-5 * max(1, abs(true_loss))
    for parameter, grad in true_grads.items():
        if grad.norm() > 1e-7:
            assert relative_error(grads[parameter], grad) < 1e-5, f"{name}: {parameter}"


def test_tokens_saved():
    """476 tokens one by one; the tree holds the prompt once and the common beginning once."""
    samples, _ = grpo_group()
    tree = fold_samples(samples)
    assert tree.num_sample_tokens == 8 * PROMPT + sum(LENGTHS) == 476
    assert tree.input_ids.shape[1] == PROMPT + sum(LENGTHS) - 4 == 136
    assert tree.num_saved_tokens == 340


def test_fold_keeps_every_sample():
    """Nested, equal and contained samples; each is what lies at its places, at positions 0, 1, 2..."""
    samples = [[1, 2, 3], [1, 2], [1, 2, 3], [4], [1, 5, 6], [1, 2, 3, 7]]
    tree = fold_samples(samples)
    position = {}
    for document in tree.spec.documents:
        for token in range(document.start, document.end):
            position[token] = document.first_position + token - document.start
    for sample, places in zip(samples, tree.places, strict=True):
        assert tree.input_ids[0][places].tolist() == sample
        assert [position[int(p)] for p in places] == list(range(len(sample)))
    assert tree.input_ids.shape[1] == 7
    with pytest.raises(ValueError, match="at least one token"):
        fold_samples([[1], []])
    with pytest.raises(ValueError, match="sample 1 is of float64: token ids are integers"):
        fold_samples([[1], [2.5]])
    with pytest.raises(ValueError, match="first has 2 numbers for 6 samples"):
        tree.targets(first=[1, 2])
    with pytest.raises(ValueError, match=r"first of sample 0 is 1\.5"):
        tree.targets(first=1.5)
