"""Launches and bytes besides the attention kernel's, counted: what packs, merges, sums, fills and casts in a step.

    python -m cpattn.launch.benchmarks.row_launches [--out DIR] [--case NAME ...]

The runtime runs every rank's plan of a group of 8 on tensors without data (32:8 heads of 128, bf16), with exchanges
that move nothing, and each operator of torch that launches a kernel is counted, with the bytes that it reads and
writes.
Three times: FlashAttention 2 inside torch with torch's operators for rows, the same with the row kernels, and the
backend `triton` with them. The worst rank's figures are given. Needs no GPU; says nothing of time, but for the host's
time to prepare a rank's tables, which is measured.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cpattn.backends import Backend
from cpattn.backends.sdpa_cuda import CudaSdpaBackend
from cpattn.backends.triton import TritonBackend
from cpattn.backends.triton_tiles import choose_tiles
from cpattn.collectives import row_kernels
from cpattn.collectives.call_kernels import FIRST, NONE
from cpattn.masks.spec import AttnMaskSpec
from cpattn.planning.ready import make_plan
from cpattn.runtime.bound import BoundPlan, bind_plan
from cpattn.runtime.exchanges import Exchanges
from cpattn.runtime.execute import Attending, KeyRows, Scoring, run_backward, run_forward

from .workloads import document_lengths, prefix_tree

RANKS, HEADS, KV_HEADS, HEAD_DIM = 8, 32, 8, 128
CPU = torch.device("cpu")
CASES: dict[str, tuple[int, Callable[[int], AttnMaskSpec]]] = {
    "causal 8K": (8192, AttnMaskSpec.causal),
    "causal 32K": (32768, AttnMaskSpec.causal),
    "window 4096, 8K": (8192, lambda total: AttnMaskSpec.sliding_window(total, 4096)),
    "200 documents, 32K": (32768, lambda total: AttnMaskSpec.varlen(document_lengths(total, mean=total / 200))),
    "prefix tree, 32K": (32768, prefix_tree),
    "block causal 1024, 32K": (32768, lambda total: AttnMaskSpec.block_causal(total, 1024)),
}
_KERNELS = ("_flash_attention", "triton_forward", "triton_dq", "triton_dkv")
_ONLY_WRITES = ("zeros", "full", "fill_", "zero_", "ones", "copy_")


class Count(NamedTuple):
    """Of a pass: calls of the attention kernel, other launches, and their bytes."""

    calls: int = 0
    launches: int = 0
    bytes: int = 0


class Counter(TorchDispatchMode):
    """Counts operators that launch a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.count = Count()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.name().split("::")[-1].split(".")[0]
        calls, launches, num_bytes = self.count
        if any(kernel in name for kernel in _KERNELS):
            self.count = Count(calls + 1, launches, num_bytes)
        elif not (func.is_view or func.name().startswith("prim::") or "empty" in name or "detach" in name):
            traffic = _traffic(name, args, result)
            self.count = Count(calls, launches + bool(traffic), num_bytes + traffic)
        return result


def _size(value: Any) -> int:
    """Bytes of the tensors in a value; what is repeated by a stride of 0 is read once."""
    tensors = [t for t in tree_leaves(value) if isinstance(t, Tensor)]
    return sum(
        t.itemsize * math.prod(n for n, stride in zip(t.shape, t.stride(), strict=True) if stride or not n)
        for t in tensors
    )


def _traffic(name: str, args: Any, result: Any) -> int:
    """Bytes that an operator reads and writes."""
    if name == "pack_rows":
        return 2 * _size(args[0])
    if name in ("add_rows", "merge_rows"):
        into, parts, rows = (args[0], args[1], args[2]) if name == "add_rows" else (args[:2], args[2:4], args[4])
        written = sum(_size(t[0]) * (len(tree_leaves(parts)[0]) if rows is None else len(rows)) for t in into)
        return _size(parts) + 2 * written
    if name == "merge_calls":
        out, lse, before, outs, lses, offsets, order, fresh = args
        return _size([outs, lses]) + _calls_traffic([out, lse], before, offsets, order, fresh)
    if name == "sum_calls":
        into, before, parts, q_offsets, q_order, k_offsets, k_order, fresh_q, fresh_k = args
        keys = _size([parts[1::3], parts[2::3]]) + _calls_traffic(into[1:], None, k_offsets, k_order, fresh_k)
        if not len(into[0]):  # what one call has for every row stays as it is
            return keys
        return keys + _size(parts[::3]) + _calls_traffic(into[:1], before, q_offsets, q_order, fresh_q)
    if name == "index_select":
        return 2 * _size(result)
    if name in ("index_copy_", "index_add_"):
        return (2 if name == "index_copy_" else 3) * _size(args[3])
    if name.startswith(_ONLY_WRITES):
        return _size(args[1:]) + _size(result)
    return _size(args) + _size(result)


