"""The demo: train a small transformer on four ranks and on one, and compare.

Run it as:

    python -m cpattn.launch.demo [--data FOLDER]
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape

from cpattn.launch.torchrun import exit_on_sigterm, num_cores, run, run_on_ranks

from .data import batches
from .pictures import draw_losses
from .recipe import TOLERANCE, Recipe, load_steps
from .report import failures, print_report

CPU_RANKS = 4
DEFAULTS = Recipe()


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


DataOption = Annotated[Path | None, typer.Option(help="Folder of text to train on, instead of the standard library.")]
RanksOption = Annotated[int | None, typer.Option(min=1, help="Ranks; the default is one per GPU, or 4 on the CPU.")]
StepsOption = Annotated[int, typer.Option(min=1, help="Training steps.")]
TokensOption = Annotated[int, typer.Option(min=2, help="Tokens per step.")]
SeedOption = Annotated[int, typer.Option(min=0, help="Seed of the weights and of the order of documents.")]
EveryOption = Annotated[int, typer.Option(min=0, help="Steps from one checkpoint to the next; 0: none.")]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Go on from the newest checkpoint in --out, on any number of ranks.")
]
RestartsOption = Annotated[
    int, typer.Option(min=0, help="Times that all ranks start again, from the newest checkpoint, if one fails.")
]
OutOption = Annotated[Path, typer.Option(help="Folder for pictures and records.")]


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


def demo(
    data: DataOption = None,
    ranks: RanksOption = None,
    steps: StepsOption = DEFAULTS.num_steps,
    tokens: TokensOption = DEFAULTS.num_tokens,
    seed: SeedOption = 0,
    checkpoint_every: EveryOption = 10,
    resume: ResumeOption = False,
    max_restarts: RestartsOption = 0,
    out: OutOption = Path("runs/demo"),
) -> None:
    """Train a small transformer with its sequence spread over ranks, then on one rank without cpattn."""
    console = Console()
    began = time.perf_counter()
    exit_on_sigterm()
    if resume and not checkpoint_every:
        raise typer.BadParameter("--resume goes on from checkpoints, and --checkpoint-every is 0")
    folder = None if data is None else str(data.resolve())
    recipe = Recipe(data=folder, num_steps=steps, num_tokens=tokens, seed=seed)
    outputs = Outputs(out)
    try:
        num_ranks, devices = choose_ranks(ranks)
        first = next(batches(recipe.folder, num_tokens=tokens, seed=seed))
    except (ValueError, OSError) as error:
        console.print(f"[red]error:[/] {escape(str(error))}")
        raise typer.Exit(2) from None
    console.print(
        f"{steps} steps of {tokens:,} tokens ({len(first.seqlens)} documents in the first), "
        f"{num_ranks} ranks on {devices}"
    )
    outputs.clear(resume=resume)
    try:
        train_both(recipe, outputs, num_ranks, every=checkpoint_every, max_restarts=max_restarts)
    except subprocess.CalledProcessError as error:
        console.print(f"[red]error:[/] a run failed with exit status {error.returncode}; its output is above")
        raise typer.Exit(1) from None
    found = report(console, recipe, outputs, num_ranks)
    for failure in found:
        console.print(f"[red]FAILED:[/] {failure}")
    if found:
        raise typer.Exit(1)
    console.print(f"[green]OK[/]: the losses agree; {time.perf_counter() - began:.0f} seconds in all")


if __name__ == "__main__":
    typer.run(demo)
