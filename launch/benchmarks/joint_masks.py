"""Full and sliding-window layers of one model over one placement: planned together, or for one mask alone.

    python -m cpattn.launch.benchmarks.joint_masks --tokens 1048576 --ranks 8 64

For each model and mask three placements: `full`, made by `make_key` for the full layers; `window`, made for the layers
with a window (the other layers then get theirs by `with_mask`); and `joint`, made with `also`. *work*: over all layers,
the visible pairs of the busiest rank, over the mean of all ranks; layers wait for one another, so 1.00 is the best.
*ms*: a step's attention, forward and backward over all layers, by the cost model. No GPU and no torch needed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from cpattn.masks.spec import AttnMaskSpec, lower_mask
from cpattn.planning.options import LayerKind
from cpattn.planning.ready import make_plan
from cpattn.solver import (
    HARDWARE,
    Hardware,
    Heads,
    Plan,
    assemble_plan,
    keys_schedule,
    simulate,
)

from .workloads import document_lengths


class Model(NamedTuple):
    """Layers of a hybrid model and its heads (query, key, dim)."""

    name: str
    num_full: int
    num_local: int
    window: int
    heads: tuple[int, int, int]


# As their published configurations have them.
MODELS = (
    Model("Gemma 2 27B", 23, 23, 4096, (32, 16, 128)),
    Model("Gemma 3 27B", 10, 52, 1024, (32, 16, 128)),
    Model("GPT-OSS 120B", 18, 18, 128, (64, 8, 64)),
)


class Row(NamedTuple):
    """One placement for one model: see the module's text."""

    placement: str
    work: float
    milliseconds: float
    planning_s: float


def masks_of(total: int, seed: int) -> dict[str, AttnMaskSpec]:
    """One sequence, documents of 4K tokens on average, and of 32K."""
    return {
        "causal": AttnMaskSpec.causal(total),
        "documents, mean 4K": AttnMaskSpec.varlen(document_lengths(total, seed=seed)),
        "documents, mean 32K": AttnMaskSpec.varlen(document_lengths(total, seed=seed, mean=32768)),
    }


def rows_of(model: Model, spec: AttnMaskSpec, cp_size: int, hardware: Hardware) -> Iterator[Row]:
    num_q, num_kv, dim = model.heads
    options: dict[str, Any] = {
        "cp_size": cp_size,
        "num_heads_q": num_q,
        "num_heads_kv": num_kv,
        "head_dim": dim,
        "chunk_size": max(1, spec.total_seqlen // (16 * cp_size)),
    }
    heads, tables = Heads(num_q, num_kv, dim, dim), [lower_mask(spec), lower_mask(spec, (model.window - 1, None))]

    def measured(name: str, plans: list[Plan], planning_s: float) -> Row:
        counts = (model.num_full, model.num_local)
        largest, mean, seconds = 0.0, 0.0, 0.0
        for plan, count in zip(plans, counts, strict=True):
            areas = plan.areas()
            largest, mean = largest + count * float(areas.max()), mean + count * float(areas.mean())
            seconds += count * simulate(plan, hardware, heads).seconds
        return Row(name, largest / mean, seconds * 1e3, planning_s)

    for number, name in enumerate(("full", "window")):
        started = time.process_time()
        own = make_plan(spec, window=(None, model.window)[number], **options).plan
        placement, other = own.q_placement, 1 - number
        planned = assemble_plan(*keys_schedule(tables[other], placement), placement, placement, costs=heads.row_costs())
        plans = [own, planned] if number == 0 else [planned, own]
        yield measured(name, plans, time.process_time() - started)
    started = time.process_time()
    also = [LayerKind(window=model.window, num_layers=model.num_local)]
    ready = make_plan(spec, num_layers=model.num_full, also=also, **options)
    yield measured("joint", [planned.plan for planned in ready.layer_plans], time.process_time() - started)


def report(total: int, ranks: list[int], seeds: int, hardware: Hardware, *, times: bool) -> Iterator[str]:
    yield f"{total:,} tokens, {hardware.name}, mean of {seeds} seeds."
    yield ""
    columns = ["ranks", "mask", "model", "work: full", "window", "joint", "ms: full", "window", "joint"]
    columns += ["planning s: full", "joint"] if times else []
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    for cp_size in ranks:
        for name in masks_of(1, 0):
            for model in MODELS:
                runs = [list(rows_of(model, masks_of(total, s)[name], cp_size, hardware)) for s in range(seeds)]
                work, ms, cpu = np.array([[row[1:] for row in run] for run in runs]).mean(axis=0).T
                planning = [f"{cpu[0]:.2f}", f"{cpu[2]:.2f}"] if times else []
                numbers = [*(f"{x:.3f}" for x in work), *(f"{x:.1f}" for x in ms), *planning]
                yield f"| {cp_size} | {name} | {model.name} | {' | '.join(numbers)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1 << 20, help="tokens of the sequence")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64], help="sizes of the group")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--hardware", default="h100", choices=list(HARDWARE))
    parser.add_argument("--times", action="store_true", help="CPU seconds of planning as well")
    options = parser.parse_args()
    machine = HARDWARE[options.hardware]
    for line in report(options.tokens, options.ranks, options.seeds, machine, times=options.times):
        print(line, flush=True)


if __name__ == "__main__":
    main()
