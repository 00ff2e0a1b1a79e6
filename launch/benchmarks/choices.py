"""Does "auto" choose what is fastest? Seeded masks of twenty kinds, planned in every layout, schedule and stage count.

    python -m cpattn.launch.benchmarks.choices [--masks 300] [--limit 900] [--out launch/benchmarks/results]
    python -m cpattn.launch.benchmarks.choices --planning     # what planning costs instead

Each mask is planned by default and in each way that can be asked for; the time of both passes is the simulator's. A way
that is predicted to take less than 0.97 of the default's time is one that "auto" should have chosen.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cpattn.launch.benchmarks.solver_board import other_lengths, random_slices
from cpattn.launch.benchmarks.workloads import document_lengths, prefix_tree
from cpattn.masks.spec import AttnMaskSpec, lower_mask
from cpattn.solver import (
    HARDWARE,
    Heads,
    Placement,
    Plan,
    SliceTable,
    assemble_plan,
    keys_schedule,
    make_dispatch_plan,
    simulate,
)

MACHINES = ("h100", "h200", "b200")
HEADS = (Heads(32, 8), Heads(64, 8), Heads(16, 16), Heads(32, 4, 64, 64))
# Ways to plan, beside "auto": what differs from the default.
WAYS: dict[str, dict[str, Any]] = {
    "contiguous": {"layout": "contiguous", "schedule": "keys"},
    "zigzag": {"layout": "zigzag", "schedule": "keys"},
    "keys": {"schedule": "keys"},
    "tiles": {"schedule": "tiles"},
    **{f"{stages} stages": {"num_stages": stages} for stages in (1, 2, 4, 8)},
}
FASTER, MUCH_FASTER = 0.97, 0.90


def _equal(total: int, count: int) -> AttnMaskSpec:
    """So many documents of about the same length."""
    return AttnMaskSpec.varlen(np.diff(np.arange(count + 1) * total // count).tolist())


def _groups(total: int, rng: np.random.Generator) -> AttnMaskSpec:
    """Prompts with eight answers each, which share the prompt and do not see one another."""
    lengths: list[int] = []
    paths: list[list[int]] = []
    while sum(lengths) < total - 9:
        prompt = len(lengths)
        lengths += [int(rng.integers(64, 2048)), *rng.integers(64, 1024, 8).tolist()]
        paths += [[prompt, prompt + 1 + answer] for answer in range(8)]
    lengths[-1] = max(1, lengths[-1] + total - sum(lengths))
    return AttnMaskSpec.prefix_tree(lengths, paths)[0]


def _strided(total: int, rng: np.random.Generator) -> AttnMaskSpec:
    """Blocks that see every other block: components that are interleaved."""
    block = total // int(rng.choice([16, 32]))
    starts = range(0, total, block)
    pairs = [(a, b) for a in starts for b in starts if (a - b) // block % 2 == 0 and b <= a]
    q = [[a, min(a + block, total)] for a, _ in pairs]
    k = [[b, min(b + block, total)] for _, b in pairs]
    return AttnMaskSpec(q, k, ["causal" if a == b else "full" for a, b in pairs], total)


def _sink(total: int, window: int, sink: int) -> AttnMaskSpec:
    """A window, and first tokens that all see."""
    return AttnMaskSpec.sliding_window(total, window) | AttnMaskSpec([[sink, total]], [[0, sink]], ["full"], total)


Kind = Callable[[int, int, np.random.Generator], AttnMaskSpec]
# By total tokens, ranks and a generator of random numbers.
KINDS: dict[str, Kind] = {
    "causal": lambda n, p, rng: AttnMaskSpec.causal(n),
    "full": lambda n, p, rng: AttnMaskSpec.varlen([n], causal=False),
    "window": lambda n, p, rng: AttnMaskSpec.sliding_window(n, int(rng.choice([512, 1024, 4096]))),
    "sink and window": lambda n, p, rng: _sink(n, int(rng.choice([512, 1024])), int(rng.choice([16, 256]))),
    "block causal": lambda n, p, rng: AttnMaskSpec.block_causal(n, int(rng.choice([64, 1024]))),
    "lognormal": lambda n, p, rng: AttnMaskSpec.varlen(document_lengths(n, seed=int(rng.integers(1 << 30)))),
    "lognormal, long": lambda n, p, rng: AttnMaskSpec.varlen(
        document_lengths(n, seed=int(rng.integers(1 << 30)), mean=16384)
    ),
    "lognormal, full": lambda n, p, rng: AttnMaskSpec.varlen(
        document_lengths(n, seed=int(rng.integers(1 << 30))), causal=False
    ),
    "lognormal, window": lambda n, p, rng: AttnMaskSpec.sliding_window(
        document_lengths(n, seed=int(rng.integers(1 << 30)), mean=8192), 1024
    ),
    "uniform": lambda n, p, rng: AttnMaskSpec.varlen(other_lengths("uniform", n, int(rng.integers(1 << 30)))),
    "pareto": lambda n, p, rng: AttnMaskSpec.varlen(other_lengths("pareto", n, int(rng.integers(1 << 30)))),
    "two sizes": lambda n, p, rng: AttnMaskSpec.varlen(other_lengths("two sizes", n, int(rng.integers(1 << 30)))),
    "equal, 1 a rank": lambda n, p, rng: _equal(n, p),
    "equal, 1 less": lambda n, p, rng: _equal(n, max(p - 1, 1)),
    "equal, 1.5 a rank": lambda n, p, rng: _equal(n, 3 * p // 2),
    "equal, 8 a rank": lambda n, p, rng: _equal(n, 8 * p),
    "prefix tree": lambda n, p, rng: prefix_tree(n, branches=int(rng.choice([4, 16])), leaves=int(rng.choice([2, 8]))),
    "groups of 8": lambda n, p, rng: _groups(n, rng),
    "interleaved": lambda n, p, rng: _strided(n, rng),
    "random slices": lambda n, p, rng: random_slices(n, int(rng.integers(1 << 30))),
}


def case(seed: int) -> dict[str, Any]:
    """Kinds take turns; size, heads and machine are random."""
    rng = np.random.default_rng(seed)
    kind = list(KINDS)[seed % len(KINDS)]
    ranks = int(rng.choice([2, 4, 8, 16, 32, 64, 128, 256], p=[0.15, 0.15, 0.25, 0.15, 0.1, 0.1, 0.05, 0.05]))
    total = ranks * int(rng.choice([2048, 4096, 8192]))
    machine, heads = str(rng.choice(MACHINES)), HEADS[int(rng.integers(len(HEADS)))]
    return {"seed": seed, "kind": kind, "ranks": ranks, "total": total, "machine": machine, "heads": heads, "rng": rng}


def measure(seed: int) -> dict[str, Any]:
    """Predicted milliseconds of "auto" and of every other way."""
    drawn = case(seed)
    spec = KINDS[drawn["kind"]](drawn["total"], drawn["ranks"], drawn.pop("rng"))
    table, drawn["total"] = lower_mask(spec), spec.total_seqlen
    hardware, heads = HARDWARE[drawn["machine"]], drawn.pop("heads")
    shape = {"total_seqlen": drawn["total"], "cp_size": drawn["ranks"], "hardware": hardware}
    started = time.process_time()
    times = {"auto": _ms(table, {"schedule": "auto"}, shape, heads)}
    drawn["cpu_s"] = time.process_time() - started
    for way, options in WAYS.items():
        times[way] = _ms(table, {"schedule": "auto", **options}, shape, heads)
    return {**drawn, "heads": heads.numbers, "ms": times}


def _ms(table: SliceTable, options: dict[str, Any], shape: dict[str, Any], heads: Heads) -> float:
    plan = make_dispatch_plan(table, costs=heads.row_costs(), **options, **shape)
    return 1e3 * simulate(plan, shape["hardware"], heads).seconds


def table_of(results: list[dict[str, Any]]) -> list[str]:
    """How often each way is faster, and the worst cases."""
    lines = ["| way | > 3 % faster than auto | > 10 % | least time / auto's |", "|---|---|---|---|"]
    ratios = {way: [r["ms"][way] / r["ms"]["auto"] for r in results] for way in WAYS}
    ratios["any"] = [min(r["ms"][way] / r["ms"]["auto"] for way in WAYS) for r in results]
    for way, found in ratios.items():
        faster, much = (sum(ratio < limit for ratio in found) for limit in (FASTER, MUCH_FASTER))
        lines.append(f"| {way} | {faster} of {len(found)} | {much} | {min(found):.2f} |")
    lines += ["", "| kind | ranks | tokens | machine | heads | auto, ms | fastest | its ms |", "|" + 8 * "---|"]
    order = np.argsort(ratios["any"])
    for r in (results[i] for i in order[:20]):
        way = min(WAYS, key=lambda way: r["ms"][way])
        if r["ms"][way] < FASTER * r["ms"]["auto"]:
            shape = f"{r['ranks']} | {r['total']} | {r['machine']} | {':'.join(map(str, r['heads']))}"
            lines.append(f"| {r['kind']} | {shape} | {r['ms']['auto']:.3f} | {way} | {r['ms'][way]:.3f} |")
    return lines


# Tokens and ranks of new packed masks.
PLANNED = ((8192, 2), (65536, 8), (131072, 16))


def planning_times(num_masks: int = 12) -> list[str]:
    """CPU milliseconds of new packed masks, medians: lowered, planned, one rank's share taken; then of `with_mask`."""
    lines = ["| tokens | ranks | lower | plan | one rank | rows |", "|" + 6 * "---|"]
    for total, ranks in PLANNED:
        found = []
        for seed in range(-3, num_masks):  # the first three warm up
            spec = AttnMaskSpec.varlen(document_lengths(total, seed=seed % 1000))
            with _Laps() as laps:
                table = laps.lap(lower_mask, spec)
                plan = laps.lap(make_dispatch_plan, table, total_seqlen=total, cp_size=ranks, schedule="auto")
                laps.lap(plan.for_rank, 0)
            found.append([*laps.ms, plan.kv_routes.num_rows()])
        times = " | ".join(f"{ms:.1f}" for ms in np.median([row[:3] for row in found[3:]], axis=0))
        lines.append(f"| {total} | {ranks} | {times} | {sum(row[3] for row in found[3:]):.0f} |")
    return [*lines, "", *_placed_times(1 << 20, 64)]


