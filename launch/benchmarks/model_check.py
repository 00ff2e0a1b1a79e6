"""Is a step as long as the cost model says? Real ranks and exchanges over links of known rate, kernels of known time.

    python -m cpattn.launch.benchmarks.model_check [--out launch/benchmarks/results]       # Linux, root

2, 4 and 8 ranks, each in a network namespace of its own, on links that are shaped in both directions; also as two nodes
with slower links between them. The kernel of this run computes nothing and sleeps for as long as the model's kernel
would take: so ranks that share two cores wait as ranks with a device each would, and everything else is what always
runs: the plan, packing, exchanges over gloo, waiting, merging. Links and copies are measured first in the same
processes; a step is forward and backward, the slowest rank's time, the median of `--repeats`.

Reference schedules (ring, zigzag ring, all-gather, Ulysses) run over the same kernel and links.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import cpattn
from cpattn.backends import register_backend
from cpattn.backends.base import Attending, KeyRows, Problem, Returning, Scoring
from cpattn.collectives import RowRoutes
from cpattn.collectives.exchange import exchange_rows
from cpattn.launch.benchmarks import schedules as sched
from cpattn.launch.benchmarks.hosts import require_namespaces
from cpattn.launch.benchmarks.switch import cluster, run_on_cluster
from cpattn.launch.benchmarks.workloads import document_lengths
from cpattn.launch.calibrate import measure_copy_rate
from cpattn.launch.predict import predict
from cpattn.masks.spec import AttnMaskSpec, lower_mask
from cpattn.solver import Hardware, Heads, Link, SliceTable, place_contiguous, place_zigzag
from cpattn.solver.report import compare

MODULE = "cpattn.launch.benchmarks.model_check"
HEADS = Heads(8, 8, 16, 16, itemsize=4)
# Enough that a step takes a second, beside what Python takes of it where 8 ranks share two cores.
TOKENS_PER_RANK = {"causal": 2048, "packed": 8192, "window": 8192}
# Mbit/s inside nodes and between them; a kernel on one causal sequence then takes about as long as its exchanges.
WITHIN_MBIT, ACROSS_MBIT = 100.0, 40.0
DEVICE = Hardware(
    name="paced",
    forward_flops=2e10,
    backward_flops=1.8e10,
    slice_s=2e-4,
    launch_s=2e-3,
    copy_bytes_per_s=1e9,
    within=Link(0.0, WITHIN_MBIT * 1e6 / 8),
    across=Link(0.0, ACROSS_MBIT * 1e6 / 8),
    ranks_per_node=1,
    hops_by_host=True,
)
NEAR = 0.15
# As the ranks of a plan exchange rows.
_P2P = RowRoutes(torch.zeros(0, dtype=torch.int64), (), (), True, "p2p")
# Ranks, and ranks of a node.
CLUSTERS = ((2, 2), (4, 4), (8, 8), (4, 2), (8, 4))

MASKS: dict[str, Callable[[int], AttnMaskSpec]] = {
    "causal": AttnMaskSpec.causal,
    "packed": lambda total: AttnMaskSpec.varlen(document_lengths(total, mean=2048)),
    "window": lambda total: AttnMaskSpec.sliding_window(total, 1024),
}
WAYS: dict[str, dict[str, Any]] = {
    "auto": {},
    "keys, 1 stage": {"schedule": "keys", "num_stages": 1},
    "keys, 4 stages": {"schedule": "keys", "num_stages": 4},
    "tiles": {"schedule": "tiles"},
    "contiguous": {"layout": "contiguous", "schedule": "keys"},
    "zigzag": {"layout": "zigzag", "schedule": "keys"},
    "head_degree 2": {"head_degree": 2},
    "one level": {"ranks_per_node": None},
}


class PacedBackend:
    """A kernel that takes as long as `DEVICE`'s and computes nothing."""

    name, kernel = "paced", "sleeps for the model's time"

    def refusal(self, problem: Problem) -> str | None:
        return None

    def prepare(self, slices: SliceTable, num_queries: int, num_keys: int, device: torch.device) -> SliceTable:
        return slices

    def writes_once(self, work: SliceTable) -> bool:
        return False

    def forward(
        self, queries: Attending, keys: KeyRows, work: SliceTable, scoring: Scoring, *, fresh: bool = False
    ) -> None:
        self._sleep(work, queries.q, backward=False)

    def backward(self, queries: Returning, keys: KeyRows, work: SliceTable, scoring: Scoring, dkeys: KeyRows) -> None:
        self._sleep(work, queries.q, backward=True)

    def _sleep(self, work: SliceTable, q: Tensor, *, backward: bool) -> None:
        heads = replace(HEADS, num_q=q.shape[1])
        area, count = np.array([float(work.area())]), np.array([float(len(work))])
        time.sleep(float(DEVICE.kernel_seconds(area, count, heads, backward=backward)[0]))


