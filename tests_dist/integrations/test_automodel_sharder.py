"""Layer 2: NeMo Automodel 0.7's own sharder and dispatch with "magi" being this project, without a shim."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F

pytest.importorskip("nemo_automodel", reason="tested with nemo-automodel (pip install cpattn[automodel])")

from tests_dist.compat.automodel.custom_model import VOCAB, CustomModel
from tests_dist.support.harness import run_on_ranks
from tests_dist.support.hf_models import IGNORE, eager_step, make_model, text_batch

IMPORTS_S = 290.0


class Cfg(dict):
    """A recipe's configuration."""


def sharded(model: Any, batch: dict[str, Any], **setting: str) -> tuple[Any, dict[str, Any]]:
    """Automodel's sharder for a model, and its batch for this rank."""
    from cpattn.automodel import install

    install()
    from nemo_automodel.components.distributed.context_parallel import magi
    from nemo_automodel.components.distributed.context_parallel.sharder import ContextParallelSharder

    import cpattn.automodel.context_parallel.magi as ours

    assert magi is ours
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("cp",))
    state = magi.setup_magi(Cfg(setting), mesh, domain="llm")
    assert (state.enabled, state.cp_size, state.domain) == (True, dist.get_world_size(), "llm")
    sharder = ContextParallelSharder(model, mesh, batch, padding_token_id=0)
    context, local = sharder.shard(batch)
    assert context().__class__.__name__ == "nullcontext"
    counts = [None] * dist.get_world_size()
    dist.all_gather_object(counts, local["input_ids"].numel())
    assert len(set(counts)) == 1, f"the sharder supposes equal shards: {counts}"
    return sharder, local


def check_verbs(sharder: Any, local: dict[str, Any], ids: Tensor, real: Tensor) -> None:
    """Token tensors go to the places of the inputs, and come back."""
    dim = local["input_ids"].ndim - 1
    sent = sharder.shard_token_tensor(ids, fill=0).reshape(local["input_ids"].shape)
    mine = sharder.shard_token_tensor(real.long(), fill=0).reshape(sent.shape).bool()
    assert torch.equal(sent[mine], local["input_ids"][mine])
    values = sent.float().requires_grad_()
    back = sharder.gather_token_tensor(values, seq_dim=dim, trim=True)
    assert torch.equal(back.reshape(ids.shape)[real], ids[real].float())
    (back.reshape(ids.shape)[real] * 2).sum().backward()
    assert torch.equal(values.grad[mine], torch.full_like(values.grad[mine], 2.0 * dist.get_world_size()))


def hf_on_rank(rows: int) -> None:
    from cpattn.automodel.magi_attn_utils import register_magi_attention

    register_magi_attention()
    batch = text_batch("right", rows=rows)
    want = eager_step("llama", batch)
    model = make_model("llama", "magi")
    shifted = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE)
    sharder, local = sharded(model, {**batch, "labels": shifted}, **{"model.attn_implementation": "magi"})
    inputs = {name: local[name] for name in ("input_ids", "position_ids", "attention_mask")}
    logits = model(**inputs, use_cache=False).logits
    count = int((shifted != IGNORE).sum())
    total = F.cross_entropy(logits.flatten(0, 1), local["labels"].flatten(), ignore_index=IGNORE, reduction="sum")
    loss = total / count
    loss.backward()
    compare(model, loss, want.loss, want.grads)
    check_verbs(sharder, local, batch["input_ids"], batch["attention_mask"].bool())


def compare(model: Any, loss: Tensor, want: Tensor, grads: dict[str, Tensor]) -> None:
    total = loss.detach().clone()
    dist.all_reduce(total)
    torch.testing.assert_close(total, want, rtol=1e-5, atol=1e-6)
    largest = max(float(grad.norm()) for grad in grads.values())
    for name, parameter in model.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        dist.all_reduce(grad)
        # The softmax cancels a bias of keys: what is left of its gradient is rounding.
        error = float((grad - grads[name]).norm() / grads[name].norm().clamp(min=1e-3 * largest))
        assert error < 2e-5, f"{name} is off by {error}"


@pytest.mark.parametrize(("ranks", "rows"), [(2, 2), (3, 1)])
def test_transformers_models_with_padding(ranks, rows):
    run_on_ranks(ranks, hf_on_rank, rows, timeout=IMPORTS_S)


def custom_on_rank(packed: bool) -> None:
    from cpattn.automodel.magi_attn_utils import set_active_cp_group

    g = torch.Generator().manual_seed(3)
    ids, labels = (torch.randint(1, VOCAB, (2, 21), generator=g) for _ in range(2))
    positions = torch.arange(21).expand(2, 21)
    batch: dict[str, Any] = {"input_ids": ids, "labels": labels, "position_ids": positions}
    if packed:
        batch |= {"qkv_format": "thd", "seq_lens": torch.tensor([[9, 12], [21, -1000]])}
        batch["seq_lens_padded"] = batch["seq_lens"].clone()
        batch["position_ids"] = torch.stack([torch.cat([torch.arange(9), torch.arange(12)]), torch.arange(21)])
    set_active_cp_group(None)  # what an earlier test set up
    whole = CustomModel()
    lengths = [9, 12, 21] if packed else [21, 21]
    texts = zip(*(t.flatten().split(lengths) for t in (ids, batch["position_ids"])), strict=True)
    logits = [whole(tokens, places, is_causal=True) for tokens, places in texts]
    want = F.cross_entropy(torch.cat(logits), labels.flatten())
    want.backward()
    model = CustomModel()
    model.backend = SimpleNamespace(attn="magi")
    given = {k: v.clone() if isinstance(v, Tensor) else v for k, v in batch.items()}
    sharder, local = sharded(model, given, **{"model.backend.attn": "magi"})
    keywords = {name: local[name] for name in ("input_ids", "position_ids", "magi_attn_spec")}
    got = model(**keywords).reshape(-1, VOCAB)
    loss = F.cross_entropy(got, local["labels"].flatten(), ignore_index=IGNORE, reduction="sum") / labels.numel()
    loss.backward()
    compare(model, loss, want.detach(), {name: p.grad for name, p in whole.named_parameters()})
    check_verbs(sharder, local, ids, torch.ones_like(ids, dtype=torch.bool))


@pytest.mark.parametrize("packed", [False, True])
def test_custom_models(packed):
    run_on_ranks(2, custom_on_rank, packed, timeout=IMPORTS_S)


def test_without_a_model_and_unknown_domains():
    from cpattn.automodel.context_parallel.magi import MagiState, set_active_attn_spec, setup_magi

    state = MagiState(enabled=True, custom=True)
    batch = {"input_ids": torch.zeros(1, 3, dtype=torch.long), "prefix_tree": ([1, 1, 1], [[0, 1], [0, 2]])}
    prepared, places = state.make_cp_batch(None, batch, return_local_indices=True)
    set_active_attn_spec(None)
    assert "prefix_tree" not in prepared
    assert places is None
    with pytest.raises(ValueError, match="model is None: a batch is shared out by the model's heads"):
        MagiState(enabled=True).make_cp_batch(None, batch)
    with pytest.raises(ValueError, match="domain is 'audio'"):
        setup_magi(Cfg(), None, domain="audio")


def test_its_modules_are_found_by_every_form_of_import():
    """In a new process, where nothing of Automodel was imported: `as` reads attributes of the packages above."""
    program = """
from cpattn.automodel import install
install()
import nemo_automodel.components.distributed.context_parallel.magi as magi
print(magi.__name__)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=IMPORTS_S)
    assert done.stdout.split() == ["cpattn.automodel.context_parallel.magi"], done.stderr[-2000:]
