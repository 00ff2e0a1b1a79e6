"""Weak scaling: measured CPU time to 8 ranks, and predicted step time to 1024.

    python -m cpattn.launch.benchmarks.scaling --out FILE.json

Measured: 1, 2, 4 and 8 ranks of this machine take turns in one run of eight processes; the work for each rank is the
same (packed documents and windows: tokens for each rank; causal: tokens grow with the root of the ranks). The figure is
CPU seconds of all ranks for each visible pair, over those of one rank in the same turn.

Predicted: `simulate` on a hardware preset, 8K tokens for each rank, 64 query and 8 key heads of 128 in bf16, beside
the predictions for ring, all-gather, Ulysses and a plan that balances chunks with a heap and moves only needed keys.
Ours crosses between nodes once for each row and node, as it does under torchrun; in the column "one level" it does not
know of nodes. Of the others only the rings do. Ring, zigzag ring, all-gather and Ulysses are formulas (`solver.report`)
in which merging and packing cost what they cost ours.
The figure is the share of the step in which the busiest kernel would be done if nothing but compute counted.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import cpattn
from cpattn.launch.benchmarks.workloads import document_lengths, plan_on_nodes
from cpattn.launch.torchrun import num_cores, run_on_ranks
from cpattn.masks.spec import AttnMaskSpec, lower_mask
from cpattn.solver import HARDWARE, Heads, ScheduleKind, make_dispatch_plan, simulate
from cpattn.solver.report import compare

MODULE = "cpattn.launch.benchmarks.scaling"
HEADS, HEAD_DIM = 8, 64
SIZES = (1, 2, 4, 8)
PREDICTED_SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)
PREDICTED_HEADS = Heads(64, 8, 128, 128, 2)
TOKENS_PER_RANK = 8192
SCHEDULES: tuple[ScheduleKind, ...] = ("auto", "keys")

# Mask and tokens of a run on some ranks.
MEASURED: dict[str, Callable[[int], AttnMaskSpec]] = {
    "causal": lambda ranks: AttnMaskSpec.causal(round(4096 * math.sqrt(ranks))),
    "packed documents": lambda ranks: AttnMaskSpec.varlen(document_lengths(8192 * ranks, mean=1024)),
    "window 1024": lambda ranks: AttnMaskSpec.sliding_window(4096 * ranks, 1024),
}
PREDICTED: dict[str, Callable[[int], AttnMaskSpec]] = {
    "causal": AttnMaskSpec.causal,
    "varlen causal": lambda tokens: AttnMaskSpec.varlen(document_lengths(tokens)),
    "window 4096": lambda tokens: AttnMaskSpec.sliding_window(tokens, 4096),
}


def worker(out: Path, repeats: int) -> None:
    """One of eight ranks: steps on the first 1, 2, 4 and 8 ranks in turns."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    groups = {size: dist.new_group(list(range(size))) for size in SIZES}
    steps = {}
    for name, make in MEASURED.items():
        for size in SIZES:
            if rank < size:
                steps[name, size] = _step(make(size), groups[size])
    seconds: dict[tuple[str, int], list[float]] = {}
    for turn in range(repeats + 1):  # the first warms up
        for name in MEASURED:
            for size in SIZES:
                dist.barrier()
                before = time.process_time()
                if rank < size:
                    steps[name, size]()
                mine = torch.tensor(time.process_time() - before if rank < size else 0.0)
                dist.all_reduce(mine)
                if turn:
                    seconds.setdefault((name, size), []).append(float(mine) / lower_mask(MEASURED[name](size)).area())
    if rank == 0:
        out.write_text(json.dumps({name: _ratios(name, seconds) for name in MEASURED}))
    dist.barrier()
    dist.destroy_process_group()


def _step(spec: AttnMaskSpec, group: dist.ProcessGroup) -> Callable[[], None]:
    shape: dict[str, Any] = {"num_heads_q": HEADS, "num_heads_kv": HEADS, "head_dim": HEAD_DIM}
    key = cpattn.make_key(spec, **shape, cp_group=group if dist.get_world_size(group) > 1 else None)
    q, k, v = (torch.randn(key.num_tokens, HEADS, HEAD_DIM, requires_grad=True) for _ in range(3))
    dout = torch.randn(key.num_tokens, HEADS, HEAD_DIM)

    def run() -> None:
        torch.autograd.grad(cpattn.attention(q, k, v, key), (q, k, v), dout)

    return run


