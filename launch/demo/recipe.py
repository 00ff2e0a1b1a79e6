"""What both training runs share: sizes, seeds, optimiser, and how a run is written down."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import NUM_STEPS, NUM_TOKENS
from .model import ModelConfig, Transformer

# Loss may differ by this much, relatively, at the first step and at any step.
FIRST_STEP_TOLERANCE = 1e-6
TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides the numbers of a run, apart from how many ranks it is spread over."""

    data: str | None = None
    num_tokens: int = NUM_TOKENS
    num_steps: int = NUM_STEPS
    warmup_steps: int = 4
    learning_rate: float = 3e-3
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)

    @property
    def folder(self) -> Path | None:
        return None if self.data is None else Path(self.data)

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, then constant; steps count from 0."""
        return self.learning_rate * min(1.0, (step + 1) / self.warmup_steps)

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)

    def require_same_training(self, other: dict[str, Any]) -> None:
        """Check that another recipe's steps (`to_dict`) are this one's, as far as both go.

        Raises:
            ValueError: names what differs, the number of steps apart.
        """
        mine = self.to_dict()
        differs = [name for name in mine if name != "num_steps" and mine[name] != other.get(name)]
        if differs:
            what = ", ".join(f"{name} is {mine[name]!r} and was {other.get(name)!r}" for name in differs)
            raise ValueError(f"the checkpoint is of another training: {what}; give another folder, or the same options")

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> Recipe:
        fields = json.loads(path.read_text())
        return cls(**{**fields, "model": ModelConfig(**fields["model"])})


def make_optimizer(model: Transformer) -> torch.optim.Optimizer:
    """AdamW; the learning rate is set before every step."""
    return torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01)


def optimizer_step(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """One update with the gradients at hand, which are then dropped."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad()


def save_steps(path: Path, steps: list[dict[str, Any]]) -> None:
    """Write one record per step, whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(steps, indent=1) + "\n")
    os.replace(part, path)


def load_steps(path: Path) -> list[dict[str, Any]]:
    """Read the records of a run."""
    steps: list[dict[str, Any]] = json.loads(path.read_text())
    return steps


class Advance(Protocol):
    """Called after every step with the loss."""

    def __call__(self, loss: float) -> None: ...


@contextmanager
def progress_bar(title: str, num_steps: int, *, done: int = 0, shown: bool = True) -> Iterator[Advance]:
    """A bar over the steps on a terminal, now and then a line elsewhere, nothing if not shown. done: steps before."""
    console = Console(quiet=not shown)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("loss {task.fields[loss]}"),
    )
    with Progress(*columns, console=console, disable=not (shown and console.is_terminal)) as progress:
        task = progress.add_task(title, total=num_steps, completed=done, loss="-")

        def advance(loss: float) -> None:
            nonlocal done
            done += 1
            progress.update(task, advance=1, loss=f"{loss:.4f}")
            if not console.is_terminal and (done % 5 == 0 or done in (1, num_steps)):
                console.print(f"{title}: step {done}/{num_steps}, loss {loss:.4f}")

        yield advance
