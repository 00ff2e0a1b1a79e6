"""The cost model against published charts: a plan like the charted system's, on masks drawn as its authors drew them.

    python -m cpattn.launch.benchmarks.charts [--packs 8] [--out launch/benchmarks/results]

MagiAttention's benchmark of context parallelism (docs/source/blog/cp_benchmark.md of its repository) shows TFLOP/s of a
GPU on 8 to 64 H100s: 64 query and 8 key heads of 128 in bf16, 8K tokens for each, forward and backward apart, rows sent
by all-to-all or once to each node ("native"). Values are read off the charts. Documents there are drawn from a
histogram of lengths of a training set, cut at a quarter of the pack, shuffled and packed. That is done here too, with
lengths even within a bin; chunks of 2,048 tokens go by a heap to the rank with the least area, each rank gets the keys
it needs in two stages, and the model says what a step takes. Below it what is planned here by default.

The figure is TFLOP/s of the mask's own work, as there. The model knows one rate of the kernel: the charts' kernel,
alone on 32K tokens, has 622 forward and 560 backward on causal, and 547 and 419 on such packs.
"""

from __future__ import annotations

import argparse
import json
import platform
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cpattn.launch.benchmarks.workloads import plan_on_nodes
from cpattn.masks.spec import AttnMaskSpec, lower_mask
from cpattn.solver import HARDWARE, Heads, Plan, SliceTable, simulate
from cpattn.solver.dispatch import keys_schedule
from cpattn.solver.draft import assemble_plan
from cpattn.solver.report import place_min_heap

MACHINE, HEADS = HARDWARE["h100"], Heads(64, 8, 128, 128)
TOKENS, CHUNK, STAGES = 8192, 2048, 2
SIZES = (8, 16, 32, 64)
# Upper ends of the bins of lengths, and documents in each: the benchmark's doc_length_distribution.csv.
BINS = (0, 10, 50, 100, 200, 500, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 196608)
DOCUMENTS = (
    30254, 391188, 699596, 1377757, 3794735, 3316785, 2106566, 988525, 410002, 173574, 115007, 18428, 22513, 18284,
)  # fmt: skip
# TFLOP/s of a GPU on 8, 16, 32 and 64, by mask, pass and how rows are sent.
PUBLISHED = {
    ("causal", "forward", "native"): (645, 648, 621, 593),
    ("causal", "backward", "native"): (529, 530, 540, 528),
    ("packed documents", "forward", "native"): (459, 426, 315, 238),
    ("packed documents", "forward", "all-to-all"): (387, 306, 276, 207),
    ("packed documents", "backward", "native"): (361, 372, 333, 264),
    ("packed documents", "backward", "all-to-all"): (335, 353, 326, 242),
}


class Rates(NamedTuple):
    """TFLOP/s of a GPU, forward and backward."""

    forward: float
    backward: float


def draw_pack(total: int, seed: int) -> list[int]:
    """Lengths of documents that fill a pack of `total` tokens; the last is cut."""
    random = np.random.default_rng(seed)
    longest, chances = total // 4, np.array(DOCUMENTS) / sum(DOCUMENTS)
    lengths: list[int] = []
    left = total
    while left:
        at = int(random.choice(len(DOCUMENTS), p=chances))
        document = int(random.integers(BINS[at] + 1, BINS[at + 1] + 1))
        # A long document is several; the others of its pieces are as likely to lie in another pack.
        pieces = -(-document // longest)
        for piece in [longest] * (document // longest) + [document % longest]:
            if piece and left and random.integers(pieces) == 0:
                lengths.append(min(piece, left))
                left -= lengths[-1]
    return lengths


def min_heap_plan(mask: SliceTable, ranks: int, *, native: bool) -> Plan:
    """Chunks by a heap, needed keys, each once to a node if native."""
    placement = place_min_heap(mask, ranks * TOKENS, ranks, CHUNK)
    nodes = MACHINE.ranks_per_node if native and ranks > MACHINE.ranks_per_node else None
    return assemble_plan(
        *keys_schedule(mask, placement), placement, placement,
        num_stages=STAGES, ranks_per_node=nodes, costs=HEADS.row_costs(), hardware=MACHINE,
    )  # fmt: skip


def rates_of(masks: list[SliceTable], plans: list[Plan]) -> Rates:
    """All their work over all their time."""
    steps = [simulate(plan, MACHINE, HEADS) for plan in plans]
    area = sum(mask.area() for mask in masks) / plans[0].cp_size
    forward, backward = (sum(float(each.seconds.max()) for each in passes) for passes in zip(*steps, strict=True))
    return Rates(HEADS.forward_flop * area / forward / 1e12, HEADS.backward_flop * area / backward / 1e12)


def predict(ranks: int, packs: int) -> dict[tuple[str, str], Rates]:
    """By mask and way."""
    total = ranks * TOKENS
    specs = {
        "causal": [AttnMaskSpec.causal(total)],
        "packed documents": [AttnMaskSpec.varlen(draw_pack(total, seed)) for seed in range(packs)],
    }
    rates = {}
    for name, group in specs.items():
        masks = [lower_mask(spec) for spec in group]
        for way, native in (("native", True), ("all-to-all", False)):
            rates[name, way] = rates_of(masks, [min_heap_plan(mask, ranks, native=native) for mask in masks])
        rates[name, "ours"] = rates_of(masks, [plan_on_nodes(mask, total, ranks, HEADS, MACHINE) for mask in masks])
    return rates


def compare_with_charts(packs: int) -> list[dict[str, Any]]:
    """A row for each curve of the charts, and one for what is planned here."""
    found = {ranks: predict(ranks, packs) for ranks in SIZES}
    rows: list[dict[str, Any]] = []
    for (mask, side, way), published in PUBLISHED.items():
        model = [getattr(found[ranks][mask, way], side) for ranks in SIZES]
        rows.append({"mask": mask, "pass": side, "way": way, "published": list(published), "model": model})
    for mask in ("causal", "packed documents"):
        for side in Rates._fields:
            model = [getattr(found[ranks][mask, "ours"], side) for ranks in SIZES]
            rows.append({"mask": mask, "pass": side, "way": "planned here", "published": None, "model": model})
    return rows


def table_of(rows: list[dict[str, Any]]) -> list[str]:
    sizes = " | ".join(f"{ranks} GPUs" for ranks in SIZES)
    lines = [f"| mask | pass | way | {sizes} |", "|---" * (3 + len(SIZES)) + "|"]
    for row in rows:
        if row["published"]:
            pairs = zip(row["model"], row["published"], strict=True)
            cells = [f"{model:.0f} / {chart} ({model / chart:.2f})" for model, chart in pairs]
        else:
            cells = [f"{model:.0f}" for model in row["model"]]
        lines.append(f"| {row['mask']} | {row['pass']} | {row['way']} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packs", type=int, default=8, help="packs of documents of each size (default 8)")
    parser.add_argument("--out", type=Path, help="folder for a JSON file and a page")
    options = parser.parse_args()
    rows = compare_with_charts(options.packs)
    lines = [
        f"# The cost model against published charts, {date.today()}", "",
        f"`python -m cpattn.launch.benchmarks.charts --packs {options.packs}`: TFLOP/s of a GPU, model / chart.",
        "H100, 64:8 heads of 128, 8K tokens for each GPU; charts of MagiAttention's blog, read by eye.", "",
        *table_of(rows),
    ]  # fmt: skip
    print("\n".join(lines))
    if options.out:
        stem = options.out / f"charts_{date.today()}"
        about = {"packs": options.packs, "numpy": np.__version__, "python": platform.python_version()}
        stem.with_suffix(".json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
        stem.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
