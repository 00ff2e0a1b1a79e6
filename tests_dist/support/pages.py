"""The pages of the documentation as programs: their code blocks in order, and what is said of each.

A block is told how it is run by a comment on the line before it, which readers do not see:

    <!-- nightly -->               only in the nightly run: it takes long
    <!-- not run: REASON -->       it cannot be run here, and why
    <!-- prints -->                what the shell block before it prints, from its first line to its last
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

_FENCE = re.compile(
    r"^(?:<!-- (?P<said>[^\n]*?) -->\n)?(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^(?P=indent)```",
    re.MULTILINE | re.DOTALL,
)
_LINK = re.compile(r"\]\(([^)\s]+)[^)]*\)")
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


class Block(NamedTuple):
    """A fenced block. line: of its first line in the page, from 1. said: of the comment before it."""

    page: Path
    line: int
    language: str
    text: str
    said: str

    @property
    def runs(self) -> bool:
        return not self.said.startswith("not run: ")

    @property
    def nightly(self) -> bool:
        return self.said == "nightly"


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text()
    found = []
    for match in _FENCE.finditer(text):
        said, indent = match["said"] or "", match["indent"]
        line = text.count("\n", 0, match.start("text")) + 1
        inside = "".join(row.removeprefix(indent) for row in match["text"].splitlines(keepends=True))
        found.append(Block(page, line, match["language"], inside, said))
    return found


def python_of(page: Path) -> list[Block]:
    return [block for block in blocks_of(page) if block.language == "python" and block.runs]


def run_python(path: str, nightly: bool = False) -> int:
    """The page's python blocks in order, in one namespace, as one script; how many were run. For every rank."""
    namespace: dict[str, Any] = {"__name__": "page"}
    blocks = [block for block in python_of(Path(path)) if nightly or not block.nightly]
    for block in blocks:
        code = "\n" * (block.line - 1) + block.text  # so that a traceback names the line of the page
        exec(compile(code, path, "exec"), namespace)
    return len(blocks)


def links_of(page: Path) -> list[str]:
    """Targets of links and pictures, outside code."""
    return _LINK.findall(_FENCE.sub("", page.read_text()))


def anchors_of(page: Path) -> set[str]:
    """What `page#...` may name: headings as GitHub and mkdocs turn them into anchors."""
    headings = _HEADING.findall(_FENCE.sub("", page.read_text()))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
