"""A plan as one page for a browser: everything it shows lies in the file, and it asks no network for anything.

The mask by the rank that computes it, with zoom; work, tokens and bytes of each rank; who sends to whom; the step in
time; and what is under the pointer, in words. The script in plan_page.html draws it from numbers that are put in here.
"""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import numpy as np

from cpattn.solver import Hardware, Heads, PassTimeline, Plan, simulate, traffic_matrix

TEMPLATE = Path(__file__).with_name("plan_page.html")
# Rectangles, ranks of the traffic map and of the timeline beyond which a page would be slow; the page says so.
MOST_TASKS, MOST_BINS, MOST_LANES, MOST_ROUTES = 40_000, 128, 64, 1 << 22


def page_of_plan(plan: Plan, *, heads: Heads, hardware: Hardware, title: str) -> str:
    """The page.

    Args:
        heads: of a rank of the plan. hardware: for the timeline. title: mask, tokens, ranks, heads, dtype.
    """
    values = {"title": title, **_mask(plan), **_ranks(plan, heads), **_timeline(plan, heads, hardware)}
    # "</" would end the script element.
    data = json.dumps(values, separators=(",", ":"), allow_nan=False).replace("</", "<\\/")
    return TEMPLATE.read_text().replace("__TITLE__", html.escape(title)).replace("__DATA__", data)


def _mask(plan: Plan) -> dict[str, Any]:
    """Banded rectangles as [q0, q1, k0, k1, lo, hi, rank] (None: no limit), and who owns which tokens."""
    tasks = plan.tasks
    order = np.argsort(-tasks.areas(), kind="stable")[:MOST_TASKS]
    lo, hi = tasks.lo[order], tasks.hi[order]
    seqlens = plan.q_placement.total_seqlen, plan.k_placement.total_seqlen
    far = sum(seqlens)
    return {
        "seqlen_q": seqlens[0],
        "seqlen_k": seqlens[1],
        "ranks": plan.cp_size,
        "tasks": [
            [*map(int, tasks.data[n, :4]), int(a) if a > -far else None, int(b) if b < far else None, int(rank)]
            for n, a, b, rank in zip(order, lo, hi, plan.task_ranks[order], strict=True)
        ],
        "tasks_left_out": len(tasks) - len(order),
        "owners": [
            [placement.ends.tolist(), placement.owners.tolist()] for placement in (plan.q_placement, plan.k_placement)
        ],
    }


def _ranks(plan: Plan, heads: Heads) -> dict[str, Any]:
    bins = min(MOST_BINS, plan.cp_size)
    kv, q = plan.kv_routes, plan.q_routes
    return {
        "pairs": plan.areas().tolist(),
        "tokens": plan.q_placement.num_tokens.tolist(),
        "key_rows": kv.rows_received(plan.cp_size).tolist(),
        "query_rows": q.rows_received(plan.cp_size).tolist(),
        "traffic": traffic_matrix(plan, heads, bins=bins).tolist(),
    }


def _timeline(plan: Plan, heads: Heads, hardware: Hardware) -> dict[str, Any]:
    """Spans of the ranks shown as [what, name, start, end] in seconds, backward after forward."""
    if len(plan.kv_routes) + len(plan.q_routes) > MOST_ROUTES:
        return {"hardware": hardware.name, "lanes": [], "seconds": 0.0, "forward_seconds": 0.0}
    step = simulate(plan, hardware, heads)
    forward = float(step.forward.seconds.max())
    shown = np.unique(np.linspace(0, plan.cp_size - 1, min(MOST_LANES, plan.cp_size)).round().astype(int))
    lanes = [
        {"rank": int(rank), "spans": _spans(step.forward, rank, 0.0) + _spans(step.backward, rank, forward)}
        for rank in shown
    ]
    return {"hardware": hardware.name, "lanes": lanes, "seconds": step.seconds, "forward_seconds": forward}


def _spans(timeline: PassTimeline, rank: int, offset: float) -> list[list[Any]]:
    return [
        [what, span.name, float(span.starts[rank]) + offset, float(span.ends[rank]) + offset]
        for what, spans in (("compute", timeline.compute), ("transfer", timeline.transfers))
        for span in spans
        if span.ends[rank] > span.starts[rank]
    ]
