"""`cpattn demo`: train a small transformer with its sequence spread over ranks, and check it against one rank."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .demo import NUM_STEPS, NUM_TOKENS
from .options import require_module
from .session import answering
from .torchrun import exit_on_sigterm

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


def demo_command(
    data: DataOption = None,
    ranks: RanksOption = None,
    steps: StepsOption = NUM_STEPS,
    tokens: TokensOption = NUM_TOKENS,
    seed: SeedOption = 0,
    checkpoint_every: EveryOption = 10,
    resume: ResumeOption = False,
    max_restarts: RestartsOption = 0,
    out: OutOption = Path("runs/demo"),
) -> None:
    """Train a small transformer with its sequence spread over ranks, then on one rank without cpattn."""
    with answering():
        if resume and not checkpoint_every:
            raise ValueError("--resume goes on from checkpoints, and --checkpoint-every is 0")
        require_module("the demo", "matplotlib")
    from .demo.data import batches
    from .demo.recipe import Recipe
    from .demo.runs import Outputs, choose_ranks, report, train_both

    console = Console()
    began = time.perf_counter()
    exit_on_sigterm()
    folder = None if data is None else str(data.resolve())
    recipe = Recipe(data=folder, num_steps=steps, num_tokens=tokens, seed=seed)
    outputs = Outputs(out)
    with answering():
        num_ranks, devices = choose_ranks(ranks)
        try:
            first = next(batches(recipe.folder, num_tokens=tokens, seed=seed))
        except OSError as error:
            raise ValueError(str(error)) from None
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
