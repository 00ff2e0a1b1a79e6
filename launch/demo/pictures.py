"""The demo's two pictures: the mask with its work coloured by rank, and the two loss curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from cpattn.solver import Placement, Plan

from ..plan_pictures import COMPUTE, FEW, rank_colours

FloatArray = NDArray[np.float64]

STYLE = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "savefig.dpi": 200,
    "savefig.bbox": "tight",
}

LIMIT = "#D55E00"
# Pixels of the mask along each side.
RESOLUTION = 1024
# Pairs with a remote key are striped: of every so many pixels so many are drawn towards white, so far. A lighter shade
# would not do, as colours of ranks differ in lightness.
STRIPES, WIDTH, TINT = 16, 6, 0.8
# Ranks in the legend of many.
NAMED = 5


def draw_plan(plan: Plan, path: Path) -> None:
    """Draw a plan's mask, each visible pair in the colour of the rank that computes it.

    Pairs whose key has to be sent are striped. Strips along the axes show who owns the queries and the keys; bars show
    each rank's work, tokens and received key rows. Masks larger than RESOLUTION are sampled on an even grid.
    """
    with mpl.rc_context(STYLE):
        figure = _new_figure(8.6, 4.9)
        grid = figure.add_gridspec(3, 2, width_ratios=(1.75, 1))
        _draw_mask(figure.add_subplot(grid[:, 0]), plan)
        received = plan.kv_routes.rows_received(plan.cp_size)
        panels = (
            ("work: visible pairs computed", plan.areas(), True),
            ("tokens owned", plan.q_placement.num_tokens, True),
            ("key rows received from other ranks", received, False),
        )
        for row, (title, values, show_mean) in enumerate(panels):
            axes = figure.add_subplot(grid[row, 1])
            _draw_bars(axes, title, values, show_mean=show_mean)
        axes.set_xlabel("rank")
        figure.savefig(path)


def mask_image(plan: Plan, resolution: int = RESOLUTION) -> FloatArray:
    """The mask as RGB, [rows, columns, 3]: one pixel for the middle of each cell of an even grid."""
    i = _samples(plan.q_placement.total_seqlen, resolution)
    j = _samples(plan.k_placement.total_seqlen, resolution)
    colours = rank_colours(plan.cp_size)
    light = 1 - (1 - TINT) * (1 - colours)
    image = np.ones((len(i), len(j), 3))
    key_owner = plan.k_placement.owner_of(j)
    tasks = zip(plan.tasks.data.tolist(), plan.task_ranks.tolist(), strict=True)
    for (q0, q1, k0, k1, lo, hi), rank in tasks:
        rows = slice(*np.searchsorted(i, [q0, q1]))
        columns = slice(*np.searchsorted(j, [k0, k1]))
        distance = j[None, columns] - i[rows, None]
        visible = (distance >= lo) & (distance <= hi)
        at = np.add.outer(np.arange(len(i))[rows], np.arange(len(j))[columns])
        striped = (key_owner[columns] != rank) & (at % STRIPES < WIDTH)
        image[rows, columns][visible] = np.where(striped[..., None], light[rank], colours[rank])[visible]
    return image


def _new_figure(width: float, height: float) -> Figure:
    """A figure that is only ever written to a file: without pyplot no window system is asked for."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _draw_mask(axes: Axes, plan: Plan) -> None:
    seqlen_q, seqlen_k = plan.q_placement.total_seqlen, plan.k_placement.total_seqlen
    axes.imshow(mask_image(plan), extent=(0, seqlen_k, seqlen_q, 0), aspect="equal", interpolation="nearest")
    for side, placement in (("left", plan.q_placement), ("top", plan.k_placement)):
        _draw_owner_strip(axes, placement, side)
    axes.set_xlabel("key token")
    axes.set_ylabel("query token", labelpad=12)
    axes.xaxis.set_major_formatter(FuncFormatter(_thousands))
    axes.yaxis.set_major_formatter(FuncFormatter(_thousands))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.spines[:].set_visible(False)
    axes.tick_params(axis="y", pad=10)
    colours = rank_colours(plan.cp_size)
    named = range(plan.cp_size) if plan.cp_size <= len(FEW) else np.linspace(0, plan.cp_size - 1, NAMED).astype(int)
    handles = [Patch(color=colours[rank], label=f"rank {rank}") for rank in named]
    handles.append(Patch(facecolor="0.4", edgecolor="white", hatch="/////", label="striped: key is sent"))
    axes.legend(handles=handles, loc="upper right", title="computed by", borderaxespad=0.2)
    axes.set_title(f"{seqlen_q:,} tokens on {plan.cp_size} ranks", pad=14)


