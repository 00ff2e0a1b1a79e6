"""Wall time of a gated delta rule layer over a slow link: states travel, or rows are gathered, or rows trade heads.

    python -m cpattn.launch.benchmarks.mixer_link [--mbit 100 1000] [--out FILE.json]     # root: network namespaces

Two hosts (network namespaces), one CPU rank on each, one sequence of fp32 rows in contiguous halves. The layer projects
rows of 1024 to q and k of 4 heads of 128, v, decay and beta of 8 heads, runs the recurrence and projects back; forward
and backward. Three ways, all with cpattn's recurrence between:

- states: `cpattn.mixers.linear_attention`; one map of a fragment travels, and its gradient back.
- all-gather: the layer's input is gathered and every rank computes the whole sequence, keeping its own rows.
- all-to-all: each rank projects its rows and trades rows for heads, before and after the recurrence.

Wall time is that of the slowest rank, median over repeats; bytes are those that the busiest rank receives in a step.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

import cpattn
from cpattn.keys.key import AttnKey
from cpattn.launch.benchmarks.decode import count_bytes
from cpattn.launch.benchmarks.hosts import require_namespaces, run_on_hosts, two_hosts
from cpattn.launch.torchrun import die_with_parent, exit_on_sigterm, num_cores
from cpattn.mixers import linear_attention

MODULE = "cpattn.launch.benchmarks.mixer_link"
HIDDEN, KEY_HEADS, HEADS, DIM = 1024, 4, 8, 128
WAYS = ("states", "all-gather", "all-to-all")


class Layer(NamedTuple):
    """Weights of the layer, the same on all ranks. inward: [HIDDEN, widths of q, k, v, decay, beta]."""

    inward: Tensor
    outward: Tensor

    @classmethod
    def random(cls) -> Layer:
        """Of a fixed seed."""
        generator = torch.Generator().manual_seed(0)
        width = (2 * KEY_HEADS + HEADS) * DIM + 2 * HEADS
        shapes = (HIDDEN, width), (HEADS * DIM, HIDDEN)
        return cls(*(torch.randn(s, generator=generator).div_(s[0] ** 0.5).requires_grad_() for s in shapes))

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """q, k [T, KEY_HEADS, DIM], v [T, HEADS, DIM], decay and beta [T, HEADS]."""
        widths = [KEY_HEADS * DIM, KEY_HEADS * DIM, HEADS * DIM, HEADS, HEADS]
        q, k, v, decay, beta = (x @ self.inward).split(widths, dim=1)
        q, k = (F.normalize(rows.unflatten(1, (-1, DIM)), dim=-1) for rows in (q, k))
        return q, k, v.unflatten(1, (-1, DIM)), -F.softplus(decay), beta.sigmoid()


def mix(rows: tuple[Tensor, ...], key: AttnKey) -> Tensor:
    """The recurrence over projected rows."""
    q, k, v, decay, beta = rows
    return linear_attention(q, k, v, key, decay=decay, beta_TH=beta)


def by_states(x: Tensor, layer: Layer, key: AttnKey, alone: AttnKey) -> Tensor:
    return mix(layer.project(x), key).flatten(1) @ layer.outward


def by_gathering(x: Tensor, layer: Layer, key: AttnKey, alone: AttnKey) -> Tensor:
    out = mix(layer.project(cpattn.undispatch(x, key)), alone).flatten(1) @ layer.outward
    return cpattn.dispatch(out, key)


def by_trading(x: Tensor, layer: Layer, key: AttnKey, alone: AttnKey) -> Tensor:
    size = key.cp_size
    parts = [rows.unflatten(1, (size, -1)).transpose(0, 1).flatten(2) for rows in layer.project(x)]
    mine = _Trade.apply(torch.cat(parts, dim=2)).flatten(0, 1)  # all rows, of this rank's heads
    q, k, v, decay, beta = mine.split([part.shape[2] for part in parts], dim=1)
    q, k, v = (rows.unflatten(1, (-1, DIM)) for rows in (q, k, v))
    out = mix((q, k, v, decay, beta), alone).flatten(1)
    home = _Trade.apply(out.unflatten(0, (size, -1)))  # this rank's rows, of the heads of each rank
    return home.transpose(0, 1).flatten(1) @ layer.outward


class _Trade(torch.autograd.Function):
    """All-to-all of equal parts [ranks, rows, width]; its backward is the same the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(out, x.contiguous())
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _Trade.forward(ctx, grad)


