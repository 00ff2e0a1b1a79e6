"""The demo's verdict: the two runs side by side, what the plans cost, and whether the losses agree."""

from __future__ import annotations

from math import sqrt
from statistics import mean
from typing import Any

from rich.console import Console, Group
from rich.table import Table

from .recipe import FIRST_STEP_TOLERANCE, TOLERANCE

Step = dict[str, Any]

# From this many steps on, the loss is expected to have fallen by a third.
STEPS_TO_LEARN = 30


def relative_difference(a: float, b: float) -> float:
    """|a - b| over |b|."""
    return abs(a - b) / abs(b)


def least_kv_rows(seqlens: list[int], cp_size: int) -> float:
    """K and V rows that packed causal documents cost at least when work is even and only keys travel.

    A document with more visible pairs than a rank's share has to be cut; cheapest is a piece of one share
    from its end, whose rank needs every key before the piece, and so on with what is left. Other documents
    cost nothing. Token counts are left free, so a plan that also evens them out may not reach this.
    """
    share = sum(length * (length + 1) / 2 for length in seqlens) / cp_size
    rows = 0.0
    for length in map(float, seqlens):
        while length * (length + 1) / 2 > share * (1 + 1e-9):
            length = max(0.0, sqrt(0.25 + length * (length + 1) - 2 * share) - 0.5)
            rows += length
    return rows


def loss_table(spread: list[Step], single: list[Step]) -> Table:
    """Step by step: documents, both losses, their difference, both times."""
    cp_size = len(spread[0]["plan"]["tokens"])
    table = Table(title=f"the same training on {cp_size} ranks (cpattn) and on one (plain torch)")
    for heading in ("step", "documents", f"loss, {cp_size} ranks", "loss, one rank", "relative difference"):
        table.add_column(heading, justify="right")
    for step, (a, b) in enumerate(zip(spread, single, strict=True), start=1):
        table.add_row(
            str(step),
            str(len(a["seqlens"])),
            f"{a['loss']:.6f}",
            f"{b['loss']:.6f}",
            f"{relative_difference(a['loss'], b['loss']):.1e}",
        )
    return table


def plan_table(spread: list[Step], bytes_per_row: int) -> Table:
    """Figures of the plans over all steps, one mask each."""
    plans = [step["plan"] for step in spread]
    cp_size = len(plans[0]["tokens"])
    received = [sum(plan["kv_rows"]) for plan in plans]
    least = [least_kv_rows(step["seqlens"], cp_size) for step in spread]
    gathered = sum(plans[0]["tokens"]) * (cp_size - 1)
    mib = bytes_per_row / 2**20
    table = Table(title=f"the plans of {len(plans)} steps, a new mask each")
    for heading in ("", "mean", "worst"):
        table.add_column(heading, justify="right" if heading else "left")
    imbalance = [plan["imbalance"] for plan in plans]
    tokens = [max(plan["tokens"]) * cp_size / sum(plan["tokens"]) for plan in plans]
    planning = [1e3 * step["planning_seconds"] for step in spread]
    table.add_row("work, busiest rank over mean", f"{mean(imbalance):.3f}", f"{max(imbalance):.3f}")
    table.add_row("tokens, fullest rank over mean", f"{mean(tokens):.3f}", f"{max(tokens):.3f}")
    table.add_row(
        "K and V received per layer, forward, all ranks",
        f"{mean(received) * mib:.2f} MiB",
        f"{max(received) * mib:.2f} MiB",
    )
    table.add_row("  least for even work", f"{mean(least) * mib:.2f} MiB", f"{max(least) * mib:.2f} MiB")
    table.add_row("  all-gather", f"{gathered * mib:.2f} MiB", f"{gathered * mib:.2f} MiB")
    moved_queries = [sum(plan["q_rows"]) for plan in plans]
    if any(moved_queries):
        table.add_row("query rows that travel", f"{mean(moved_queries):.0f}", str(max(moved_queries)))
    table.add_row("planning and comparing plans", f"{mean(planning):.1f} ms", f"{max(planning):.1f} ms")
    return table


def failures(spread: list[Step], single: list[Step], *, must_learn: bool) -> list[str]:
    """What is wrong with the two runs, in words; empty if nothing is."""
    differences = [relative_difference(a["loss"], b["loss"]) for a, b in zip(spread, single, strict=True)]
    found = []
    # Written so that a NaN fails.
    for step, difference in enumerate(differences, start=1):
        limit = FIRST_STEP_TOLERANCE if step == 1 else TOLERANCE
        if not difference <= limit:
            found.append(f"losses differ by {difference:.1e} at step {step}: the limit is {limit:g}")
            break
    first, last = spread[0]["loss"], spread[-1]["loss"]
    if must_learn and len(spread) >= STEPS_TO_LEARN and not last <= first * 2 / 3:
        found.append(f"the loss went from {first:.3f} to {last:.3f}: it should fall by a third or more")
    return found


def print_report(console: Console, spread: list[Step], single: list[Step], *, bytes_per_row: int) -> None:
    """All tables, and the plan of one step in its own words."""
    cp_size = len(spread[0]["plan"]["tokens"])
    differences = [relative_difference(a["loss"], b["loss"]) for a, b in zip(spread, single, strict=True)]
    console.print(Group(loss_table(spread, single), "", plan_table(spread, bytes_per_row), ""))
    for number, step in enumerate(spread, start=1):
        if "description" in step:
            lengths = ", ".join(map(str, step["seqlens"]))
            console.print(f"the plan of step {number}, documents of {lengths} tokens:", soft_wrap=True)
            console.print(step["description"], highlight=False, soft_wrap=True)
    console.print()
    console.print(
        f"loss {spread[0]['loss']:.3f} -> {spread[-1]['loss']:.3f}; largest relative difference "
        f"{max(differences):.1e}, at step 1 {differences[0]:.1e}"
    )
    times = [mean(step["seconds"] for step in run) for run in (spread, single)]
    console.print(f"seconds per step: {times[0]:.2f} on {cp_size} ranks, {times[1]:.2f} on one")
