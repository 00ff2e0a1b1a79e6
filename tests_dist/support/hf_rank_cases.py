"""What ranks run in the tests of the Hugging Face integration."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

from cpattn.integrations.transformers import ContextParallel, register_attention
from tests_dist.support.hf_models import StepResult, gradients, make_model

Batch = dict[str, Tensor]


def parallel_step(name: str, batches: list[Batch], checkpointing: bool = False, **changes: Any) -> StepResult:
    """Forward and backward over the micro-batches on all ranks; whole results on every rank.

    logits are those of the last micro-batch; loss and gradients add up over all.
    """
    register_attention()
    model = make_model(name, "cpattn", **changes)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    parallel = ContextParallel(model, dist.group.WORLD if dist.is_initialized() else None)
    count = parallel.count_targets(batches) if len(batches) > 1 else None
    outs = [parallel(batch, num_targets=count) for batch in batches]
    # Backward only now: with checkpointing, layers of all micro-batches are run again out of turn.
    for out in outs:
        out.loss.backward()
    parallel.reduce_gradients()
    loss = sum(out.loss.detach() for out in outs)
    return StepResult(outs[-1].shard.gather(outs[-1].logits).detach(), loss, gradients(model))


def parallel_steps(
    cases: dict[str, tuple[str, list[Batch]]], checkpointing: bool = False
) -> dict[str, StepResult]:
    """Several cases in one visit to the ranks; results from rank 0 only."""
    results = {what: parallel_step(name, batches, checkpointing) for what, (name, batches) in cases.items()}
    return results if dist.get_rank() == 0 else {}
