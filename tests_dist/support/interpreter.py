"""Triton's interpreter for tests: a third of its time, and what to skip without it."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from cpattn.backends.triton import interpreting

needs_interpreter = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or not interpreting(),
    reason="needs triton and TRITON_INTERPRET=1 (tests_dist/conftest.py sets it where there is no GPU)",
)


def quicken() -> None:
    """Leave out what the interpreter does anew for every call of a function inside a kernel, and its overflow checks.

    It replaces the language's functions by its own once more in each such call, though they are replaced already.
    """
    from triton.runtime import interpreter

    patch, options = interpreter._patch_lang, interpreter.interpreter_builder.options
    patch_tensor = interpreter._patch_lang_tensor
    done: set[int] = set()  # by the globals of a function: in them the language is found

    class Kernel:
        def __init__(self, scope: Any) -> None:
            self.scope = scope

        def restore(self) -> None:
            done.clear()
            self.scope.restore()

    def patch_once(fn: Any) -> Kernel | None:
        if id(fn.__globals__) in done:
            return None  # inside a kernel, where the result is not used
        done.add(id(fn.__globals__))
        return Kernel(patch(fn))

    def patch_index(tensor: Any, *scope: Any) -> None:
        """Triton 3.6 makes a number of an array of one element, which numpy 2.4 refuses."""
        patch_tensor(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())

    interpreter._patch_lang = patch_once
    interpreter._patch_lang_tensor = patch_index
    object.__setattr__(options, "sanitize_overflow", False)
