"""`cpattn docs`: the pages of this documentation, which come with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markdown import Markdown

from .session import answering
from .tables import Grid, show

# Beside this folder both in a checkout and where the package is installed.
PAGES = Path(__file__).resolve().parents[1] / "docs"


def docs_command(
    page: Annotated[str, typer.Argument(help="Name of a page, as the list has it.", show_default=False)] = "",
) -> None:
    """List the pages of the documentation, or print one."""
    if not page:
        grid = Grid(("page", "about"), words=("about",))
        for name, path in sorted(_pages().items()):
            grid.add(name, _title(path))
        show([grid])
        return
    with answering():
        text = _read(page)
    console = Console()
    if console.is_terminal:
        console.print(Markdown(text))
    else:
        print(text, end="")


def _pages() -> dict[str, Path]:
    found = (path.relative_to(PAGES) for path in PAGES.rglob("*.md"))
    return {path.with_suffix("").as_posix(): PAGES / path for path in found}


def _read(page: str) -> str:
    pages = _pages()
    if page.removesuffix(".md") not in pages:
        raise ValueError(f"there is no page {page!r}: `cpattn docs` lists them")
    return pages[page.removesuffix(".md")].read_text()


def _title(path: Path) -> str:
    first = path.read_text().lstrip().partition("\n")[0]
    return first.lstrip("# ")
