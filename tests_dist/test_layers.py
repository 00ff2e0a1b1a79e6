"""Layer 1: the arrows of the architecture, read off the imports.

    launch -> cpattn -> solver, collectives        tests_dist -> everything

Within cpattn every folder is a room, and rooms stand above one another (`ROOMS`). Imports inside functions and those
for type checkers count as any other: a circle of files is one, wherever it is closed.

`solver` is plain Python and numpy; `collectives` is torch, triton and itself. A folder's name is not an import name:
solver/ is `cpattn.solver`, collectives/ `cpattn.collectives`, launch/ `cpattn.launch`.
"""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "cpattn": "cpattn",
    "solver": "cpattn.solver",
    "collectives": "cpattn.collectives",
    "launch": "cpattn.launch",
}

_CORE = ("solver", "collectives", "masks", "planning", "backends", "runtime", "keys", "ops")
# The rooms from the ground up, and what each may import: nothing of the same height or above. `cpattn` is what
# cpattn/__init__.py offers, and `generation` a documented path.
ROOMS: dict[str, tuple[str, ...]] = {
    "solver": (),
    "collectives": (),
    "masks": ("solver",),
    "planning": ("solver", "masks"),
    "backends": ("solver", "collectives"),
    "runtime": ("solver", "collectives", "backends"),
    "keys": ("solver", "collectives", "masks", "planning", "backends", "runtime"),
    "ops": ("solver", "collectives", "masks", "runtime", "keys"),
    "checks": ("solver", "masks", "backends", "runtime", "keys", "ops"),
    "mixers": ("solver", "collectives", "masks", "backends", "runtime", "keys", "ops"),
    "integrations": ("collectives", "masks", "planning", "runtime", "keys", "ops", "mixers"),
    "nn": ("integrations",),
    "decoding": ("collectives", "masks", "runtime", "keys", "ops", "integrations"),
    "generation": ("decoding",),
    "te_ops": (*_CORE, "decoding"),
    "automodel": (*_CORE, "integrations", "te_ops"),
    "magi_api": _CORE,
    "cpattn": (*_CORE, "checks", "integrations", "decoding"),
    "testing": (*_CORE, "cpattn"),
    "launch": (*_CORE, "mixers", "integrations", "decoding", "generation", "cpattn", "testing"),
}


class Import(NamedTuple):
    line: int
    module: str  # absolute: for `from a.b import c`, a.b.c


