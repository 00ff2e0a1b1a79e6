"""Layer 2: heads, outputs and architectures under `ContextParallel`, each against eager in one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

pytest.importorskip("transformers")

import transformers as hf

from cpattn.integrations.transformers import ContextParallel
from cpattn.launch.benchmarks.hf_sweep import batches, eager_step, sharded_step
from cpattn.launch.benchmarks.tiny_models import make_lively, tiny_config
from tests_dist.support.harness import run_on_ranks
from tests_dist.support.hf_models import make_model, text_batch

SIZES = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def pair(kind: str, config) -> tuple:
    """The same lively weights under eager and under cpattn."""
    models = []
    for attention in ("eager", "cpattn"):
        torch.manual_seed(0)
        models.append(getattr(hf, kind)._from_config(config(), attn_implementation=attention).eval())
        make_lively(models[-1])
    return tuple(models)


def llama(kind: str = "LlamaForCausalLM", **changes) -> tuple:
    return pair(kind, lambda: hf.LlamaConfig(**{**SIZES, **changes}))


def close(got: Tensor, want: Tensor) -> None:
    error = float((got - want).norm() / want.norm())
    assert error < 1e-5, error


def grads_of(model) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same_grads(model, want: dict[str, Tensor]) -> None:
    largest = max(g.norm() for g in want.values())
    for name, grad in grads_of(model).items():
        assert float((grad - want[name]).norm()) < 1e-5 * max(float(want[name].norm()), 1e-2 * float(largest)), name


def sample_on_rank(model_types: tuple[str, ...]) -> None:
    for name in model_types:
        models = []
        for attention in ("eager", "cpattn"):
            torch.manual_seed(0)
            models.append(hf.AutoModelForCausalLM.from_config(tiny_config(name), attn_implementation=attention).eval())
            make_lively(models[-1])
        parallel = ContextParallel(models[1], dist.group.WORLD)
        for what in ("left", "packed"):
            batch = batches()[what]
            error, where = sharded_step(models[1], parallel, batch).error(eager_step(models[0], batch))
            assert error < 1e-5, f"{name}, {what}: {where} off by {error}"


SAMPLE = ["bart", "roberta", "opt", "qwen2_moe", "exaone4", "gemma4_text", "deepseek_v3", "bloom", "roformer", "xglm"]


@pytest.mark.parametrize("model_type", SAMPLE)
def test_a_sample_of_the_sweep(model_type):
    run_on_ranks(2, sample_on_rank, (model_type,))


@pytest.mark.parametrize("model_type", ["inkling2_text", "bloom"])
def test_a_model_outside_a_shard_adds_its_bias_its_sinks_and_its_mask(model_type):
    """Inkling passes a bias and a sink of each query (under a shard it is refused); BLOOM adds the mask itself."""
    models = []
    for attention in ("eager", "cpattn"):
        torch.manual_seed(0)
        config = tiny_config(model_type)
        models.append(hf.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval())
        make_lively(models[-1])
    batch = {name: value for name, value in batches()["left"].items() if name != "labels"}
    with torch.no_grad():
        want, got = (model(**batch, use_cache=False).logits[batch["attention_mask"].bool()] for model in models)
    close(got, want)


@pytest.mark.nightly
def test_the_sweep():
    """Every type of the installed transformers; 0 wrong, 0 crash."""
    from cpattn.launch.benchmarks import hf_sweep

    assert hf_sweep.main([]) == 0


def rope_on_rank(rope: dict, columns: int) -> None:
    """Frequencies by the longest position: one long row and one short, so that ranks' own maxima differ."""
    eager, model = llama(rope_parameters={"rope_theta": 1e4, **rope}, max_position_embeddings=16)
    ids = torch.randint(4, 97, (2, columns), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    want = eager(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    out = ContextParallel(model, dist.group.WORLD)({"input_ids": ids, "attention_mask": mask})
    close(out.shard.gather(out.logits)[mask.bool()], want)


def test_rope_that_follows_the_longest_position_follows_that_of_the_whole_batch():
    longrope = {"rope_type": "longrope", "original_max_position_embeddings": 16, "factor": 4.0}
    longrope |= {"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 3.0, 5.0]}
    run_on_ranks(2, rope_on_rank, longrope, 20)
    run_on_ranks(2, rope_on_rank, {"rope_type": "dynamic", "factor": 2.0}, 30)


def llama4_on_rank() -> None:
    changes = {"intermediate_size_mlp": 48, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 1}
    changes |= {"attention_chunk_size": 64, "no_rope_layers": [1, 0], "floor_scale": 4, "attn_scale": 0.5}
    eager, model = pair("Llama4ForCausalLM", lambda: hf.Llama4TextConfig(**SIZES, **changes))
    parallel = ContextParallel(model, dist.group.WORLD)
    for what in ("right", "packed"):
        error, where = sharded_step(model, parallel, batches()[what]).error(eager_step(eager, batches()[what]))
        assert error < 1e-5, f"{what}: {where}"


def test_llama_4_scales_queries_by_their_true_positions():
    run_on_ranks(2, llama4_on_rank)


def router_on_rank(asked_by: str) -> None:
    config = {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.5}
    eager, model = pair("MixtralForCausalLM", lambda: hf.MixtralConfig(**config, sliding_window=None))
    batch = batches()["right"]
    want = eager(**batch, output_router_logits=True)
    want.loss.backward()
    parallel = ContextParallel(model, dist.group.WORLD)
    if asked_by == "config":
        model.config.output_router_logits = True
    asked = {"output_router_logits": True}
    out = parallel({**batch, **(asked if asked_by == "batch" else {})}, **(asked if asked_by == "keyword" else {}))
    out.loss.backward()
    parallel.reduce_gradients()
    close(out.loss.detach(), want.loss.detach())
    close(out.outputs.aux_loss.detach(), want.aux_loss.detach())
    same_grads(model, grads_of(eager))


@pytest.mark.parametrize("asked_by", ["batch", "keyword", "config"])
def test_the_routers_loss_is_over_all_ranks_tokens(asked_by):
    run_on_ranks(2, router_on_rank, asked_by)


def foreign_router_loss_on_rank() -> None:
    config = {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}
    _, model = pair("MixtralForCausalLM", lambda: hf.MixtralConfig(**config, sliding_window=None))
    forward = type(model).forward

    def local_loss(**kwargs):
        out = forward(model, **kwargs)
        out.aux_loss = torch.stack([gate.logsumexp(-1).square().mean() for gate in out.router_logits]).mean()
        return out

    model.forward = local_loss
    ContextParallel(model, dist.group.WORLD, check=False)(batches()["right"], output_router_logits=True)


def test_a_router_loss_that_is_not_known_is_refused():
    with pytest.raises(Exception, match="has a router loss of its own"):
        run_on_ranks(2, foreign_router_loss_on_rank)


def classes_on_rank(problem: str) -> None:
    eager, model = llama("LlamaForSequenceClassification", num_labels=1 if problem == "regression" else 3)
    batch = {k: v for k, v in batches()["right"].items() if k != "labels"}
    labels = torch.tensor([2, 0]) if problem == "classes" else torch.tensor([0.3, -1.0])
    want = eager(**batch, labels=labels)
    want.loss.backward()
    parallel = ContextParallel(model, dist.group.WORLD)
    out = parallel({**batch, "labels": labels})
    out.loss.backward()
    parallel.reduce_gradients()
    close(out.logits.detach(), want.logits.detach())
    close(out.loss.detach(), want.loss.detach())
    same_grads(model, grads_of(eager))


@pytest.mark.parametrize("problem", ["classes", "regression"])
def test_sequence_classification_reads_the_rows_last_tokens(problem):
    run_on_ranks(2, classes_on_rank, problem)


def opt_classes_on_rank() -> None:
    """Its embeddings run over the whole batch, and it pools what it takes for one."""
    sizes = {"vocab_size": 97, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = hf.OPTConfig(**sizes, word_embed_proj_dim=32, max_position_embeddings=64, pad_token_id=0, num_labels=3)
    models = []
    for attention in ("eager", "cpattn"):
        torch.manual_seed(0)
        models.append(hf.OPTForSequenceClassification._from_config(config, attn_implementation=attention).eval())
    eager, model = models
    batch = {k: v for k, v in batches()["left"].items() if k != "labels"}
    want = eager(**batch, labels=torch.tensor([2, 0]))
    want.loss.backward()
    parallel = ContextParallel(model, dist.group.WORLD)
    assert parallel.cut == "layers"
    out = parallel({**batch, "labels": torch.tensor([2, 0])})
    out.loss.backward()
    parallel.reduce_gradients()
    close(out.logits.detach(), want.logits.detach())
    same_grads(model, grads_of(eager))


def test_sequence_classification_of_a_model_that_numbers_its_tokens():
    run_on_ranks(2, opt_classes_on_rank)


def bert_for_masked_lm(attention: str):
    config = hf.BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    torch.manual_seed(0)
    return hf.BertForMaskedLM._from_config(config, attn_implementation=attention)


def token_classes_on_rank(head: str) -> None:
    if head == "masked":
        eager, model = (bert_for_masked_lm(name) for name in ("eager", "cpattn"))
    else:
        eager, model = llama("LlamaForTokenClassification", num_labels=3)
    batch = batches()["right"]
    real = batch["attention_mask"].bool()
    batch["labels"] = (batch["input_ids"] % 3).masked_fill(~real, -100)
    want = eager(**batch)
    want.loss.backward()
    parallel = ContextParallel(model, dist.group.WORLD)
    out = parallel(batch)
    out.loss.backward()
    parallel.reduce_gradients()
    assert parallel.count_targets([batch]) == int(real.sum())
    close(out.shard.gather(out.logits.detach())[real], want.logits.detach()[real])
    close(out.loss.detach(), want.loss.detach())
    same_grads(model, grads_of(eager))


@pytest.mark.parametrize("head", ["classes", "masked"])
def test_labels_of_tokens_are_not_shifted(head):
    run_on_ranks(2, token_classes_on_rank, head)


def test_models_without_a_head_or_with_an_encoder_are_refused():
    with pytest.raises(ValueError, match=r"LlamaModel returned no logits .*AutoModelForCausalLM"):
        ContextParallel(hf.LlamaModel._from_config(hf.LlamaConfig(**SIZES), attn_implementation="cpattn"))
    config = hf.T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder model"):
        ContextParallel(hf.T5ForConditionalGeneration._from_config(config, attn_implementation="cpattn"))


def test_heads_that_are_not_known_are_refused():
    for kind in ("LlamaForQuestionAnswering", "BertForSequenceClassification"):
        config = hf.LlamaConfig(**SIZES) if "Llama" in kind else hf.BertConfig(**SIZES, is_decoder=True)
        with pytest.raises(ValueError, match=kind):
            ContextParallel(getattr(hf, kind)._from_config(config, attn_implementation="cpattn"))


def kept_on_rank(keep) -> None:
    eager, model = llama()
    batch = {k: v for k, v in batches()["left"].items() if k != "labels"}
    want = eager(**batch, logits_to_keep=keep).logits
    columns = torch.arange(24)[-keep:] if isinstance(keep, int) else keep
    real = batch["attention_mask"].bool()[:, columns]
    weights = torch.randn(want.shape, generator=torch.Generator().manual_seed(2)) * real[..., None]
    (want * weights).sum().backward()
    parallel = ContextParallel(model, dist.group.WORLD)
    out = parallel(batch, logits_to_keep=keep)
    (out.logits * weights).sum().backward()
    parallel.reduce_gradients()
    close(out.logits.detach()[real], want.detach()[real])
    same_grads(model, grads_of(eager))
    with pytest.raises(ValueError, match="logits_to_keep with labels"):
        parallel(batches()["left"], logits_to_keep=keep)


@pytest.mark.parametrize("keep", [5, torch.tensor([22, 3, -1])])
def test_logits_to_keep_are_the_places_of_the_batch(keep):
    run_on_ranks(2, kept_on_rank, keep)


def outputs_on_rank() -> None:
    eager, model = llama()
    parallel, batch = ContextParallel(model, dist.group.WORLD), batches()["right"]
    real = batch["attention_mask"].bool()
    want = eager(**batch, output_hidden_states=True).hidden_states
    got = parallel(batch, output_hidden_states=True).outputs.hidden_states
    assert len(got) == len(want) == 3
    for a, b in zip(got, want, strict=True):
        close(a[real].detach(), b[real].detach())
    for states in (got, want):  # a head of one's own, the same on every rank
        states[-1][real].square().sum().backward()
    parallel.reduce_gradients()
    assert not model.lm_head.weight.grad.any()
    model.lm_head.weight.grad = None
    same_grads(model, grads_of(eager))
    refused = {"output_attentions": True, "return_dict": False}
    for name, value in refused.items():
        with pytest.raises(ValueError, match=name):
            parallel(batch, **{name: value})
        with pytest.raises(ValueError, match=name):
            parallel({**batch, name: value})


def test_hidden_states_are_gathered_and_attentions_refused():
    run_on_ranks(2, outputs_on_rank)


def weights_on_rank(broadcast: bool) -> None:
    model = make_model("llama", "cpattn", seed=0)
    if dist.get_rank() == 1:
        with torch.no_grad():
            model.model.norm.weight[3] += 1e-4
    ContextParallel(model, dist.group.WORLD, broadcast=broadcast)
    assert torch.equal(model.model.norm.weight, make_model("llama", seed=0).model.norm.weight)


def test_ranks_with_different_weights_are_told_or_made_equal():
    with pytest.raises(Exception, match=r"ranks \[1\] of the group .* 1 of \d+ differ \(model\.norm\.weight\)"):
        run_on_ranks(2, weights_on_rank, False)
    run_on_ranks(2, weights_on_rank, True)


def test_it_is_a_module_with_the_models_names():
    from cpattn.nn import ContextParallel as Exported

    assert Exported is ContextParallel
    model = make_model("llama", "cpattn")
    parallel = ContextParallel(model)
    assert parallel.training
    assert list(parallel.state_dict()) == list(model.state_dict())
    assert [n for n, _ in parallel.named_parameters()] == [n for n, _ in model.named_parameters()]
    parallel.eval()
    assert not model.training
    assert parallel.config is model.config
    held = torch.nn.Sequential(parallel)
    assert list(held.state_dict()) == [f"0.{name}" for name in model.state_dict()]
    other = torch.nn.Sequential(ContextParallel(make_model("llama", "cpattn", seed=1)))
    other.load_state_dict(held.state_dict())
    parallel.load_state_dict(model.state_dict())
    batch = text_batch("plain")
    assert torch.equal(other[0](batch).loss, parallel(batch).loss)


def test_processes_that_would_train_alone_are_told(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="no process group was made"):
        ContextParallel(make_model("llama", "cpattn"))


def test_models_that_attend_by_themselves_are_refused_at_load():
    own = "does not attend through transformers' attention interface"
    for name, why in {"mpt": own, "falcon": own, "gpt_neo": own, "deepseek_v32": "choose keys by an indexer"}.items():
        with pytest.raises(ValueError, match=why):
            hf.AutoModelForCausalLM.from_config(tiny_config(name), attn_implementation="cpattn")
    with pytest.raises(ValueError, match=own):  # a composite that looks its layers up by the attention's name
        hf.GitForCausalLM._from_config(hf.GitConfig(num_hidden_layers=1), attn_implementation="cpattn")


@pytest.mark.parametrize(
    "first",
    [
        pytest.param("import cpattn", marks=pytest.mark.nightly),
        pytest.param("import transformers.modeling_utils, cpattn", marks=pytest.mark.nightly),
        "",
        pytest.param("import torch", marks=pytest.mark.nightly),
    ],
)
def test_a_script_may_forget_to_register(first, tmp_path):
    """And to import the package at all, where it is installed: torch calls its entry point."""
    lines = (Path(__file__).parents[2] / "pyproject.toml").read_text().splitlines()
    entry = lines[lines.index('[project.entry-points."torch.backends"]') + 1].replace('"', "")
    installed = tmp_path / "installed-0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: installed\nVersion: 0\n")
    (installed / "entry_points.txt").write_text(f"[torch.backends]\n{entry}\n")
    code = f"{first}\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"
    code += "sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)\n"
    code += "LlamaForCausalLM._from_config(LlamaConfig(**sizes), attn_implementation='cpattn')"
    env = os.environ | ({} if "cpattn" in first else {"PYTHONPATH": str(tmp_path)})
    subprocess.run([sys.executable, "-c", code], check=True, env=env)
