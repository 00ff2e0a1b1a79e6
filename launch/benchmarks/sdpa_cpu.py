"""Visible pairs per second of the CPU kernel under masks, against one causal call of torch's kernel.

    python -m cpattn.launch.benchmarks.sdpa_cpu [--out FILE.json] [--repeats 3] [--tokens 32768] [--dtype bfloat16]

One thread, CPU time, forward and backward, 8 heads of 64. The yardstick, torch's own flash kernel on one
causal sequence of 8192 tokens, runs before and after every mask, so that a busy machine slows both. Each
mask is run once before it is timed: tiles and edge masks are made at a key's first call.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cpattn.backends.base import Attending, KeyRows, Returning, Scoring
from cpattn.backends.sdpa_cpu import CpuSdpaBackend
from cpattn.launch.benchmarks.workloads import document_lengths
from cpattn.solver import SliceTable

NUM_HEADS, HEAD_DIM = 8, 64
YARDSTICK_TOKENS = 8192


def packed_documents(tokens: int) -> SliceTable:
    """Causal documents of lognormal lengths, mean 4096: the project's board (seed 0)."""
    lengths = np.array(document_lengths(tokens))
    ends = np.cumsum(lengths)
    starts = ends - lengths
    return SliceTable.from_columns(starts, ends, starts, ends, -tokens, 0)


def sliding_window(tokens: int, window: int) -> SliceTable:
    """Causal; each query sees `window` keys, itself included."""
    return SliceTable.from_columns(0, tokens, 0, tokens, -(window - 1), 0)


def equal_documents(tokens: int, length: int) -> SliceTable:
    """Causal documents of one length."""
    starts = np.arange(0, tokens, length)
    return SliceTable.from_columns(starts, starts + length, starts, starts + length, -tokens, 0)


# mask, table, share of the yardstick that it should reach in fp32 and bf16 (None: for the record)
def board(tokens: int) -> list[tuple[str, SliceTable, dict[str, float | None]]]:
    """The masks measured."""
    return [
        ("packed documents", packed_documents(tokens), {"float32": 0.90, "bfloat16": 0.90}),
        ("window 4096", sliding_window(tokens, 4096), {"float32": 0.85, "bfloat16": 0.85}),
        ("window 1024", sliding_window(tokens, 1024), {"float32": 0.75, "bfloat16": 0.65}),
        ("documents of 512", equal_documents(tokens, 512), {"float32": None, "bfloat16": None}),
    ]


def seconds_per_pair(table: SliceTable, tokens: int, dtype: torch.dtype) -> tuple[float, float]:
    """CPU seconds of the backend per visible pair, forward and backward."""
    backend = CpuSdpaBackend()
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (
        torch.randn(tokens, NUM_HEADS, HEAD_DIM, generator=generator).to(dtype) for _ in range(4)
    )
    work = backend.prepare(table, tokens, tokens, q.device)
    once = backend.writes_once(work)
    grads = [torch.zeros(t.shape) for t in (q, k, v)]
    out = torch.zeros(q.shape, dtype=dtype if once else torch.float32)
    lse = torch.full(q.shape[:2], -torch.inf)
    keys, scoring = KeyRows(k, v), Scoring(HEAD_DIM**-0.5)

    def forward() -> None:
        backend.forward(Attending(q, out, lse), keys, work, scoring, fresh=True)
        out.to(dtype)  # part of what the runtime does

    def backward() -> None:
        backend.backward(Returning(dout, q, out, lse, grads[0]), keys, work, scoring, KeyRows(*grads[1:]))
        for grad in grads:
            grad.to(dtype)

    area = table.area()
    for run in (forward, backward):
        run()
    return _cpu_seconds(forward) / area, _cpu_seconds(backward) / area


def yardstick(dtype: torch.dtype) -> tuple[float, float]:
    """The same for one causal call of torch's kernel."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (
        torch.randn(1, YARDSTICK_TOKENS, NUM_HEADS, HEAD_DIM, generator=generator).to(dtype).transpose(1, 2)
        for _ in range(4)
    )
    ops = torch.ops.aten
    results: list[torch.Tensor] = []

    def forward() -> None:
        results[:] = ops._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)

    def backward() -> None:
        ops._scaled_dot_product_flash_attention_for_cpu_backward(dout, q, k, v, *results, 0.0, True)

    area = YARDSTICK_TOKENS * (YARDSTICK_TOKENS + 1) // 2
    return _cpu_seconds(forward) / area, _cpu_seconds(backward) / area


def _cpu_seconds(run: Callable[[], None]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def measure(tokens: int, repeats: int, dtypes: list[torch.dtype]) -> Iterator[list[dict[str, Any]]]:
    """After every repeat, a row per mask and dtype: pairs per second over the yardstick's, the median so far."""
    ratios: dict[tuple[str, torch.dtype], list[tuple[float, float, float]]] = {}
    for dtype in dtypes:
        yardstick(dtype)  # warm up
    for _ in range(repeats):
        for dtype in dtypes:
            for mask, table, _ in board(tokens):
                before, mine, after = yardstick(dtype), seconds_per_pair(table, tokens, dtype), yardstick(dtype)
                theirs = [(a + b) / 2 for a, b in zip(before, after, strict=True)]
                measured = (theirs[0] / mine[0], theirs[1] / mine[1], sum(theirs) / sum(mine))
                ratios.setdefault((mask, dtype), []).append(measured)
        yield [
            _row(mask, table, targets, dtype, ratios[mask, dtype])
            for dtype in dtypes
            for mask, table, targets in board(tokens)
        ]


def _row(
    mask: str,
    table: SliceTable,
    targets: dict[str, float | None],
    dtype: torch.dtype,
    ratios: list[tuple[float, float, float]],
) -> dict[str, Any]:
    name = str(dtype).removeprefix("torch.")
    forward, backward, both = (float(np.median(column)) for column in zip(*ratios, strict=True))
    return {
        "mask": mask,
        "dtype": name,
        "visible_pairs": table.area(),
        "forward": forward,
        "backward": backward,
        "forward_and_backward": both,
        "target": targets[name],
        "repeats": len(ratios),
    }


def _line(row: dict[str, Any]) -> str:
    target = "" if row["target"] is None else f"{row['target']:.0%}"
    return (
        f"| {row['mask']} | {row['dtype']} | {row['forward']:.1%} | {row['backward']:.1%} | "
        f"{row['forward_and_backward']:.1%} | {target} |"
    )


def main() -> None:
    """Print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    dtypes = [names[arguments.dtype]] if arguments.dtype else list(names.values())
    for rows in measure(arguments.tokens, arguments.repeats, dtypes):
        print(f"\nafter {rows[0]['repeats']} of {arguments.repeats} repeats\n")
        print("| mask | dtype | forward | backward | both | target |\n|---|---|---|---|---|---|")
        print("\n".join(_line(row) for row in rows), flush=True)
        if arguments.out:
            machine = {"cpu": platform.machine(), "torch": torch.__version__, "threads": 1, "clock": "CPU time"}
            result = {**machine, "tokens": arguments.tokens, "rows": rows}
            arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
