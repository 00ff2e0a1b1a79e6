"""Hooks of mkdocs: pages of the site that are made from files outside docs/, and links that lead there.

README.md is the first page; CHANGELOG.md and CONTRIBUTING.md are pages, and so is each committed result of a benchmark.

    python -m cpattn.launch.site_hooks      # writes docs/performance.md, the list of them
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "launch" / "benchmarks" / "results"
_COPIED = {"index.md": "README.md", "changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)([^)]*)\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made here."""
    from mkdocs.structure.files import File

    made = {page: (ROOT / source).read_text() for page, source in _COPIED.items()}
    made |= {f"results/{path.name}": path.read_text() for path in sorted(RESULTS.glob("*.md"))}
    for page, text in made.items():
        files.append(File.generated(config, page, content=rewritten(text, source_of(page), page)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Lead links out of docs/ to the pages made from there, or say only what they name."""
    if page.file.generated_by:
        return markdown
    return rewritten(markdown, f"docs/{page.file.src_uri}", page.file.src_uri)


def source_of(page: str) -> str:
    """The file of the repository that a page is made from, which its links are relative to."""
    if page.startswith("results/"):
        return f"launch/benchmarks/{page}"
    return _COPIED.get(page, f"docs/{page}")


def rewritten(text: str, source: str, page: str) -> str:
    """The text with its links as they are on the site. source: its file, from the root; page: its place on the site."""
    there = {file: made for made, file in _COPIED.items()}

    def link(match: re.Match[str]) -> str:
        picture, words, target, rest = match.groups()
        if "://" in target or target.startswith("#"):
            return match[0]
        path, hash_, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if path in there:
            new = there[path]
        elif path == "docs/decisions":
            new = "decisions/README.md"
        elif path.startswith("docs/"):
            new = path.removeprefix("docs/")
        elif path.startswith("launch/benchmarks/results/") and path.endswith(".md"):
            new = "results/" + posixpath.basename(path)
        elif path == "launch/benchmarks/results":
            new = "performance.md"
        else:
            return words  # a file of the repository
        new = posixpath.relpath(new, posixpath.dirname(page) or ".")
        return f"{picture}[{words}]({new}{hash_}{anchor}{rest})"

    return _LINK.sub(link, text)


def performance_page() -> str:
    """Committed measurements: title and command of each file, by its name."""
    lines = ["# Performance", "", "Committed measurements and predictions, with command, versions and hardware.", ""]
    lines += ["| results | what | command |", "|---|---|---|"]
    for path in sorted(RESULTS.glob("*.md")):
        text = path.read_text()
        title = next((line[2:] for line in text.splitlines() if line.startswith("# ")), path.stem)
        command = re.search(r"`?((?:python|bash|torchrun)[^`\n]*)", text)
        shown = f"`{command[1].strip()}`" if command else ""
        lines.append(f"| [{path.stem}](../launch/benchmarks/results/{path.name}) | {title} | {shown} |")
    return "\n".join([*lines, "", "Where others are faster is in [Beside others](comparison.md).", ""])


if __name__ == "__main__":
    (ROOT / "docs" / "performance.md").write_text(performance_page())
