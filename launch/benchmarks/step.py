"""Forward and backward of the attention layer on CPU ranks: ours, reference schedules and installed peers.

    python -m cpattn.launch.benchmarks.step --ranks 2 4 --out FILE.json           # loopback
    python -m cpattn.launch.benchmarks.step --ranks 2 --hosts --out FILE.json     # two hosts, a link as slow as compute

8 heads of 64, one thread for each rank. Every schedule is checked first, against the whole layer on one rank in fp32.
Then all take turns, `--repeats` times in changing order; figures are medians of the repeats.

- CPU: CPU seconds of the busiest rank, times the ranks, over those of the local kernel on the whole layer (torch's own
  kernel for causal masks) run in the same turn. 1.00 is a rank that does its share and nothing else.
- wall: seconds of the slowest rank over those of ours in the same turn.
- memory: most MiB that the allocator gave out at once during a step, beyond q, k, v and dout, on the fullest rank;
  stated: what `key.memory` said.
- exposed (with --hosts): the share of a step's wall time that goes when exchanges bring nothing and take no time.

With --hosts the ranks are spread over two network namespaces (root needed), joined by a link on which gathering all
keys and values takes as long as the forward kernel of the all-gather schedule.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import random
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

from cpattn.launch.benchmarks import schedules as sched
from cpattn.launch.benchmarks.hosts import require_namespaces, run_on_hosts, two_hosts
from cpattn.launch.benchmarks.workloads import document_lengths
from cpattn.launch.torchrun import exit_on_sigterm, num_cores, run_on_ranks
from cpattn.masks.spec import AttnMaskSpec
from cpattn.solver import place_zigzag

HEADS, HEAD_DIM = 8, 64
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Largest relative error by norm that a schedule may have against fp32 on one rank.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
MODULE = "cpattn.launch.benchmarks.step"


class Case(NamedTuple):
    """A mask; lengths: of its documents, None for one that is not packed."""

    spec: AttnMaskSpec
    lengths: list[int] | None = None


def _packed(tokens: int) -> Case:
    lengths = document_lengths(tokens)
    return Case(AttnMaskSpec.varlen(lengths), lengths)


KINDS: dict[str, Callable[[int], Case]] = {
    "causal": lambda tokens: Case(AttnMaskSpec.causal(tokens)),
    "packed": _packed,
    "window": lambda tokens: Case(AttnMaskSpec.sliding_window(tokens, 1024)),
}
DEFAULT_CASES = ("causal:8192", "causal:16384", "packed:32768", "window:32768")


def make_case(name: str) -> Case:
    """The case of a name such as causal:8192."""
    kind, _, tokens = name.partition(":")
    if kind not in KINDS or not tokens.isdigit():
        raise SystemExit(f"case {name!r}: give a kind ({', '.join(KINDS)}) and tokens, for example causal:8192")
    return KINDS[kind](int(tokens))


def make_schedules(name: str, case: Case, dtype: str) -> tuple[list[sched.Schedule], list[str]]:
    """The local kernel, ours, and what else can run here; and notes on what cannot."""
    size = dist.get_world_size()
    causal = name.startswith("causal")
    if case.lengths is None:
        placement = place_zigzag(case.spec.total_seqlen, size)
    else:
        placement = sched.place_zigzag_by_document(case.lengths, size)
    found: list[sched.Schedule] = [
        sched.TorchKernel(case.spec) if causal else sched.LocalKernel(case.spec),
        sched.Ours("ours", case.spec, (HEADS, HEAD_DIM)),
        sched.AllGather(case.spec, placement),
        sched.Ulysses(case.spec),
        sched.Ring(case.spec, placement),
    ]
    notes = []
    if causal:
        found.append(sched.Ours("ours, identify off", case.spec, (HEADS, HEAD_DIM), identify=False))
        found.append(sched.Ours("ours, keep_kv", case.spec, (HEADS, HEAD_DIM), keep_kv=True))
        found.append(sched.Ours("ours, head_degree auto", case.spec, (HEADS, HEAD_DIM), head_degree="auto"))
        found.append(sched.TorchRing(case.spec))
        peers: dict[str, Callable[[AttnMaskSpec], sched.Schedule]] = {
            "para_attn": sched.ParaAttn,
            "ring_flash_attn": sched.RingFlashAttn,
        }
        for package, peer in peers.items():
            if package == "ring_flash_attn" and dtype != "bfloat16":
                continue
            if sched.is_installed(package):
                found.append(peer(case.spec))
            else:
                notes.append(f"{package} is not installed")
    return found, notes


def worker(name: str, dtype: str, repeats: int, only: list[str], out: Path, dry: bool) -> None:
    """One rank: check every schedule, or `only` some, then time them in turns. Rank 0 writes the result."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    size, rank = dist.get_world_size(), dist.get_rank()
    case = make_case(name)
    everything, notes = make_schedules(name, case, dtype)
    if only:
        unknown = set(only) - {s.name for s in everything}
        if unknown:
            raise ValueError(f"schedules {sorted(unknown)}: choose from {[s.name for s in everything[1:]]}")
        everything = everything[:1] + [s for s in everything[1:] if s.name in only]
    generator = torch.Generator().manual_seed(0)
    shape = (case.spec.total_seqlen, HEADS, HEAD_DIM)
    whole = [torch.randn(shape, generator=generator).to(DTYPES[dtype]) for _ in range(4)]
    local = {s.name: [t[torch.from_numpy(s.rows)] for t in whole] for s in everything}
    truth = sched.LocalKernel(case.spec).run(*(t.float() for t in whole))
    errors = {s.name: relative_error(s.run(*local[s.name]), truth, s) for s in everything}
    del truth, whole
    good = [s for s in everything if errors[s.name] <= TOLERANCE[dtype]]
    notes += [f"{s.name} is wrong by {errors[s.name]:.1e} and was not timed" for s in everything if s not in good]
    memory = {s.name: _across_ranks(_peak_bytes(s, local[s.name])) for s in good}
    stated = {s.name: _across_ranks(s.key.memory(DTYPES[dtype], "cpu").step) for s in good if isinstance(s, sched.Ours)}
    modes = ("real", "dry") if dry else ("real",)
    times: dict[tuple[str, str], list[tuple[list[float], list[float]]]] = {}
    for turn in range(repeats):
        for schedule in random.Random(turn).sample(good, len(good)):  # the same order on all ranks
            for mode in modes if schedule is not everything[0] else ("real",):
                seconds = _timed(schedule, local[schedule.name], everything[0], mode)
                times.setdefault((schedule.name, mode), []).append(seconds)
    if rank == 0:
        rows = [_row(s.name, everything[0].name, errors[s.name], times, size) for s in good]
        for row in rows:
            row["peak_mib"] = memory[row["schedule"]] / 2**20
            if row["schedule"] in stated:
                row["stated_mib"] = stated[row["schedule"]] / 2**20
        result = {"case": name, "dtype": dtype, "ranks": size, "repeats": repeats, "rows": rows, "notes": notes}
        out.write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def relative_error(results: sched.Results, truth: sched.Results, schedule: sched.Schedule) -> float:
    """The largest relative error, by norm over all ranks' rows, of the four results."""
    rows = torch.from_numpy(schedule.rows)
    pairs = [(mine.float(), theirs[rows]) for mine, theirs in zip(results, truth, strict=True)]
    sums = torch.stack([torch.stack([(a - b).square().sum(), b.square().sum()]) for a, b in pairs])
    dist.all_reduce(sums)
    return float((sums[:, 0] / sums[:, 1]).sqrt().max())


