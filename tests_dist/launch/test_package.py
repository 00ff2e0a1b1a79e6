"""Layer 1: what is shipped: the wheel, the lists in pyproject.toml, public names, docstring examples."""

from __future__ import annotations

import ast
import doctest
import importlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

import cpattn
from tests_dist.test_layers import FOLDERS, ROOT, module_name, source_files

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def package_folders() -> set[str]:
    return {module_name(path) for _, path in source_files() if path.name == "__init__.py"}


def test_every_package_is_listed(pyproject: dict[str, Any]) -> None:
    """A package missing from the list works in the checkout and is absent from the wheel."""
    assert sorted(pyproject["tool"]["setuptools"]["packages"]) == sorted({*package_folders(), "cpattn.docs"})


def test_every_folder_with_python_files_is_a_package() -> None:
    """Among the tests too: ranks import a case by its full name, and two folders may hold a test_x.py each."""
    folders = {path.parent for _, path in source_files()} | {
        path.parent for path in (ROOT / "tests_dist").rglob("*.py")
    }
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def test_versions_agree(pyproject: dict[str, Any]) -> None:
    assert pyproject["project"]["version"] == cpattn.__version__
    assert re.search(rf"^## {re.escape(cpattn.__version__)}\b", (ROOT / "CHANGELOG.md").read_text(), re.M)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: setuptools writes into the tree that it builds."""
    pytest.importorskip("setuptools")
    source = tmp_path_factory.mktemp("source")
    for folder in (*FOLDERS, "docs"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    target = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(target), str(source))
    (path,) = target.glob("cpattn-*.whl")
    return path


def pip(*args: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *args]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_wheel_holds_every_module(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {"cpattn/py.typed", "cpattn/docs/planning.md", "cpattn/docs/images/timeline.png"}
    expected |= {"cpattn/launch/plan_page.html", "cpattn/launch/scripts/several_nodes.sh"}
    for _, path in source_files():
        name = module_name(path).replace(".", "/")
        expected.add(f"{name}/__init__.py" if path.name == "__init__.py" else f"{name}.py")
    assert expected - names == set()
    assert {name.split("/")[0] for name in names} == {"cpattn", f"cpattn-{cpattn.__version__}.dist-info"}
    assert any(name.endswith("LICENSE") for name in names)


def test_an_index_would_take_the_wheel(wheel: Path) -> None:
    pytest.importorskip("twine")
    command = [sys.executable, "-m", "twine", "check", "--strict", str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_wheel_works_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "solver.py").write_text("raise ImportError('a module of the user')")
    pip("install", "-q", "--no-index", "--no-deps", "--target", str(site), str(wheel))
    code = f"""
import sys
import cpattn, cpattn.solver
assert "torch" not in sys.modules
{chr(10).join(f"import {name}" for name in sorted(package_folders()))}
for name in {sorted(package_folders())!r}:
    print(sys.modules[name].__file__)
"""
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-c", code], cwd=elsewhere, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(line.startswith(str(site)) for line in done.stdout.splitlines())


def test_public_names_load() -> None:
    assert sorted(cpattn.__all__) == sorted({*cpattn._MODULE_OF, "__version__"})
    for name in cpattn.__all__:
        assert getattr(cpattn, name) is not None
    assert set(cpattn.__all__) <= set(dir(cpattn))
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = cpattn.no_such_name


def test_type_checkers_see_what_is_loaded() -> None:
    """The imports under TYPE_CHECKING and the table behind __getattr__ name the same modules."""
    tree = ast.parse((ROOT / "cpattn/__init__.py").read_text())
    seen = {
        alias.name: (node.module or "").removeprefix("cpattn.")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cpattn.")
        for alias in node.names
    }
    assert seen == cpattn._MODULE_OF


def test_the_command_says_what_it_lacks() -> None:
    """Without typer the command names the extra to install, without a traceback."""
    code = "import sys; sys.modules['typer'] = None\nfrom cpattn.launch.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "pip install 'cpattn[cli]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_command_prints_versions() -> None:
    pytest.importorskip("typer")
    done = subprocess.run(
        [sys.executable, "-m", "cpattn.launch.cli", "version"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"torch\W+\d+\.\d+", done.stdout)


with_examples = [module_name(path) for _, path in source_files() if ">>> " in path.read_text()]


@pytest.mark.parametrize("name", with_examples)
def test_docstring_examples_run(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "cpattn":
            raise
        pytest.skip(f"{name} needs {error.name}")
    failed, tried = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert tried > 0
    assert failed == 0
