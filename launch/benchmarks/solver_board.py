"""The planner's board: imbalance, rows and bytes against the best rival and against lower bounds, planning time.

    python -m cpattn.launch.benchmarks.solver_board [--seeds 3] [--out launch/benchmarks/results]

Every plan is made cold in a process of its own: CPU seconds from the mask's spec to every rank's routes, and the
process's peak memory above what it had after its imports. Plans are searched for with a unit of search effort, unless
it is said. The rival's numbers are MagiAttention's planner as measured on a CPU at 2026-05-28; where there is none
(other seeds, other masks) its default dispatch is replayed: chunks in order of falling area, each to the rank with
the least area that has room.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cpattn.launch.benchmarks.workloads import WORKLOADS, document_lengths
from cpattn.masks.spec import AttnMaskSpec, lower_mask
from cpattn.solver import (
    Limits,
    Plan,
    RowCosts,
    SliceTable,
    bytes_bound,
    kv_rows_bound,
    make_dispatch_plan,
    row_costs,
    simulate,
)
from cpattn.solver.place.measure import kv_rows_received, rank_areas
from cpattn.solver.report import place_min_heap, received_bytes

K, M = 1 << 10, 1 << 20
HEADS = (32, 8, 128, 128)


class Goal(NamedTuple):
    """A row of the board: the rival's figures and what is asked of ours, as factors of the rival's."""

    mask: str
    seqlen: int
    ranks: int
    schedule: str
    rival_imbalance: float
    rival_rows: int
    rival_worst: int | None
    imbalance: float
    rows: float  # rows, or bytes where queries may move
    worst: float | None


GOALS = (
    Goal("varlen causal", 64 * K, 8, "keys", 1.001, 148_453, 22_220, 1.02, 0.22, 0.7),
    Goal("varlen causal", 256 * K, 64, "keys", 1.007, 2_108_482, 45_603, 1.02, 0.30, 0.7),
    Goal("varlen causal", M, 64, "keys", 1.284, 3_915_595, 126_236, 1.02, 0.46, 0.7),
    Goal("varlen causal", M, 256, "keys", 1.271, 15_676_003, 99_860, 1.02, 0.50, 0.78),
    Goal("varlen full", M, 64, "keys", 1.014, 7_692_065, 174_500, 1.02, 0.40, 0.7),
    Goal("window", M, 64, "keys", 1.002, 2_090_498, 32_760, 1.01, 0.125, 0.7),
    Goal("prefix tree", M, 64, "keys", 1.058, 13_172_688, 232_004, 1.02, 0.68, 0.7),
    Goal("causal", M, 64, "keys", 1.000, 61_931_520, 1_032_192, 1.01, 0.80, None),
    Goal("causal", M, 64, "tiles", 1.000, 61_931_520, 1_032_192, 1.03, 0.60, None),
    Goal("causal", M, 256, "tiles", 1.000, 250_675_200, 1_044_480, 1.03, 0.25, None),
    Goal("causal", M, 1024, "tiles", 1.000, 1_005_649_920, 1_047_552, 1.03, 0.13, None),
    Goal("prefix tree", M, 64, "tiles", 1.058, 13_172_688, 232_004, 1.03, 0.60, None),
    Goal("varlen causal", M, 256, "auto", 1.271, 15_676_003, 99_860, 1.03, math.inf, None),
)

# Time and memory of the default planner, every mask: seconds allowed.
TIMES = {256: 0.100, 1024: 0.400}
MEMORY_MB = 200


def random_slices(total: int, seed: int) -> AttnMaskSpec:
    """Random rectangles of all four types over random stretches, plus a causal diagonal so that no row is blind."""
    rng = np.random.default_rng(seed)
    count = 48
    edges = np.sort(rng.integers(0, total + 1, (2, count, 2)), axis=-1)
    kinds = rng.choice(["full", "causal", "inv_causal", "bi_causal"], count).tolist()
    q, k = edges.tolist()
    # Short key ranges, so that locality can matter.
    k = [[a, min(b, a + total // 16)] for a, b in k]
    return AttnMaskSpec(q, k, kinds, total) | AttnMaskSpec.sliding_window(total, max(1, total // 256))


def other_lengths(name: str, total: int, seed: int) -> list[int]:
    """Document lengths of other distributions: uniform, heavy-tailed, two sizes, all equal."""
    rng = np.random.default_rng(seed)
    draw: dict[str, Callable[[], Any]] = {
        "uniform": lambda: rng.integers(1, 8192),
        "pareto": lambda: 512 * (1 + rng.pareto(1.1)),
        "two sizes": lambda: 32768 if rng.random() < 0.05 else 1024,
        "equal": lambda: 4096,
    }
    lengths: list[int] = []
    left = total
    while left:
        lengths.append(min(left, max(1, int(draw[name]()))))
        left -= lengths[-1]
    return lengths


def spec_of(mask: str, total: int, seed: int) -> AttnMaskSpec:
    """A mask by name: the board's, "varlen <distribution>", or "random slices"."""
    if mask == "varlen causal":
        return AttnMaskSpec.varlen(document_lengths(total, seed=seed))
    if mask in WORKLOADS:
        return WORKLOADS[mask](total)
    if mask == "random slices":
        return random_slices(total, seed)
    return AttnMaskSpec.varlen(other_lengths(mask.removeprefix("varlen "), total, seed))


