"""Greedy generation over a sharded cache: tokens equal to one rank's, bytes per token, time per token.

    python -m cpattn.launch.benchmarks.decode --ranks 4 --prompt 8192 --new 256 [--output FILE.md]

Runs the demo's model (random weights, fp32) on one rank and on several, and compares every token. Bytes are counted
where the collectives are called, and stated beside what moving the cache itself would take.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cpattn.launch.demo.model import ModelConfig, Transformer
from cpattn.launch.torchrun import run_on_ranks

CONFIG = ModelConfig()
# The bytes that a rank receives from others, as a share of the output of a collective.
_SHARES = {
    "all_gather_single": lambda size: (size - 1) / size,  # from torch 2.13 on
    "all_gather_into_tensor": lambda size: (size - 1) / size,
    "all_reduce": lambda size: 2 * (size - 1) / size,
    "broadcast": lambda size: 1.0,
}


def count_bytes(received: Counter[str]) -> None:
    """Count what each collective brings to this rank, by its name."""
    size = dist.get_world_size()
    for name, share in _SHARES.items():
        original = getattr(dist, name, None)
        if original is None:
            continue

        def counted(
            tensor: Any, *args: Any, _name: str = name, _share: Any = share, _fn: Any = original, **kw: Any
        ) -> Any:
            received[_name] += int(tensor.numel() * tensor.element_size() * _share(size))
            return _fn(tensor, *args, **kw)

        setattr(dist, name, counted)
    exchange = dist.all_to_all_single

    def counted_exchange(tensor: Any, send: Any, splits: Any = None, *args: Any, **kw: Any) -> Any:
        splits = kw.pop("output_split_sizes", splits)
        own = 1 / size if splits is None else splits[dist.get_rank(kw.get("group"))] / max(sum(splits), 1)
        received["all_to_all_single"] += int(tensor.numel() * tensor.element_size() * (1 - own))
        return exchange(tensor, send, splits, *args, **kw)

    dist.all_to_all_single = counted_exchange  # type: ignore[assignment]


def worker(path: Path, prompt: int, new: int) -> None:
    """One rank: prefill and decode, with the bytes and the time of every step."""
    from cpattn.decoding.generation import generate
    from cpattn.decoding.kv_cache import PagedKVCache

    dist.init_process_group("gloo")
    received: Counter[str] = Counter()
    marks: list[tuple[float, dict[str, int]]] = []
    caches: list[PagedKVCache] = []
    count_bytes(received)
    advance = PagedKVCache.advance

    def marked(self: PagedKVCache, counts: Sequence[int] | None = None) -> Tensor:
        marks.append((time.perf_counter(), dict(received)))
        caches[:] = [self]
        return advance(self, counts)

    PagedKVCache.advance = marked  # type: ignore[method-assign]
    model = Transformer(CONFIG, seed=0)
    tokens = torch.randint(0, 256, (prompt,), generator=torch.Generator().manual_seed(1))
    began = time.perf_counter()
    (out,) = generate(model, [tokens], max_new_tokens=new, cp_group=dist.group.WORLD)
    steps = [b[0] - a[0] for a, b in pairwise(marks)]
    names = marks[-1][1].keys()
    per_token = {n: (marks[-1][1][n] - marks[0][1].get(n, 0)) / max(1, len(marks) - 1) for n in names}
    if dist.get_rank() == 0:
        record = {
            "tokens": out.tolist(),
            "prefill_seconds": marks[0][0] - began,
            "step_seconds": statistics.median(steps),
            "bytes_per_token": {n: b for n, b in per_token.items() if b},
            "stated": caches[0].bytes_per_step(),
            "cache": caches[0].bytes_to_gather_cache(),
        }
        path.write_text(json.dumps(record))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=8192)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.prompt, options.new)
        return
    records = {}
    with tempfile.TemporaryDirectory() as folder:
        for ranks in (1, options.ranks):
            path = Path(folder) / f"{ranks}.json"
            arguments = ["--worker", str(path), "--prompt", str(options.prompt), "--new", str(options.new)]
            run_on_ranks("cpattn.launch.benchmarks.decode", arguments, num_ranks=ranks)
            records[ranks] = json.loads(path.read_text())
    text = report(options, records[1], records[options.ranks])
    print(text)
    if options.output:
        options.output.write_text(text)
    if records[1]["tokens"] != records[options.ranks]["tokens"]:
        sys.exit("tokens differ")


def report(options: argparse.Namespace, one: dict[str, Any], many: dict[str, Any]) -> str:
    """The figures as Markdown."""
    same = sum(a == b for a, b in zip(one["tokens"], many["tokens"], strict=True))
    moved = sum(many["bytes_per_token"].values())
    by_name = ", ".join(f"{name} {count:,.0f}" for name, count in many["bytes_per_token"].items())
    ratio = many["cache"] / max(moved, 1)
    load = "/".join(f"{x:.1f}" for x in os.getloadavg())
    return f"""# Decoding over a sharded cache

`python -m cpattn.launch.benchmarks.decode --ranks {options.ranks} --prompt {options.prompt} --new {options.new}`,
{datetime.date.today()}, torch {torch.__version__}, {platform.processor() or platform.machine()}, {os.cpu_count()}
cores, gloo, load {load}. Model of the demo, random weights, fp32: {CONFIG.num_layers} layers, {CONFIG.num_heads_q}
query and {CONFIG.num_heads_kv} key heads of {CONFIG.head_dim}.

| | 1 rank | {options.ranks} ranks |
|---|---|---|
| tokens equal to one rank's | | {same} of {len(one["tokens"])} |
| prefill, s | {one["prefill_seconds"]:.2f} | {many["prefill_seconds"]:.2f} |
| per token, ms (median) | {1e3 * one["step_seconds"]:.1f} | {1e3 * many["step_seconds"]:.1f} |
| bytes received per rank and token | 0 | {moved:,.0f} ({by_name}) |
| of which attention, as `bytes_per_step` states | 0 | {many["stated"]:,} |
| bytes per rank to gather the cache instead | | {many["cache"]:,} |

Keys never move. Gathering the cache for every token would move {ratio:,.0f} times as many bytes;
gathering it once costs as much as {ratio:,.0f} tokens and needs room for all of it on every rank.
"""


if __name__ == "__main__":
    main()
