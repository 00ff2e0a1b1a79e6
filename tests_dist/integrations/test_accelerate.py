"""Layer 2: a loop of one's own on accelerate, on context-parallel groups, against the same loop on one process."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

pytest.importorskip("accelerate", reason="tested with accelerate (pip install cpattn[trainers])")
pytest.importorskip("transformers")

from tests_dist.support.harness import run_on_ranks
from tests_dist.support.hf_models import make_model
from tests_dist.support.trainer_cases import IMPORTS_S, Outcome, as_torchrun, padded, require_same, rows, weights_of


@contextlib.contextmanager
def as_on_gpus() -> Iterator[None]:
    """What accelerate finds of its ranks, as on GPUs, with the CPU for a device.

    It shards weights and keeps a ParallelismConfig's context parallelism for types of accelerators only (state.py,
    where it lists MULTI_GPU to MULTI_NEURON and leaves MULTI_CPU out); nothing else of it is changed.
    """
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    found = mock.patch.object(PartialState, "_prepare_backend", return_value=("gloo", DistributedType.MULTI_GPU))
    device = {"ACCELERATE_TORCH_DEVICE": "cpu", "ACCELERATE_USE_CPU": "false"}
    with as_torchrun(), found, mock.patch.dict(os.environ, device):
        yield


def sharding_weights(replicas: int) -> Any:
    """An accelerator with FSDP2, and a ParallelismConfig that says how many ranks share a batch."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin, ParallelismConfig

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["LlamaDecoderLayer"]
    )
    config = ParallelismConfig(cp_size=2, dp_shard_size=replicas)
    return Accelerator(gradient_accumulation_steps=2, fsdp_plugin=plugin, parallelism_config=config)