def _placed_times(total: int, ranks: int) -> list[str]:
    """Masks over a placement at hand, one by one."""
    lines = [f"| {total} tokens placed on {ranks} ranks | lower | plan | one rank |", "|" + 4 * "---|"]
    packed = document_lengths(total)
    placement = make_dispatch_plan(lower_mask(AttnMaskSpec.varlen(packed)), total_seqlen=total, cp_size=ranks)
    masks = {
        "documents": lambda: AttnMaskSpec.varlen(packed),
        "window of 1024 in documents": lambda: AttnMaskSpec.sliding_window(packed, 1024),
        "window of 4096": lambda: AttnMaskSpec.sliding_window(total, 4096),
        "causal": lambda: AttnMaskSpec.causal(total),
    }
    for name, make in masks.items():
        found = []
        for _ in range(5):
            spec = make()
            with _Laps() as laps:
                table = laps.lap(lower_mask, spec)
                plan = laps.lap(_planned_over, table, placement.q_placement)
                laps.lap(plan.for_rank, 0)
            found.append(laps.ms)
        lines.append(f"| {name} | {' | '.join(f'{ms:.1f}' for ms in np.median(found, axis=0))} |")
    return lines


def _planned_over(table: SliceTable, placement: Placement) -> Plan:
    return assemble_plan(*keys_schedule(table, placement), placement, placement)


