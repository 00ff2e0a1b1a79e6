"""Pictures of a plan: its mask by rank, the work and bytes of each rank, who sends to whom, and the step in time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from cpattn.solver import Hardware, Heads, PassTimeline, Plan, simulate, traffic_matrix

FloatArray = NDArray[np.float64]

STYLE = {
    "font.family": "sans-serif",
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "savefig.dpi": 220,
    "savefig.bbox": "tight",
    "pdf.fonttype": 42,
}

# Colours of ranks go from dark to light: told apart by colour-blind readers and in grey. Few ranks take theirs from all
# over the first list (Paul Tol's muted colours, by lightness), many from a map that is even in lightness.
FEW = ("#2A1A78", "#7A1C50", "#117733", "#B85A62", "#3FA090", "#D9AC40", "#92D2F0", "#F3E79B")
MANY = "cividis"
# What travels lies below a line and differs in lightness too.
COMPUTE, COMPUTE_NEXT, KEYS, QUERIES, HOME = "#0072B2", "#7FBCE3", "#E69F00", "#009E73", "#882255"
# Pixels of the mask along each side, bins of the traffic matrix, and lanes of the timeline.
RESOLUTION, BINS, LANES = 1200, 256, 8
# Timelines of plans with more routes are left out.
MOST_ROUTES = 1 << 23


def draw_report(plan: Plan, folder: Path, *, heads: Heads, hardware: Hardware, title: str = "") -> list[Path]:
    """Draw the panels into one figure, folder/plan.png and folder/plan.pdf; the files written.

    title: what was planned: mask, tokens, ranks, heads, dtype. Set so that it can be read 650 pixels wide.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 7.6), layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(title, fontsize=8.5, x=0.01, ha="left", wrap=True)
        grid = figure.add_gridspec(3, 2, width_ratios=(1.05, 1), height_ratios=(1, 1, 1.3))
        _draw_mask(figure.add_subplot(grid[:2, 0]), plan)
        _draw_shares(figure.add_subplot(grid[0, 1]), plan)
        _draw_bytes(figure.add_subplot(grid[1, 1]), plan, heads)
        _draw_traffic(figure.add_subplot(grid[2, 0]), plan, heads)
        _draw_timeline(figure.add_subplot(grid[2, 1]), plan, heads, hardware)
        paths = [folder / "plan.png", folder / "plan.pdf"]
        for path in paths:
            figure.savefig(path)
    return paths


def rank_colours(cp_size: int) -> FloatArray:
    """A colour for each rank, [cp_size, 3]."""
    if cp_size <= len(FEW):
        chosen = np.linspace(0, len(FEW) - 1, cp_size).round().astype(int)
        return np.array([to_rgb(FEW[number]) for number in chosen])
    colours: FloatArray = mpl.colormaps[MANY](np.linspace(0.0, 1.0, cp_size))[:, :3]
    return colours


def mask_image(plan: Plan, resolution: int = RESOLUTION) -> FloatArray:
    """The mask as RGB, [rows, columns, 3]: the colour of the rank that computes the middle of each cell."""
    i = _samples(plan.q_placement.total_seqlen, resolution)
    j = _samples(plan.k_placement.total_seqlen, resolution)
    image = np.ones((len(i), len(j), 3))
    colours = rank_colours(plan.cp_size)
    rows = np.searchsorted(i, plan.tasks.data[:, :2])
    columns = np.searchsorted(j, plan.tasks.data[:, 2:4])
    drawn = np.flatnonzero((rows[:, 1] > rows[:, 0]) & (columns[:, 1] > columns[:, 0]))
    for n in drawn.tolist():
        r, c = slice(*rows[n]), slice(*columns[n])
        distance = j[None, c] - i[r, None]
        visible = (distance >= plan.tasks.lo[n]) & (distance <= plan.tasks.hi[n])
        image[r, c][visible] = colours[plan.task_ranks[n]]
    return image


def _draw_mask(axes: Axes, plan: Plan) -> None:
    seqlen_q, seqlen_k = plan.q_placement.total_seqlen, plan.k_placement.total_seqlen
    image = mask_image(plan)
    axes.imshow(image, extent=(0, seqlen_k, seqlen_q, 0), aspect="auto", interpolation="nearest")
    colours = rank_colours(plan.cp_size)
    for placement, bounds, tall in (
        (plan.q_placement, (-0.032, 0, 0.02, 1), True),
        (plan.k_placement, (0, 1.012, 1, 0.02), False),
    ):
        strip = colours[placement.owner_of(_samples(placement.total_seqlen, RESOLUTION))]
        inset = axes.inset_axes(bounds)
        inset.imshow(strip[:, None] if tall else strip[None], aspect="auto", interpolation="nearest")
        inset.set_axis_off()
    axes.spines[:].set_visible(False)
    axes.set_title("a  mask, by the rank that computes it", pad=13)
    axes.set_xlabel("key token (strip: owner)")
    axes.set_ylabel("query token (strip: owner)")
    axes.tick_params(axis="y", pad=9)
    for axis, total in ((axes.xaxis, seqlen_k), (axes.yaxis, seqlen_q)):
        axis.set_ticks([total * half / 2 for half in range(3)])
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.get_ticklabels()[0].set_verticalalignment("top")
    if plan.cp_size <= len(FEW):
        handles = [Patch(color=colour, label=f"rank {rank}") for rank, colour in enumerate(colours)]
        axes.legend(handles=handles, loc="upper right", borderaxespad=0.4)
    else:
        scale = axes.inset_axes((0.6, 0.93, 0.36, 0.03))
        scale.imshow(colours[None], aspect="auto", extent=(-0.5, plan.cp_size - 0.5, 0, 1))
        scale.set_yticks([])
        scale.set_xticks([0, plan.cp_size - 1])
        scale.set_xlabel("rank", labelpad=-6)
        scale.spines[:].set_visible(False)