def allocated_at_peak(run: Callable[[], Any], repeats: int = 1) -> int:
    """Most bytes that torch's CPU allocator had given out at once since the run began.

    repeats: the least of so many runs counts. More than one is for code that exchanges by other means than
        `all_to_all_single`: what a thread of the exchange frees, the profile does not see.
    """
    with settled_exchanges():
        run()  # fills caches
        return min(_profiled_peak(run) for _ in range(repeats))


def _profiled_peak(run: Callable[[], Any]) -> int:
    with torch_profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events = recorded.profiler.kineto_results.events()
    live = peak = 0
    for _, num_bytes in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        live += num_bytes
        peak = max(peak, live)
    return peak


@contextlib.contextmanager
def settled_exchanges() -> Iterator[None]:
    """A wait for an all-to-all returns when its thread has let go of the buffers, so that this thread frees them."""
    start = dist.all_to_all_single

    def settled(received: torch.Tensor, send: torch.Tensor, *args: Any, **options: Any) -> Any:
        own = (received.detach(), send.detach())
        work = start(*own, *args, **options)
        return None if work is None else _Settled(work, own)

    with mock.patch.object(dist, "all_to_all_single", settled):
        yield


class _Settled:
    """An exchange of tensors that nobody else holds."""

    def __init__(self, work: dist.Work, own: tuple[torch.Tensor, ...]) -> None:
        self._work: dist.Work | None = work
        self._own = own

    def wait(self, *_: Any) -> bool:
        if self._work is not None:
            self._work.wait()
            self._work = None  # it holds them, too
            while any(t._use_count() > 1 for t in self._own):  # type: ignore[attr-defined]
                time.sleep(1e-5)
            self._own = ()
        return True


