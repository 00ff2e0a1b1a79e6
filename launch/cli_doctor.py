"""`cpattn doctor`: which local kernels are here, what each refuses and why, and what "auto" would choose."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from .options import BackendOption, HeadOptions, JsonOption, heads_of_option, takes_options
from .session import answering, telling
from .tables import Grid, show

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


@takes_options
def doctor(
    *,
    device: Annotated[str, typer.Option(help="cuda or cpu; default: cuda where there is one.")] = "",
    heads: HeadOptions,
    head_dim_v: Annotated[int | None, typer.Option(help="Dim of a value's head; default: --head-dim.")] = None,
    softcap: Annotated[bool, typer.Option("--softcap", help="Scores are capped.")] = False,
    backend: BackendOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Say which local kernels serve a problem, which refuse it and why, and which one would run."""
    with answering():
        shape = heads_of_option(heads.heads, heads.head_dim, head_dim_v)
        if device not in ("", "cuda", "cpu"):
            raise ValueError(f"--device is {device!r}: use cuda or cpu")
    import torch

    from cpattn.backends import Problem, device_kind, explain_backends, explain_choice

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    problem = Problem(device, getattr(torch, heads.dtype.torch_name), *shape.numbers, softcap)
    if backend == "fastest":
        _race(problem, f"{heads.words()} on {device}", as_json=as_json)
        return
    with answering():
        explained = explain_backends(problem, backend)
    try:
        choice = explain_choice(problem, backend)
    except ValueError:
        choice = None
    answers = [(candidate.name, candidate.kernel, refusal) for candidate, refusal in explained]
    if as_json:
        print(json.dumps(_values(device, device_kind(device), backend, answers, choice), indent=2))
    else:
        show(_lines(device, device_kind(device), backend, answers, choice, f"{heads.words()} on {device}"))
    if choice is None:
        raise typer.Exit(1)


def _race(problem: Problem, words: str, *, as_json: bool) -> None:
    """What "fastest" would find for a causal sequence."""
    import torch

    from cpattn.masks.spec import AttnMaskSpec, lower_mask
    from cpattn.runtime.fastest import Work, decide

    tokens = 16384 if problem.device_type == "cuda" else 1024
    work = Work(lower_mask(AttnMaskSpec.causal(tokens)), tokens, tokens)
    try:
        with telling("trying kernels", quiet=as_json):
            choice = decide(problem, work, torch.device(problem.device_type), None)
    except ValueError as error:
        show([str(error)])
        raise typer.Exit(1) from None
    trials = sorted(choice.trials, key=lambda trial: trial.seconds)
    if as_json:
        values = [{"kernel": t.kernel, "seconds": None if t.fault else t.seconds, "fault": t.fault} for t in trials]
        print(json.dumps({"tokens": tokens, "trials": values, "choice": choice.in_words()}, indent=2))
        return
    title = f"causal, {tokens} tokens, {words}"
    grid = Grid(("kernel", "both passes", "against reference"), title=title, words=("against reference",))
    for trial in trials:
        grid.add(trial.kernel, "-" if trial.fault else f"{trial.seconds * 1e3:.3g} ms", trial.fault or "agrees")
    show([grid, f"fastest would run: {choice.in_words()}"])


_Answers: TypeAlias = list[tuple[str, str, "str | None"]]


def _values(device: str, kind: str, backend: str, answers: _Answers, choice: str | None) -> dict[str, Any]:
    return {
        "device": _device_name(device),
        "kind": kind,
        "packages": {package: _version(package) for package in _PACKAGES},
        "backends": [{"backend": name, "kernel": kernel, "refusal": refusal} for name, kernel, refusal in answers],
        "asked": backend,
        "choice": choice,
    }


def _lines(
    device: str, kind: str, backend: str, answers: _Answers, choice: str | None, problem: str
) -> Iterator[Grid | str]:
    yield f"device {_device_name(device)} (kind {kind})"
    yield ", ".join(f"{package} {_version(package) or '-'}" for package in _PACKAGES)
    grid = Grid(("backend", "kernel", "answer"), title=problem, words=("kernel", "answer"))
    for name, kernel, refusal in answers:
        grid.add(name, kernel, refusal or "serves it")
    yield grid
    yield f"{backend}: nothing serves it" if choice is None else f"{backend} would run: {choice}"


def _device_name(device: str) -> str:
    import torch

    if device == "cuda" and torch.cuda.is_available():
        return f"cuda: {torch.cuda.get_device_name()}, {torch.cuda.device_count()} of them"
    return device


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
