"""A measured attention call beside its prediction: what each rank computes, moves and waits for, on one time scale."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from cpattn.runtime.trace import Call, Span, Trace
from cpattn.solver import PassTimeline

from .plan_pictures import COMPUTE, HOME, KEYS, QUERIES, STYLE, draw_bar, lanes_of, stage_colour, transfer_colour
from .predict import Prediction

# What a thread does differs in lightness, too: copies are darkest, waiting is lightest.
WAIT, COPIES, HEAD_EXCHANGES = "#FFD3BF", "#404040", "#F0E442"
# Top and height of the bar of compute and of that of the link, within a rank's lane.
_THREAD, _LINK = (-0.34, 0.42), (0.12, 0.2)


class Bar(NamedTuple):
    """Something that a rank does, in seconds from the start of the pass. on_link: below, beside what it computes."""

    start: float
    end: float
    colour: str
    on_link: bool = False


class PassBars(NamedTuple):
    """One pass: the bars of each rank, the seconds of the slowest, and those waited by the mean rank."""

    ranks: tuple[tuple[Bar, ...], ...]
    seconds: float
    waited: float


def draw_step(trace: Trace, predicted: Prediction, folder: Path, *, machine: str) -> list[Path]:
    """Draw the median of the traced steps over the predicted one, as folder/timeline.png and .pdf; the files written.

    Args:
        trace: of calls of one key, forward and backward in turn on every rank.
        machine: what it was measured on.
    """
    measured = measured_step(trace)
    model = tuple(
        around_attention(predicted_bars(timeline), *seconds, degree=predicted.head_degree)
        for timeline, seconds in zip(predicted.attention, predicted.head_seconds, strict=True)
    )
    longest = max(sum(p.seconds for p in step) for step in (measured, model))
    unit, scale = ("s", 1.0) if longest > 2 else ("ms", 1e3) if longest > 2e-3 else ("us", 1e6)
    lanes = lanes_of(np.array([rank[-1].end if rank else 0.0 for rank in measured[1].ranks]))
    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 1.5 + 0.62 * len(lanes)), layout="constrained")
        FigureCanvasAgg(figure)
        above, below = figure.subplots(2, 1, sharex=True)
        _draw(above, measured, lanes, scale, f"a  measured on {machine}", unit)
        _draw(below, model, lanes, scale, "b  predicted by the cost model", unit)
        below.set_xlabel(f"time, {unit}")
        below.set_xlim(0, 1.01 * longest * scale)
        below.xaxis.set_major_locator(MaxNLocator(9))
        shown = {bar.colour for part in measured for rank in part.ranks for bar in rank}
        figure.legend(handles=_key(shown), loc="outside lower center", ncols=6, columnspacing=1.2, handlelength=1.3)
        paths = [folder / "timeline.png", folder / "timeline.pdf"]
        for path in paths:
            figure.savefig(path)
    return paths


def measured_step(trace: Trace) -> tuple[PassBars, PassBars]:
    """Forward and backward of the step whose length is the median of those traced (the lower of two)."""
    passes = []
    for name in ("forward", "backward"):
        calls = ([call for call in rank.calls if call.name == name] for rank in trace.ranks)
        passes.append([measured_bars(same) for same in zip(*calls, strict=True)])
    steps = sorted(zip(*passes, strict=True), key=lambda step: sum(p.seconds for p in step))
    forward, backward = steps[(len(steps) - 1) // 2]
    return forward, backward


def measured_bars(calls: tuple[Call, ...]) -> PassBars:
    """The bars of one pass from each rank's call, from the moment at which the first began."""
    first = min(call.start for call in calls)
    ranks = tuple(tuple(_bar_of(span, first) for span in call.spans) for call in calls)
    waited = sum(call.seconds_of("wait") for call in calls) / len(calls)
    return PassBars(ranks, max(call.end for call in calls) - first, waited)


def predicted_bars(timeline: PassTimeline) -> PassBars:
    """The same of a simulated pass; a rank waits where it neither computes nor copies before it is done."""
    ranks = tuple(tuple(_predicted_of(timeline, rank)) for rank in range(len(timeline.seconds)))
    waits = [bar.end - bar.start for rank in ranks for bar in rank if bar.colour == WAIT]
    return PassBars(ranks, float(timeline.seconds.max()), sum(waits) / max(len(ranks), 1))


