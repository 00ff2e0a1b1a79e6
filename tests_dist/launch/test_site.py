"""The documentation as a site: it builds without a warning, names everything public, and quotes messages that exist."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import cpattn
from cpattn.launch.site_hooks import performance_page, rewritten
from tests_dist.support.pages import PAGES, ROOT
from tests_dist.test_sizes import sources

COMPARISON = ROOT / "docs" / "comparison.md"
# The tests at the end of the second cell of a row.
ROW = re.compile(r"^(\| ([^|*]+) \| [^|]*?): `test_[^|]* \|", re.MULTILINE)
TEST_FILE = re.compile(r"`((?:tests_dist/\w+/)?test_\w+\.py)`")


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """--strict: dead links and anchors, pages outside the navigation and docstrings that cannot be read are errors."""
    for module in ("mkdocs", "material", "mkdocstrings_handlers"):
        if find_spec(module) is None:
            pytest.skip(f"{module} is not here: pip install 'cpattn[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "make_key" in (tmp_path / "site/reference/index.html").read_text()
    assert (tmp_path / "site/results/step_packed_cpu_2026-11-21/index.html").exists()


def test_every_page_is_in_the_navigation() -> None:
    nav = (ROOT / "mkdocs.yml").read_text()
    pages = list((ROOT / "docs").glob("*.md"))
    assert [page.name for page in pages if f"- {page.name}\n" not in nav] == []


def test_the_reference_names_everything_public() -> None:
    text = (ROOT / "docs/reference.md").read_text()
    assert {name for name, module in cpattn._MODULE_OF.items() if f"::: cpattn.{module}.{name}\n" not in text} == set()


def test_performance_is_made_from_the_results() -> None:
    """After a new results file: python -m cpattn.launch.site_hooks"""
    assert (ROOT / "docs/performance.md").read_text() == performance_page()


def test_links_out_of_docs_lead_to_pages_of_the_site() -> None:
    text = "[a](../launch/benchmarks/results/x.md) [b](../launch/x.py) [c](masks.md#rectangles) [d](../README.md)"
    site = "[a](results/x.md) b [c](masks.md#rectangles) [d](index.md)"
    assert rewritten(text, "docs/tuning.md", "tuning.md") == site


def shown_rows() -> dict[str, list[str]]:
    """Rows of the comparison, and the tests that are marked with each: file::name."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "tests_dist").rglob("test_*.py")):
        for node in ast.parse(path.read_text()).body:
            for mark in node.decorator_list if isinstance(node, ast.FunctionDef) else ():
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.shows":
                    for row in map(ast.literal_eval, mark.args):
                        found.setdefault(row, []).append(f"{path.name}::{node.name}")  # type: ignore[attr-defined]
    return found


def with_tests(page: str) -> str:
    """The page with the tests of each row as they are marked."""
    shown = shown_rows()
    return ROW.sub(lambda row: f"{row[1]}: {', '.join(f'`{test}`' for test in shown[row[2]])} |", page)


def test_the_comparison_names_the_tests_that_are_marked() -> None:
    text = COMPARISON.read_text()
    assert {row for _, row in ROW.findall(text)} == shown_rows().keys()
    assert with_tests(text) == text


def messages() -> str:
    """All text of the source's strings, with what is filled in left out."""
    found = []
    for _, source in sources():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(v.value if isinstance(v, ast.Constant) else "\0" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_quoted_messages_exist() -> None:
    page = (ROOT / "docs/troubleshooting.md").read_text().partition("Messages of Python")[0]
    quoted = re.findall(r"^\| `([^`]+)`", page, re.MULTILINE)
    text = messages()
    assert len(quoted) > 10
    assert [message for message in quoted if message not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_that_a_page_names_exist(page: Path) -> None:
    """What a page says is tested by a file that is there."""
    there = {path.name for path in (ROOT / "tests_dist").rglob("test_*.py")} | {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "tests_dist").rglob("test_*.py")
    }
    assert set(TEST_FILE.findall(page.read_text())) - there <= {"test_model.py"}


if __name__ == "__main__":
    COMPARISON.write_text(with_tests(COMPARISON.read_text()))
