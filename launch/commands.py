"""The commands of `cpattn`. Each loads torch only when it runs, so that `cpattn --help` answers at once."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from .bench_command import bench_command
from .calibrate import calibrate_command
from .check_command import check_command
from .cli_doctor import doctor
from .demo_command import demo_command
from .docs_command import docs_command
from .options import JsonOption
from .plan_command import plan_command
from .session import Root
from .tables import Grid, show

app = typer.Typer(
    name="cpattn",
    cls=Root,
    help="Exact context-parallel attention for PyTorch.",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

# What a report of a problem should name: what is required, then what brings a backend or an integration.
_REPORTED_PACKAGES = (
    "cpattn",
    "torch",
    "numpy",
    "triton",
    "flash-attn",
    "transformer-engine",
    "nvidia-cudnn-frontend",
    "transformers",
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"cpattn {_version('cpattn')}")
        raise typer.Exit


@app.callback()
def _root(
    show_it: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Exact context-parallel attention for PyTorch."""


app.command("plan")(plan_command)
app.command("check")(check_command)
app.command("bench")(bench_command)
app.command("calibrate")(calibrate_command)
app.command("doctor")(doctor)
app.command("demo")(demo_command)
app.command("docs")(docs_command)


@app.command("version")
def show_version(as_json: JsonOption = False) -> None:
    """Print the versions of cpattn, Python and the packages it can use."""
    versions = {"python": platform.python_version(), **{name: _version(name) for name in _REPORTED_PACKAGES}}
    if as_json:
        print(json.dumps(versions, indent=2))
        return
    grid = Grid(("package", "version"), words=("version",))
    for package, found in versions.items():
        grid.add(package, found or "-")
    show([grid])


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