def around_attention(attention: PassBars, before: float, after: float, *, degree: int) -> PassBars:
    """A pass of context ranks as that of their parts, with the waits for head exchanges before and after it.

    before, after: seconds of the two exchanges; the second begins when the last rank is done.
    degree: parts of a context rank; with one part there are no exchanges.
    """
    if degree == 1:
        return attention
    begin, end = before + attention.seconds, before + attention.seconds + after
    trades = (Bar(0.0, before, HEAD_EXCHANGES, on_link=True), Bar(begin, end, HEAD_EXCHANGES, on_link=True))
    ranks, waited = [], attention.waited + before
    for bars in attention.ranks:
        later = [bar._replace(start=bar.start + before, end=bar.end + before) for bar in bars]
        done = max((bar.end for bar in later if not bar.on_link), default=before)
        ranks += [(Bar(0.0, before, WAIT), *later, Bar(done, end, WAIT), *trades)] * degree
        waited += (end - done) / len(attention.ranks)
    return PassBars(tuple(ranks), end, waited)


def _predicted_of(timeline: PassTimeline, rank: int) -> Iterator[Bar]:
    colours = [stage_colour(int(span.name.split()[1])) for span in timeline.compute] + [COPIES] * len(timeline.copies)
    spans = (*timeline.compute, *timeline.copies)
    busy = [Bar(float(s.starts[rank]), float(s.ends[rank]), c) for s, c in zip(spans, colours, strict=True)]
    now = 0.0
    for bar in sorted(busy):
        if bar.start > now:
            yield Bar(now, bar.start, WAIT)
        yield bar
        now = max(now, bar.end)
    if timeline.seconds[rank] > now:
        yield Bar(now, float(timeline.seconds[rank]), WAIT)
    for span in timeline.transfers:
        yield Bar(float(span.starts[rank]), float(span.ends[rank]), transfer_colour(span.name), on_link=True)


def _bar_of(span: Span, first: float) -> Bar:
    if span.thread == "transfer":
        of_heads = span.name.startswith(("heads of ", "rows of "))
        colour = HEAD_EXCHANGES if of_heads else transfer_colour(span.name)
        return Bar(span.start - first, span.end - first, colour, on_link=True)
    busy = stage_colour(span.stage or 0) if span.name == "kernel" else COPIES
    return Bar(span.start - first, span.end - first, WAIT if span.thread == "wait" else busy)


def _draw(axes: Axes, step: tuple[PassBars, ...], lanes: list[int], scale: float, title: str, unit: str) -> None:
    total = sum(p.seconds for p in step)
    waited = sum(p.waited for p in step) / total if total else 0.0
    axes.set_title(f"{title}: {_digits(total * scale)} {unit}, exposed communication {waited:.1%}", pad=14)
    offset = 0.0
    for name, part in zip(("forward", "backward"), step, strict=True):
        for lane, rank in enumerate(lanes):
            for bar in part.ranks[rank]:
                top, height = _LINK if bar.on_link else _THREAD
                draw_bar(axes, (offset + bar.start) * scale, (offset + bar.end) * scale, lane + top, height, bar.colour)
        axes.axvline(offset * scale, color="0.2", linewidth=0.7)
        axes.text(offset * scale, -0.5, f" {name}", fontsize=7, va="bottom")
        offset += part.seconds
    axes.axvline(offset * scale, color="0.2", linewidth=0.7)
    axes.set_ylim(len(lanes) - 0.5, -0.5)
    axes.set_yticks(range(len(lanes)), [f"rank {rank}" for rank in lanes])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def _digits(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _key(shown: set[str]) -> list[Patch]:
    named = [
        (COMPUTE, "kernel (shades: stages)"),
        (COPIES, "packing, reducing"),
        (WAIT, "waiting"),
        (KEYS, "keys and values travel"),
        (QUERIES, "queries travel"),
        (HOME, "gradients, results travel"),
        (HEAD_EXCHANGES, "rows traded for heads"),
    ]
    rare = {QUERIES, HEAD_EXCHANGES} - shown
    return [Patch(color=colour, label=label) for colour, label in named if colour not in rare]
