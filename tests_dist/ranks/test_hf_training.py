"""Runtime layer: training transformers models over ranks: accumulation, wrappers, recomputation, evaluation, guards."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers")



from cpattn import AttnMaskSpec
from cpattn.integrations.batch_layout import layout_of_spec, shifted_labels
from cpattn.integrations.transformers import ContextParallel, register_attention
from tests_dist.support.harness import RankError, run_on_ranks
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
from tests_dist.support.hf_rank_cases import parallel_steps


def one_loss(name, batches):
    """Eager gradients of the mean loss over all targets of several batches; logits of the last."""
    model = make_model(name)
    count = sum(int((b["labels"][:, 1:] != IGNORE).sum()) for b in batches)
    total = torch.zeros(())
    for batch in batches:
        out = model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False)
        targets = batch["labels"][:, 1:].flatten()
        loss = torch.nn.functional.cross_entropy(
            out.logits[:, :-1].flatten(0, 1), targets, ignore_index=IGNORE, reduction="sum"
        )
        (loss / count).backward()
        total += loss.detach() / count
    return StepResult(out.logits.detach(), total, gradients(model))


def few_labels(batch, keep):
    """All but `keep` labels of the last row are taken away: most shards have none."""
    labels = torch.full_like(batch["labels"], IGNORE)
    labels[-1, 20 : 20 + keep] = batch["input_ids"][-1, 20 : 20 + keep]
    return {**batch, "labels": labels}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_gradient_accumulation_of_different_batches(checkpointing):
    """Two micro-batches, one with two labels in all: shards and batches weigh by their targets.

    With checkpointing both are in flight at once, and each layer is run again with its own mask.
    """
    batches = [text_batch("right", 2, seed=1), few_labels(text_batch("plain", 1, columns=31, seed=2), 2)]
    cases = {name: (name, batches) for name in ("llama", "gpt_oss")}
    results = run_on_ranks(4, parallel_steps, cases, checkpointing=checkpointing)[0]
    for name, (_, batches) in cases.items():
        assert_same_step(results[name], one_loss(name, batches), real_tokens(batches[-1]), name)


def test_no_label_at_all_and_ranks_without_tokens():
    """A batch of three tokens on four ranks; then one without a single target: loss 0, gradients 0."""
    small = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[5, 6, 7]])}
    empty = text_batch("plain")
    empty["labels"] = torch.full_like(empty["labels"], IGNORE)
    cases = {"small": ("llama", [small]), "empty": ("llama", [empty])}
    results = run_on_ranks(4, parallel_steps, cases)[0]
    assert_same_step(results["small"], eager_step("llama", small), real_tokens(small), "three tokens")
    assert results["empty"].loss == 0
    assert all((grad == 0).all() for grad in results["empty"].grads.values())


def wrapped_step_on_rank(name, batches, wrapper):
    """Two data-parallel replicas of two context-parallel ranks (or one of four under DDP)."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    register_attention()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    model = make_model(name, "cpattn")
    if wrapper == "fsdp2":
        everyone = mesh["dp", "cp"]._flatten("dp_cp")
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for layer in model.get_decoder().layers:
            fully_shard(layer, mesh=everyone)
        fully_shard(model, mesh=everyone)
    else:
        model = torch.nn.parallel.DistributedDataParallel(model)
    parallel = ContextParallel(model, mesh, loss_group=mesh, grad_reduction="mean")
    out = parallel(batches[mesh.get_local_rank("dp")])
    out.loss.backward()
    grads = {n.removeprefix("module."): p.grad for n, p in model.named_parameters()}
    whole = {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in grads.items()}
    return StepResult(out.shard.gather(out.logits).detach(), out.loss.detach(), whole)


