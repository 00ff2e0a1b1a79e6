"""TFLOP/s of every usable local kernel, forward and backward, by mask, length and heads, on one GPU.

    python -m cpattn.launch.benchmarks.kernels --out DIR [--part first|lengths|heads|rest|all] [--backend NAME ...]

Counts visible pairs only: 4 * pairs * heads * head_dim operations forward, 10 backward. Every row is checked against
`reference` on sampled rows of out, lse and the gradients; one that is wrong says so and has no rate. Beside each
stand, measured in the same process, torch's cuDNN attention on a causal mask of the same length and heads, and the
rate of a large bf16 matrix product. Time includes all that the runtime pays for a part: masks, merges, fp32 sums;
the launches of torch's operators and row kernels around the kernel, and the bytes that they move, are counted too.
Each run appends its rows to DIR/kernels.jsonl as they come and writes DIR/kernels.md of all that is there; --budget-s,
counted from the start of the process, ends it before a row that would pass it, most valuable rows first. Exit status 5
if nothing of that name serves, 1 if a row was wrong.
With `--device cpu --tokens 512` it runs anywhere, for trying the script out.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cpattn.backends import Backend, Problem, backend_names, explain_backends
from cpattn.backends.trial import BoundKernel, Results, Sample, find_fault, reference_rows
from cpattn.masks.spec import AttnMaskSpec, lower_mask

from .row_launches import Count, Counter
from .workloads import document_lengths, prefix_tree

MASKS: dict[str, Callable[[int], AttnMaskSpec]] = {
    "causal": AttnMaskSpec.causal,
    "full": lambda n: AttnMaskSpec.varlen([n], causal=False),
    "documents lognormal": lambda n: AttnMaskSpec.varlen(document_lengths(n)),
    "documents 2K": lambda n: AttnMaskSpec.varlen(_equal(n, 2048)),
    "window 1024": lambda n: AttnMaskSpec.sliding_window(n, 1024),
    "prefix tree": prefix_tree,
    "block causal": lambda n: AttnMaskSpec.block_causal(n, 1024),
    "documents 4K": lambda n: AttnMaskSpec.varlen(_equal(n, 4096)),
    "documents 1K": lambda n: AttnMaskSpec.varlen(_equal(n, 1024)),
}


class Shape(NamedTuple):
    """Tokens, heads and head dim of a row."""

    tokens: int
    num_heads_q: int
    num_heads_kv: int
    head_dim: int


PARTS: dict[str, list[Shape]] = {
    "first": [Shape(32768, 64, 8, 128)],
    "lengths": [Shape(n, 64, 8, 128) for n in (8192, 131072, 16384, 65536)],
    "heads": [Shape(32768, 32, 8, 64), Shape(32768, 32, 8, 128), Shape(32768, 64, 8, 64)],
    "rest": [Shape(n, h, 8, d) for n in (8192, 131072) for h, d in ((32, 64), (32, 128), (64, 64))],
}


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement; errors in words, with zeros for numbers. extra_*: besides the kernel, -1 where not counted."""

    tokens: int
    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    mask: str
    backend: str
    kernel: str
    visible_pairs: int
    forward_ms: float = 0.0
    backward_ms: float = 0.0
    forward_tflops: float = 0.0
    backward_tflops: float = 0.0
    peak_gib: float = 0.0
    prepare_ms: float = 0.0
    extra_launches: int = -1
    extra_gb: float = -1.0
    error: str = ""