RUNS: dict[str, Callable[[Tensor, Layer, AttnKey, AttnKey], Tensor]] = {
    "states": by_states,
    "all-gather": by_gathering,
    "all-to-all": by_trading,
}


def worker(path: Path, tokens: int, repeats: int) -> None:
    """One rank: every way, with its time, its bytes and how far it is from the first."""
    die_with_parent()
    dist.init_process_group("gloo")
    received: Counter[str] = Counter()
    count_bytes(received)
    heads: dict[str, Any] = {"num_heads_q": HEADS, "num_heads_kv": HEADS, "head_dim": DIM}
    spec = cpattn.AttnMaskSpec.causal(tokens)
    key = cpattn.make_key(spec, cp_group=dist.group.WORLD, layout="contiguous", **heads)
    alone, layer = cpattn.make_key(spec, **heads), Layer.random()
    whole = torch.randn(2, tokens, HIDDEN, generator=torch.Generator().manual_seed(1))
    x, dout = (cpattn.dispatch(rows, key).requires_grad_(n == 0) for n, rows in enumerate(whole))
    result: dict[str, Any] = {}
    truth: list[Tensor] = []
    for way in WAYS:
        seconds = []
        for _ in range(1 + repeats):
            received.clear()
            dist.barrier()
            start = time.perf_counter()
            out = RUNS[way](x, layer, key, alone)
            (dx,) = torch.autograd.grad(out, [x], dout, retain_graph=False)
            took = torch.tensor([time.perf_counter() - start, float(sum(received.values()))])
            dist.all_reduce(took, dist.ReduceOp.MAX)
            seconds.append(took.tolist())
        truth = truth or [out.detach(), dx]
        error = max(float((a - b).norm() / b.norm()) for a, b in zip((out.detach(), dx), truth, strict=True))
        assert error < 1e-4, f"{way} is off by {error}"
        walls = [wall for wall, _ in seconds[1:]]
        result[way] = {"wall_s": statistics.median(walls), "walls_s": walls, "bytes": int(seconds[-1][1])}
    if dist.get_rank() == 0:
        path.write_text(json.dumps(result))
    dist.destroy_process_group()


def table(rate: str, ways: dict[str, Any]) -> str:
    """One rate's rows as Markdown."""
    ours = ways["states"]["wall_s"]
    rows = [
        f"| {rate} | {way} | {told['bytes'] / 2**20:.2f} | {told['wall_s']:.2f} | {told['wall_s'] / ours:.2f} |"
        for way, told in ways.items()
    ]
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mbit", type=float, nargs="+", default=[100, 1000], help="rates of the link")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON; a Markdown table goes beside it")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        worker(options.worker, options.tokens, options.repeats)
        return
    require_namespaces()
    exit_on_sigterm()  # the namespaces go, too
    measured: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        for mbit in options.mbit:
            with two_hosts(mbit):
                arguments = ["--tokens", str(options.tokens), "--repeats", str(options.repeats)]
                run_on_hosts(MODULE, ["--worker", str(path), *arguments], num_ranks=2)
            measured[f"{mbit:g} Mbit/s"] = json.loads(path.read_text())
            print(table(f"{mbit:g} Mbit/s", measured[f"{mbit:g} Mbit/s"]), flush=True)
    if options.out is not None:
        _write(options.out, measured, options.tokens)


def _write(out: Path, measured: dict[str, Any], tokens: int) -> None:
    command, date = shlex.join(["python", "-m", MODULE, *sys.argv[1:]]), str(datetime.date.today())
    machine = f"{platform.machine()}, {num_cores()} cores shared with other work (load {os.getloadavg()[0]:.1f})"
    about = {"command": command, "date": date, "torch": torch.__version__, "machine": machine, "tokens": tokens}
    out.write_text(json.dumps({**about, "links": measured}, indent=1) + "\n")
    rows = "\n".join(table(rate, ways) for rate, ways in measured.items())
    out.with_suffix(".md").write_text(
        f"# A gated delta rule layer over a slow link\n\n`{command}`, {date}, torch {torch.__version__}, {machine}, "
        f"gloo, one rank on each of two hosts. {tokens} tokens, forward and backward; see the command's `--help`.\n\n"
        f"| link | way | MiB received, busiest rank | wall, s | wall / states |\n|---|---|---|---|---|\n{rows}\n"
    )


if __name__ == "__main__":
    main()
