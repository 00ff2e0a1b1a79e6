"""TFLOP/s of every usable local kernel, forward and backward, by mask, length and heads, on one GPU.

    python -m cpattn.launch.benchmarks.kernels --out DIR [--part first|lengths|heads|rest|all] [--budget-s 220]

Counts visible pairs only: 4 * pairs * heads * head_dim operations forward, 10 backward. Beside each row stand,
measured in the same run, torch's cuDNN attention on a causal mask of the same length and heads, and the rate of
a large bf16 matrix product. Time includes all that the runtime pays for a part: masks, merges, fp32 gradients.
Results go to DIR/kernels_<part>.json and .md as they come; the budget ends a part, most valuable rows first.
With `--device cpu --tokens 512` it runs anywhere, for trying the script out.
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cpattn.backends import Backend, Problem, explain_backends
from cpattn.backends.base import Attending, KeyRows, Returning, Scoring
from cpattn.masks.spec import AttnMaskSpec, lower_mask
from cpattn.solver import SliceTable

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
    """One measurement; errors in words, with zeros for numbers."""

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


def make_rows(shape: Shape, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, dout."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(heads: int) -> Tensor:
        size = (shape.tokens, heads, shape.head_dim)
        return torch.randn(size, generator=generator, device=device, dtype=torch.float32).to(dtype)

    heads_q, heads_kv = shape.num_heads_q, shape.num_heads_kv
    return normal(heads_q), normal(heads_kv), normal(heads_kv), normal(heads_q)


def measure_backend(
    backend: Backend, shape: Shape, mask: str, slices: SliceTable, device: str, dtype: torch.dtype
) -> Row:
    """A row; an error is part of the result."""
    area = slices.area()
    row = Row(*shape, mask, backend.name, backend.kernel, area)
    try:
        clock = Clock(device)
        q, k, v, dout = make_rows(shape, device, dtype)
        start = time.perf_counter()
        work = backend.prepare(slices, shape.tokens, shape.tokens, q.device)
        once = backend.writes_once(work)
        prepare_ms = (time.perf_counter() - start) * 1e3
        keys, scoring = KeyRows(k, v), Scoring(shape.head_dim**-0.5)
        kept: dict[str, Tensor] = {}
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()

        def forward() -> None:
            out = torch.zeros(q.shape, dtype=dtype if once else torch.float32, device=device)
            lse = torch.full(q.shape[:2], -torch.inf, device=device)
            backend.forward(Attending(q, out, lse), keys, work, scoring, fresh=True)
            kept["out"], kept["lse"] = out.to(dtype), lse

        def backward() -> None:
            grads = [torch.zeros(t.shape, dtype=torch.float32, device=device) for t in (q, k, v)]
            queries = Returning(dout, q, kept["out"], kept["lse"], grads[0])
            backend.backward(queries, keys, work, scoring, KeyRows(*grads[1:]))
            kept["dq"], kept["dk"], kept["dv"] = (g.to(dtype) for g in grads)

        forward_ms, backward_ms = clock(forward), clock(backward)
        wrong = [name for name, t in kept.items() if torch.isnan(t).any()]
        operations = area * shape.num_heads_q * shape.head_dim * 1e-9
        numbers = {
            "forward_ms": forward_ms,
            "backward_ms": backward_ms,
            "forward_tflops": 4 * operations / forward_ms,
            "backward_tflops": 10 * operations / backward_ms,
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0,
            "prepare_ms": prepare_ms,
            "error": f"NaN in {', '.join(wrong)}" if wrong else "",
        }
        return Row(**{**asdict(row), **numbers})
    except Exception as error:
        traceback.print_exc(limit=4)
        return Row(**{**asdict(row), "error": f"{type(error).__name__}: {str(error)[:200]}"})


def measure_torch_causal(shape: Shape, device: str, dtype: torch.dtype) -> Row:
    """The yardstick: torch's cuDNN attention (on CPU its flash attention) on one causal sequence."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    area = shape.tokens * (shape.tokens + 1) // 2
    kind = SDPBackend.CUDNN_ATTENTION if device == "cuda" else SDPBackend.FLASH_ATTENTION
    row = Row(*shape, "causal", "torch", f"torch SDPA, {kind.name.lower()}", area)
    try:
        q, k, v, dout = (t.transpose(0, 1)[None] for t in make_rows(shape, device, dtype))
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        kept: list[Tensor] = []
        sdpa = torch.nn.functional.scaled_dot_product_attention

        def forward() -> None:
            with sdpa_kernel(kind):
                q, k, v = leaves
                kept[:] = [sdpa(q, k, v, is_causal=True, enable_gqa=shape.num_heads_q != shape.num_heads_kv)]

        def backward() -> None:
            torch.autograd.grad(kept[0], leaves, dout, retain_graph=True)

        clock = Clock(device)
        forward_ms, backward_ms = clock(forward), clock(backward)
        operations = area * shape.num_heads_q * shape.head_dim * 1e-9
        numbers = {
            "forward_ms": forward_ms,
            "backward_ms": backward_ms,
            "forward_tflops": 4 * operations / forward_ms,
            "backward_tflops": 10 * operations / backward_ms,
        }
        return Row(**{**asdict(row), **numbers})
    except Exception as error:
        return Row(**{**asdict(row), "error": f"{type(error).__name__}: {str(error)[:200]}"})


