"""What is installed, with which arguments and on which GPU: asked once, answered in words."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import inspect
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch


def missing_package(module: str, package: str, how: str = "") -> str | None:
    """Words that name the package if its module cannot be found; nothing is imported for it.

    how: what brings it, where that is not pip.
    """
    if module in sys.modules:
        return None
    if _spec_exists(module):
        return None
    return f"the package {package} is not installed ({how or f'pip install {package}'})"


@lru_cache(maxsize=64)
def _spec_exists(module: str) -> bool:
    # find_spec imports parents, which for these packages load shared libraries and may fail loudly.
    parts = module.split(".")
    try:
        spec = importlib.util.find_spec(parts[0])
    except (ImportError, ValueError):
        return False
    if spec is None:
        return False
    for part in parts[1:]:
        finder = importlib.machinery.PathFinder
        spec = finder.find_spec(part, list(spec.submodule_search_locations or ()))
        if spec is None:
            return False
    return True


@lru_cache(maxsize=64)
def failing_import(module: str, package: str) -> str | None:
    """Words for a package that is there and cannot be imported. It is imported for it, so ask this last."""
    try:
        importlib.import_module(module)
    except Exception as error:  # of any kind: a shared library that does not fit raises OSError, and others
        said = (str(error).splitlines() or [""])[0]
        return f"the package {package} is installed and cannot be imported ({type(error).__name__}: {said[:160]})"
    return None


def device_capability(device_type: str) -> tuple[int, int] | None:
    """Compute capability of the current GPU; None without one (fakes run on the CPU)."""
    if device_type != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability()


def call_known(function: Callable[..., Any], required: dict[str, Any], optional: dict[str, Any]) -> Any:
    """Call with those optional arguments that the function has; the required ones whatever it has."""
    known = known_parameters(function)
    return function(**required, **{k: v for k, v in optional.items() if known is None or k in known})


@lru_cache(maxsize=64)
def known_parameters(function: Callable[..., Any]) -> frozenset[str] | None:
    """Names of its parameters; None if it takes any."""
    inner = getattr(function, "_init_fn", None) or getattr(function, "_opaque_func", None) or function
    try:
        parameters = inspect.signature(inner).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind == p.VAR_KEYWORD for p in parameters):
        return None
    return frozenset(p.name for p in parameters)