@pytest.mark.parametrize(
    ("name", "wrapper"),
    [("gemma3", "fsdp2"), pytest.param("gpt_oss", "fsdp2", marks=pytest.mark.nightly), ("llama", "ddp")],
)
def test_data_parallel_by_context_parallel(name, wrapper):
    """2 x 2 ranks, a different batch for each replica: one mean over all of their targets."""
    batches = [text_batch("left", 2, seed=3), few_labels(text_batch("right", 2, seed=4), 3)]
    results = run_on_ranks(4, wrapped_step_on_rank, name, batches, wrapper)
    truth = one_loss(name, batches)
    for rank, got in enumerate(results):
        batch = batches[rank // 2]
        logits = make_model(name)(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        assert_same_step(got, truth._replace(logits=logits.detach()), real_tokens(batch), f"{name} rank {rank}")


def tensor_parallel_on_rank(batch):
    """Attention heads split over two ranks, the sequence over two more."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    register_attention()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "tp"))
    model = make_model("llama", "cpattn")
    plan = dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ColwiseParallel())
    for layer in model.model.layers:
        parallelize_module(layer, mesh["tp"], {**plan, "self_attn.o_proj": RowwiseParallel()})
    parallel = ContextParallel(model, mesh)
    out = parallel(batch)
    out.loss.backward()
    parallel.reduce_gradients()
    grads = {n: p.grad for n, p in model.named_parameters()}
    whole = {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in grads.items()}
    return StepResult(out.shard.gather(out.logits).detach(), out.loss.detach(), whole)


def test_heads_of_a_tensor_parallel_rank():
    batch = text_batch("right", 2)
    got = run_on_ranks(4, tensor_parallel_on_rank, batch)[0]
    assert_same_step(got, eager_step("llama", batch), real_tokens(batch), "tp 2 x cp 2")


def evaluate_on_rank(batch):
    register_attention()
    model = make_model("gemma3", "cpattn").eval()
    parallel = ContextParallel(model, dist.group.WORLD)
    with torch.no_grad():
        out = parallel({k: v for k, v in batch.items() if k != "labels"}, output_hidden_states=True)
    assert out.loss is None
    logits = out.shard.gather(out.logits, fill_value=-1.0)
    hidden = out.shard.gather(out.outputs.hidden_states[-1])
    return logits, hidden, out.logits.shape[1]


def test_evaluation_gathers_logits_and_hidden_states():
    """In the batch's own order, on every rank; padding gets the fill value."""
    batch = text_batch("left", 3)
    real = real_tokens(batch)
    with torch.no_grad():
        out = make_model("gemma3").eval()(**batch, output_hidden_states=True)
    results = run_on_ranks(4, evaluate_on_rank, batch)
    assert sum(local for *_, local in results) == int(real.sum())  # padding is not computed
    for logits, hidden, _ in results:
        assert relative_error(logits[real], out.logits[real]) < 1e-5
        assert relative_error(hidden[real], out.hidden_states[-1][real]) < 1e-5
        assert (logits[~real] == -1).all()


def test_generate_without_a_shard():
    """The same model object generates by itself, with a cache, as the eager model does."""
    register_attention()
    batch = {k: v for k, v in text_batch("left", 2).items() if k != "labels"}
    for name in ("gemma2", "gpt_oss"):
        tokens = [
            make_model(name, attention).eval().generate(**batch, max_new_tokens=6, do_sample=False)
            for attention in ("eager", "cpattn")
        ]
        assert torch.equal(*tokens), name


# Guards: what would be ignored is refused, by layer.


def local_model(name="llama", **changes):
    register_attention()
    return make_model(name, "cpattn", **changes)


def test_attention_dropout_is_refused_by_layer():
    model = local_model(attention_dropout=0.1)
    with pytest.raises(ValueError, match=r"LlamaAttention of layer 0: attention dropout 0\.1"):
        ContextParallel(model)(text_batch("plain"))


def test_output_attentions_is_refused():
    with pytest.raises(ValueError, match="output_attentions: there is no matrix"):
        ContextParallel(local_model())(text_batch("plain"), output_attentions=True)


def test_an_unknown_bias_is_refused():
    with pytest.raises(ValueError, match="layer 0: position_bias would be ignored"):
        ContextParallel(local_model())(text_batch("plain"), position_bias=torch.zeros(1))
    with pytest.raises(ValueError, match="layer 0: cpattn does not know the argument extra_scores"):
        ContextParallel(local_model())(text_batch("plain"), extra_scores=torch.zeros(1))


def test_a_window_that_the_mask_lacks_is_refused():
    model = local_model("mistral")
    model.model.layers[0].self_attn.config = copy.deepcopy(model.config)
    model.model.layers[0].self_attn.config.sliding_window = 3
    model.config.sliding_window = None  # the masks are then made without it
    with pytest.raises(ValueError, match="MistralAttention of layer 0: the layer has a sliding window of 3"):
        ContextParallel(model)(text_batch("plain"))


def test_a_softcap_that_is_not_passed_on_is_refused():
    with pytest.raises(ValueError, match="Gemma3Attention of layer 0: attn_logit_softcapping"):
        ContextParallel(local_model("gemma3", attn_logit_softcapping=2.0))(text_batch("plain"))


def test_a_mask_of_unknown_make_is_refused():
    model = local_model("gemma3")
    model.config.use_bidirectional_attention = True
    with pytest.raises(ValueError, match="which cpattn does not know"):
        ContextParallel(model)(text_batch("plain"))


def test_a_model_that_does_not_use_the_interface_is_noticed():
    """As with a prefix-tree spec that no layer consumes: an error, not causal attention."""
    model = make_model("llama", "sdpa")
    with pytest.raises(ValueError, match="0 of 2 layers that mix tokens ran under context parallelism"):
        ContextParallel(model)(text_batch("plain"))


def test_recurrent_layers_are_refused():
    import transformers as hf

    config = hf.MambaConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1, state_size=4)
    with pytest.raises(ValueError, match="mixes tokens outside attention"):
        ContextParallel(hf.MambaForCausalLM(config))


def test_mask_values_and_cache_are_refused():
    batch = text_batch("right")
    with pytest.raises(ValueError, match="values other than 0 and 1"):
        ContextParallel(local_model()).shard({**batch, "attention_mask": batch["attention_mask"] * 2})
    with pytest.raises(ValueError, match="past_key_values"):
        ContextParallel(local_model()).shard({**batch, "past_key_values": object()})
    with pytest.raises(ValueError, match="token_type_ids"):
        ContextParallel(local_model()).shard({**batch, "token_type_ids": torch.zeros(1, 40)})


def different_batches_on_rank():
    register_attention()
    parallel = ContextParallel(make_model("llama", "cpattn"), dist.group.WORLD)
    parallel.shard(text_batch("plain", seed=dist.get_rank()))


def test_ranks_with_different_data_are_told():
    """A sampler that gives every rank its own data is the usual mistake."""
    with pytest.raises(RankError, match="input_ids differs between ranks"):
        run_on_ranks(2, different_batches_on_rank)


# Masks given whole, and prefix trees.


def test_four_dimensional_mask():
    """A custom mask (two documents that both see a common start), bool and additive, equals eager."""
    batch = text_batch("plain", 2)
    visible = torch.ones(40, 40, dtype=torch.bool).tril()
    visible[25:, 10:25] = False
    batch["labels"][:, 25] = IGNORE  # it does not see the token before it, which therefore does not predict it
    lowest = torch.finfo(torch.float32).min
    additive = torch.zeros(2, 1, 40, 40).masked_fill(~visible, lowest)
    truth = eager_step("llama", {**batch, "attention_mask": additive})
    for mask in (visible[None, None], additive):
        model = local_model()
        out = ContextParallel(model)({**batch, "attention_mask": mask})
        out.loss.backward()
        got = StepResult(out.shard.gather(out.logits).detach(), out.loss.detach(), gradients(model))
        assert_same_step(got, truth, torch.ones(2, 40, dtype=torch.bool), "4-D mask")


def test_holes_in_the_attention_mask():
    """Masked tokens in the middle: the others see what eager shows them, windows count columns."""
    batch = text_batch("plain", 2)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][0, 12:15] = 0
    batch["attention_mask"][1, [3, 30]] = 0
    for row, column in ((0, slice(11, 16)), (1, [2, 3, 4, 29, 30, 31])):
        batch["labels"][row, column] = IGNORE
    for name in ("qwen2", "mistral"):
        model = local_model(name)
        out = ContextParallel(model)(batch)
        out.loss.backward()
        got = StepResult(out.shard.gather(out.logits).detach(), out.loss.detach(), gradients(model))
        assert_same_step(got, eager_step(name, batch), real_tokens(batch), name)