class Outcome(NamedTuple):
    """Seconds of a step, by the model and by the clock."""

    ranks: int
    ranks_per_node: int
    mask: str
    way: str
    predicted: float
    measured: float


def rank_main(ranks_per_node: int, repeats: int, masks: list[str], out: Path) -> None:
    """One rank: measure links, then run everything; rank 0 writes what came out."""
    torch.set_num_threads(1)
    register_backend(PacedBackend())
    sched.all_to_all = _exchange
    dist.init_process_group("gloo")
    device = _measured_device(ranks_per_node)
    outcomes = []
    for name in masks:
        spec = MASKS[name](TOKENS_PER_RANK[name] * dist.get_world_size())
        runs = _ours(name, spec, device)
        if name == "causal":
            runs |= _references(spec, device)
        for way, (run, seconds) in runs.items():
            measured = _step_seconds(run, repeats)
            outcomes.append(Outcome(dist.get_world_size(), ranks_per_node, name, way, seconds, measured))
            if dist.get_rank() == 0:
                print(_row(outcomes[-1]), flush=True)
    if dist.get_rank() == 0:
        out.write_text(json.dumps({"device": json.loads(device.to_json()), "steps": [o._asdict() for o in outcomes]}))
    dist.destroy_process_group()


def _measured_device(ranks_per_node: int) -> Hardware:
    """The paced device with the links and copies of these processes, rank 0's on all."""
    rank, size = dist.get_rank(), dist.get_world_size()
    node = [other for other in range(size) if other // ranks_per_node == rank // ranks_per_node]
    within = _measured_link(node)
    across = _measured_link(list(range(rank % ranks_per_node, size, ranks_per_node))) if len(node) < size else within
    rate = measure_copy_rate(torch.device("cpu"))
    device = replace(DEVICE, within=within, across=across, copy_bytes_per_s=rate, ranks_per_node=ranks_per_node)
    text = [device.to_json()]
    dist.broadcast_object_list(text, src=0)
    return Hardware.from_json(text[0])


def _measured_link(ranks: list[int]) -> Link:
    """Latency and rate of this rank's link from exchanges of two sizes with all of them, all at once."""
    points = []
    for nbytes in (1 << 10, 1 << 21):
        splits = [nbytes // (len(ranks) - 1) if other in ranks else 0 for other in range(dist.get_world_size())]
        splits[dist.get_rank()] = 0
        send, received = (torch.zeros(sum(splits), 1, dtype=torch.uint8) for _ in range(2))
        times = []
        for _ in range(4):
            dist.barrier()
            started = time.perf_counter()
            _exchange(received, send, splits, splits).wait()
            times.append(time.perf_counter() - started)
        points.append((sum(splits), min(times[1:])))
    (few, short), (many, long) = points
    return Link(short, (many - few) / (long - short))


def _exchange(received: Tensor, send: Tensor, receives: list[int], sends: list[int]) -> Any:
    """Rows with uneven splits from rank to rank, receives first: else gloo often sends one way at a time."""
    return exchange_rows(received, send, receives, sends, _P2P, dist.group.WORLD)


Run = tuple[Callable[[], Any], float]


def _ours(mask: str, spec: AttnMaskSpec, device: Hardware) -> dict[str, Run]:
    """Every way to plan that there is for this group, with the model's seconds."""
    size, runs = dist.get_world_size(), {}
    two_nodes = device.ranks_per_node < size
    shape: dict[str, Any] = {"num_heads_q": HEADS.num_q, "num_heads_kv": HEADS.num_kv, "head_dim": HEADS.head_dim}
    for way, options in WAYS.items():
        if (way == "tiles" and size == 2) or (way == "one level" and not two_nodes):
            continue
        nodes = {"ranks_per_node": device.ranks_per_node if two_nodes else None}
        key = cpattn.make_key(
            spec, **shape, cp_group=dist.group.WORLD, hardware=device, backend="paced", transport="p2p", identify=False,
            **{**nodes, **options},
        )  # fmt: skip
        rows = len(cpattn.dispatch(torch.arange(spec.total_seqlen), key))
        runs[way] = (_attention_step(key, rows), predict(key.plan, key.options.head_degree, device, HEADS).seconds)
    return runs


def _attention_step(key: cpattn.AttnKey, rows: int) -> Callable[[], Any]:
    q, k, v = (x.requires_grad_() for x in _rows(rows, 3))
    (dout,) = _rows(rows, 1)

    def step() -> None:
        torch.autograd.grad(cpattn.attention(q, k, v, key), (q, k, v), dout)

    return step


def _rows(count: int, tensors: int) -> list[Tensor]:
    return [torch.zeros(count, HEADS.num_q, HEADS.head_dim) for _ in range(tensors)]


def _references(spec: AttnMaskSpec, device: Hardware) -> dict[str, Run]:
    """What one would write by hand, over the paced kernel."""
    size, total = dist.get_world_size(), spec.total_seqlen
    contiguous, zigzag = place_contiguous(total, size), place_zigzag(total, size)
    with mock.patch.object(sched, "CpuSdpaBackend", PacedBackend):
        made: dict[str, sched.Schedule] = {
            "ring": sched.Ring(spec, contiguous),
            "zigzag ring": sched.Ring(spec, zigzag),
            "all-gather": sched.AllGather(spec, contiguous, again=True),
            "Ulysses": sched.Ulysses(spec),
        }
    model = {rival.name: rival.seconds for rival in compare(lower_mask(spec), total, size, HEADS, device, 512)}
    return {
        name: (partial(schedule.run, *_rows(len(schedule.rows), 4)), model[name]) for name, schedule in made.items()
    }


def _step_seconds(run: Callable[[], Any], repeats: int) -> float:
    """Median over repeats of the slowest rank's time; once to warm up."""
    times = []
    for _ in range(repeats + 1):
        dist.barrier()
        started = time.perf_counter()
        run()
        taken = torch.tensor(time.perf_counter() - started)
        dist.all_reduce(taken, dist.ReduceOp.MAX)
        times.append(float(taken))
    return statistics.median(times[1:])


def _row(one: Outcome) -> str:
    nodes = "one level" if one.ranks_per_node == one.ranks else f"nodes of {one.ranks_per_node}"
    return (
        f"| {one.ranks}, {nodes} | {one.mask} | {one.way} | {1e3 * one.predicted:.0f} | {1e3 * one.measured:.0f} | "
        f"{one.measured / one.predicted:.2f} |"
    )


def table_of(outcomes: list[Outcome]) -> list[str]:
    """Every step, and how far the model is off."""
    off = np.array([one.measured / one.predicted for one in outcomes])
    near = int((np.abs(off - 1) <= NEAR).sum())
    return [
        f"{near} of {len(off)} within {NEAR:.0%}; measured over predicted from {off.min():.2f} to {off.max():.2f}, "
        f"median {np.median(off):.2f}.",
        "",
        "| ranks | mask | schedule | predicted, ms | measured, ms | measured / predicted |",
        "|---|---|---|---|---|---|",
        *map(_row, outcomes),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--masks", nargs="+", default=list(MASKS), choices=list(MASKS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="folder in which to store the table and its JSON")
    parser.add_argument("--node", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.node:
        rank_main(options.node, options.repeats, options.masks, options.result)
        return
    require_namespaces()
    outcomes, devices = [], []
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        for size, per_node in CLUSTERS:
            if size not in options.ranks:
                continue
            args = ["--node", str(per_node), "--repeats", str(options.repeats), "--result", str(result)]
            with cluster(size, per_node, WITHIN_MBIT, ACROSS_MBIT):
                run_on_cluster(MODULE, [*args, "--masks", *options.masks], num_ranks=size, ranks_per_node=per_node)
            found = json.loads(result.read_text())
            outcomes += [Outcome(**one) for one in found["steps"]]
            devices.append(found["device"])
    lines = table_of(outcomes)
    print("\n".join(lines))
    if options.out:
        today = time.strftime("%Y-%m-%d")
        heading = [
            f"# The cost model against real runs, {today}",
            "",
            f"`python -m {MODULE}`, torch {torch.__version__}, {platform.machine()}, gloo; links of "
            f"{WITHIN_MBIT:.0f} Mbit/s and, between nodes, {ACROSS_MBIT:.0f}; kernels that sleep. Tokens a rank: "
            f"{', '.join(f'{name} {count}' for name, count in TOKENS_PER_RANK.items())}.",
            "",
        ]
        stem = options.out / f"model_check_{today}"
        stem.with_suffix(".md").write_text("\n".join(heading + lines) + "\n")
        rows = [one._asdict() for one in outcomes]
        stem.with_suffix(".json").write_text(json.dumps({"devices": devices, "steps": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
