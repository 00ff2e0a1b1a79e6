"""Solver layer: small instances against exhaustive search, and the lower bounds against its optimum.

An instance is a mask over ten chunks (or fewer) on three ranks. The search tries every assignment of whole chunks in
which token counts differ by one chunk at most and no rank computes more than the planner's busiest does, and takes the
one that moves the fewest key rows. Where whole chunks are too coarse for that balance, the optimum may use the best
balance that they allow, which is looser than ours: such an instance says what balance costs rather than what the
planner loses. The others are compared like for like. The planner may also cut inside chunks, so it can be better than
the "optimum": a negative gap.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest

from cpattn import AttnMaskSpec
from cpattn.masks.spec import lower_mask
from cpattn.solver import Limits, Plan, SliceTable, bytes_bound, kv_rows_bound, make_dispatch_plan, row_costs

RANKS, CHUNK = 3, 16
KINDS = ("causal", "varlen causal", "varlen full", "window", "prefix tree", "random slices")


class Instance(NamedTuple):
    kind: str
    table: SliceTable
    seqlen: int


class Optimum(NamedTuple):
    rows: int
    limits: Limits


def instance(seed: int) -> Instance:
    """A random small mask; kinds take turns."""
    rng = np.random.default_rng(seed)
    kind = KINDS[seed % len(KINDS)]
    seqlen = CHUNK * int(rng.integers(6, 11))
    if kind == "causal":
        spec = AttnMaskSpec.causal(seqlen)
    elif kind.startswith("varlen"):
        cuts = np.sort(rng.choice(np.arange(1, seqlen), int(rng.integers(1, 6)), replace=False))
        lengths = np.diff([0, *cuts.tolist(), seqlen]).tolist()
        spec = AttnMaskSpec.varlen(lengths, causal=kind == "varlen causal")
    elif kind == "window":
        spec = AttnMaskSpec.sliding_window(seqlen, int(rng.integers(2, seqlen)))
    elif kind == "prefix tree":
        lengths = (1 + rng.multinomial(seqlen - 5, np.ones(5) / 5)).tolist()
        spec = AttnMaskSpec.prefix_tree(lengths, [[0, 1, 2], [0, 1, 3], [0, 4]])[0]
    else:
        edges = np.sort(rng.integers(0, seqlen + 1, (2, 4, 2)), axis=-1)
        kinds = rng.choice(["full", "causal", "inv_causal", "bi_causal"], 4).tolist()
        spec = AttnMaskSpec(*edges.tolist(), kinds, seqlen) | AttnMaskSpec.sliding_window(seqlen, 5)
    return Instance(kind, lower_mask(spec), seqlen)


def planned(case: Instance) -> Plan:
    return make_dispatch_plan(
        case.table, total_seqlen=case.seqlen, cp_size=RANKS, chunk_size=CHUNK, schedule="keys", num_stages=1
    )


def search(case: Instance, max_area: float) -> Optimum:
    """The fewest rows of any assignment of chunks with areas up to max_area, or to the least that there is."""
    dense = case.table.to_dense(case.seqlen, case.seqlen)
    chunks = case.seqlen // CHUNK
    subsets = np.arange(1 << chunks)
    member = (subsets[:, None] >> np.arange(chunks)) & 1 == 1
    keys = np.stack([dense[c * CHUNK : (c + 1) * CHUNK].any(0) for c in range(chunks)])
    needed = member.astype(np.int64) @ keys.astype(np.int64) > 0
    rows = (needed & ~np.repeat(member, CHUNK, axis=1)).sum(1)
    areas = member @ dense.reshape(chunks, -1).sum(1)
    sizes = member.sum(1)
    a, b = (grid.ravel() for grid in np.meshgrid(subsets, subsets))
    apart = (a & b == 0) & (sizes[a] <= -(-chunks // RANKS)) & (sizes[b] <= -(-chunks // RANKS))
    a, b = a[apart], b[apart]
    c = subsets[-1] & ~(a | b)
    each = np.stack([a, b, c])
    each = each[:, np.ptp(sizes[each], axis=0) <= 1]
    largest = areas[each].max(0)
    each = each[:, largest <= max(max_area, largest.min())]
    best = each[:, rows[each].sum(0).argmin()]
    tokens = sizes[best] * CHUNK
    return Optimum(int(rows[best].sum()), Limits(int(tokens.min()), int(tokens.max()), int(areas[best].max())))


class Result(NamedTuple):
    """Rows of the planner and of the optimum, and whether the optimum is as balanced as the plan, or within 2 %."""

    kind: str
    rows: int
    optimum: int
    alike: bool


def results(seeds: range) -> list[Result]:
    """The planner against the optimum; checks the bounds."""
    found = []
    for seed in seeds:
        case = instance(seed)
        plan = planned(case)
        rows = plan.kv_routes.num_rows()
        assert np.ptp(plan.q_placement.num_tokens) <= CHUNK
        for value, limits in ((rows, Limits.of_plan(plan)), *_searched(case, plan)):
            options = {"total_seqlen": case.seqlen, "cp_size": RANKS, "limits": limits}
            bound = kv_rows_bound(case.table, **options)
            assert bound.total <= value, f"seed {seed}, {case.kind}: bound {bound.total} above {value} rows"
            costs = row_costs(4, 2, 8, 8)
            any_bound = bytes_bound(case.table, costs=costs, **options)
            assert any_bound.total <= value * costs.kv
        most = max(plan.areas().max(), 1.02 * plan.areas().mean())
        best = search(case, most)
        found.append(Result(case.kind, rows, best.rows, best.limits.max_area <= most))
    return found


def _searched(case: Instance, plan: Plan) -> list[tuple[int, Limits]]:
    """Optima at two balances, for the bounds to be held against."""
    best = [search(case, factor * plan.areas().mean()) for factor in (1.05, 3.0)]
    return [(optimum.rows, optimum.limits) for optimum in best]


def gaps(found: list[Result]) -> np.ndarray:
    """Rows of the planner over the optimum's, less one; instances whose optimum moves nothing count if ours does."""
    return np.array([(f.rows - f.optimum) / max(f.optimum, CHUNK) for f in found])


@pytest.mark.parametrize("count", [60, pytest.param(240, marks=pytest.mark.nightly)])
def test_against_exhaustive_search(count: int) -> None:
    """No worse than the optimum on average; 35 % above it where it is as balanced, at most."""
    found = results(range(count))
    gap = gaps(found)
    for kind in KINDS:
        mine = gaps([f for f in found if f.kind == kind])
        print(f"{kind}: {len(mine)} instances, mean gap {mine.mean():+.1%}, worst {mine.max():+.1%}")
    alike = gaps([f for f in found if f.alike])
    print(f"all: {len(gap)} instances, mean gap {gap.mean():+.1%}, worst {gap.max():+.1%}")
    print(f"optimum as balanced: {len(alike)} instances, mean gap {alike.mean():+.1%}, worst {alike.max():+.1%}")
    assert len(gap) == count
    assert len(alike) >= count // 4
    assert gap.mean() <= 0.0
    assert gap.max() <= 1.0
    assert alike.max() <= 0.35


@pytest.mark.nightly
def test_bounds_hold_on_many_instances() -> None:
    results(range(1000, 3000))
