"""Tests that put ranks into network namespaces of their own."""

from __future__ import annotations

import pytest

from cpattn.launch.benchmarks.hosts import require_namespaces


def skip_without_namespaces() -> None:
    """Skip where they cannot be made."""
    try:
        require_namespaces()
    except RuntimeError as error:
        pytest.skip(str(error))
