"""Training with the sequence spread over ranks: what torchrun starts on each of them.

    torchrun --nproc-per-node 4 -m cpattn.launch.demo.train RECIPE.json STEPS.json MASK.png [CHECKPOINTS EVERY]

With CHECKPOINTS, a folder, the run goes on from the newest checkpoint there, whatever number of ranks wrote it, and
writes one after each EVERY steps: `torchrun --max-restarts` then loses no more than those.

Every rank holds the whole model and its own rows of every batch. A rank's gradients are those of the
loss of its own rows, so the gradient of the whole loss is their sum over ranks.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import cpattn
from cpattn.launch.torchrun import join_ranks

from .checkpoint import CheckpointError, Checkpoints
from .data import Batch, batches
from .model import ModelConfig, Transformer, loss_sum
from .pictures import draw_plan
from .recipe import Recipe, make_optimizer, optimizer_step, progress_bar, save_steps


def make_key(seqlens: list[int], config: ModelConfig, group: dist.ProcessGroup) -> cpattn.AttnKey:
    """The plan for one batch: its documents, spread over the ranks of the group."""
    return cpattn.make_key(
        cpattn.AttnMaskSpec.varlen(seqlens),
        num_heads_q=config.num_heads_q,
        num_heads_kv=config.num_heads_kv,
        head_dim=config.head_dim,
        cp_group=group,
    )


def local_loss(model: Transformer, batch: Batch, key: cpattn.AttnKey, device: torch.device) -> Tensor:
    """This rank's part of the batch's mean loss; the parts of all ranks sum to the whole."""
    tokens_T = cpattn.dispatch(batch.tokens.to(device), key, dim=0)
    labels_T = cpattn.roll(tokens_T, key, shift=-1)
    logits = model(tokens_T, cpattn.position_ids(key, device=device), partial(cpattn.attention, key=key))
    return loss_sum(logits, labels_T) / batch.num_labels


def sum_gradients(parameters: Iterable[Tensor], group: dist.ProcessGroup) -> None:
    """Replace every gradient by its sum over the ranks, in one all-reduce."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat, group=group)
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def sum_over_ranks(value: Tensor, group: dist.ProcessGroup) -> float:
    """A scalar summed over the ranks, in fp64."""
    total = value.detach().double()
    dist.all_reduce(total, group=group)
    return total.item()


def plan_figures(key: cpattn.AttnKey) -> dict[str, Any]:
    """What the report says about a plan."""
    plan = key.plan
    return {
        "imbalance": plan.imbalance(),
        "tokens": plan.q_placement.num_tokens.tolist(),
        "kv_rows": plan.kv_routes.rows_received(plan.cp_size).tolist(),
        "q_rows": plan.q_routes.rows_received(plan.cp_size).tolist(),
    }


class State(NamedTuple):
    """What training changes: the model, its optimizer, and one record for each step that is done."""

    model: Transformer
    optimizer: torch.optim.Optimizer
    steps: list[dict[str, Any]]


def start(recipe: Recipe, device: torch.device, checkpoints: Checkpoints | None) -> State:
    """The state before the first step, or the newest checkpoint's.

    Raises:
        ValueError: the checkpoint is of a run with another recipe.
    """
    model = Transformer(recipe.model, seed=recipe.seed).to(device)
    state = State(model, make_optimizer(model), [])
    run = None if checkpoints is None else checkpoints.load(model, state.optimizer)
    if run is not None:
        recipe.require_same_training(run["recipe"])
        state.steps.extend(run["steps"])
    return state


def train_step(
    batch: Batch, state: State, recipe: Recipe, group: dist.ProcessGroup, device: torch.device
) -> dict[str, Any]:
    """One step, and its record."""
    began = time.perf_counter()
    key = make_key(batch.seqlens, recipe.model, group)
    planned = time.perf_counter()
    loss = local_loss(state.model, batch, key, device)
    loss.backward()
    sum_gradients(state.model.parameters(), group)
    optimizer_step(state.optimizer, recipe.learning_rate_at(len(state.steps)))
    return {
        "loss": sum_over_ranks(loss, group),
        "seconds": time.perf_counter() - began,
        "planning_seconds": planned - began,
        "seqlens": batch.seqlens,
        "plan": plan_figures(key),
    }


def train(
    recipe: Recipe, group: dist.ProcessGroup, device: torch.device, checkpoints: Checkpoints | None = None
) -> list[dict[str, Any]]:
    """All steps that are not done yet; one record for each step, also of those before."""
    state = start(recipe, device, checkpoints)
    stream = batches(recipe.folder, num_tokens=recipe.num_tokens, seed=recipe.seed)
    for _ in state.steps:
        next(stream)
    title = f"{dist.get_world_size(group)} ranks, cpattn"
    done = len(state.steps)
    if done and dist.get_rank(group) == 0:
        print(f"{title}: going on after step {done}/{recipe.num_steps}", flush=True)
    with progress_bar(title, recipe.num_steps, done=done, shown=dist.get_rank(group) == 0) as advance:
        for step in range(done, recipe.num_steps):
            began = time.perf_counter()
            batch = next(stream)
            reading = time.perf_counter() - began
            record = train_step(batch, state, recipe, group, device)
            record["seconds"] += reading
            state.steps.append(record)
            advance(record["loss"])
            if checkpoints is not None and checkpoints.due(step + 1, recipe.num_steps):
                run = {"recipe": recipe.to_dict(), "steps": state.steps}
                checkpoints.save(step + 1, run, state.model, state.optimizer)
    return state.steps


def describe_fullest(steps: list[dict[str, Any]], recipe: Recipe, group: dist.ProcessGroup, mask_path: Path) -> None:
    """Draw and describe the plan of the batch with most documents."""
    fullest = max(steps, key=lambda step: len(step["seqlens"]))
    key = make_key(fullest["seqlens"], recipe.model, group)
    if dist.get_rank(group) == 0:
        draw_plan(key.plan, mask_path)
        fullest["description"] = key.describe(torch.float32)


def main(recipe_path: str, steps_path: str, mask_path: str, folder: str = "", every: str = "0") -> None:
    device = torch.device("cpu")
    if torch.cuda.device_count() > 1:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    join_ranks("nccl" if device.type == "cuda" else "gloo")
    group = dist.group.WORLD
    assert group is not None
    recipe = Recipe.load(Path(recipe_path))
    checkpoints = Checkpoints(Path(folder), int(every)) if folder else None
    try:
        steps = train(recipe, group, device, checkpoints)
        describe_fullest(steps, recipe, group, Path(mask_path))
        if dist.get_rank() == 0:
            save_steps(Path(steps_path), steps)
    except (CheckpointError, ValueError) as error:
        sys.exit(f"rank {dist.get_rank()}: {error}")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