def _peak_bytes(schedule: sched.Schedule, tensors: list[torch.Tensor]) -> int:
    return allocated_at_peak(lambda: schedule.run(*tensors), repeats=3)


def _across_ranks(number: int) -> int:
    """The largest number of any rank."""
    largest = torch.tensor(number)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def _timed(
    schedule: sched.Schedule, tensors: list[torch.Tensor], kernel: sched.Schedule, mode: str
) -> tuple[list[float], list[float]]:
    """Wall and CPU seconds of every rank for one step."""
    # The local kernel has a core on each rank that runs it; ranks beyond the cores wait.
    idle = schedule is kernel and dist.get_rank() >= num_cores()
    dist.barrier()
    with without_transfers() if mode == "dry" else contextlib.nullcontext():
        wall, cpu = time.perf_counter(), time.process_time()
        if not idle:
            schedule.run(*tensors)
        mine = torch.tensor([time.perf_counter() - wall, time.process_time() - cpu, float(not idle)])
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    ran = [t.tolist() for t in everyone if t[2]]
    return [t[0] for t in ran], [t[1] for t in ran]


class _Done:
    """An exchange that is over."""

    def wait(self, *_: Any) -> bool:
        return True


@contextlib.contextmanager
def without_transfers() -> Iterator[None]:
    """Exchanges of this process bring zeros and take no time."""

    def nothing(received: torch.Tensor, *_: Any, **__: Any) -> _Done:
        received.zero_()
        return _Done()

    with mock.patch.object(dist, "all_to_all_single", nothing):
        yield


def _row(
    name: str,
    kernel: str,
    error: float,
    times: dict[tuple[str, str], list[tuple[list[float], list[float]]]],
    size: int,
) -> dict[str, Any]:
    """Medians over the turns; ratios are taken within a turn."""
    mine, ours, local = (times[n, "real"] for n in (name, "ours", kernel))
    share = [statistics.mean(cpu) / size for _, cpu in local]
    walls = [max(wall) for wall, _ in mine]
    row: dict[str, Any] = {
        "schedule": name,
        "error": error,
        "wall_ms": 1e3 * statistics.median(walls),
        "wall_over_ours": statistics.median(a / max(b[0]) for a, b in zip(walls, ours, strict=True)),
        "cpu_busiest": statistics.median(max(cpu) / s for (_, cpu), s in zip(mine, share, strict=True)),
        "cpu_mean": statistics.median(statistics.mean(cpu) / s for (_, cpu), s in zip(mine, share, strict=True)),
        "all_wall_ms": [round(1e3 * w, 1) for w in walls],
    }
    if (name, "dry") in times:
        dry = [max(wall) for wall, _ in times[name, "dry"]]
        row["exposed"] = statistics.median((w - d) / w for w, d in zip(walls, dry, strict=True))
        row["dry_ms"] = 1e3 * statistics.median(dry)
    return row


