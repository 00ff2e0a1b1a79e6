"""`cpattn doctor`: which local kernels are here, what each refuses and why, and what "auto" would choose."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from cpattn.planning.options import read_heads

from .options import TORCH_NAMES, refused

if TYPE_CHECKING:
    from cpattn.backends import Problem

# What brings each kernel, by the name that pip knows.
_PACKAGES = (
    "torch",
    "triton",
    "flash-attn",
    "flash-attn-3",
    "flash-attn-4",
    "transformer-engine",
    "nvidia-cudnn-frontend",
    "magi-attention",
)


def doctor(
    device: Annotated[str, typer.Option(help="cuda or cpu; default: cuda where there is one")] = "",
    dtype: Annotated[str, typer.Option(help="of q, k and v")] = "bfloat16",
    num_heads_q: Annotated[int, typer.Option()] = 32,
    num_heads_kv: Annotated[int, typer.Option()] = 8,
    head_dim: Annotated[int, typer.Option(help="of queries and keys")] = 128,
    head_dim_v: Annotated[int, typer.Option(help="of values; 0: as head-dim")] = 0,
    softcap: Annotated[bool, typer.Option(help="scores are capped")] = False,
    backend: Annotated[str, typer.Option(help="a backend by name, auto, or fastest: try them")] = "auto",
) -> None:
    """Say which local kernels serve a problem, which refuse it and why, and which one would run."""
    import torch

    from cpattn.backends import Problem, device_kind, explain_backends, explain_choice

    console = Console()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if device not in ("cuda", "cpu"):
            raise ValueError(f"--device is {device!r}: use cuda or cpu")
        chosen_dtype = getattr(torch, TORCH_NAMES.get(dtype, dtype), None)
        if chosen_dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            raise ValueError(f"dtype {dtype!r} is unknown: use bfloat16, float16, float32 or float64")
        heads = read_heads(num_heads_q, num_heads_kv, head_dim, head_dim_v or head_dim)
    except ValueError as error:
        raise refused(error) from None
    console.print(f"device {_device_name(device)} (kind {device_kind(device)})")
    console.print(", ".join(f"{p} {_version(p)}" for p in _PACKAGES))
    problem = Problem(device, chosen_dtype, *heads.numbers, softcap)
    if backend == "fastest":
        _race(console, problem)
        return
    try:
        explained = explain_backends(problem, backend)
    except ValueError as error:
        console.print(str(error), markup=False)
        raise typer.Exit(2) from None
    table = Table("backend", "kernel", "answer", title=f"{problem}", title_justify="left")
    for candidate, refusal in explained:
        table.add_row(candidate.name, candidate.kernel, "serves it" if refusal is None else refusal)
    console.print(table)
    try:
        console.print(f"{backend} would run: {explain_choice(problem, backend)}", highlight=False)
    except ValueError:
        console.print(f"{backend}: nothing serves it")
        raise typer.Exit(1) from None


def _race(console: Console, problem: Problem) -> None:
    """What "fastest" would find for a causal sequence."""
    import torch

    from cpattn.masks.spec import AttnMaskSpec, lower_mask
    from cpattn.runtime.fastest import Work, decide

    tokens = 16384 if problem.device_type == "cuda" else 1024
    work = Work(lower_mask(AttnMaskSpec.causal(tokens)), tokens, tokens)
    try:
        choice = decide(problem, work, torch.device(problem.device_type), None)
    except ValueError as error:
        console.print(str(error), markup=False)
        raise typer.Exit(1) from None
    table = Table("kernel", "both passes", "against reference", title=f"causal, {tokens} tokens, {problem}")
    for trial in sorted(choice.trials, key=lambda t: t.seconds):
        took = "-" if trial.fault else f"{trial.seconds * 1e3:.3g} ms"
        table.add_row(trial.kernel, took, trial.fault or "agrees")
    console.print(table)
    console.print(f"fastest would run: {choice.in_words()}", highlight=False)


def _device_name(device: str) -> str:
    import torch

    if device == "cuda" and torch.cuda.is_available():
        return f"cuda: {torch.cuda.get_device_name()}, {torch.cuda.device_count()} of them"
    return device


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "-"