def _calls_traffic(into: list[Tensor], before: Tensor | None, offsets: Tensor, order: Tensor, fresh: bool) -> int:
    """Of the rows that results of calls are taken into, by the tables: read where they held anything, and written.

    before: out so far, in another dtype: rows that have begun are read from there, and all are written.
    """
    with unset_fake_temporarily():
        starts, entries = offsets.cpu().numpy(), order.cpu().numpy()
    first = entries[starts[:-1][starts[1:] > starts[:-1]]]
    read = int((((first & FIRST) == 0) if fresh else ((first & NONE) != NONE)).sum())
    written = len(first) if fresh else read
    if before is None:
        return (read + written) * sum(_size(t[:1]) for t in into)
    begun = int(((first & FIRST) != 0).sum()) if fresh else 0
    return _size(before[begun:]) + _size(into[0]) + 2 * sum(_size(t) for t in into[1:])


def count_plan(plan: BoundPlan) -> tuple[Count, Count]:
    """Forward and backward of a rank's plan, run without data."""
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        q, out = (torch.empty(plan.num_queries, HEADS, HEAD_DIM, dtype=torch.bfloat16) for _ in range(2))
        kv = KeyRows(*(torch.empty(plan.num_keys, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16) for _ in range(2)))
        lse, none = torch.empty(plan.num_queries, HEADS), torch.empty(0, dtype=torch.uint8)
        with Counter() as forward:
            run_forward(plan, q, kv, None, none, Scoring(0.1))
        with Counter() as backward:
            run_backward(plan, out, Attending(q, out, lse), kv, none, Scoring(0.1))
    return forward.count, backward.count


class _PackedTiles(TritonBackend):
    """The backend with a GPU's tiles, wherever it runs, and its tables made when it prepares."""

    def prepare(self, slices: Any, num_queries: int, num_keys: int, device: torch.device) -> Any:
        work = super().prepare(slices, num_queries, num_keys, device)
        tiles = choose_tiles("sm90", 2, HEAD_DIM)
        work.by_query(tiles.forward), work.by_query(tiles.dq), work.by_key(tiles.dkv)
        return work


class Row(NamedTuple):
    """A case under one way of doing it: the worst rank's counts, and the host's seconds to bind the slowest rank."""

    case: str
    way: str
    forward: Count
    backward: Count
    seconds: float


def count_case(case: str) -> list[Row]:
    tokens, mask = CASES[case]
    spec = mask(RANKS * tokens)
    ready = make_plan(spec, cp_size=RANKS, num_heads_q=HEADS, num_heads_kv=KV_HEADS, head_dim=HEAD_DIM)
    ways: list[tuple[str, Backend, bool]] = [
        ("FlashAttention 2, torch's rows", CudaSdpaBackend(device_type="cpu", stores_first=False), False),
        ("FlashAttention 2, row kernels", CudaSdpaBackend(device_type="cpu"), True),
        ("triton, row kernels", _PackedTiles(), True),
    ]
    rows = []
    for way, backend, fused in ways:
        counts, slowest = [], 0.0
        with row_kernels.also_on("cpu") if fused else nullcontext():
            for rank in range(RANKS):
                start = time.perf_counter()
                bound = bind_plan(
                    ready.plan.for_rank(rank), backend, Exchanges(), CPU, transport="all_to_all", keep_kv=False
                )
                slowest = max(slowest, time.perf_counter() - start)
                counts.append(count_plan(_still(bound)))
        worst = [max((c[i] for c in counts), key=lambda c: (c.launches, c.bytes)) for i in range(2)]
        rows.append(Row(case, way, worst[0], worst[1], slowest))
        print(rows[-1], flush=True)
    return rows


def _still(plan: BoundPlan) -> BoundPlan:
    """The plan without a group, whose exchanges have their buffers and move nothing."""

    def trip(t: Any) -> Any:
        return t._replace(hops=tuple(replace(hop, active=False) for hop in t.hops))

    stages = tuple(stage._replace(kv=trip(stage.kv)) for stage in plan.stages)
    return plan._replace(queries=trip(plan.queries), stages=stages)


def table_of(rows: list[Row]) -> str:
    """Markdown."""
    lines = [
        "| case, tokens per rank | way | kernel calls fwd/bwd | other launches fwd/bwd | GB fwd/bwd | "
        "launches and bytes, of the first way's | ms to bind |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        first = next(r for r in rows if r.case == row.case)
        f, b = row.forward, row.backward
        launches, num_bytes = f.launches + b.launches, f.bytes + b.bytes
        base, base_bytes = first.forward.launches + first.backward.launches, first.forward.bytes + first.backward.bytes
        share = "" if row is first else f"{launches / base:.0%}, {num_bytes / base_bytes:.0%}"
        lines.append(
            f"| {row.case} | {row.way} | {f.calls}/{b.calls} | {f.launches}/{b.launches} | "
            f"{f.bytes / 1e9:.2f}/{b.bytes / 1e9:.2f} | {share} | {row.seconds * 1e3:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for row_launches.md")
    parser.add_argument("--case", nargs="*", choices=CASES, default=list(CASES))
    args = parser.parse_args(argv)
    rows: list[Row] = []
    for case in args.case:
        rows += count_case(case)
        if args.out is not None:
            args.out.mkdir(parents=True, exist_ok=True)
            head = "# Launches and bytes besides the attention kernel's\n\n"
            head += "`python -m cpattn.launch.benchmarks.row_launches`: counted, nothing was run.\n\n"
            (args.out / "row_launches.md").write_text(head + table_of(rows))
    print(table_of(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