def measure(mask: str, seqlen: int, ranks: int, schedule: Any, seed: int = 0, search_effort: int = 1) -> dict[str, Any]:
    """One plan, made cold, with its bounds; run in a process of its own."""
    spec = spec_of(mask, seqlen, seed)
    chunk = max(1, seqlen // (16 * ranks))
    costs: RowCosts = row_costs(*HEADS)
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    table = lower_mask(spec)
    plan = make_dispatch_plan(
        table,
        total_seqlen=seqlen,
        cp_size=ranks,
        chunk_size=chunk,
        schedule=schedule,
        costs=costs,
        search_effort=search_effort,
    )
    seconds = time.process_time() - started
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base
    kv, q = plan.kv_routes.rows_received(ranks), plan.q_routes.rows_received(ranks)
    (came, sent), q_sent = plan.key_rows_moved(), plan.q_routes.rows_sent(ranks)
    received = received_bytes(q, q_sent, kv, sent, costs.heads)
    return {
        "mask": mask,
        "seqlen": seqlen,
        "ranks": ranks,
        "schedule": schedule,
        "seed": seed,
        "search_effort": search_effort,
        "slices": len(table),
        "imbalance": plan.imbalance(),
        "token_spread": int(np.ptp(plan.q_placement.num_tokens)),
        "chunk": chunk,
        "kv_rows": int(kv.sum()),
        "kv_rows_worst": int(kv.max()),
        "kv_rows_sent_worst": int(sent.max()),
        "sent_over_received": int(sent.max()) / max(int(came.max()), 1),
        "q_rows": int(q.sum()),
        "bytes": int(q.sum()) * costs.q + int(kv.sum()) * costs.kv,
        "bytes_worst": int(received.max()),
        **_bounds(plan, table, seqlen, ranks, costs),
        **_min_heap(table, seqlen, ranks, chunk),
        "cpu_seconds": seconds,
        "memory_mb": memory / 1024,
        "predicted_ms": 1e3 * simulate(plan, heads=costs.heads).seconds,
        "routes": len(plan.kv_routes) + len(plan.q_routes),
        "stages": plan.num_stages,
    }


def _bounds(plan: Plan, table: SliceTable, seqlen: int, ranks: int, costs: RowCosts) -> dict[str, Any]:
    """What no plan within the same limits moves less than."""
    limits = Limits.of_plan(plan)
    rows = kv_rows_bound(table, total_seqlen=seqlen, cp_size=ranks, limits=limits)
    any_bytes = bytes_bound(table, total_seqlen=seqlen, cp_size=ranks, limits=limits, costs=costs)
    return {"kv_rows_bound": rows.total, "kv_rows_worst_bound": rows.worst, "bytes_bound": any_bytes.total}


def _min_heap(table: SliceTable, seqlen: int, ranks: int, chunk: int) -> dict[str, Any]:
    """What a placement of chunks by a min-heap of work receives."""
    heap = place_min_heap(table, seqlen, ranks, chunk)
    rows, areas = kv_rows_received(table, heap), rank_areas(table, heap)
    return {
        "heap_rows": int(rows.sum()),
        "heap_worst": int(rows.max()),
        "heap_imbalance": float(areas.max() / max(areas.mean(), 1)),
    }


def cold(**arguments: Any) -> dict[str, Any]:
    """`measure` in a new process with one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "cpattn.launch.benchmarks.solver_board", "--one", json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{arguments}: {done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _named(seqlen: int) -> str:
    return f"{seqlen // M}M" if seqlen % M == 0 else f"{seqlen // K}K"


def _verdict(ok: bool) -> str:
    return "yes" if ok else "**no**"


def board(out: Callable[[str], None]) -> list[dict[str, Any]]:
    """The two tables that the project has to show."""
    results = []
    out("\n## Keys only\n")
    out(
        "| mask | ranks | rival: imbalance, rows | ours | rows / rival | goal | bound / rival | rows / bound | "
        "worst / rival's (goal) | most sent / received | predicted ms | CPU s | MB | met |"
    )
    out("|---|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    for goal in GOALS:
        if goal.schedule != "keys":
            continue
        got = cold(mask=goal.mask, seqlen=goal.seqlen, ranks=goal.ranks, schedule=goal.schedule)
        ratio = got["kv_rows"] / goal.rival_rows
        assert goal.rival_worst is not None
        worst = got["kv_rows_worst"] / goal.rival_worst
        met = got["imbalance"] <= goal.imbalance + 5e-4 and ratio <= goal.rows + 5e-4
        met = met and (goal.worst is None or worst <= goal.worst + 5e-4) and got["token_spread"] <= got["chunk"]
        results.append({**got, "rival_ratio": ratio, "worst_ratio": worst, "goal": goal._asdict(), "met": met})
        out(
            f"| {goal.mask} {_named(goal.seqlen)} | {goal.ranks} | {goal.rival_imbalance:.3f}, {goal.rival_rows:,} | "
            f"{got['imbalance']:.4f}, {got['kv_rows']:,} | {ratio:.3f} | {goal.rows} | "
            f"{got['kv_rows_bound'] / goal.rival_rows:.3f} | {got['kv_rows'] / max(got['kv_rows_bound'], 1):.2f} | "
            f"{worst:.2f} ({goal.worst or '-'}) | {got['sent_over_received']:.2f} | {got['predicted_ms']:.2f} | "
            f"{got['cpu_seconds']:.3f} | {got['memory_mb']:.0f} | {_verdict(met)} |"
        )
    out("\n## Queries may move: bytes, forward and backward, heads 32:8, dim 128\n")
    out(
        "| mask | ranks | rival bytes | ours: imbalance, bytes | / rival | goal | bound / rival | bytes / bound | "
        "CPU s | MB | met |"
    )
    out("|---|---|---|---|---|---|---|---|---|---|---|")
    keys_bytes = {(r["mask"], r["seqlen"], r["ranks"]): r["bytes"] for r in results}
    for goal in GOALS:
        if goal.schedule == "keys":
            continue
        got = cold(mask=goal.mask, seqlen=goal.seqlen, ranks=goal.ranks, schedule=goal.schedule)
        rival = goal.rival_rows * row_costs(*HEADS).kv
        ratio = got["bytes"] / rival
        limit = keys_bytes[goal.mask, goal.seqlen, goal.ranks] / rival if math.isinf(goal.rows) else goal.rows
        met = ratio <= limit + 5e-4 and got["imbalance"] <= goal.imbalance + 5e-4
        results.append({**got, "rival_ratio": ratio, "goal": {**goal._asdict(), "rows": limit}, "met": met})
        out(
            f"| {goal.mask} {_named(goal.seqlen)} | {goal.ranks} | {rival / 1e9:,.0f} GB | {got['imbalance']:.4f}, "
            f"{got['bytes'] / 1e9:,.1f} GB | {ratio:.3f} | {limit:.3g} | {got['bytes_bound'] / rival:.3f} | "
            f"{got['bytes'] / max(got['bytes_bound'], 1):.2f} | {got['cpu_seconds']:.3f} | {got['memory_mb']:.0f} | "
            f"{_verdict(met)} |"
        )
    return results


def plain_rows(title: str, cases: Iterable[dict[str, Any]], out: Callable[[str], None]) -> list[dict[str, Any]]:
    """Rows against the replayed min-heap dispatch."""
    out(f"\n## {title}\n")
    out(
        "| mask | ranks | schedule | seed | slices | imbalance | token spread / chunk | bytes / min-heap | rows "
        "/ bound | worst / min-heap's | bytes / bound | CPU s | MB | routes |"
    )
    out("|---|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    results = []
    for case in cases:
        got = cold(**case)
        results.append(got)
        bound = f"{got['kv_rows'] / got['kv_rows_bound']:.2f}" if got["kv_rows_bound"] and not got["q_rows"] else "-"
        any_bound = f"{got['bytes'] / got['bytes_bound']:.2f}" if got["bytes_bound"] else "-"
        effort = f" (effort {got['search_effort']})" if got["search_effort"] != 1 else ""
        out(
            f"| {got['mask']} {_named(got['seqlen'])}{effort} | {got['ranks']} | {got['schedule']} | {got['seed']} | "
            f"{got['slices']} | {got['imbalance']:.4f} | {got['token_spread']} / {got['chunk']} | "
            f"{got['bytes'] / max(got['heap_rows'] * row_costs(*HEADS).kv, 1):.3f} | {bound} | "
            f"{got['kv_rows_worst'] / max(got['heap_worst'], 1):.2f} | {any_bound} | {got['cpu_seconds']:.3f} | "
            f"{got['memory_mb']:.0f} | {got['routes']:,} |"
        )
    return results


def other_cases(seeds: int) -> list[dict[str, Any]]:
    """Masks that nobody tuned the planner for."""
    cases = [
        {"mask": "varlen causal", "seqlen": M, "ranks": 64, "schedule": "keys", "seed": seed}
        for seed in range(1, seeds + 1)
    ]
    for mask in ("varlen uniform", "varlen pareto", "varlen two sizes", "varlen equal", "random slices"):
        for seed in range(seeds):
            cases.append({"mask": mask, "seqlen": M, "ranks": 64, "schedule": "keys", "seed": seed})
    cases.append({"mask": "random slices", "seqlen": M, "ranks": 64, "schedule": "auto", "seed": 0})
    return cases


GROWTH: list[dict[str, Any]] = [
    *({"mask": m, "seqlen": M, "ranks": r, "schedule": "keys"} for m in WORKLOADS for r in (256, 1024)),
    *({"mask": "causal", "seqlen": M, "ranks": r, "schedule": "tiles"} for r in (16, 64, 256, 1024)),
    *({"mask": "varlen causal", "seqlen": s * M, "ranks": 64, "schedule": "keys"} for s in (1, 4, 16)),
    {"mask": "causal", "seqlen": 4 * M, "ranks": 4096, "schedule": "auto"},
]
EFFORT: list[dict[str, Any]] = [
    {"mask": m, "seqlen": s, "ranks": r, "schedule": "keys", "search_effort": e}
    for m, s, r in (
        ("varlen causal", 64 * K, 8),
        ("varlen causal", M, 64),
        ("varlen causal", M, 256),
        ("varlen full", M, 64),
    )
    for e in (0, 1, 10, 100)
]


def _path(n: int) -> AttnMaskSpec:
    return AttnMaskSpec.prefix_tree([3] * n, [list(range(n))])[0]


def _random_tree(n: int) -> AttnMaskSpec:
    """Nodes of seven tokens, depth first, each below one of the fifty before it."""
    rng = np.random.default_rng(0)
    parents = [-1, *(int(rng.integers(max(0, i - 50), i)) for i in range(1, n))]
    children: list[list[int]] = [[] for _ in range(n)]
    for node in range(1, n):
        children[parents[node]].append(node)
    paths: list[list[int]] = []
    waiting: list[tuple[int, list[int]]] = [(0, [])]
    seen = 0
    while waiting:
        node, above = waiting.pop()
        path, seen = [*above, seen], seen + 1
        if not children[node]:
            paths.append(path)
        waiting += [(child, path) for child in reversed(children[node])]
    return AttnMaskSpec.prefix_tree([7] * n, paths)[0]


def _rectangles(n: int) -> AttnMaskSpec:
    """Random rectangles of all types over 64K tokens, most of which overlap hundreds of others."""
    rng = np.random.default_rng(0)
    q, k = np.sort(rng.integers(0, 64 * K + 1, (2, n, 2)), axis=-1).tolist()
    return AttnMaskSpec(q, k, rng.choice(["full", "causal", "inv_causal", "bi_causal"], n).tolist(), 64 * K)


def _windows_and_sinks(n: int) -> AttnMaskSpec:
    """Documents of 64 tokens, each with a window of 8 and its first four tokens seen by all."""
    sinks = [[64 * i, 64 * i + 4] for i in range(n)]
    documents = [[64 * i, 64 * i + 64] for i in range(n)]
    return AttnMaskSpec.sliding_window([64] * n, 8) | AttnMaskSpec(documents, sinks, ["causal"] * n, 64 * n)


def _columns(n: int) -> AttnMaskSpec:
    """Strided: every fourth key, seen by all."""
    return AttnMaskSpec([[0, 4 * n]] * n, [[4 * i, 4 * i + 1] for i in range(n)], ["full"] * n, 4 * n)


FAMILIES: dict[str, tuple[int, Callable[[int], AttnMaskSpec]]] = {
    "path of nodes": (75, _path),
    "random tree": (500, _random_tree),
    "overlapping rectangles": (375, _rectangles),
    "documents of 64 tokens": (8 * K, lambda n: AttnMaskSpec.varlen([64] * n)),
    "documents of 1 to 63 tokens": (
        8 * K,
        lambda n: AttnMaskSpec.varlen(np.random.default_rng(0).integers(1, 64, n).tolist()),
    ),
    "block-causal, blocks of 1": (8 * K, lambda n: AttnMaskSpec.block_causal(n, 1)),
    "block-causal, blocks of 2": (4 * K, lambda n: AttnMaskSpec.block_causal(2 * n, 2)),
    "windows with sinks": (500, _windows_and_sinks),
    "strided columns": (500, _columns),
}


def measure_growth(family: str, size: int) -> dict[str, Any]:
    """CPU seconds of making a spec of a family, of lowering it and of planning it on 8 ranks."""
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = [time.process_time()]
    spec = FAMILIES[family][1](size)
    times.append(time.process_time())
    table = lower_mask(spec)
    times.append(time.process_time())
    plan = make_dispatch_plan(table, total_seqlen=spec.total_seqlen, cp_size=8)
    times.append(time.process_time())
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base
    seconds = dict(zip(("spec", "lower", "plan"), np.diff(times).tolist(), strict=True))
    return {
        "family": family,
        "size": size,
        "rectangles": len(spec.q_ranges),
        "slices": len(table),
        "imbalance": plan.imbalance(),
        "memory_mb": memory / 1024,
        **seconds,
    }


def growth_table(out: Callable[[str], None]) -> list[dict[str, Any]]:
    """Every family at four sizes, each twice the one before."""
    out("\n## Growth with the mask, on 8 ranks\n")
    out("| mask | size | rectangles | slices | CPU s: spec | lower | plan | times the size before | MB |")
    out("|---|---|---|---|---|---|---|---|---|")
    results = []
    for family, (first, _) in FAMILIES.items():
        before = 0.0
        for size in (first, 2 * first, 4 * first, 8 * first):
            got = cold(family=family, size=size)
            results.append(got)
            total = got["spec"] + got["lower"] + got["plan"]
            ratio = f"{total / before:.1f}" if before else "-"
            out(
                f"| {family} | {size:,} | {got['rectangles']:,} | {got['slices']:,} | {got['spec']:.3f} | "
                f"{got['lower']:.3f} | {got['plan']:.3f} | {ratio} | {got['memory_mb']:.0f} |"
            )
            before = total
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2, help="seeds of each other distribution")
    parser.add_argument("--quick", action="store_true", help="only the two tables of the board")
    parser.add_argument("--growth", action="store_true", help="only the growth with the mask")
    parser.add_argument("--out", type=Path, help="folder in which to store the tables and their JSON")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        arguments = json.loads(options.one)
        print(json.dumps((measure_growth if "family" in arguments else measure)(**arguments)))
        return
    lines: list[str] = []

    def out(line: str) -> None:
        lines.append(line)
        print(line, flush=True)

    out(f"# Solver board, {time.strftime('%Y-%m-%d')}\n")
    out(f"Command: `{shlex.join(['python', '-m', 'cpattn.launch.benchmarks.solver_board', *sys.argv[1:]])}`\n")
    out(
        f"Python {platform.python_version()}, numpy {np.__version__}, {platform.processor() or platform.machine()}, "
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}. One process for each plan; CPU seconds of that "
        f"process, from the spec to every rank's routes, cold; MB above its size after imports. Equal tokens within "
        f"one chunk of S / (16 P)."
    )
    results: dict[str, Any] = {} if options.growth else {"board": board(out)}
    if not options.quick and not options.growth:
        title = "Other seeds, lengths and masks: rows against a replayed min-heap dispatch"
        results["others"] = plain_rows(title, other_cases(options.seeds), out)
        results["growth"] = plain_rows("Growth with ranks and documents", GROWTH, out)
        results["effort"] = plain_rows("What a longer search buys", EFFORT, out)
    every = [row for rows in results.values() for row in rows if row["search_effort"] == 1]
    if not options.quick:
        results["families"] = growth_table(out)
    late = [r for r in every if r["ranks"] in TIMES and r["seqlen"] == M and r["cpu_seconds"] > TIMES[r["ranks"]]]
    large = [r for r in every if r["memory_mb"] > MEMORY_MB and r["ranks"] <= 1024]
    slow = [f"{r['mask']} on {r['ranks']} ({r['schedule']}): {r['cpu_seconds']:.3f} s" for r in late]
    out(f"\nSlower than {TIMES} (ranks: seconds) at 1M tokens: {'; '.join(slow) or 'none'}.")
    big = [f"{r['mask']} on {r['ranks']}: {r['memory_mb']:.0f} MB" for r in large]
    out(f"More than {MEMORY_MB} MB up to 1024 ranks: {'; '.join(big) or 'none'}.")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        name = f"solver_{platform.machine()}_{time.strftime('%Y-%m-%d')}"
        (options.out / f"{name}.md").write_text("\n".join(lines) + "\n")
        (options.out / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
