"""What a sweep found, as text and as JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field

# Tries some cases: how many, and the seed and error of each that failed.
Batch = Callable[[], tuple[int, list[tuple[int, str]]]]


@dataclass(slots=True)
class Sweep:
    """Cases tried and what went wrong.

    command: that repeats a failure, with {seed} in the place of its seed.
    failures: (seed, first lines of the error).
    figures: whatever else the sweep has to say.
    """

    name: str
    seed: int
    command: str
    cases: int = 0
    failures: list[tuple[int, str]] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    def run(self, batches: Iterable[Batch], say: Callable[[str], None]) -> None:
        """Run batches, each of which gives its number of cases and its failures; a line every ten seconds."""
        start = said = time.monotonic()
        for batch in batches:
            cases, failures = batch()
            self.cases += cases
            self.failures += failures
            self.seconds = time.monotonic() - start
            for seed, error in failures:
                say(f"FAILED seed {seed}: {error}\n    again: {self.command.format(seed=seed)}")
            if time.monotonic() - said > 10:
                said = time.monotonic()
                say(f"{self.name}: {self.cases} cases, {len(self.failures)} failed, {self.seconds:.0f} s")

    def summary(self) -> str:
        """One line."""
        found = f"{self.cases} cases from seed {self.seed}, {len(self.failures)} failed, {self.seconds:.0f} s"
        return ", ".join([f"{self.name}: {found}", *(f"{name} {value:g}" for name, value in self.figures.items())])

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)
