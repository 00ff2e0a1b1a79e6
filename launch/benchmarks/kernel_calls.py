"""Calls of each local kernel, forward and backward, that a mask takes on the worst of 8 ranks. Counts, no times.

    python -m cpattn.launch.benchmarks.kernel_calls [--out DIR] [--tokens 8192 32768] [--ranks 8]

A call is one launch of the attention kernel; `ffa` and `flex` have their slices in one and take one a stage. Prints a
table and writes DIR/kernel_calls.json. No GPU is needed: calls are planned on the CPU.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from cpattn.backends.flex import make_passes
from cpattn.backends.offsets import plan_offsets
from cpattn.backends.sdpa_cpu import CpuSdpaBackend
from cpattn.backends.varlen import plan_varlen
from cpattn.masks.spec import AttnMaskSpec
from cpattn.planning.ready import make_plan
from cpattn.solver import RankPlan, SliceTable

from .workloads import document_lengths, prefix_tree

CPU = torch.device("cpu")
MASKS: dict[str, Callable[[int], AttnMaskSpec]] = {
    "causal": AttnMaskSpec.causal,
    "window 4096": lambda n: AttnMaskSpec.sliding_window(n, 4096),
    "documents": lambda n: AttnMaskSpec.varlen(document_lengths(n)),
    "prefix tree": prefix_tree,
    "block causal 1024": lambda n: AttnMaskSpec.block_causal(n, 1024),
}


class Calls(NamedTuple):
    """Kernel calls of a pass over a slice table."""

    forward: int
    backward: int


def _varlen(table: SliceTable, num_queries: int, num_keys: int) -> Calls:
    work = plan_varlen(table, CPU)
    return Calls(len(work.forward), len(work.backward))


def _offsets(table: SliceTable, num_queries: int, num_keys: int) -> Calls:
    work = plan_offsets(table, CPU)
    return Calls(len(work.forward), len(work.backward))


def _one(table: SliceTable, num_queries: int, num_keys: int) -> Calls:
    return Calls(1, 1)


def _flex(table: SliceTable, num_queries: int, num_keys: int) -> Calls:
    passes = len(make_passes(table, num_queries, num_keys, CPU))
    return Calls(passes, passes)


def _cpu(table: SliceTable, num_queries: int, num_keys: int) -> Calls:
    work = CpuSdpaBackend().prepare(table, num_queries, num_keys, CPU)
    return Calls(len(work.calls(torch.bfloat16)), len(work.calls(torch.bfloat16, backward=True)))


BACKENDS: dict[str, Callable[[SliceTable, int, int], Calls]] = {
    "sdpa (CUDA), flash_attn": _varlen,
    "cudnn, te": _offsets,
    "ffa": _one,
    "flex": _flex,
    "sdpa (CPU)": _cpu,
}


def tables_of(plan: RankPlan) -> list[tuple[SliceTable, int, int]]:
    """Slice tables of a rank's stages, own queries and received ones, with the rows of their buffers."""
    rows = (plan.num_queries, plan.queries[-1].num_received)
    return [
        (table, num_queries, stage.num_keys)
        for stage in plan.stages
        for table, num_queries in zip((stage.own, stage.guest), rows, strict=True)
        if len(table)
    ]


def count(plans: list[RankPlan]) -> dict[str, list[int]]:
    """Most slices of a rank, and for each backend the most calls of a rank, forward and backward."""
    most = {"slices": [max(sum(len(t) for t, _, _ in tables_of(p)) for p in plans)]}
    for name, calls in BACKENDS.items():
        of_ranks = [[calls(*table) for table in tables_of(plan)] for plan in plans]
        most[name] = [max(sum(c[way] for c in rank) for rank in of_ranks) for way in (0, 1)]
    return most


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/kernel_calls"))
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768], help="on a rank")
    parser.add_argument("--ranks", type=int, default=8)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, list[int]]] = {}
    print(f"{'':26s} {'slices':>6s}  " + "  ".join(f"{name:>24s}" for name in BACKENDS))
    for tokens in given.tokens:
        for mask, make in MASKS.items():
            spec = make(tokens * given.ranks)
            ready = make_plan(spec, cp_size=given.ranks, num_heads_q=32, num_heads_kv=8, head_dim=128)
            most = count([ready.plan.for_rank(rank) for rank in range(given.ranks)])
            found[f"{mask}, {tokens}"] = most
            numbers = "  ".join(f"{'/'.join(map(str, most[name])):>24s}" for name in BACKENDS)
            print(f"{mask + ', ' + str(tokens):26s} {most['slices'][0]:6d}  {numbers}", flush=True)
            (given.out / "kernel_calls.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
