"""What was checked and what came of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class Check:
    """One check on all ranks.

    name: what was checked. backend: of which kernel; empty where it concerns none. ok: whether all ranks passed.
    said: what was found, with the worst rank's number and, if not ok, the first ranks that failed.
    """

    name: str
    backend: str
    ok: bool
    said: str

    def line(self) -> str:
        of_backend = f"{self.backend}: " if self.backend else ""
        return f"{'ok  ' if self.ok else 'FAIL'} {of_backend}{self.name}: {self.said}"


@dataclass(frozen=True, slots=True)
class Verification:
    """All checks of a `verify`; the same on every rank. True if all are ok."""

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        lines = [c.line() for c in self.checks]
        failed = sum(not c.ok for c in self.checks)
        return "\n".join([*lines, f"{failed} of {len(self.checks)} checks failed" if failed else "all checks passed"])

    def to_json(self) -> str:
        """{"ok": ..., "checks": [{"name", "backend", "ok", "said"}, ...]}"""
        return json.dumps({"ok": self.ok, "checks": [asdict(check) for check in self.checks]}, indent=2)


@dataclass(frozen=True, slots=True)
class Finding:
    """One check as one rank saw it. error: what is compared with `allowed`. said: more about it."""

    error: float
    allowed: float = 0.0
    said: str = ""

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed  # not where error is NaN


def summed_up(name: str, backend: str, findings: Sequence[Finding]) -> Check:
    """The check that all ranks' findings make."""
    failed = [rank for rank, finding in enumerate(findings) if not finding.ok]
    shown = failed[0] if failed else max(range(len(findings)), key=lambda rank: findings[rank].error)
    worst = findings[shown]
    said = worst.said or f"largest error {worst.error:.1e}, {worst.allowed:.1e} is allowed"
    if failed and len(findings) > 1:
        said += f" (rank {shown}; failed on {len(failed)} of {len(findings)} ranks)"
    return Check(name, backend, not failed, said)
