"""One group of all ranks, fixed groups, or groups of another size for each batch? Predicted for packed documents.

    python -m cpattn.launch.benchmarks.groups [--ranks 64 256 1024 4096] [--out launch/benchmarks/results]
    python -m cpattn.launch.benchmarks.groups --stored RESULTS.json --plot docs/images/groups.png

Every rank has room for so many tokens, and a step's documents fill 95 % of it. They are shared between the ranks in
three ways, attention inside a group being planned by cpattn in all of them:

- fixed: groups as small as hold the longest document that there may be; longest documents first, each into the group
  with the least work that has room for it.
- powers of two: a document has as many ranks as its tokens and its share of the work ask for, rounded up to a power
  of two; shorter documents fill what is left in such groups, and groups of one rank.
- one group.

A document that fits nowhere is cut (as packing does; the column says how many tokens lost their beginning). The figures
are the simulator's for one layer, both passes, 64 query and 8 key heads of 128 in bf16 on h100, eight ranks to a node:
the ideal is the work of the uncut documents over all ranks at the kernel's rate, and all wait for the slowest group.
"""

from __future__ import annotations

import argparse
import heapq
import json
import platform
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cpattn.launch.benchmarks.solver_board import other_lengths
from cpattn.launch.benchmarks.workloads import document_lengths, plan_on_nodes
from cpattn.masks.spec import AttnMaskSpec, lower_mask
from cpattn.solver import HARDWARE, Heads, simulate, step_time_bound
from cpattn.solver.cost import FloatArray
from cpattn.solver.simulate import traffic_matrix

MACHINE, HEADS = HARDWARE["h100"], Heads(64, 8, 128, 128)
CORPORA = ("lognormal", "long lognormal", "pareto", "two sizes")
FILLED = 0.95
LONGEST = 256 << 10
# Groups of which a step is simulated, those with most work for a rank and with the longest documents; the others wait.
SIMULATED = 32
WAYS = ("fixed", "powers of two", "one group")


class Group(NamedTuple):
    """Ranks that share documents: how many, room for tokens left, the documents' lengths."""

    ranks: int
    room: list[int]
    lengths: list[int]

    @property
    def work(self) -> float:
        """Visible pairs of a rank if they are shared evenly."""
        return sum(n * (n + 1) / 2 for n in self.lengths) / self.ranks

    def add(self, length: int) -> None:
        self.room[0] -= length
        self.lengths.append(length)


@dataclass
class Outcome:
    """A step of one way.

    cut: tokens of documents that are in pieces. imbalance: the busiest rank's pairs over the mean of all ranks.
    mib: received by a rank in both passes, on average and by the busiest. of_ideal: the ideal's time over this one's.
    plan_s: CPU seconds to plan a group, the longest of all (each rank plans its own).
    """

    corpus: str
    ranks: int
    tokens_per_rank: int
    way: str
    groups: int
    cut: int
    imbalance: float
    mib: float
    mib_busiest: float
    ms: float
    of_ideal: float
    plan_s: float


def corpus(name: str, total: int, seed: int) -> list[int]:
    """Documents of a batch, none longer than LONGEST."""
    if name == "lognormal":
        lengths = document_lengths(total, seed=seed)
    elif name == "long lognormal":
        lengths = document_lengths(total, seed=seed, mean=16384, sigma=1.6)
    else:
        lengths = other_lengths(name, total, seed)
    return [min(n, LONGEST) for n in lengths]


