"""The demo's two runs: what they write, how they are started, and what they are judged by."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from cpattn.launch.torchrun import num_cores, run, run_on_ranks

from .pictures import draw_losses
from .recipe import TOLERANCE, Recipe, load_steps
from .report import failures, print_report

CPU_RANKS = 4


def choose_ranks(wanted: int | None) -> tuple[int, str]:
    """How many ranks, and on what in words: one per GPU where there are several, else CPU processes.

    Raises:
        ValueError: more ranks are wanted than there are GPUs.
    """
    num_gpus = torch.cuda.device_count()
    if num_gpus < 2:
        return wanted or CPU_RANKS, f"{num_cores()} CPU cores"
    if wanted is not None and wanted > num_gpus:
        raise ValueError(f"--ranks is {wanted} on a machine with {num_gpus} GPUs: each rank needs its own")
    return wanted or num_gpus, f"{num_gpus} GPUs"


@dataclass(frozen=True, slots=True)
class Outputs:
    """The files of a demo, all in one folder."""

    folder: Path

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.json"

    @property
    def ranks_steps(self) -> Path:
        return self.folder / "steps_ranks.json"

    @property
    def one_rank_steps(self) -> Path:
        return self.folder / "steps_one_rank.json"

    @property
    def mask(self) -> Path:
        return self.folder / "mask_by_rank.png"

    @property
    def losses(self) -> Path:
        return self.folder / "loss.png"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def clear(self, *, resume: bool) -> None:
        """Make the folder, and remove what an earlier run left, checkpoints too unless it goes on from them."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not resume:
            shutil.rmtree(self.checkpoints, ignore_errors=True)
        for path in (self.recipe, self.ranks_steps, self.one_rank_steps, self.mask, self.losses):
            path.unlink(missing_ok=True)


def train_both(recipe: Recipe, outputs: Outputs, num_ranks: int, *, every: int, max_restarts: int) -> None:
    """The run on several ranks, with a checkpoint after `every` steps (0: none), then the run on one.

    Raises:
        subprocess.CalledProcessError: one of them failed.
    """
    recipe.save(outputs.recipe)
    checkpoints = [str(outputs.checkpoints), str(every)] if every else []
    run_on_ranks(
        "cpattn.launch.demo.train",
        [str(outputs.recipe), str(outputs.ranks_steps), str(outputs.mask), *checkpoints],
        num_ranks=num_ranks,
        max_restarts=max_restarts,
    )
    one_rank = [str(outputs.recipe), str(outputs.one_rank_steps)]
    run([sys.executable, "-m", "cpattn.launch.demo.baseline", *one_rank])


def report(console: Console, recipe: Recipe, outputs: Outputs, num_ranks: int) -> list[str]:
    """Tables, pictures and what is wrong (nothing, if all is well)."""
    spread, single = load_steps(outputs.ranks_steps), load_steps(outputs.one_rank_steps)
    draw_losses(
        [step["loss"] for step in spread],
        [step["loss"] for step in single],
        cp_size=num_ranks,
        tolerance=TOLERANCE,
        path=outputs.losses,
    )
    bytes_per_row = 2 * recipe.model.num_heads_kv * recipe.model.head_dim * 4  # K and V, fp32
    print_report(console, spread, single, bytes_per_row=bytes_per_row)
    console.print(f"pictures: {outputs.mask}, {outputs.losses}")
    return failures(spread, single, must_learn=recipe.data is None)
