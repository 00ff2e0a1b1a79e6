"""What a command runs in: errors in one sentence, a limit of time, the ranks it starts, and word of how far it is."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from typer.core import TyperGroup

from .torchrun import exit_on_sigterm, run_on_ranks

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

# A mask of many ranges or documents can take hours: a command says so and stops.
LIMIT_S = 900
_MOST_LIMIT_S = 10_000_000
# Called with what is done next; a step further.
Tell: TypeAlias = Callable[[str], None]


class Root(TyperGroup):
    """The command group; keeps the words that it was called with, for the ranks that a command starts."""

    called_with: ClassVar[list[str]] = []

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        Root.called_with = list(args)
        return super().parse_args(ctx, args)


def refused(error: ValueError) -> typer.Exit:
    """Say what is wrong with the options, and how to end the command."""
    of = f"rank {os.environ['RANK']}: " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
    Console(stderr=True).print(f"[bold red]{of}error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
    return typer.Exit(2)


@contextmanager
def answering(limit_s: float = 0) -> Iterator[None]:
    """What a command does with what it was given: an error ends it with a sentence and status 2, not with a traceback.

    Args:
        limit_s: seconds after which the body ends with such an error too; 0: none. Only in the main thread.
    """
    try:
        with _within(limit_s):
            yield
    except ValueError as error:
        raise refused(error) from None
    except MemoryError:
        raise refused(ValueError("this needs more memory than there is: give fewer tokens or larger chunks")) from None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around what writes to a path or below it: a full disk ends the command with a sentence and status 2."""
    with answering():
        try:
            yield
        except OSError as error:
            raise ValueError(f"{error.filename or path} could not be written: {error.strerror or error}") from None


def write_whole(path: Path, text: str) -> None:
    """Write a file, whole or not at all: what a full disk leaves of it does not take the place of the one before.

    Raises:
        OSError: it could not be written.
    """
    if path.exists() and not path.is_file():  # a device, such as /dev/stdout
        path.write_text(text)
        return
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_text(text)
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


@contextmanager
def _within(limit_s: float) -> Iterator[None]:
    def stop(number: int, frame: Any) -> None:
        raise ValueError(
            f"no answer within {limit_s:g} seconds: give fewer documents, ranges or ranks, or more time (--limit)"
        )

    if not 0 <= limit_s <= _MOST_LIMIT_S:
        raise ValueError(f"--limit is {limit_s}: give at most {_MOST_LIMIT_S:,} seconds, or 0 for no limit")
    if not limit_s or not hasattr(signal, "setitimer"):
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def start_ranks(asked: int | None) -> bool:
    """Run this very command on so many ranks of this machine, unless it is one of them already; whether it did.

    Raises:
        ValueError: torchrun has started another number of ranks.
        typer.Exit: a rank failed; it has said why.
    """
    if "WORLD_SIZE" in os.environ:
        if asked not in (None, started := int(os.environ["WORLD_SIZE"])):
            raise ValueError(f"--ranks is {asked} and torchrun has started {started}: leave --ranks away there")
        return False
    if asked in (None, 1):
        return False
    exit_on_sigterm()
    try:
        run_on_ranks("cpattn.launch.cli", Root.called_with, num_ranks=asked or 1)
    except subprocess.CalledProcessError:
        raise typer.Exit(1) from None
    return True


def num_ranks(asked: int | None) -> int:
    """Ranks that a command will run on: torchrun's, or those that it starts."""
    return int(os.environ.get("WORLD_SIZE", asked or 1))


@contextmanager
def launched_ranks() -> Iterator[tuple[torch.device, dist.ProcessGroup | None]]:
    """This rank's device, and the group of all ranks if torchrun started several.

    Raises:
        ValueError: there are fewer GPUs here than ranks.
    """
    import torch
    import torch.distributed as dist

    cuda, several = torch.cuda.is_available(), int(os.environ.get("WORLD_SIZE", "1")) > 1
    here, local = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    if cuda and here > torch.cuda.device_count():
        raise ValueError(
            f"{here} ranks on a machine with {torch.cuda.device_count()} GPUs: each needs its own; with "
            f"CUDA_VISIBLE_DEVICES= (empty) they run on the CPU"
        )
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if several:
        dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield device, dist.group.WORLD if several else None
    finally:
        if several:
            dist.destroy_process_group()


@contextmanager
def telling(what: str, total: int | None = None, *, quiet: bool = False) -> Iterator[Tell]:
    """Show on a terminal that work goes on, and how far; a bar where the steps are counted. Nothing in a pipe.

    total: how often the result will be called. quiet: show nothing there either. Only rank 0 shows anything.
    """
    console = Console(stderr=True)
    shown = console.is_terminal and not quiet and os.environ.get("RANK", "0") == "0"
    counted = (BarColumn(), MofNCompleteColumn()) if total is not None else ()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), *counted, TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not shown, transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda now: progress.update(task, advance=1, description=f"{what}: {now}" if now else what)