def even(texts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With as many targets in each: the mean of the replicas' means, which such a loop learns by, is that of one."""
    return [{"input_ids": text["input_ids"][:12], "labels": text["input_ids"][:12]} for text in texts]


def learn(cp_size: int, sharded: bool = False) -> Outcome:
    """Four batches, steps of two micro-batches, a schedule, and gathered losses of an evaluation."""
    from accelerate import Accelerator

    from cpattn.integrations.accelerate import context_parallel

    with as_on_gpus() if sharded else as_torchrun():
        if sharded:
            accelerator = context_parallel(sharding_weights(dist.get_world_size() // cp_size))
        else:
            accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
            accelerator = context_parallel(accelerator, cp_size) if cp_size > 1 else accelerator
        replicas = accelerator.num_processes
        model: Any = make_model("llama", "cpattn" if cp_size > 1 else "eager")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        # A prepared schedule steps once for each replica.
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step // replicas))
        loader = DataLoader(even(rows(16)), batch_size=4 // replicas, collate_fn=padded)
        model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
        log, norms = [], []
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norms.append(accelerator.clip_grad_norm_(model.parameters(), 0.5))
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            mean = accelerator.gather(loss.detach()).mean() if replicas > 1 else loss
            log.append({"loss": float(mean), "sum": float(accelerator.reduce(loss.detach(), "sum")) / replicas})
        model.eval()
        evaluation = accelerator.prepare(DataLoader(rows(6, seed=1), batch_size=4 // replicas, collate_fn=padded))
        seen = []
        for batch in evaluation:
            with torch.no_grad():
                logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            real = batch["attention_mask"].bool()[..., None]
            seen.append(accelerator.gather_for_metrics((logits * real).sum((1, 2))))
            names = accelerator.gather_for_metrics([str(int(n)) for n in batch["input_ids"][:, 0]])
            assert len(names) == len(seen[-1])
        log += [{f"row {n}": float(value)} for n, value in enumerate(torch.cat(seen))]
        log += [{"norm": float(whole(norm))} for norm in norms]
        assert any(hasattr(p, "full_tensor") for p in model.parameters()) == sharded
        weights = weights_of(accelerator.unwrap_model(model))
        return Outcome(log, {name: whole(weight) for name, weight in weights.items()})


def whole(x: Any) -> torch.Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def compare_on_rank(want: Outcome, cp_size: int, sharded: bool = False) -> None:
    require_same(learn(cp_size, sharded), want)


def test_a_loop_equals_one_process():
    run_on_ranks(2, compare_on_rank, learn(1), 2, timeout=IMPORTS_S)


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.nightly)])
def test_a_loop_on_fsdp2_with_a_parallelism_config_equals_one_process(ranks):
    run_on_ranks(ranks, compare_on_rank, learn(1), 2, True, timeout=IMPORTS_S)


def groups_on_rank() -> list[Any]:
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    from cpattn.integrations.accelerate import context_parallel

    with as_torchrun():
        accelerator = context_parallel(Accelerator(cpu=True), 2)
        loader = accelerator.prepare(DataLoader(range(10), batch_size=2))
        batches = [batch.tolist() for batch in loader]
        assert accelerator.gather(torch.tensor([accelerator.process_index])).tolist() == [0, 1]
        assert float(accelerator.reduce(torch.ones(()), "sum")) == 2.0
        assert float(accelerator.reduce(torch.ones(()), "mean")) == 1.0
        assert len(accelerator.gather_for_metrics(["a"] * (1 + accelerator.process_index))) == 3
        with pytest.raises(ValueError, match="cp_size is 3 and there are 4 ranks"):
            context_parallel(Accelerator(cpu=True), 3)
        split = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(split_batches=True))
        with pytest.raises(ValueError, match="split_batches and dispatch_batches"):
            context_parallel(split, 2)
        return [accelerator.process_index, accelerator.num_processes, dist.get_rank(accelerator.cp_group), batches]


def configured_on_rank() -> None:
    """accelerate itself takes no ParallelismConfig on CPU: what is made of one is looked at alone."""
    from accelerate import ParallelismConfig

    from cpattn.integrations.accelerate import _join_cp_and_shards, context_parallel

    config = ParallelismConfig(cp_size=2, dp_shard_size=2)
    accelerator: Any = SimpleNamespace(parallelism_config=config, state=SimpleNamespace(), device=torch.device("cpu"))
    _join_cp_and_shards(accelerator)
    joined = accelerator.state.parallelism_config
    assert (joined.cp_size, joined.dp_shard_size, joined.cp_enabled) == (1, 4, False)
    assert accelerator.state.device_mesh.mesh_dim_names == ("dp_shard",)
    accelerator.state.num_processes = 4
    with pytest.raises(ValueError, match="cp_size is 4 and the ParallelismConfig says 2"):
        context_parallel(accelerator, 4)
    accelerator.parallelism_config = ParallelismConfig(tp_size=2, dp_shard_size=2)
    accelerator.distributed_type = SimpleNamespace(value="FSDP")
    with pytest.raises(ValueError, match=r"ParallelismConfig\(tp_size=2\): not supported"):
        context_parallel(accelerator, 2)


def test_a_parallelism_configs_size_is_taken_over():
    run_on_ranks(4, configured_on_rank, timeout=IMPORTS_S)


def test_groups_are_processes():
    first, second, third, fourth = run_on_ranks(4, groups_on_rank, timeout=IMPORTS_S)
    assert [r[:3] for r in (first, second, third, fourth)] == [[0, 2, 0], [0, 2, 1], [1, 2, 0], [1, 2, 1]]
    assert first[3] == second[3] == [[0, 1], [4, 5], [8, 9]]
    assert third[3] == fourth[3] == [[2, 3], [6, 7], [0, 1]]


def learned_prompts(kind: str) -> Any:
    import peft

    config = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}[kind]
    return peft.get_peft_model(make_model("llama", "cpattn"), config(task_type="CAUSAL_LM", num_virtual_tokens=3))


@pytest.mark.parametrize(("kind", "name"), [("prompt", "PROMPT_TUNING"), ("prefix", "PREFIX_TUNING")])
def test_learned_prompts_are_refused_by_name(kind, name):
    pytest.importorskip("peft", reason="adapters are tested with peft (pip install cpattn[trl])")
    from cpattn.integrations.whole_batches import serve_whole_batches

    with pytest.raises(ValueError, match=f"PEFT's {name} .adapter 'default'. puts learned tokens or keys"):
        serve_whole_batches(learned_prompts(kind), None)
