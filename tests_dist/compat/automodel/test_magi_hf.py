"""`attn_implementation="magi"`: the original's wrong results there (numbers 4, 8, 12, 13, 14), made right."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers")

from cpattn import undispatch
from cpattn.automodel import magi_attn_utils as magi
from cpattn.automodel.magi_attn_utils import AttnMaskSpec, MagiState
from tests_dist.support.harness import RankError, fresh_group, run_on_ranks
from tests_dist.support.hf_models import (
    IGNORE,
    StepResult,
    assert_same_step,
    eager_step,
    gradients,
    make_model,
    real_tokens,
    relative_error,
    text_batch,
    vision_batch,
)


def shifted(batch):
    """Labels as Automodel's datasets give them: each token's next token."""
    labels = torch.full_like(batch["labels"], IGNORE)
    labels[:, :-1] = batch["labels"][:, 1:]
    return {**batch, "labels": labels}


def take_masks_away(model):
    """As Automodel does over several ranks (`attach_context_parallel_hooks`), for its own sharding of SDPA."""

    def without(module, args, kwargs):
        return args, {**kwargs, "attention_mask": None, "is_causal": True}

    for name, module in model.named_modules():
        if name.endswith("self_attn"):
            module.register_forward_pre_hook(without, with_kwargs=True, prepend=True)


def recipe_step_on_rank(name, batches, num_targets, vision=False, checkpointing=False, masks_taken=False):
    """What a recipe does: prepare each micro-batch, run, per-shard loss, gradients summed over the ranks."""
    group = fresh_group()
    magi.register_magi_attention()
    model = make_model(name, "magi")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if masks_taken:
        take_masks_away(model)
    state = MagiState(True, False, group, dist.get_world_size(group))
    losses, logits = [], []
    for batch in batches:
        if vision:
            context, new = state.prepare_vlm_batch(model, batch)
        else:
            context, new = state.prepare_llm_batch(model, batch, None, False, 0, 1)
        labels = new.pop("labels")
        with context():
            out = model(**new)
        logits.append((out.logits.detach(), magi._LAST_STEP[model]))
        losses.append(
            torch.nn.functional.cross_entropy(
                out.logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum"
            )
            / num_targets
        )
    for loss in losses:  # all micro-batches are in flight, as in a pipeline
        loss.backward()
    total = sum(loss.detach() for loss in losses)
    dist.all_reduce(total, group=group)
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad, group=group)
    last, shard = logits[-1]
    return StepResult(shard.gather(last), total, gradients(model))


def targets_of(*batches):
    return sum(int((b["labels"] != IGNORE).sum()) for b in batches)


@pytest.mark.parametrize(
    ("name", "layout", "rows"),
    [("mistral", "left", 3), ("gemma2", "right", 1), ("gpt_oss", "plain", 3)],
    ids=["window", "softcap", "sinks"],
)
def test_4_and_8_windows_softcap_sinks_padding_and_rows(name, layout, rows):
    """The original ignored all of these, and ran rows as one sequence (or refused them)."""
    batch = shifted(text_batch(layout, rows))
    got = run_on_ranks(2, recipe_step_on_rank, name, [batch], targets_of(batch))[0]
    assert_same_step(got, eager_step(name, text_batch(layout, rows)), real_tokens(batch), name)


def test_masks_that_are_taken_from_attention_are_given_back_and_padding_masks_count():
    """What a recipe of Automodel 0.7 does to a transformers model at cp 2, and what its collater gives."""
    batch = shifted(text_batch("left", 3))
    batch["padding_mask"] = ~batch.pop("attention_mask").bool()
    got = run_on_ranks(2, recipe_step_on_rank, "llama", [batch], targets_of(batch), masks_taken=True)[0]
    want = text_batch("left", 3)
    assert_same_step(got, eager_step("llama", want), real_tokens(want), "llama")


@pytest.mark.parametrize("how", ["seq_lens", "cu_seqlens", "position_ids"])
def test_4_packed_documents_keep_their_boundaries(how):
    """The original made one causal sequence of a packed batch."""
    batch = shifted(text_batch("packed"))
    positions = batch.pop("position_ids") if how != "position_ids" else batch["position_ids"]
    starts = [*(positions[0] == 0).nonzero().flatten().tolist(), 40]
    if how == "seq_lens":
        batch["seq_lens"] = torch.tensor([[*(b - a for a, b in itertools.pairwise(starts)), -1000]])
    elif how == "cu_seqlens":
        batch |= {"cu_seqlens": torch.tensor(starts), "max_seqlen": 21, "qkv_format": "thd"}
    got = run_on_ranks(2, recipe_step_on_rank, "llama", [batch], targets_of(batch))[0]
    truth = eager_step("llama", text_batch("packed"))
    assert_same_step(got, truth, torch.ones(1, 40, dtype=torch.bool), how)
    plain = eager_step("llama", text_batch("plain"))
    assert relative_error(plain.logits, truth.logits) > 1e-2  # boundaries matter here


def test_4_dropout_is_refused():
    magi.register_magi_attention()
    model = make_model("llama", "magi", attention_dropout=0.1)
    batch, _ = magi.magi_prepare_batch(model, text_batch("plain"), None)
    batch.pop("labels")
    with pytest.raises(ValueError, match="LlamaAttention of layer 0: attention dropout"):
        model(**batch)


def tree_on_rank(tree, batch):
    group = fresh_group()
    magi.register_magi_attention()
    model = make_model("llama", "magi")
    state = MagiState(True, False, group, dist.get_world_size(group))
    _, new = state.prepare_llm_batch(model, {**batch, "prefix_tree": tree}, None, False, 0, 1)
    logits = undispatch(model(**new).logits[0], magi._LAST_STEP[model].key)
    # The mask is that step's alone: the next batch without a tree is causal again.
    _, after = state.prepare_llm_batch(model, batch, None, False, 0, 1)
    causal = undispatch(model(**after).logits[0], magi._LAST_STEP[model].key)
    return logits.detach(), causal.detach()


def test_prefix_tree_on_the_hugging_face_path():
    """Refused by the original on this path; each sample is as it is alone."""
    tree = ([14, 9, 17], [[0, 1], [0, 2]])
    ids = text_batch("plain")["input_ids"]
    logits, causal = run_on_ranks(2, tree_on_rank, tree, {"input_ids": ids})[0]
    model = make_model("llama")
    samples = AttnMaskSpec.prefix_tree(*tree)[1]
    for ranges in samples:
        places = torch.cat([torch.arange(a, b) for a, b in ranges])
        assert relative_error(logits[places], model(input_ids=ids[:, places]).logits[0].detach()) < 1e-5
    assert relative_error(causal, model(input_ids=ids).logits[0].detach()) < 1e-5


def test_12_without_a_cp_axis_the_engine_still_attends(monkeypatch):
    """A mesh without "cp": the original called itself enabled and ran SDPA."""
    import cpattn.integrations.hf_attention as hf

    calls = []
    attend = hf.attention
    monkeypatch.setattr(hf, "attention", lambda *args, **kwargs: calls.append(1) or attend(*args, **kwargs))
    state = magi.setup_magi({"model.attn_implementation": "magi"}, None)
    assert state == MagiState(True, False, None, 1)
    model, batch = make_model("llama", "magi"), text_batch("right", 2)
    _, new = state.prepare_llm_batch(model, batch, None, False, 0, 1)
    new.pop("labels")
    calls.clear()  # of the placement probe
    out = model(**new)
    assert len(calls) == 2
    real, logits = real_tokens(batch), magi._LAST_STEP[model].gather(out.logits.detach())
    assert relative_error(logits[real], eager_step("llama", batch).logits[real]) < 1e-5


def test_13_recomputation_has_the_mask_of_its_own_micro_batch():
    """Two micro-batches of one length in flight under activation checkpointing: the original's layers
    took the key made last when they were run again."""
    batches = [text_batch("packed", seed=5), text_batch("plain", seed=6)]
    count = sum(int((b["labels"][:, 1:] != IGNORE).sum()) for b in batches)
    args = ([shifted(b) for b in batches], count, False, True)
    got = run_on_ranks(2, recipe_step_on_rank, "llama", *args)[0]
    grads = {}
    for batch in batches:
        step = eager_step("llama", batch)
        weight = int((batch["labels"][:, 1:] != IGNORE).sum()) / count
        grads = {name: grads.get(name, 0) + weight * grad for name, grad in step.grads.items()}
    for name, grad in grads.items():
        if grad.norm() > 1e-7:
            assert relative_error(got.grads[name], grad) < 1e-5, name


@pytest.mark.parametrize(("name", "rows"), [("gemma3_vl", 1), ("qwen2_vl", 3)])
def test_14_vision_models_over_ranks(name, rows):
    """Refused by the original beyond one rank, and one row; image tokens see each other in Gemma 3."""
    batch = vision_batch(name, "left", rows)
    prepared = shifted(batch)
    got = run_on_ranks(2, recipe_step_on_rank, name, [prepared], targets_of(prepared), True)[0]
    assert_same_step(got, eager_step(name, batch), real_tokens(batch), name)


def test_14_the_vision_tower_is_left_alone():
    """By what the model says its decoder is; a tower that cannot be told apart is an error."""
    for name in ("gemma3_vl", "qwen2_vl"):
        model = make_model(name)
        found = list(magi._iter_language_model_attention(model))
        assert found
        assert not [m for m in found if "Vision" in type(m).__name__ or "Siglip" in type(m).__name__]
        for module in found:
            assert any(module is m for m in model.get_decoder().modules())
    text = make_model("llama")
    assert len(list(magi._iter_language_model_attention(text))) == 2

    class Nameless(torch.nn.Module):
        config = make_model("gemma3_vl").config

    with pytest.raises(ValueError, match="its vision tower would get the language model's mask"):
        list(magi._iter_language_model_attention(Nameless()))


def lost_mask_on_rank(batch):
    group = fresh_group()
    magi.register_magi_attention()
    model = make_model("llama", "magi")
    new, _ = magi.magi_prepare_batch(model, batch, group)
    model(input_ids=new["input_ids"], position_ids=new["position_ids"])


def test_a_prepared_batch_without_its_mask_is_refused():
    with pytest.raises(RankError, match="LlamaAttention of layer 0 is prepared for 2 ranks"):
        run_on_ranks(2, lost_mask_on_rank, text_batch("plain"))


def test_generation_after_taking_the_group_away():
    magi.register_magi_attention()
    model = make_model("llama", "magi").eval()
    magi._set_cp_group_on_attention(model, None)
    ids = text_batch("plain")["input_ids"]
    eager = make_model("llama").eval().generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), eager)
