"""The README and docs/ are true: every block of code runs, tables are what their commands print, links lead somewhere.

Python blocks of a page run in page order in one namespace, on two ranks (at night on one too); shell blocks in an empty
folder. What takes long is left to the nightly run. `python -m tests_dist.launch.test_pages` counts blocks and links.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests_dist.support.harness import run_on_ranks
from tests_dist.support.pages import (
    PAGES,
    ROOT,
    Block,
    anchors_of,
    blocks_of,
    links_of,
    python_of,
    run_python,
)

SCRIPT = re.compile(r"bash (launch/\S+\.sh)")
# The time that planning took differs from run to run; predicted times do not.
VARIES = re.compile(r"\d+\.\d+ CPU s\b")
LANGUAGES = {"", "python", "bash", "text", "json", "toml", "diff"}
# Pages that make their own groups or need more than ranks: run in other tests.
ELSEWHERE = {"README.md": "test_readme.py runs the quickstart file under torchrun", "testing.md": "test_testing.py"}


def page_id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def shell_blocks(*, nightly: bool) -> list[Block]:
    return [
        block
        for page in PAGES
        for block in blocks_of(page)
        if block.language == "bash" and block.runs and block.nightly == nightly
    ]


def with_code(*, nightly: bool) -> list[Path]:
    return [
        page
        for page in PAGES
        if page.name not in ELSEWHERE and any(block.nightly == nightly for block in python_of(page))
    ]


@pytest.mark.parametrize("cp_size", [pytest.param(1, marks=pytest.mark.nightly), 2])
@pytest.mark.parametrize("page", with_code(nightly=False), ids=page_id)
def test_python_on_pages_runs(page: Path, cp_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their assertions hold too: docs/gradients.md compares DDP's gradients with the summed ones."""
    if "transformers" in page.read_text():
        pytest.importorskip("transformers")
    counts = run_on_ranks(cp_size, run_page, str(page), str(tmp_path))
    assert counts == [len([block for block in python_of(page) if not block.nightly])] * cp_size


@pytest.mark.nightly
@pytest.mark.parametrize("page", with_code(nightly=True), ids=page_id)
def test_slow_python_on_pages_runs(page: Path, tmp_path: Path) -> None:
    run_on_ranks(2, run_page, str(page), str(tmp_path), True)


def run_page(path: str, folder: str, nightly: bool = False) -> int:
    """In a folder of its own, as pages may write files."""
    here = os.getcwd()
    os.chdir(folder)
    try:
        return run_python(path, nightly)
    finally:
        os.chdir(here)


def run_shell(block: Block, folder: Path, limit_s: float) -> str:
    """What the block prints; with the commands of this environment first on the path.

    limit_s: seconds after which all that it started is killed.
    """
    bin_folder = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
        "COLUMNS": "80",
    }
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        environment.pop(name, None)
    text = block.text.replace("bash launch/", f"bash {ROOT}/launch/")
    command = ["bash", "-euo", "pipefail", "-c", text]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **pipes) as shell:
        try:
            out, err = shell.communicate(timeout=limit_s)
        except BaseException:
            os.killpg(shell.pid, signal.SIGKILL)
            raise
    assert shell.returncode == 0, f"{page_id(block.page)}:{block.line}\n{out}\n{err}"
    return str(out)


def stated_output(block: Block) -> str | None:
    """The block marked as what this one prints, if there is one right after it."""
    blocks = blocks_of(block.page)
    after = blocks[blocks.index(block) + 1 :]
    return after[0].text if after and after[0].said == "prints" else None


def without_times(text: str) -> list[str]:
    return [VARIES.sub("#", re.sub(r" +", " ", line)).rstrip() for line in text.strip().splitlines()]


def check_shell(block: Block, folder: Path, limit_s: float = 290) -> None:
    (folder / "mask.json").write_text("[300, 200, 12]")
    printed, stated = run_shell(block, folder, limit_s), stated_output(block)
    if stated is not None:
        assert without_times(printed) == without_times(stated), f"{page_id(block.page)}:{block.line}"


@pytest.mark.parametrize("block", shell_blocks(nightly=False), ids=lambda b: f"{page_id(b.page)}:{b.line}")
def test_shell_on_pages_runs(block: Block, tmp_path: Path) -> None:
    pytest.importorskip("typer")
    check_shell(block, tmp_path)


@pytest.mark.nightly
@pytest.mark.parametrize("block", shell_blocks(nightly=True), ids=lambda b: f"{page_id(b.page)}:{b.line}")
@pytest.mark.timeout(2000)
def test_slow_shell_on_pages_runs(block: Block, tmp_path: Path) -> None:
    check_shell(block, tmp_path, limit_s=1900)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_block_says_its_language(page: Path) -> None:
    """A block of another language would be code that no test runs."""
    assert {block.language for block in blocks_of(page)} <= LANGUAGES


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page: Path) -> None:
    wrong = [link for link in links_of(page) if "://" not in link and not leads(page, link)]
    wrong += [script for script in SCRIPT.findall(page.read_text()) if not (ROOT / script).exists()]
    assert not wrong, f"{page_id(page)} points to {wrong}"


def leads(page: Path, link: str) -> bool:
    target, _, anchor = link.partition("#")
    path = (page.parent / target).resolve() if target else page
    return path.exists() and (not anchor or path.suffix != ".md" or anchor in anchors_of(path))


def test_every_extra_is_in_the_table() -> None:
    package, page = ((ROOT / name).read_text() for name in ("pyproject.toml", "docs/install.md"))
    extras = package.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    names = "".join(re.findall(r"^\| (`.*?) \|", page.partition("## Extras")[2].partition("\n## ")[0], re.M))
    assert set(re.findall(r"`([\w-]+)`", names)) == set(re.findall(r"^([\w-]+) = \[", extras, re.M))


def test_a_link_to_nowhere_is_seen() -> None:
    page = ROOT / "docs/gradients.md"
    assert leads(page, "masks.md#rectangles")
    assert not leads(page, "masks.md#no-such-heading")
    assert not leads(page, "no_such_page.md")


def main() -> None:
    blocks = [block for page in PAGES for block in blocks_of(page)]
    code = [block for block in blocks if block.language in ("python", "bash")]
    default, nightly = sum(b.runs and not b.nightly for b in code), sum(b.nightly for b in code)
    print(f"{len(PAGES)} pages; {len(code)} blocks of code: {default} run by default, {nightly} nightly")
    print(f"{sum(block.said == 'prints' for block in blocks)} outputs compared with what their command prints")
    print(f"{sum('://' not in link for page in PAGES for link in links_of(page))} links checked")
    for block in code:
        if not block.runs:
            print(f"  {page_id(block.page)}:{block.line}: {block.said}")


if __name__ == "__main__":
    main()