def _ratios(name: str, seconds: dict[tuple[str, int], list[float]]) -> dict[str, float]:
    one = seconds[name, 1]
    return {str(p): statistics.median(a / b for a, b in zip(seconds[name, p], one, strict=True)) for p in SIZES}


def predict(preset: str, sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    """Compute over step time, for ours and the rivals."""
    hardware = HARDWARE[preset]
    rows = []
    for name, make in PREDICTED.items():
        for size in sizes:
            tokens = TOKENS_PER_RANK * size
            mask = lower_mask(make(tokens))
            plans = {
                f"ours, {schedule}": plan_on_nodes(mask, tokens, size, PREDICTED_HEADS, hardware, schedule)
                for schedule in SCHEDULES
            }
            if size > hardware.ranks_per_node:
                plans["ours, one level"] = make_dispatch_plan(
                    mask,
                    total_seqlen=tokens,
                    cp_size=size,
                    schedule="auto",
                    costs=PREDICTED_HEADS.row_costs(),
                    hardware=hardware,
                )
            seconds = {of: simulate(plan, hardware, PREDICTED_HEADS).seconds for of, plan in plans.items()}
            rivals = compare(mask, tokens, size, PREDICTED_HEADS, hardware, 512)
            seconds.update({rival.name: rival.seconds for rival in rivals})
            rate = PREDICTED_HEADS.forward_flop / hardware.forward_flops
            rate += PREDICTED_HEADS.backward_flop / hardware.backward_flops
            ideal = mask.area() / size * rate
            shares = {of: None if math.isnan(s) else ideal / s for of, s in seconds.items()}
            rows.append({"mask": name, "ranks": size, "tokens": tokens, "compute_ms": 1e3 * ideal, "shares": shares})
    return rows


def _markdown(measured: dict[str, dict[str, float]], predicted: list[dict[str, Any]], preset: str) -> str:
    about = f"{datetime.date.today()}, torch {torch.__version__}, {platform.processor() or platform.machine()}, "
    load = f"{num_cores()} cores shared with other work (load {os.getloadavg()[0]:.1f}), gloo, fp32"
    lines = ["# Weak scaling", "", f"`python -m {MODULE}`, {about}{load}.", ""]
    if measured:
        lines += ["Measured: CPU seconds of all ranks for each visible pair, over one rank's.", ""]
        lines += ["| mask | " + " | ".join(f"{p} ranks" for p in SIZES) + " |", "|---" * (len(SIZES) + 1) + "|"]
        for name, ratios in measured.items():
            lines.append(f"| {name} | " + " | ".join(f"{ratios[str(p)]:.3f}" for p in SIZES) + " |")
    if predicted:
        names = max((list(row["shares"]) for row in predicted), key=len)
        lines += ["", f"Predicted: compute over step time on {preset}, 8K tokens for each rank, heads 64:8 of 128."]
        lines += ["One level: planned without nodes, run on nodes of 8.", ""]
        lines += ["| mask | ranks | compute, ms | " + " | ".join(names) + " |", "|---" * (len(names) + 3) + "|"]
        for row in predicted:
            cells = (row["shares"].get(n) for n in names)
            shares = " | ".join("" if c is None else f"{c:.1%}" for c in cells)
            lines.append(f"| {row['mask']} | {row['ranks']} | {row['compute_ms']:.2f} | {shares} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print tables and write JSON with a Markdown table beside it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--hardware", default="h100", choices=list(HARDWARE), help="for the prediction")
    parser.add_argument("--largest", type=int, default=1024, help="most ranks predicted")
    parser.add_argument("--only", choices=("measured", "predicted"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.repeats)
        return
    measured: dict[str, dict[str, float]] = {}
    predicted: list[dict[str, Any]] = []
    if options.only != "measured":
        predicted = predict(options.hardware, tuple(p for p in PREDICTED_SIZES if p <= options.largest))
    if options.only != "predicted":
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "measured.json"
            run_on_ranks(MODULE, ["--worker", str(path), "--repeats", str(options.repeats)], num_ranks=max(SIZES))
            measured = json.loads(path.read_text())
    text = _markdown(measured, predicted, options.hardware)
    print(text)
    if options.out:
        options.out.write_text(json.dumps({"measured": measured, "predicted": predicted}, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