def _draw_owner_strip(axes: Axes, placement: Placement, side: str) -> None:
    """A strip outside the axes, in the colour of each token's owner."""
    colours = rank_colours(placement.cp_size)
    strip = colours[placement.owner_of(_samples(placement.total_seqlen, RESOLUTION))]
    if side == "left":
        inset, image = axes.inset_axes((-0.035, 0, 0.022, 1)), strip[:, None]
    else:
        inset, image = axes.inset_axes((0, 1.013, 1, 0.022)), strip[None]
    inset.imshow(image, aspect="auto", interpolation="nearest")
    inset.set_axis_off()


def _draw_bars(axes: Axes, title: str, values: NDArray[np.int64], *, show_mean: bool) -> None:
    ranks = np.arange(len(values))
    axes.bar(ranks, values, color=rank_colours(len(values)), width=0.7)
    if show_mean:
        mean = float(np.mean(values))
        axes.axhline(mean, color="0.25", linewidth=0.8, linestyle="--")
        title += f" (max/mean {np.max(values) / max(mean, 1.0):.3f})"
    else:
        title += f" ({int(np.sum(values)):,})"
    axes.set_title(title, loc="left")
    axes.set_xticks(ranks if len(ranks) <= 16 else ranks[:: len(ranks) // 8])
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_formatter(FuncFormatter(_thousands))


def draw_losses(
    ranks_losses: Sequence[float],
    one_rank_losses: Sequence[float],
    *,
    cp_size: int,
    tolerance: float,
    path: Path,
) -> None:
    """Draw both loss curves, and below them their relative difference against the tolerance."""
    steps = np.arange(1, len(ranks_losses) + 1)
    spread, single = np.asarray(ranks_losses), np.asarray(one_rank_losses)
    difference = np.abs(spread - single) / np.abs(single)
    # A logarithmic axis has no zero: equal losses are drawn at half of what fp32 can tell apart.
    floor = float(np.finfo(np.float32).eps) / 2
    with mpl.rc_context(STYLE):
        figure = _new_figure(6.0, 4.4)
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2.2, 1))
        top.plot(steps, single, color="0.2", linewidth=1.2, label="one rank, plain torch attention")
        marks = {"color": COMPUTE, "markersize": 4, "fillstyle": "none"}
        top.plot(steps, spread, "o", label=f"{cp_size} ranks, cpattn", **marks)
        top.set_ylabel("loss (nats per byte)")
        top.legend()
        bottom.semilogy(steps, np.maximum(difference, floor), ".-", color=COMPUTE, linewidth=0.8)
        bottom.axhline(tolerance, color=LIMIT, linewidth=1, linestyle="--")
        bottom.annotate(
            f"limit {tolerance:g}", (steps[-1], tolerance), xytext=(0, -10), textcoords="offset points",
            ha="right", color=LIMIT, fontsize=8,
        )  # fmt: skip
        bottom.set_ylim(floor / 2, tolerance * 3)
        bottom.set_ylabel("relative\ndifference")
        bottom.set_xlabel("step")
        bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
        bottom.set_xlim(0.5, len(steps) + 0.5)
        figure.align_ylabels()
        figure.savefig(path)


def _samples(total: int, resolution: int) -> NDArray[np.int64]:
    """Up to `resolution` token indices: the middles of equal cells."""
    count = max(1, min(total, resolution))
    return ((np.arange(count) + 0.5) * total / count).astype(np.int64)


def _thousands(value: float, _: object = None) -> str:
    if value >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}K" if value >= 1e3 else f"{value:g}"