def table(result: dict[str, Any]) -> str:
    """A result as Markdown."""
    link = f", link {result['link_mbit']:.0f} Mbit/s" if result.get("link_mbit") else ""
    head = f"{result['case']}, {result['dtype']}, {result['ranks']} ranks{link}"
    columns = ("schedule", "CPU, busiest", "CPU, mean", "wall, ms", "wall / ours", "exposed", "memory, MiB", "error")
    lines = [f"\n**{head}**\n", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in result["rows"]:
        exposed = f"{row['exposed']:.1%}" if "exposed" in row else ""
        stated = f" (stated {row['stated_mib']:.0f})" if "stated_mib" in row else ""
        lines.append(
            f"| {row['schedule']} | {row['cpu_busiest']:.3f} | {row['cpu_mean']:.3f} | {row['wall_ms']:.0f} | "
            f"{row['wall_over_ours']:.3f} | {exposed} | {row['peak_mib']:.0f}{stated} | {row['error']:.1e} |"
        )
    return "\n".join([*lines, *(f"\n{note}." for note in result["notes"])])


def link_rate(result: dict[str, Any], case: Case) -> float:
    """Mbit/s at which a rank gathers the others' keys and values in the forward part of the all-gather's compute."""
    size = result["ranks"]
    row = next(r for r in result["rows"] if r["schedule"] == "all-gather")
    # Backward of the flash kernel is 2.5 times the FLOP of forward.
    forward = row["dry_ms"] / 1e3 / 3.5
    itemsize = DTYPES[result["dtype"]].itemsize
    across = case.spec.total_seqlen / 2 * 2 * HEADS * HEAD_DIM * itemsize * (size / 2)
    return across * 8 / forward / 1e6


def _run(options: argparse.Namespace, ranks: int, name: str, dtype: str, folder: Path) -> dict[str, Any]:
    """One case on some ranks."""

    def measure(repeats: int, mbit: float | None) -> dict[str, Any]:
        out = folder / "result.json"
        arguments = ["--worker", str(out), "--cases", name, "--dtypes", dtype, "--repeats", str(repeats)]
        if options.schedules:
            arguments += ["--schedules", *options.schedules, *(["all-gather"] if options.hosts else [])]
        if options.hosts:
            with two_hosts(mbit):
                run_on_hosts(MODULE, [*arguments, "--dry"], num_ranks=ranks)
        else:
            run_on_ranks(MODULE, arguments, num_ranks=ranks)
        result: dict[str, Any] = json.loads(out.read_text())
        return result

    if not options.hosts:
        return measure(options.repeats, None)
    rate = options.link_mbit or link_rate(measure(2, None), make_case(name))
    return {**measure(options.repeats, rate), "link_mbit": rate}


def main() -> None:
    """Print tables and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--cases", nargs="+", default=list(DEFAULT_CASES), help="kind:tokens")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--schedules", nargs="+", default=[], help="beside the kernel; default: all")
    parser.add_argument("--hosts", action="store_true", help="two network namespaces and a slow link (root)")
    parser.add_argument("--link-mbit", type=float, help="rate of the link; default: gathering takes as long as compute")
    parser.add_argument("--out", type=Path, help="JSON; a Markdown table goes beside it")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--dry", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.cases[0], options.dtypes[0], options.repeats, options.schedules, options.worker, options.dry)
        return
    for name in options.cases:
        make_case(name)
    if options.hosts:
        require_namespaces()
        exit_on_sigterm()  # the namespaces go, too
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for ranks in options.ranks:
            for name in options.cases:
                for dtype in options.dtypes:
                    results.append(_run(options, ranks, name, dtype, Path(folder)))
                    print(table(results[-1]), flush=True)
                    if options.out:
                        _write(options.out, results)


def _write(out: Path, results: list[dict[str, Any]]) -> None:
    command = shlex.join(["python", "-m", MODULE, *sys.argv[1:]])
    machine: dict[str, Any] = {
        "command": command,
        "date": str(datetime.date.today()),
        "torch": torch.__version__,
        "cpu": platform.processor() or platform.machine(),
        "cores": num_cores(),
        "load": os.getloadavg(),
    }
    out.write_text(json.dumps({**machine, "results": results}, indent=1) + "\n")
    about = (
        f"# The attention layer, forward and backward, on CPU ranks\n\n`{command}`, {machine['date']}, torch "
        f"{torch.__version__}, {machine['cpu']}, {num_cores()} cores shared with other work (load "
        f"{machine['load'][0]:.1f}), gloo, one thread for each rank. Columns: see the command's `--help`.\n"
    )
    out.with_suffix(".md").write_text(about + "\n".join(table(r) for r in results) + "\n")


if __name__ == "__main__":
    main()
