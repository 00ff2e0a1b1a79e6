"""Training with the sequence spread over ranks: what torchrun starts on each of them.

    torchrun --nproc-per-node 4 -m cpattn.launch.demo.train RECIPE.json STEPS.json MASK.png

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
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import cpattn
from cpattn.launch.torchrun import die_with_parent

from .data import Batch, batches
from .model import ModelConfig, Transformer, loss_sum
from .pictures import draw_plan
from .recipe import Recipe, make_optimizer, optimizer_step, progress_bar, save_steps


def make_key(batch: Batch, config: ModelConfig, group: dist.ProcessGroup) -> cpattn.AttnKey:
    """The plan for one batch: its documents, spread over the ranks of the group."""
    return cpattn.make_key(
        cpattn.AttnMaskSpec.varlen(batch.seqlens),
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


def train(recipe: Recipe, group: dist.ProcessGroup, device: torch.device, mask_path: Path) -> list[dict[str, Any]]:
    """All steps; one record for each. The plan of the batch with most documents is drawn and described."""
    rank = dist.get_rank(group)
    model = Transformer(recipe.model, seed=recipe.seed).to(device)
    optimizer = make_optimizer(model)
    stream = batches(recipe.folder, num_tokens=recipe.num_tokens, seed=recipe.seed)
    steps: list[dict[str, Any]] = []
    shown_key, shown_step = None, -1
    title = f"{dist.get_world_size(group)} ranks, cpattn"
    with progress_bar(title, recipe.num_steps, shown=rank == 0) as advance:
        for step in range(recipe.num_steps):
            began = time.perf_counter()
            batch = next(stream)
            before_planning = time.perf_counter()
            key = make_key(batch, recipe.model, group)
            planned = time.perf_counter()
            loss = local_loss(model, batch, key, device)
            loss.backward()
            sum_gradients(model.parameters(), group)
            optimizer_step(optimizer, recipe.learning_rate_at(step))
            steps.append(
                {
                    "loss": sum_over_ranks(loss, group),
                    "seconds": time.perf_counter() - began,
                    "planning_seconds": planned - before_planning,
                    "seqlens": batch.seqlens,
                    "plan": plan_figures(key),
                }
            )
            if shown_key is None or len(batch.seqlens) > len(steps[shown_step]["seqlens"]):
                shown_key, shown_step = key, step
            advance(steps[-1]["loss"])
    if rank == 0 and shown_key is not None:
        draw_plan(shown_key.plan, mask_path)
        steps[shown_step]["description"] = shown_key.describe(torch.float32)
    return steps


def main(recipe_path: str, steps_path: str, mask_path: str) -> None:
    die_with_parent()
    device = torch.device("cpu")
    if torch.cuda.device_count() > 1:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    group = dist.group.WORLD
    assert group is not None
    try:
        steps = train(Recipe.load(Path(recipe_path)), group, device, Path(mask_path))
        if dist.get_rank() == 0:
            save_steps(Path(steps_path), steps)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