def _equal(tokens: int, length: int) -> list[int]:
    lengths = [length] * (tokens // length)
    return lengths + ([tokens % length] if tokens % length else [])


class Clock:
    """Times a function on the device: median of repeats, within a limit."""

    def __init__(self, device: str, limit_s: float = 0.4) -> None:
        self.cuda, self.limit_s = device == "cuda", limit_s

    def __call__(self, run: Callable[[], object]) -> float:
        """Milliseconds."""
        self._once(run)  # warm up; compile
        times = [self._once(run)]
        while sum(times) < self.limit_s * 1e3 and len(times) < 20:
            times.append(self._once(run))
        return float(np.median(times))

    def _once(self, run: Callable[[], object]) -> float:
        if not self.cuda:
            start = time.perf_counter()
            run()
            return (time.perf_counter() - start) * 1e3
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


class Bench(NamedTuple):
    """A mask at a shape: inputs, and what `reference` says of sampled rows."""

    shape: Shape
    mask: str
    sample: Sample
    expected: Results

    @classmethod
    def of(cls, shape: Shape, mask: str, device: str, dtype: torch.dtype) -> Bench:
        tokens, heads, heads_kv, dim = shape
        problem = Problem(device, dtype, heads, heads_kv, dim, dim)
        slices = lower_mask(MASKS[mask](tokens))
        sample = Sample.of(problem, slices, tokens, tokens, torch.device(device))
        return cls(shape, mask, sample, reference_rows(sample))


def measure_backend(backend: Backend, bench: Bench) -> Row:
    """A row; an error is part of the result."""
    shape, sample, cuda = bench.shape, bench.sample, bench.sample.q.is_cuda
    row = Row(*shape, bench.mask, backend.name, backend.kernel, sample.table.area())
    try:
        start = time.perf_counter()
        kernel = BoundKernel(backend, sample)
        prepare_ms = (time.perf_counter() - start) * 1e3
        fault = find_fault(sample, kernel(), bench.expected)
        if fault:
            return replace(row, error=f"WRONG: {fault}")
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        count = _counted(backend, kernel)
        clock, (out, lse) = Clock(sample.q.device.type), kernel.forward()
        row = _with_rates(row, shape, clock(kernel.forward), clock(lambda: kernel.backward(out, lse)))
        peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
        return replace(
            row, peak_gib=peak, prepare_ms=prepare_ms, extra_launches=count.launches, extra_gb=count.bytes / 1e9
        )
    except Exception as error:
        traceback.print_exc(limit=4)
        return replace(row, error=f"{type(error).__name__}: {str(error)[:200]}")


def _counted(backend: Backend, kernel: BoundKernel) -> Count:
    """What both passes launch besides the kernel; not of flex, whose kernel is compiled operators of torch."""
    if backend.name in ("flex", "reference"):
        return Count(0, -1, -(10**9))
    with torch.no_grad(), Counter() as counter:
        kernel()
    return counter.count


def _with_rates(row: Row, shape: Shape, forward_ms: float, backward_ms: float) -> Row:
    operations = row.visible_pairs * shape.num_heads_q * shape.head_dim * 1e-9
    forward, backward = 4 * operations / forward_ms, 10 * operations / backward_ms
    return replace(
        row, forward_ms=forward_ms, backward_ms=backward_ms, forward_tflops=forward, backward_tflops=backward
    )


def measure_torch_causal(bench: Bench) -> Row:
    """The yardstick: torch's cuDNN attention (on CPU its flash attention) on one causal sequence."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    shape, inputs = bench.shape, bench.sample.inputs
    kind = SDPBackend.CUDNN_ATTENTION if inputs[0].is_cuda else SDPBackend.FLASH_ATTENTION
    area = shape.tokens * (shape.tokens + 1) // 2
    row = Row(*shape, "causal", "torch", f"torch SDPA, {kind.name.lower()}", area)
    try:
        q, k, v, dout = (t.transpose(0, 1)[None] for t in inputs)
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        kept: list[Tensor] = []
        sdpa = torch.nn.functional.scaled_dot_product_attention

        def forward() -> None:
            with sdpa_kernel(kind):
                q, k, v = leaves
                kept[:] = [sdpa(q, k, v, is_causal=True, enable_gqa=shape.num_heads_q != shape.num_heads_kv)]

        def backward() -> None:
            torch.autograd.grad(kept[0], leaves, dout, retain_graph=True)

        clock = Clock(q.device.type)
        return _with_rates(row, shape, clock(forward), clock(backward))
    except Exception as error:
        return replace(row, error=f"{type(error).__name__}: {str(error)[:200]}")


def matrix_tflops(device: str, dtype: torch.dtype) -> float:
    """Rate of a square matrix product in the dtype."""
    n = 8192 if device == "cuda" else 512
    a = torch.randn(n, n, device=device).to(dtype)
    return 2 * n**3 * 1e-9 / Clock(device)(lambda: torch.mm(a, a))


def serving(names: Sequence[str], device: str, dtype: torch.dtype, shape: Shape) -> list[Backend]:
    """The kernels of those names that serve a shape (flex last, which compiles for every class of masks).

    Raises:
        ValueError: a name is unknown.
    """
    heads_q, heads_kv, dim = shape[1:]
    problem = Problem(device, dtype, heads_q, heads_kv, dim, dim)
    asked = [pair for name in names for pair in explain_backends(problem, name)]
    for backend, refusal in asked:
        if refusal is not None:
            print(f"{backend.name} ({backend.kernel}) refuses {shape}: {refusal}", flush=True)
    return sorted((b for b, refusal in asked if refusal is None), key=lambda b: b.name == "flex")


def measure(shapes: list[Shape], names: Sequence[str], device: str, dtype: torch.dtype) -> Iterator[Row]:
    """Rows of a part: for every shape the yardstick, then every mask on every backend that serves it."""
    for shape in shapes:
        usable, first = serving(names, device, dtype, shape), True
        for mask in MASKS if usable else ():
            bench = Bench.of(shape, mask, device, dtype)
            if first:
                yield measure_torch_causal(bench)
            first = False
            for backend in usable:
                yield measure_backend(backend, bench)
                if device == "cuda":
                    torch.cuda.empty_cache()


def _shape(row: Row) -> Shape:
    return Shape(row.tokens, row.num_heads_q, row.num_heads_kv, row.head_dim)


def markdown(runs: list[dict[str, Any]]) -> str:
    """A table for each run; shares are of the yardstick of the same shape in the same run."""
    lines = ["# Kernels", "", "Share: of torch's cuDNN causal rate at the same shape, measured in the same process."]
    for run in runs:
        rows = run["rows"]
        yardsticks = {_shape(r): r for r in rows if r.backend == "torch"}
        lines += [
            "",
            f"{run['machine']}; bf16 matrix product {run['matrix_tflops']:.0f} TFLOP/s",
            "",
            "| tokens | heads | d | mask | backend | fwd TFLOP/s | share | bwd TFLOP/s | share | of matrix rate | "
            "GiB | other launches | GB |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
            *(_line(r, yardsticks.get(_shape(r)), run["matrix_tflops"]) for r in rows),
        ]
    return "\n".join(lines) + "\n"


def _line(r: Row, base: Row | None, matrix_rate: float) -> str:
    start = f"| {r.tokens} | {r.num_heads_q}:{r.num_heads_kv} | {r.head_dim} | {r.mask} | {r.backend}: {r.kernel} |"
    if not r.forward_tflops:
        return f"{start} {r.error} | | | | | | | |"
    theirs = (base.forward_tflops, base.backward_tflops) if base else (0.0, 0.0)
    mine = (r.forward_tflops, r.backward_tflops)
    shares = [f"{a / b:.0%}" if b else "-" for a, b in zip(mine, theirs, strict=True)]
    of_matrix = " / ".join(f"{rate / matrix_rate:.0%}" for rate in mine)
    extra = f"{r.extra_launches} | {r.extra_gb:.2f}" if r.extra_launches >= 0 else "- | -"
    rates = f"{mine[0]:.1f} | {shares[0]} | {mine[1]:.1f} | {shares[1]} | {of_matrix}"
    return f"{start} {rates} | {r.peak_gib:.1f} | {extra} |"


def read_runs(file: Path) -> list[dict[str, Any]]:
    """The runs in a results file: a line that describes one, then a line for each of its rows."""
    runs: list[dict[str, Any]] = []
    for line in file.read_text().splitlines():
        entry = json.loads(line)
        if "machine" in entry:
            runs.append({**entry, "rows": []})
        else:
            runs[-1]["rows"].append(Row(**entry))
    return runs


def run(given: argparse.Namespace) -> list[Row]:
    """Measure a part within the budget, writing after every row."""
    rows: list[Row] = []
    longest, before = 0.0, process_seconds()
    names = list(PARTS) if given.part == "all" else [given.part]
    shapes = [s for name in names for s in PARTS[name]]
    if given.tokens is not None:
        shapes = [Shape(given.tokens, 4, 2, 64)]
    file = given.out / "kernels.jsonl"
    for row in measure(shapes, given.backend, given.device, torch.bfloat16):
        if not rows:
            given.out.mkdir(parents=True, exist_ok=True)
            _append(file, _this_run(given.device))
        rows.append(row)
        _append(file, asdict(row))
        (given.out / "kernels.md").write_text(markdown(read_runs(file)))
        numbers = f"{row.forward_tflops:7.1f} {row.backward_tflops:7.1f}"
        print(f"{row.tokens:7d} {row.mask:20s} {row.backend:11s} {numbers} {row.error}", flush=True)
        now = process_seconds()
        longest, before = max(longest, now - before), now
        if now + longest > given.budget_s:
            print(f"stopped after {len(rows)} rows: {given.budget_s:.0f} s are too few for another", flush=True)
            break
    return rows


def process_seconds() -> float:
    """Seconds since this process began, imports included; where that is not known, since this was first asked."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return time.perf_counter() - _BEGAN


_BEGAN = time.perf_counter()


def _append(file: Path, entry: dict[str, Any]) -> None:
    with file.open("a") as lines:
        lines.write(json.dumps(entry) + "\n")


def _this_run(device: str) -> dict[str, Any]:
    machine = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    rate = matrix_tflops(device, torch.bfloat16)
    return {"machine": f"{machine}, torch {torch.__version__}", "matrix_tflops": rate}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/kernels"))
    parser.add_argument("--part", choices=(*PARTS, "all"), default="first")
    parser.add_argument("--backend", nargs="+", default=[n for n in backend_names() if n != "reference"])
    parser.add_argument("--budget-s", type=float, default=215.0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int)
    given = parser.parse_args(argv)
    if given.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device: --device cpu --tokens 512 tries the script out")
    rows = run(given)
    if not rows:
        return 5
    return int(any(row.error for row in rows if row.backend != "torch"))


if __name__ == "__main__":
    sys.exit(main())