def matrix_tflops(device: str, dtype: torch.dtype) -> float:
    """Rate of a square matrix product in the dtype."""
    n = 8192 if device == "cuda" else 512
    a = torch.randn(n, n, device=device).to(dtype)
    return 2 * n**3 * 1e-9 / Clock(device)(lambda: torch.mm(a, a))


def measure(shapes: list[Shape], device: str, dtype: torch.dtype) -> Iterator[Row]:
    """Rows of a part: for every shape the yardstick, then every mask on every backend that serves it."""
    for shape in shapes:
        yield measure_torch_causal(shape, device, dtype)
        problem = Problem(device, dtype, shape.num_heads_q, shape.num_heads_kv, shape.head_dim, shape.head_dim)
        usable = [b for b, _ in explain_backends(problem) if b.refusal(problem) is None and b.name != "reference"]
        tables = {mask: lower_mask(make_spec(shape.tokens)) for mask, make_spec in MASKS.items()}
        slow = [b for b in usable if b.name == "flex"]  # compiles for every class of masks: last
        for group in ([b for b in usable if b not in slow], slow):
            for mask, slices in tables.items():
                for backend in group:
                    yield measure_backend(backend, shape, mask, slices, device, dtype)
                    if device == "cuda":
                        torch.cuda.empty_cache()


def _shape(row: Row) -> Shape:
    return Shape(row.tokens, row.num_heads_q, row.num_heads_kv, row.head_dim)


def markdown(rows: list[Row], matrix_rate: float, machine: str) -> str:
    """A table; shares are of the yardstick of the same shape."""
    yardsticks = {_shape(r): r for r in rows if r.backend == "torch"}
    lines = [
        f"{machine}; bf16 matrix product {matrix_rate:.0f} TFLOP/s. Share: of torch's cuDNN causal at the same shape.",
        "",
        "| tokens | heads | d | mask | backend | fwd TFLOP/s | share | bwd TFLOP/s | share | of matrix rate | GiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        base = yardsticks.get(_shape(r))
        heads = f"{r.num_heads_q}:{r.num_heads_kv}"
        start = f"| {r.tokens} | {heads} | {r.head_dim} | {r.mask} | {r.backend}: {r.kernel} |"
        if r.error and not r.forward_tflops:
            lines.append(f"{start} {r.error} | | | | | |")
            continue
        shares = [
            f"{mine / theirs:.0%}" if theirs else "-"
            for mine, theirs in (
                (r.forward_tflops, base.forward_tflops if base else 0),
                (r.backward_tflops, base.backward_tflops if base else 0),
            )
        ]
        of_matrix = f"{r.forward_tflops / matrix_rate:.0%} / {r.backward_tflops / matrix_rate:.0%}"
        lines.append(
            f"{start} {r.forward_tflops:.1f} | {shares[0]} | {r.backward_tflops:.1f} | {shares[1]} | {of_matrix} | "
            f"{r.peak_gib:.1f} {r.error} |"
        )
    return "\n".join(lines) + "\n"


def run(part: str, out: Path, *, budget_s: float, device: str, tokens: int | None = None) -> list[Row]:
    """Measure a part within the budget, writing after every row."""
    began, rows = time.perf_counter(), []
    dtype = torch.bfloat16
    names = list(PARTS) if part == "all" else [part]
    shapes = [s for name in names for s in PARTS[name]]
    if tokens is not None:
        shapes = [Shape(tokens, 4, 2, 64)]
    machine = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    machine = f"{machine}, torch {torch.__version__}"
    rate = matrix_tflops(device, dtype)
    out.mkdir(parents=True, exist_ok=True)
    for row in measure(shapes, device, dtype):
        rows.append(row)
        numbers = f"{row.forward_tflops:7.1f} {row.backward_tflops:7.1f}"
        print(f"{row.tokens:7d} {row.mask:20s} {row.backend:11s} {numbers} {row.error}", flush=True)
        result = {"machine": machine, "matrix_tflops": rate, "rows": [asdict(r) for r in rows]}
        (out / f"kernels_{part}.json").write_text(json.dumps(result, indent=1) + "\n")
        (out / f"kernels_{part}.md").write_text(markdown(rows, rate, machine))
        if time.perf_counter() - began > budget_s:
            print(f"the budget of {budget_s:.0f} s is used up", flush=True)
            break
    return rows


def main(part: str = "first") -> None:
    """Command line; `part` is the default of --part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/kernels"))
    parser.add_argument("--part", choices=(*PARTS, "all"), default=part)
    parser.add_argument("--budget-s", type=float, default=215.0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int)
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device: --device cpu --tokens 512 tries the script out")
    run(given.part, given.out, budget_s=given.budget_s, device=given.device, tokens=given.tokens)


if __name__ == "__main__":
    main()
