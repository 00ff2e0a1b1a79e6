"""Layer 1: functions and files stay short enough to be read at once. Docstrings do not count.

What is longer by contract (files that stand for another project's) is let be.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("cpattn", "solver", "collectives", "launch")
MOST_IN_A_BODY, MOST_IN_A_FILE = 50, 500
MOST_PARAMETERS, MOST_WITH_MORE = 8, 30
# Stand for files of other projects, whose names they have.
CONTRACTS = ("cpattn/automodel/", "cpattn/magi_api.py", "cpattn/te_ops/")
# Triton: every pointer and stride is a parameter.
KERNELS = ("triton_kernels.py", "row_kernels_triton.py")


def sources() -> Iterator[tuple[str, str]]:
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), path.read_text()


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from the first statement to the last, the docstring left out."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Those that a caller may give; not self or cls."""
    a = function.args
    names = [x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg)))]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def is_overload(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any(isinstance(d, ast.Name) and d.id == "overload" for d in function.decorator_list)


def functions(source: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def test_body_lines_leave_the_docstring_out() -> None:
    (found,) = functions('def f(a):\n    """Words.\n\n    More words.\n    """\n    b = a\n\n    return b\n')
    assert body_lines(found) == 3


def test_bodies_are_short() -> None:
    long = {
        f"{name} {function.name}"
        for name, source in sources()
        for function in functions(source)
        if body_lines(function) > MOST_IN_A_BODY
    }
    assert long == set()


def test_files_are_short() -> None:
    long = [name for name, source in sources() if len(source.splitlines()) > MOST_IN_A_FILE]
    assert [name for name in long if not name.startswith(CONTRACTS)] == []


def test_few_functions_take_many_parameters() -> None:
    """Signatures that others prescribe (contracts, kernels of a language of its own, overloads) are not counted."""
    many = [
        f"{name} {function.name}"
        for name, source in sources()
        if not name.startswith(CONTRACTS) and not name.endswith(KERNELS)
        for function in functions(source)
        if not is_overload(function) and parameters(function) > MOST_PARAMETERS
    ]
    assert len(many) <= MOST_WITH_MORE, many
