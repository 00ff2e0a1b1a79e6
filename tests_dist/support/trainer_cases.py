"""The same training on one process and on ranks: what a framework logs, evaluates and leaves in the weights."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .hf_models import IGNORE

IMPORTS_S = 290.0  # a new rank first imports the framework


class Outcome(NamedTuple):
    """Numbers by name, in the order in which they were logged, and the weights at the end."""

    log: list[dict[str, float]]
    weights: dict[str, Tensor]


@contextlib.contextmanager
def as_torchrun() -> Iterator[None]:
    """The environment and the fresh state in which accelerate finds this rank's process group (none: one process)."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    ranks: dict[str, str] = {}
    if dist.is_initialized():
        ranks = {"RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size())}
        ranks |= {"LOCAL_RANK": ranks["RANK"], "LOCAL_WORLD_SIZE": ranks["WORLD_SIZE"]}
        ranks |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    kept = {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "WANDB_DISABLED": "true"}

    def reset() -> None:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()

    with mock.patch.dict(os.environ, {**ranks, **kept}):
        reset()
        try:
            yield
        finally:
            reset()


def rows(count: int, seed: int = 0, longest: int = 24) -> list[dict[str, Any]]:
    """Texts of several lengths, some of whose tokens have no label."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        length = int(torch.randint(longest // 2, longest + 1, (1,), generator=generator))
        ids = torch.randint(3, 90, (length,), generator=generator)
        labels = ids.clone()
        labels[torch.rand(length, generator=generator) < 0.3] = IGNORE
        made.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return made


def padded(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A collator: right padding to 24 columns."""
    out = {"input_ids": [], "attention_mask": [], "labels": []}
    for row in batch:
        pad = 24 - len(row["input_ids"])
        out["input_ids"].append(row["input_ids"] + [0] * pad)
        out["attention_mask"].append([1] * len(row["input_ids"]) + [0] * pad)
        out["labels"].append(row["labels"] + [IGNORE] * pad)
    return {name: torch.tensor(values) for name, values in out.items()}


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies, by name, of what is trained."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def require_same(got: Outcome, want: Outcome, limit: float = 1e-5, weights_limit: float = 1e-6) -> None:
    """Every number that both logged, and every weight; the weights by how far they may be from each other."""
    skipped = ("runtime", "per_second", "time", "flos")
    assert len(got.log) == len(want.log), (got.log, want.log)
    for mine, theirs in zip(got.log, want.log, strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            if any(word in name for word in skipped) or not isinstance(value, (int, float)):
                continue
            assert math.isclose(mine[name], value, rel_tol=limit, abs_tol=limit), (name, mine[name], value)
    assert got.weights.keys() == want.weights.keys()
    for name, value in want.weights.items():
        error = float((got.weights[name] - value).abs().max())
        assert error < weights_limit, f"{name} is off by {error:.3g}"


def three_steps(model: nn.Module, lr: float, backward: Callable[[int], Tensor], sum_up: Callable[[Tensor], Any]) -> Any:
    """Losses and gradient norms of three steps, and the loss after them, over all ranks' tokens.

    backward: of batch n, gives this rank's part of the loss. sum_up: adds up over the ranks, in place.
    """
    optimizer, seen = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9), []
    for number in range(4):
        optimizer.zero_grad()
        loss = backward(number)
        sum_up(loss)
        seen.append(loss)
        if number < 3:
            for parameter in model.parameters():
                sum_up(parameter.grad)
            seen.append(nn.utils.clip_grad_norm_(model.parameters(), 1.0))
            optimizer.step()
    return seen


def same_weights(model: nn.Module, want: nn.Module) -> None:
    """After training, by name."""
    weights = dict(model.named_parameters())
    assert weights.keys() == dict(want.named_parameters()).keys()
    for name, theirs in want.named_parameters():
        torch.testing.assert_close(weights[name], theirs, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