def _draw_shares(axes: Axes, plan: Plan) -> None:
    """Work and tokens of each rank, as shares of the mean."""
    areas, tokens = plan.areas().astype(np.float64), plan.q_placement.num_tokens.astype(np.float64)
    ranks = np.arange(plan.cp_size)
    worst = 0.02
    for values, colour, line, name in ((areas, COMPUTE, "-", "visible pairs"), (tokens, KEYS, "--", "tokens owned")):
        mean = values.mean()
        if not mean:
            continue
        share = values / mean - 1
        worst = max(worst, float(np.abs(share).max()))
        _steps(axes, ranks, share, colour, line, f"{name}: max / mean {values.max() / mean:.3f}")
    axes.axhline(0, color="0.5", linewidth=0.6)
    axes.set_ylim(-1.15 * worst, 2.4 * worst)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+.1%}" if value else "mean"))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    _legend(axes)
    axes.set_title("b  balance")
    _rank_axis(axes, plan.cp_size)


def bytes_received(plan: Plan, heads: Heads) -> tuple[FloatArray, FloatArray]:
    """Bytes that come in on each rank in the forward pass, and in both passes together, [cp_size] each."""
    row, size = heads.row_bytes(), plan.cp_size
    kv, q = plan.kv_routes, plan.q_routes
    kv_in, kv_out, q_in, q_out = (
        counts.astype(np.float64)
        for counts in (kv.rows_received(size), kv.rows_sent(size), q.rows_received(size), q.rows_sent(size))
    )
    forward = kv_in * row.kv + q_in * row.q + q_out * row.partial
    return forward, forward + kv_in * row.kv_again + kv_out * row.dkv + q_in * row.q_again + q_out * row.dq


def _draw_bytes(axes: Axes, plan: Plan, heads: Heads) -> None:
    size = plan.cp_size
    forward, both = bytes_received(plan, heads)
    ranks = np.arange(size)
    for values, colour, line, name in ((both, COMPUTE, "-", "both"), (forward, KEYS, "--", "forward")):
        label = f"{name}: max {_bytes(values.max())}, mean {_bytes(values.mean())}"
        _steps(axes, ranks, values, colour, line, label)
    top = max(float(both.max()), 1.0)
    axes.set_ylim(0, 1.6 * top)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _bytes(value)))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    _legend(axes)
    axes.set_title("c  bytes received, of one layer")
    _rank_axis(axes, size)


def _draw_traffic(axes: Axes, plan: Plan, heads: Heads) -> None:
    matrix = traffic_matrix(plan, heads, bins=BINS)
    shown = np.ma.masked_equal(matrix, 0)
    axes.set_title("d  traffic, both passes", pad=6)
    axes.set_xlabel("to rank")
    axes.set_ylabel("from rank")
    axes.spines[:].set_visible(True)
    axes.set_facecolor("white")
    size = plan.cp_size
    if not matrix.any():
        axes.text(0.5, 0.5, "nothing moves", ha="center", va="center", transform=axes.transAxes)
        return
    top = float(matrix.max())
    least = max(float(shown.min()), top / 1e4)
    # From the least that moves: a causal mask moves nearly as much between any two ranks.
    norm = LogNorm(least, top) if top > 30 * least else Normalize(0.98 * least, top)
    extent = (-0.5, size - 0.5, size - 0.5, -0.5)
    image = axes.imshow(shown, norm=norm, cmap=_from_light(), extent=extent, aspect="auto", interpolation="nearest")
    bar = axes.figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02, format=FuncFormatter(lambda v, _: _bytes(v)))
    per = f"each {-(-size // BINS)} x {-(-size // BINS)} ranks" if size > BINS else "each pair"
    bar.set_label(f"bytes, {per}; white: none", fontsize=8)
    bar.outline.set_visible(False)
    bar.ax.minorticks_off()
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5, integer=True))