class _Laps:
    """CPU milliseconds of calls, one after the other, none of them with rubbish collected."""

    def __init__(self) -> None:
        self.ms: list[float] = []

    def __enter__(self) -> _Laps:
        gc.disable()
        return self

    def __exit__(self, *error: object) -> None:
        gc.enable()

    def lap(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        started = time.process_time()
        result = call(*args, **kwargs)
        self.ms.append(1e3 * (time.process_time() - started))
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--masks", type=int, default=300)
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds after which no further mask is begun")
    parser.add_argument("--out", type=Path, help="folder in which to store the table and its JSON")
    parser.add_argument("--planning", action="store_true", help="print what planning costs on the CPU instead")
    options = parser.parse_args()
    if options.planning:
        print("\n".join(planning_times()))
        return
    started, results = time.monotonic(), []
    for seed in range(options.masks):
        if time.monotonic() - started > options.limit:
            break
        results.append(measure(seed))
    lines = [
        f"# What auto chooses, {time.strftime('%Y-%m-%d')}",
        "",
        f"`python -m cpattn.launch.benchmarks.choices`: {len(results)} masks of {len(KINDS)} kinds, 2 to 256 ranks of",
        "one level; predicted milliseconds of both passes of a layer.",
        "",
        *table_of(results),
    ]
    print("\n".join(lines))
    if options.out:
        name = f"choices_{time.strftime('%Y-%m-%d')}"
        (options.out / f"{name}.md").write_text("\n".join(lines) + "\n")
        (options.out / f"{name}.json").write_text(json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