def fixed_groups(lengths: list[int], ranks: int, tokens: int) -> list[Group]:
    """Groups that hold the longest document there may be."""
    size = min(ranks, _power_of_two(LONGEST / tokens))
    return _fill([Group(size, [size * tokens], []) for _ in range(ranks // size)], lengths)


def power_groups(lengths: list[int], ranks: int, tokens: int) -> list[Group]:
    """Groups of a power of two, by the tokens and the work of the documents that open them."""
    mean = sum(n * (n + 1) / 2 for n in lengths) / ranks
    groups, left, rest = [], ranks, []
    for n in sorted(lengths, reverse=True):
        size = _power_of_two(max(n / tokens, n * (n + 1) / 2 / mean))
        if size > 1 and size <= left:
            groups.append(Group(size, [size * tokens], []))
            groups[-1].add(n)
            left -= size
        else:
            rest.append(n)
    groups += [Group(1, [tokens], []) for _ in range(left)]
    return _fill(groups, rest)


def _power_of_two(least: float) -> int:
    return 1 << max(0, int(np.ceil(np.log2(max(least, 1.0)))))


def _fill(groups: list[Group], lengths: list[int]) -> list[Group]:
    """Longest first into the group with least work that has room; what fits nowhere is cut over the roomiest."""
    heap = [(group.work, at) for at, group in enumerate(groups)]
    heapq.heapify(heap)
    for n in sorted(lengths, reverse=True):
        passed: list[tuple[float, int]] = []
        while heap and groups[heap[0][1]].room[0] < n and len(passed) < 64:
            passed.append(heapq.heappop(heap))
        if heap and groups[heap[0][1]].room[0] >= n:
            pieces = [(n, heapq.heappop(heap)[1])]
        else:
            pieces = _cut(groups, n)
        for piece, at in pieces:
            groups[at].add(piece)
            passed.append((groups[at].work, at))
        for entry in passed:
            if groups[entry[1]].room[0] > 0:
                heapq.heappush(heap, entry)
    return groups


def _cut(groups: list[Group], n: int) -> list[tuple[int, int]]:
    """A document over the groups with most room."""
    pieces = []
    for at in sorted(range(len(groups)), key=lambda at: -groups[at].room[0]):
        piece = min(n, groups[at].room[0])
        if piece:
            pieces.append((piece, at))
        n -= piece
        if not n:
            break
    return pieces


def measure(name: str, ranks: int, tokens: int, seed: int) -> list[Outcome]:
    """All ways to share one batch."""
    lengths = corpus(name, int(ranks * tokens * FILLED), seed)
    ways = {
        "fixed": fixed_groups(lengths, ranks, tokens),
        "powers of two": power_groups(lengths, ranks, tokens),
        "one group": [Group(ranks, [0], lengths)],
    }
    area = sum(n * (n + 1) / 2 for n in lengths) / ranks
    ideal = 1e3 * sum(
        step_time_bound(area=area, cp_size=1, worst_bytes=0.0, heads=HEADS, hardware=MACHINE, backward=backward)
        for backward in (False, True)
    )
    outcomes = []
    for way, groups in ways.items():
        shared = [group for group in groups if group.ranks > 1 and group.lengths]
        steps = [_step(group) for group in _slowest(shared)]
        alone = [group for group in groups if group.ranks == 1]
        ms = max([step.ms for step in steps] + [_alone_ms(group) for group in alone])
        moved = sum(float(step.mib.sum()) for step in steps) * len(shared) / max(len(steps), 1)
        outcomes.append(
            Outcome(
                corpus=name,
                ranks=ranks,
                tokens_per_rank=tokens,
                way=way,
                groups=len(groups),
                cut=sum(lengths) - sum(_whole(lengths, groups)),
                imbalance=max([step.busiest for step in steps] + [group.work for group in alone]) / area,
                mib=moved / ranks,
                mib_busiest=max([float(step.mib.max()) for step in steps], default=0.0),
                ms=ms,
                of_ideal=ideal / ms,
                plan_s=max((step.plan_s for step in steps), default=0.0),
            )
        )
    return outcomes


class _Step(NamedTuple):
    """Of one group: time of a layer, MiB that each rank receives, pairs of the busiest rank, CPU seconds to plan."""

    ms: float
    mib: FloatArray
    busiest: float
    plan_s: float


def _step(group: Group) -> _Step:
    """Planned as `make_key` plans by default on nodes, and simulated."""
    spec = AttnMaskSpec.varlen(group.lengths)
    started = time.process_time()
    plan = plan_on_nodes(lower_mask(spec), spec.total_seqlen, group.ranks, HEADS, MACHINE)
    plan_s = time.process_time() - started
    areas = np.bincount(plan.task_ranks, plan.tasks.areas(), group.ranks)
    received = traffic_matrix(plan, HEADS).sum(axis=0)
    return _Step(1e3 * simulate(plan, MACHINE, HEADS).seconds, received / 2**20, float(areas.max()), plan_s)


def _slowest(groups: list[Group]) -> list[Group]:
    """Those with most work for a rank and those with the longest documents."""
    half = SIMULATED // 2
    by_work = sorted(range(len(groups)), key=lambda at: -groups[at].work)[:half]
    by_length = sorted(range(len(groups)), key=lambda at: -max(groups[at].lengths))
    return [groups[at] for at in dict.fromkeys(by_work + by_length[:half])]


def _alone_ms(group: Group) -> float:
    """On one rank."""
    work, slices = np.array([group.work]), np.array([len(group.lengths)])
    passes = (MACHINE.kernel_seconds(work, slices, HEADS, backward=backward) for backward in (False, True))
    return 1e3 * float(sum(seconds[0] for seconds in passes))


def _whole(lengths: list[int], groups: list[Group]) -> list[int]:
    """Documents that no group has in pieces."""
    pieces = Counter(n for group in groups for n in group.lengths)
    return list((Counter(lengths) & pieces).elements())


def table_of(outcomes: list[Outcome]) -> list[str]:
    """One row for each batch, the ways side by side."""
    lines = [
        "| documents | ranks | tokens a rank | groups | imbalance | MiB received: mean, busiest | ms a layer "
        "| of the ideal | tokens in cut documents | planning, CPU s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in outcomes:
        cut = one.cut / (one.ranks * one.tokens_per_rank * FILLED)
        lines.append(
            f"| {one.corpus} | {one.ranks} | {one.tokens_per_rank // 1024}K | {one.way} ({one.groups}) | "
            f"{one.imbalance:.2f} | {one.mib:.0f}, {one.mib_busiest:.0f} | {one.ms:.2f} | {one.of_ideal:.1%} | "
            f"{cut:.1%} | {one.plan_s:.3f} |"
        )
    return lines


def draw(outcomes: list[Outcome], path: Path) -> None:
    """A panel for each corpus: how near the ideal each way is, by ranks; dashed: the fewest tokens a rank."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    from cpattn.launch.plan_pictures import COMPUTE, HOME, KEYS, STYLE

    corpora = list(dict.fromkeys(one.corpus for one in outcomes))
    fewest = min(one.tokens_per_rank for one in outcomes)
    ways = dict(zip(WAYS, ((KEYS, "s"), (COMPUTE, "^"), (HOME, "o")), strict=True))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 5.2), layout="constrained")
        panels = figure.subplots(-(-len(corpora) // 2), 2, sharex=True, sharey=True).flat
        for axes, name in zip(panels, corpora, strict=False):
            for (way, tokens), line in _lines([one for one in outcomes if one.corpus == name]).items():
                colour, mark = ways[way]
                style, label = ("--" if tokens == fewest else "-"), f"{way}, {tokens // 1024}K a rank"
                axes.plot(*line, mark + style, color=colour, label=label, markersize=4, linewidth=1.2)
            axes.set_xscale("log", base=2)
            axes.set_xticks(sorted({one.ranks for one in outcomes}), sorted({one.ranks for one in outcomes}))
            axes.set_ylim(0, 1)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
            axes.set_title(name)
            axes.set_xlabel("ranks")
            axes.label_outer()
        figure.supylabel("of the ideal, predicted", fontsize=8)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
        figure.savefig(path)


def _lines(outcomes: list[Outcome]) -> dict[tuple[str, int], tuple[list[int], list[float]]]:
    """By way and tokens a rank: ranks, and the share of the ideal on so many."""
    lines: dict[tuple[str, int], tuple[list[int], list[float]]] = {}
    for one in sorted(outcomes, key=lambda one: (-one.tokens_per_rank, WAYS.index(one.way), one.ranks)):
        ranks, shares = lines.setdefault((one.way, one.tokens_per_rank), ([], []))
        ranks.append(one.ranks)
        shares.append(one.of_ideal)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 256, 1024, 4096])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8 << 10, 64 << 10], help="room of a rank")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder in which to store the table and its JSON")
    parser.add_argument("--stored", type=Path, help="JSON of a run, instead of running")
    parser.add_argument("--plot", type=Path, help="the picture, a file")
    options = parser.parse_args()
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
    if options.stored:
        outcomes = [Outcome(**row) for row in json.loads(options.stored.read_text())]
    else:
        outcomes = _run(options.ranks, options.tokens, options.seed)
    if options.plot:
        draw(outcomes, options.plot)
    if options.out:
        _store(outcomes, options.out, options.seed)


def _run(all_ranks: list[int], all_tokens: list[int], seed: int) -> list[Outcome]:
    outcomes: list[Outcome] = []
    for name in CORPORA:
        for ranks in all_ranks:
            for tokens in all_tokens:
                outcomes += measure(name, ranks, tokens, seed)
                print(*table_of(outcomes[-len(WAYS) :])[2:], sep="\n", flush=True)
    return outcomes


def _store(outcomes: list[Outcome], folder: Path, seed: int) -> None:
    today = time.strftime("%Y-%m-%d")
    heading = [
        f"# Which group? {today}",
        "",
        f"`python -m cpattn.launch.benchmarks.groups`, seed {seed}, {platform.machine()}; predicted on"
        " h100, 64:8 heads of 128, nodes of 8.",
        "",
    ]
    (folder / f"groups_{today}.md").write_text("\n".join(heading + table_of(outcomes)) + "\n")
    (folder / f"groups_{today}.json").write_text(json.dumps([asdict(one) for one in outcomes], indent=1) + "\n")


if __name__ == "__main__":
    main()
