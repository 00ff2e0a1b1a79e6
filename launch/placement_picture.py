"""The picture of docs/placement.md: density, tops, fillers and division, of a placement that the solver makes.

    python -m cpattn.launch.placement_picture docs/images/placement.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cpattn.solver import UNBOUNDED, IntArray, Placement, SliceTable
from cpattn.solver.place.balance import AREA_LIMIT
from cpattn.solver.place.components import TokenPool, find_components
from cpattn.solver.place.density import DensityProfile
from cpattn.solver.place.divide import Allowed
from cpattn.solver.place.improve import Holdings, repack
from cpattn.solver.place.measure import kv_rows_received, rank_areas
from cpattn.solver.place.peel import place_peeled

from .plan_pictures import STYLE

# Packed causal documents on four ranks; a rank's colours also differ in grey.
LENGTHS, RANKS, CHUNK = (220, 150, 110, 80, 70, 60, 60, 30, 20), 4, 24
COLOURS = ("#0072B2", "#E69F00", "#F7E9A0", "#7F5FA0")
INK = ("white", "black", "black", "white")


def documents() -> SliceTable:
    """The mask."""
    ends = np.cumsum(LENGTHS)
    return SliceTable.from_columns(ends - LENGTHS, ends, ends - LENGTHS, ends, -UNBOUNDED, 0)


def peeled(table: SliceTable, total: int) -> Placement:
    """The placement that one peeling makes."""
    pool = TokenPool(DensityProfile.from_table(table, total), *find_components(table, total))
    return place_peeled(pool, cp_size=RANKS, chunk_size=CHUNK, most_area=AREA_LIMIT * table.area() / RANKS, lean=0.8)


def divided(table: SliceTable, before: Placement) -> Placement:
    """The same after pairs of ranks have divided anew what they hold, with the even tokens and areas that count."""
    total = before.total_seqlen
    tokens, areas = before.num_tokens, rank_areas(table, before)
    allowed = Allowed(int(tokens.min()), int(tokens.min()) + CHUNK, max(1.02 * areas.mean(), float(areas.max())))
    profile, (components, _) = DensityProfile.from_table(table, total), find_components(table, total)
    return repack(Holdings([before], profile, components, allowed), num_rounds=24)


def draw(path: Path) -> None:
    """Draw the picture."""
    table, total = documents(), sum(LENGTHS)
    before = peeled(table, total)
    after = divided(table, before)
    with mpl.rc_context({**STYLE, "font.size": 9, "axes.titlesize": 10, "xtick.labelsize": 8, "ytick.labelsize": 8}):
        figure = Figure(figsize=(6.8, 6.6), layout="constrained")
        FigureCanvasAgg(figure)
        top, middle, bottom = figure.subplots(3, 1, sharex=True)
        _draw_density(top, table, total)
        for axes, placement, title in (
            (middle, before, "2  Peel and fill"),
            (bottom, after, "3  Divide, pair after pair"),
        ):
            rows, areas = kv_rows_received(table, placement), rank_areas(table, placement)
            _draw_owners(axes, table, placement)
            axes.set_title(f"{title}: {rows.sum():,} rows travel, imbalance {areas.max() / areas.mean():.3f}")
        bottom.set_xlabel("token")
        for axes in (top, middle, bottom):
            axes.set_ylabel("keys seen")
            axes.set_xlim(0, total)
            axes.set_ylim(0, 1.25 * max(LENGTHS))
        figure.savefig(path)


def _density(table: SliceTable, tokens: IntArray) -> IntArray:
    """Keys seen by each token."""
    return DensityProfile.from_table(table, sum(LENGTHS)).density(tokens)


def _draw_density(axes: Axes, table: SliceTable, total: int) -> None:
    """Keys seen by each token, and the words for the parts of it."""
    tokens = np.arange(total)
    density = _density(table, tokens)
    axes.fill_between(tokens, density, color="#BBBBBB", linewidth=0)
    axes.axhline(density.mean(), color="black", linewidth=0.8, linestyle="--")
    axes.text(total - 2, density.mean() + 3, "mean", ha="right", va="bottom")
    axes.set_title("1  Density: keys that each token sees (nine packed documents)")
    notes = (
        ("top: dense, its\nrank needs all keys", (214, 214), (262, 232)),
        ("bottom:\nsparse", (30, 30), (16, 170)),
        ("small documents: fillers,\nno rows if whole", (735, 30), (560, 200)),
    )
    for text, at, place in notes:
        arrow = {"arrowstyle": "-", "linewidth": 0.8}
        axes.annotate(text, at, place, arrowprops=arrow, va="center")


def _draw_owners(axes: Axes, table: SliceTable, placement: Placement) -> None:
    """The density again, in the colour and with the number of the rank that owns each token."""
    starts = np.unique(np.concatenate([placement.starts, np.cumsum([0, *LENGTHS[:-1]])]))
    ends = np.append(starts[1:], placement.total_seqlen)
    for start, end, rank in zip(starts.tolist(), ends.tolist(), placement.owner_of(starts).tolist(), strict=True):
        tokens = np.arange(start, end + 1)
        density = _density(table, np.minimum(tokens, end - 1))
        axes.fill_between(tokens, density, color=COLOURS[rank], edgecolor="black", linewidth=0.6)
        high = int(density.max())
        inside = high > 75 and end - start > 16
        axes.text(
            (start + end) / 2 + (4 if inside else 0),
            0.3 * high if inside else high + 4,
            str(rank),
            ha="center",
            va="center" if inside else "bottom",
            color=INK[rank] if inside else "black",
            fontweight="bold",
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="the file to write; its ending names the format")
    draw(parser.parse_args().path)


if __name__ == "__main__":
    main()
