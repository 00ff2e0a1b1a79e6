"""Local attention kernels, one file each, and the choice among them."""

from __future__ import annotations

from functools import lru_cache

from .base import Backend, Problem
from .reference import ReferenceBackend
from .sdpa_cpu import CpuSdpaBackend

__all__ = ["Backend", "Problem", "backend_names", "choose_backend", "explain_backends"]

# In order of preference for backend="auto". A name may stand for several kernels (one a device).
_BACKENDS: tuple[Backend, ...] = (CpuSdpaBackend(), ReferenceBackend())


def backend_names() -> tuple[str, ...]:
    """Names that `backend=` takes, besides "auto"."""
    return tuple(dict.fromkeys(b.name for b in _BACKENDS))


def explain_backends(problem: Problem, name: str = "auto") -> list[tuple[Backend, str | None]]:
    """Every backend of that name (all for "auto"), in order of preference, and why it refuses."""
    if name != "auto" and name not in backend_names():
        raise ValueError(f"backend {name!r} is unknown: use auto, {', '.join(backend_names())}")
    return [(b, b.refusal(problem)) for b in _BACKENDS if name in ("auto", b.name)]


@lru_cache(maxsize=256)
def choose_backend(problem: Problem, name: str = "auto") -> Backend:
    """The backend of that name, or for "auto" the first that accepts the problem.

    Raises:
        ValueError: the name is unknown, or none that it stands for accepts; says why each refused.
    """
    explained = explain_backends(problem, name)
    for backend, refusal in explained:
        if refusal is None:
            return backend
    reasons = "; ".join(f"{b.name}: {refusal}" for b, refusal in explained)
    raise ValueError(f"no backend {name!r} serves {problem}: {reasons}")
