"""Layer 2: faults of real processes, as docs/reliability.md has them: what other ranks see, and that they go on."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests_dist.support.faults import FAULTY, RANKS, TIMEOUT_S

ROOT = Path(__file__).parents[2]
# On a busy machine a message takes a while to be read; a timeout of the group takes no less than itself.
SOON_S = 0.8 * TIMEOUT_S
WAITS = rf"LostRankError: rank \d waits in \S.*, and ranks \[{FAULTY}\] of the group did not come"
# Which of the exchanges it was depends on when the rank left.
ROWS_OF = r"(queries|results|(keys|gradients) \d, stage \d)"
LOST = rf"an exchange failed \({ROWS_OF}\), and ranks \[{FAULTY}\] of the group do not answer"
MIDDLE = rf"LostRankError: rank \d in attention( backward)? \(key .*{LOST}"
REFUSED = r"LostRankError: rank \d is in attention .* rank 1 of the group raised in attention: ValueError: q has shape"
# Fault, what the others say, whether they say so before the group's timeout.
ROWS = {
    "killed between steps": (WAITS, True),
    "killed in forward": (f"{WAITS}|{MIDDLE}", True),
    "killed in backward": (f"{WAITS}|{MIDDLE}", True),
    "exception in a kernel": (f"{WAITS}|{MIDDLE}", True),
    "exception before a step": (WAITS, True),
    "input refused": (REFUSED, True),
    "stopped": (rf"{WAITS}.*Timed out", False),
    "stopped in forward": (f"({WAITS}|{MIDDLE}).*Timed out", False),
    # The others have their key at hand.
    "another length": (rf"ValueError: ranks are out of step: ranks \[{FAULTY}\] .* in attention .* in make_key", True),
    "planning takes too long": (rf"{WAITS}.*Timed out", False),
    "killed while it passes rows on": (MIDDLE, True),
    "killed while it adds rows up": (MIDDLE, True),
}
QUICK = ("killed while it passes rows on", "killed in forward", "input refused", "stopped")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    "faults",
    [QUICK, *(pytest.param((fault,), marks=pytest.mark.nightly) for fault in ROWS if fault not in QUICK)],
    ids=", ".join,
)
def test_a_fault_is_named_by_the_others_who_then_train_on(faults):
    command = [sys.executable, "-m", "tests_dist.support.faults", *faults]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    told = {(line["fault"], line["rank"]): line for line in map(json.loads, done.stdout.splitlines())}
    for fault in faults:
        check(fault, {rank: line for (of, rank), line in told.items() if of == fault}, done.stdout + done.stderr)


def check(fault: str, told: dict[int, dict[str, Any]], printed: str) -> None:
    """What the ranks told about a fault is that row's."""
    message, soon = ROWS[fault]
    others = [rank for rank in range(RANKS) if rank != FAULTY]
    assert set(others) <= set(told), printed
    for rank in others:
        assert re.search(message, told[rank]["error"] or ""), told[rank]
        assert told[rank]["trained on"], told[rank]
        if not soon:  # the other way round is a matter of the machine's load
            assert told[rank]["seconds"] >= SOON_S, told[rank]