def test_labels_of_the_next_document_are_not_targets():
    """Nothing is learnt across a boundary, labelled or not."""
    batch = text_batch("packed")
    labelled = {**batch, "labels": batch["input_ids"].clone()}
    first = labelled["labels"].clone()
    first[batch["position_ids"] == 0] = IGNORE
    both = (labelled["labels"], first)
    losses = [ContextParallel(local_model())({**batch, "labels": labels}).loss.item() for labels in both]
    assert losses[0] == losses[1]


def test_a_mask_given_whole_says_which_targets_there_are():
    """Packed documents by position_ids, by a 4-D mask, and by a spec: the same targets, loss, and count."""
    lengths = [5, 13, 20]
    ids = torch.randint(1, 61, (1, 38), generator=torch.Generator().manual_seed(0))
    spec = AttnMaskSpec.varlen(lengths)
    given = {
        "positions": ({"position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}, None),
        "4-D": ({"attention_mask": torch.from_numpy(spec.to_dense())[None, None]}, None),
        "spec": ({}, spec),
    }
    parallel, losses = ContextParallel(local_model()), []
    for name, (fields, mask) in given.items():
        batch = {"input_ids": ids, "labels": ids, **fields}
        if name != "positions":  # the rotary positions are a matter of their own
            batch["position_ids"] = given["positions"][0]["position_ids"]
        out = parallel(batch, spec=mask)
        ends = (out.shard.gather(out.shard.targets.unsqueeze(-1), IGNORE)[0, :, 0] == IGNORE).nonzero().flatten()
        assert ends.tolist() == [4, 17, 37], name
        assert parallel.count_targets([batch], specs=[mask]) == 35
        losses.append(out.loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) == pytest.approx(losses[2], rel=1e-6)


def test_a_tree_has_targets_where_the_next_token_sees():
    """A root, a branch that goes on from it, and another that follows the first branch in the sequence only."""
    spec = AttnMaskSpec.prefix_tree([3, 2, 2], [[0, 1], [0, 2]])[0]
    labels = torch.arange(7)[None]
    assert shifted_labels(labels, layout_of_spec(1, 7, spec)).tolist() == [[1, 2, 3, 4, IGNORE, 6, IGNORE]]


def test_bad_batches_are_refused():
    parallel, batch = ContextParallel(local_model()), text_batch("plain")
    no_labels = {"input_ids": batch["input_ids"]}
    for call, message in (
        (lambda: parallel.count_targets(batch), "in a list: this is a single batch"),
        (lambda: parallel.count_targets([no_labels]), "neither labels nor shift_labels"),
        (lambda: parallel.count_targets([{"labels": batch["labels"]}]), "the batch needs input_ids"),
        (lambda: parallel.count_targets([batch], specs=[]), "1 batches and 0 specs"),
        (lambda: parallel(no_labels, labels=batch["labels"]), "labels cannot be given as keywords"),
        (lambda: parallel(batch, num_targets=-1), "num_targets is -1"),
        (lambda: parallel({"input_ids": torch.zeros(1, 0, dtype=torch.int64)}), "B and S at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def wanted_log_probabilities() -> None:
    """Refused on every rank alike, before any of them waits for the others."""
    register_attention()
    parallel = ContextParallel(make_model("llama", "cpattn"), dist.group.WORLD)
    batch = text_batch("right", 2)
    out = parallel(batch)
    real = int((batch["attention_mask"].flatten() == 0).nonzero()[0])
    odd = dist.get_rank() == 1
    for places, tokens, message in (
        ([0, 999], [1, 2], "place 999 holds no token of the batch: it has 2 x 40 places"),
        ([-1], [1], "place -1 holds no token"),
        ([real], [1], f"place {real} holds no token"),
        ([0, 1], [1], r"places is torch.int64 \(2,\) and tokens torch.int64 \(1,\)"),
        ([0], [10**6], "token 1000000 is not among the model's"),
        ([0, 1 + odd], [1, 2], "token_logprobs: places differs between ranks"),
        ([0], [1 + odd], "token_logprobs: tokens differs between ranks"),
    ):
        with pytest.raises(ValueError, match=message):
            parallel.token_logprobs(out, torch.tensor(places), torch.tensor(tokens))
    assert parallel.token_logprobs(out, torch.tensor([0]), torch.tensor([1])).isfinite().all()


def test_wanted_log_probabilities_are_checked():
    run_on_ranks(2, wanted_log_probabilities, timeout=60)


def test_vision_positions_are_those_of_the_whole_batch():
    """Text-only batches of a vision model take the same way."""
    batch = {k: v for k, v in vision_batch("qwen2_vl").items() if k in ("input_ids", "labels")}
    batch["input_ids"] = batch["input_ids"].clamp(max=80)
    model = local_model("qwen2_vl")
    out = ContextParallel(model)(batch)
    out.loss.backward()
    got = StepResult(out.shard.gather(out.logits).detach(), out.loss.detach(), gradients(model))
    assert_same_step(got, eager_step("qwen2_vl", batch), real_tokens(batch), "text only")


def test_core_imports_without_transformers():
    import subprocess
    import sys

    code = "import sys; sys.modules['transformers'] = None; import cpattn, cpattn.magi_api; cpattn.make_key; "
    code += "import cpattn.automodel.magi_attn_utils, cpattn.integrations.prefix_tree"
    subprocess.run([sys.executable, "-c", code], check=True)