def _draw_timeline(axes: Axes, plan: Plan, heads: Heads, hardware: Hardware) -> None:
    """What some ranks do: above the line compute, below it the link; backward follows forward."""
    axes.set_title(f"e  one layer on {hardware.name}, predicted")
    if len(plan.kv_routes) + len(plan.q_routes) > MOST_ROUTES:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "too many routes for a timeline", ha="center", transform=axes.transAxes)
        return
    step = simulate(plan, hardware, heads)
    lanes = lanes_of(step.forward.seconds + step.backward.seconds)
    forward_end = float(step.forward.seconds.max())
    unit, scale = ("ms", 1e3) if step.seconds > 1e-3 else ("us", 1e6)
    for offset, timeline in ((0.0, step.forward), (forward_end, step.backward)):
        _draw_pass(axes, timeline, lanes, offset * scale, scale)
    busy = float((step.forward.busy + step.backward.busy).mean())
    axes.axvline(forward_end * scale, color="0.2", linewidth=0.7)
    axes.set_ylim(len(lanes) - 0.4, -0.95)
    axes.set_xlim(0, step.seconds * scale)
    for start, name in ((0.0, "forward"), (forward_end, "backward")):
        axes.text(start * scale + 0.006 * step.seconds * scale, -0.55, name, fontsize=8, va="center")
    axes.set_yticks(range(len(lanes)), [str(rank) for rank in lanes])
    axes.set_ylabel("rank")
    axes.set_xlabel(f"{unit}; computing {busy / step.seconds:.0%} of the time")
    handles = [
        Patch(color=COMPUTE, label="kernel"),
        Patch(color=COMPUTE_NEXT, label="kernel, odd stages"),
        Patch(color=KEYS, label="keys arrive"),
        Patch(color=HOME, label="gradients, results"),
    ]
    if len(plan.q_routes):
        handles.insert(3, Patch(color=QUERIES, label="queries arrive"))
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.45, -0.2), ncols=2, borderaxespad=0)


def _draw_pass(axes: Axes, timeline: PassTimeline, lanes: list[int], offset: float, scale: float) -> None:
    for lane, rank in enumerate(lanes):
        for span in timeline.compute:
            start, end = span.starts[rank] * scale + offset, span.ends[rank] * scale + offset
            draw_bar(axes, start, end, lane - 0.32, 0.4, stage_colour(int(span.name.split()[1])))
        for span in timeline.transfers:
            start, end = span.starts[rank] * scale + offset, span.ends[rank] * scale + offset
            draw_bar(axes, start, end, lane + 0.1, 0.2, transfer_colour(span.name))


def stage_colour(stage: int) -> str:
    """The colour of a stage's kernel: neighbouring stages are told apart."""
    return (COMPUTE, COMPUTE_NEXT)[stage % 2]


def transfer_colour(name: str) -> str:
    """The colour of an exchange, by what travels."""
    return {"keys": KEYS, "queries": QUERIES}.get(name.split()[0], HOME)


def draw_bar(axes: Axes, start: float, end: float, top: float, height: float, colour: Any) -> None:
    if end > start:
        axes.broken_barh([(start, end - start)], (top, height), facecolors=colour, linewidth=0)


def lanes_of(seconds: FloatArray) -> list[int]:
    """Ranks to show: all of few, else evenly spread ones with the slowest among them."""
    if len(seconds) <= LANES:
        return list(range(len(seconds)))
    spread = np.linspace(0, len(seconds) - 1, LANES).astype(int).tolist()
    slowest = int(seconds.argmax())
    if slowest not in spread:
        spread[int(np.argmin(np.abs(np.array(spread[1:-1]) - slowest))) + 1] = slowest
    return sorted(spread)


def _from_light() -> Any:
    """A map even in lightness whose light end can still be told from white."""
    return LinearSegmentedColormap.from_list("light to dark", mpl.colormaps["cividis_r"](np.linspace(0.08, 1, 256)))


def _steps(axes: Axes, ranks: NDArray[np.int64], values: FloatArray, colour: str, line: str, label: str) -> None:
    """One level for each rank; points where they would be too narrow to see."""
    if len(ranks) > 512:
        axes.plot(ranks, values, ".", markersize=1.2, color=colour, label=label, rasterized=True)
        axes.lines[-1].set_alpha(0.6)
    else:
        edges = np.append(ranks, len(ranks)) - 0.5
        axes.stairs(values, edges, color=colour, linewidth=1.3, linestyle=line, label=label, baseline=None)


def _legend(axes: Axes) -> None:
    axes.legend(loc="upper left", borderaxespad=0.2, handlelength=1.5, handletextpad=0.4, markerscale=5)


def _rank_axis(axes: Axes, cp_size: int) -> None:
    axes.set_xlim(-0.5, cp_size - 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.set_xlabel("rank")


def _samples(total: int, resolution: int) -> NDArray[np.int64]:
    """Up to `resolution` token indices: the middles of equal cells."""
    count = max(1, min(total, resolution))
    return ((np.arange(count) + 0.5) * max(total, 1) / count).astype(np.int64)


def _bytes(value: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} PB"
