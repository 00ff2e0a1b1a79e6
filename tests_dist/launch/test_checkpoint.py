"""Layer 2: the demo trainer's checkpoints on gloo ranks; a job whose rank is killed goes on from the last one."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

pytest.importorskip("rich")

from cpattn.launch.demo.baseline import attention_by_document, next_tokens
from cpattn.launch.demo.checkpoint import CheckpointError, Checkpoints
from cpattn.launch.demo.data import Batch
from cpattn.launch.demo.model import ModelConfig, Transformer, loss_sum
from cpattn.launch.demo.recipe import Recipe, make_optimizer, optimizer_step
from cpattn.launch.demo.train import local_loss, make_key, sum_over_ranks
from tests_dist.support.harness import run_on_ranks

SMALL = ModelConfig(num_layers=1, dim=16, num_heads_q=2, num_heads_kv=1, head_dim=8, ffn_dim=16)


def trained(seed: int, num_steps: int):
    """A model and optimizer after some steps; the same on all ranks."""
    model = Transformer(SMALL, seed=seed)
    optimizer = make_optimizer(model)
    for step in range(num_steps):
        for number, parameter in enumerate(model.parameters()):
            parameter.grad = torch.full_like(parameter, 0.1 * (step + 1) + number)
        optimizer_step(optimizer, 1e-2)
    return model, optimizer


def values(model, optimizer) -> list[torch.Tensor]:
    state = optimizer.state_dict()["state"]
    moments = [tensor for number in sorted(state) for _, tensor in sorted(state[number].items())]
    return [parameter.detach() for parameter in model.parameters()] + moments


def check_saved_and_disk_full(folder):
    """Three steps saved, of which two are kept; then no file may grow past 4 KiB."""
    checkpoints = Checkpoints(Path(folder), every=1)
    assert checkpoints.load(*trained(0, 0)) is None
    for step in (1, 2, 3):
        checkpoints.save(step, {"step": step}, *trained(0, step))
    dist.barrier()
    assert checkpoints.steps() == [2, 3]
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(CheckpointError, match=r"step 4 was not written: rank \d: OSError.*step_000003 is whole"):
            checkpoints.save(4, {"step": 4}, *trained(0, 4))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    dist.barrier()
    assert sorted(path.name for path in Path(folder).iterdir()) == ["step_000002", "step_000003"]


def check_loaded(folder):
    """What was saved is read into other weights and an optimizer that has done nothing."""
    model, optimizer = trained(1, 0)
    assert Checkpoints(Path(folder), every=1).load(model, optimizer) == {"step": 3}
    for mine, theirs in zip(values(model, optimizer), values(*trained(0, 3)), strict=True):
        assert torch.equal(mine, theirs)


def test_a_full_disk_leaves_the_checkpoint_before_and_other_ranks_read_it(tmp_path):
    run_on_ranks(2, check_saved_and_disk_full, str(tmp_path))
    # What a run that was killed while writing leaves is no checkpoint.
    (tmp_path / "step_000009.part").mkdir()
    (tmp_path / "step_000009").mkdir()
    for num_ranks in (1, 3):
        run_on_ranks(num_ranks, check_loaded, str(tmp_path))


LENGTHS = [30, 1, 20, 7]


def sharded_steps(folder: str, num_steps: int) -> list[float]:
    """Go on from the newest checkpoint to that many steps, model and optimizer sharded over the ranks; the losses."""
    mesh, group, device = init_device_mesh("cpu", (dist.get_world_size(),)), dist.group.WORLD, torch.device("cpu")
    model, checkpoints = Transformer(SMALL, seed=0), Checkpoints(Path(folder), every=1)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    optimizer = make_optimizer(fully_shard(model, mesh=mesh))
    done = checkpoints.load(model, optimizer) or {"losses": []}
    losses = done["losses"]
    tokens = torch.randint(256, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0))
    while len(losses) < num_steps:
        loss = local_loss(model, Batch(tokens, LENGTHS), make_key(LENGTHS, SMALL, group), device)
        (loss * dist.get_world_size()).backward()  # FSDP takes the mean over ranks
        optimizer_step(optimizer, 1e-2)
        losses.append(sum_over_ranks(loss, group))
        checkpoints.save(len(losses), {"losses": losses}, model, optimizer)
    for parameter in model.parameters():
        assert isinstance(parameter, DTensor)
        assert parameter.to_local().shape != parameter.shape or dist.get_world_size() == 1
    return losses


def unbroken_losses(num_steps: int) -> list[float]:
    """One process, plain torch."""
    model, losses = Transformer(SMALL, seed=0), []
    optimizer = make_optimizer(model)
    tokens = torch.randint(256, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0))
    batch, positions = Batch(tokens, LENGTHS), torch.cat([torch.arange(n) for n in LENGTHS])
    for _ in range(num_steps):
        logits = model(tokens, positions, attention_by_document(LENGTHS))
        loss = loss_sum(logits, next_tokens(tokens, LENGTHS)) / batch.num_labels
        loss.backward()
        optimizer_step(optimizer, 1e-2)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("ranks", [(2, 3), pytest.param((4, 2, 1), marks=pytest.mark.nightly)])
def test_sharded_states_go_on_at_another_number_of_ranks(tmp_path, ranks):
    """Two steps on each number of ranks; the losses are those of one process that nobody interrupted."""
    for number, size in enumerate(ranks, start=1):
        losses = run_on_ranks(size, sharded_steps, str(tmp_path), 2 * number)[0]
    torch.testing.assert_close(losses, unbroken_losses(2 * len(ranks)), rtol=1e-5, atol=0)


def test_a_checkpoint_of_another_training_is_refused():
    with pytest.raises(ValueError, match="of another training: seed is 1 and was 0;"):
        Recipe(seed=1).require_same_training(Recipe(num_steps=7).to_dict())


def ranks_of(text: str) -> list[int]:
    """The processes of the training ranks whose command line holds the text."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if "cpattn.launch.rank" in words and any(text in word for word in words) and "--standalone" not in words:
            found.append(int(entry.parent.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc")
def test_a_killed_rank_goes_on_from_the_last_checkpoint(tmp_path):
    """The losses are those of one rank with plain torch, which nobody interrupted; the demo compares them."""
    out, data = tmp_path / "out", tmp_path / "data"
    data.mkdir()
    for length in (1, 5, 40, 64):
        (data / str(length)).write_bytes(bytes(range(32, 32 + length)) * 7)
    options = ["--steps", "20", "--tokens", "600", "--checkpoint-every", "4", "--max-restarts", "1"]
    command = [sys.executable, "-m", "cpattn.launch.demo", "--out", str(out), "--ranks", "2", "--data", str(data)]
    process = subprocess.Popen(
        [*command, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "step 10/20" in line and "going on" not in "".join(lines):  # after the restart it comes again
            os.kill(max(ranks_of(str(out))), signal.SIGKILL)
    text = "".join(lines)
    assert process.wait(240) == 0, text
    gone_on = [line for line in lines if "going on after step" in line]
    assert len(gone_on) == 1, text
    assert int(gone_on[0].split("step ")[1].split("/")[0]) >= 8, text
    steps = json.loads((out / "steps_ranks.json").read_text())
    assert len(steps) == 20
    assert all(sum(step["seqlens"]) == sum(step["plan"]["tokens"]) == 600 for step in steps)
    assert "the losses agree" in text
    for picture in ("mask_by_rank.png", "loss.png"):
        assert (out / picture).stat().st_size > 10_000
