"""The commands of `cpattn`. Each loads torch only when it runs, so that `cpattn --help` answers at once."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import typer
from rich.console import Console
from rich.table import Table

from .bench_command import bench_command
from .calibrate import calibrate_command
from .check_command import check_command
from .cli_doctor import doctor
from .plan_command import plan_command

app = typer.Typer(
    name="cpattn",
    help="Exact context-parallel attention for PyTorch.",
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


@app.callback()
def _root() -> None:
    """Exact context-parallel attention for PyTorch."""


app.command("doctor")(doctor)
app.command("plan")(plan_command)
app.command("calibrate")(calibrate_command)
app.command("bench")(bench_command)
app.command("check")(check_command)


@app.command("version")
def show_version() -> None:
    """Print the versions of cpattn, Python and the packages it can use."""
    table = Table("package", "version")
    table.add_row("python", platform.python_version())
    for package in _REPORTED_PACKAGES:
        try:
            table.add_row(package, version(package))
        except PackageNotFoundError:
            table.add_row(package, "-")
    Console().print(table)