def module_name(path: Path) -> str:
    """The import name of a file of the checkout."""
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    parts = [FOLDERS[folder], *rest]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(source: str, module: str, is_package: bool) -> list[Import]:
    """Every import in the source, at top level or not, made absolute."""
    found: list[Import] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [Import(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".")[: None if is_package else -1]
                package = package[: len(package) - node.level + 1]
                base = ".".join([*package, *([base] if base else [])])
            found += [Import(node.lineno, f"{base}.{alias.name}") for alias in node.names]
    return found


def within(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def fault(folder: str, module: str) -> str | None:
    """Why a file of `folder` may not import `module`; None if it may."""
    top = module.split(".")[0]
    if top in ("solver", "collectives", "launch"):
        return f"{top}/ is imported as cpattn.{top}"
    if top == "tests_dist":
        return "nothing imports the tests"
    if folder == "solver":
        if top not in (*sys.stdlib_module_names, "numpy") and not within(module, "cpattn.solver"):
            return "solver is the standard library, numpy and itself"
    elif folder == "collectives":
        if top not in (*sys.stdlib_module_names, "torch", "triton") and not within(module, "cpattn.collectives"):
            return "collectives is the standard library, torch, triton and itself"
    elif folder == "cpattn" and within(module, "cpattn.launch"):
        return "cpattn does not know launch"
    return None


def source_files() -> list[tuple[str, Path]]:
    return [
        (folder, path)
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
        if "__pycache__" not in path.parts
    ]


def room_of(module: str) -> str:
    """The room of a module of cpattn."""
    return module.split(".")[1] if "." in module else module


def imported_files() -> dict[str, set[str]]:
    """Each module of the package with the modules that it imports from the package."""
    files = {module_name(path): path for _, path in source_files()}

    def file_of(name: str) -> str:
        while name not in files:
            name = name.rpartition(".")[0]
        return name

    graph: dict[str, set[str]] = {}
    for module, path in files.items():
        found = imports_of(path.read_text(), module, path.name == "__init__.py")
        graph[module] = {file_of(name) for _, name in found if within(name, "cpattn")} - {module}
    return graph


def test_rooms_import_downward_only() -> None:
    order = list(ROOMS)
    assert all(order.index(below) < order.index(room) for room, allowed in ROOMS.items() for below in allowed)
    wrong = [
        f"{module} imports {other}: {room_of(module)} may import {', '.join(ROOMS[room_of(module)]) or 'no room'}"
        for module, imported in imported_files().items()
        for other in sorted(imported)
        if room_of(other) not in (room_of(module), *ROOMS[room_of(module)])
    ]
    assert wrong == []


def test_the_page_on_the_inside_shows_these_rooms() -> None:
    """docs/inside.md has a row for each room, in this order, with what it may import."""
    text = (ROOT / "docs" / "inside.md").read_text()
    rows = [line.split("|")[1:4] for line in text[text.index("## Rooms") :].splitlines() if line.startswith("| `")]
    shown = {room.strip(" `"): tuple(re.findall(r"`(\w+)`", imports)) for room, _, imports in rows}
    assert list(shown) == list(ROOMS)
    assert shown == ROOMS


def test_no_circle_of_files() -> None:
    try:
        graphlib.TopologicalSorter(imported_files()).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"files that import one another: {' <- '.join(error.args[1])}")


def test_no_import_points_the_wrong_way() -> None:
    wrong = []
    for folder, path in source_files():
        for line, module in imports_of(path.read_text(), module_name(path), path.name == "__init__.py"):
            reason = fault(folder, module)
            if reason is not None:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {module}: {reason}")
    assert wrong == []


def test_all_four_folders_are_looked_at() -> None:
    assert {folder for folder, _ in source_files()} == set(FOLDERS)


@pytest.mark.parametrize(
    ("folder", "source", "allowed"),
    [
        ("solver", "import numpy as np", True),
        ("solver", "from .slices import SliceTable", True),
        ("solver", "from cpattn.solver import Plan", True),
        ("solver", "import torch", False),
        ("solver", "def f():\n    import torch.distributed", False),
        ("solver", "from ..mask_spec import AttnMaskSpec", False),
        ("solver", "from .. import key", False),
        ("solver", "from cpattn import make_key", False),
        ("solver", "import scipy", False),
        ("collectives", "import torch.distributed as dist", True),
        ("collectives", "from .merge import merge_partials", True),
        ("collectives", "from cpattn.solver import Plan", False),
        ("cpattn", "from cpattn.solver import Plan", True),
        ("cpattn", "from .collectives import group_cast", True),
        ("cpattn", "from .launch import cli", False),
        ("cpattn", "from solver import Plan", False),
        ("launch", "import cpattn, typer", True),
        ("launch", "from tests_dist.support.harness import run_on_ranks", False),
    ],
)
def test_the_rules_themselves(folder: str, source: str, allowed: bool) -> None:
    found = imports_of(source, FOLDERS[folder] + ".some_file", is_package=False)
    assert found
    assert all(fault(folder, module) is None for _, module in found) == allowed


def test_relative_imports_of_a_package_are_its_own() -> None:
    source = "from . import a\nfrom .b import c\nfrom .. import d"
    assert [module for _, module in imports_of(source, "cpattn.backends", is_package=True)] == [
        "cpattn.backends.a",
        "cpattn.backends.b.c",
        "cpattn.d",
    ]


def test_planning_loads_no_torch() -> None:
    """A DataLoader worker plans without paying for torch; so do tools on machines that lack it."""
    modules = [module_name(path) for folder, path in source_files() if folder == "solver"]
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr or "torch was imported"
