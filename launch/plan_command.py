"""`cpattn plan`: plan any mask for any number of ranks, and say how good the plan is. No GPU, no torch."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console

from cpattn.masks.fragments import mixer_lines
from cpattn.masks.spec import AttnMaskSpec, lower_mask
from cpattn.planning.hardware import find_hardware
from cpattn.planning.head_degree import between_context_ranks, choose_head_degree, most_heads
from cpattn.planning.options import PlanOptions
from cpattn.planning.ready import plan_layers, with_layers
from cpattn.solver import (
    HARDWARE,
    Hardware,
    Heads,
    Plan,
    PlanReport,
    Rival,
    compare,
    plan_report,
    split_heads,
)

from .options import (
    MAX_CHUNKS,
    MAX_RANKS,
    DegreeOption,
    HeadOptions,
    JsonOption,
    LayoutOption,
    Layouts,
    MaskOptions,
    MixerOptions,
    ScheduleOption,
    Schedules,
    StagesOption,
    require_file,
    require_folder,
    require_module,
    takes_options,
)
from .predict import Prediction, predict
from .session import LIMIT_S, answering, telling, write_whole, writing
from .tables import Grid, show


@takes_options
def plan_command(
    mask: MaskOptions,
    ranks: Annotated[int, typer.Option(help="Ranks of the context-parallel group.")] = 8,
    ranks_per_node: Annotated[
        int | None, typer.Option(help="Ranks that share a node; 0: one level; default: the hardware's.")
    ] = None,
    *,
    heads: HeadOptions,
    mixers: MixerOptions,
    chunk_size: Annotated[
        int | None, typer.Option(help="Tokens by which ranks may differ; default: tokens / (16 ranks).")
    ] = None,
    imbalance: Annotated[
        float | None, typer.Option(help="Fail if a rank's work exceeds this many times the mean.")
    ] = None,
    layout: LayoutOption = Layouts.balanced,
    schedule: ScheduleOption = Schedules.auto,
    num_stages: StagesOption = None,
    head_degree: DegreeOption = 1,
    search_effort: Annotated[int, typer.Option(help="Search, in units of 100 ms; 0: as long as it pays.")] = 0,
    relays: Annotated[
        bool | None, typer.Option(help="Ranks pass on rows that others need as well; default: where it is faster.")
    ] = None,
    hardware: Annotated[str, typer.Option(help=f"{', '.join(HARDWARE)}, or a file of cpattn calibrate.")] = "h100",
    limit: Annotated[float, typer.Option(min=0, help="Seconds after which to give up; 0: never.")] = LIMIT_S,
    plot: Annotated[Path | None, typer.Option(help="Draw the plan into this folder, as PNG and PDF.")] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write the plan as one page for a browser: this file, no network.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Plan a mask for a group of ranks: balance, tokens and bytes, against bounds and alternatives."""
    with answering(limit), telling("planning", quiet=as_json):
        spec = mask.spec()
        require_folder("--plot", plot)
        if plot is not None:
            require_module("--plot", "matplotlib")
        require_file("--html", html)
        machine = find_hardware(hardware)
        options = PlanOptions(
            _chunk_size(chunk_size, spec, ranks),
            layout.value,
            schedule.value,
            num_stages,
            _nodes(ranks_per_node, ranks, machine),
            search_effort,
            machine,
            relays=relays,
        )
        asked = f"{mask.words()}; {heads.words()}"
        layers = mixers.read()
        answer = _answer(spec, ranks, heads.read(), options, head_degree)._replace(asked=asked)
        moved = (spec, answer.plan.q_placement, layers, answer.heads.itemsize, "--recurrence and --convolution")
        answer = answer._replace(mixers=tuple(mixer_lines(*moved)))
        _check_balance(answer.report, imbalance)
    if as_json:
        print(json.dumps(_values(answer), indent=2))
    else:
        show([_table(answer), _rivals(answer), *_advice(answer)])
    with writing(html or plot or Path()):
        for path in _written(answer, plot, html):
            Console(stderr=True).print(f"wrote {path}", highlight=False, markup=False)


class Answer(NamedTuple):
    """A plan, of context ranks where heads are split, and what is said of it.

    heads: of the whole group. asked: mask and heads in words.
    degrees: predicted seconds of each head degree that was planned, if several were. mixers: what they move, in words.
    """

    plan: Plan
    report: PlanReport
    step: Prediction
    heads: Heads
    hardware: Hardware
    cpu_seconds: float
    degrees: tuple[tuple[int, float], ...]
    asked: str = ""
    mixers: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """Of a step, the exchanges of heads included; NaN where the plan has too many routes to simulate."""
        return self.report.seconds + sum(map(sum, self.step.head_seconds))


def _answer(spec: AttnMaskSpec, ranks: int, heads: Heads, options: PlanOptions, degree: int | str) -> Answer:
    started = time.process_time()
    masks = with_layers(spec, None, 1, ())
    degrees: tuple[tuple[int, float], ...] = ()
    if degree == "auto":
        degree, (planned,), degrees = choose_head_degree(masks, heads, options, cp_size=ranks)
    else:
        degree = _degree(degree, ranks, heads)
        planned, = plan_layers(
            masks, most_heads(heads, degree), options.for_contexts(degree), cp_size=ranks // degree
        )
    seconds = time.process_time() - started
    hardware, plan, table = options.hardware, planned.plan, lower_mask(spec)
    step = predict(plan, degree, hardware, heads)
    report = plan_report(
        plan, mask=table, heads=step.heads, hardware=between_context_ranks(hardware, degree), rivals=False
    )
    if not spec.is_cross:
        rivals = compare(table, spec.total_seqlen, ranks, heads, hardware, options.chunk_size)
        report = replace(report, rivals=tuple(rivals))
    return Answer(plan, report, step, heads, hardware, seconds, degrees)


def _degree(asked: int | str, ranks: int, heads: Heads) -> int:
    degree = int(asked)
    if degree < 1 or ranks % degree:
        raise ValueError(f"--head-degree is {degree} and --ranks {ranks}: it must divide them")
    split_heads(heads.num_q, heads.num_kv, degree)  # or it says why not
    return degree


def _written(answer: Answer, plot: Path | None, html: Path | None) -> Iterator[Path]:
    """The files that are asked for, as they are written."""
    shown: dict[str, Any] = {"heads": answer.step.heads, "hardware": answer.hardware, "title": _title(answer)}
    if plot is not None:
        from .plan_pictures import draw_report

        yield from draw_report(answer.plan, plot, **shown)
    if html is not None:
        from .plan_page import page_of_plan

        write_whole(html, page_of_plan(answer.plan, **shown))
        yield html


def _title(answer: Answer) -> str:
    """What was planned, for pictures."""
    report, degree = answer.report, answer.step.head_degree
    tokens = f"{report.seqlen_q:,} x {report.seqlen_k:,} tokens"
    split = f", {degree} of them share rows (each with some of the heads)" if degree > 1 else ""
    return f"{tokens}, {answer.asked}; {report.cp_size * degree:,} ranks{split}; forward and backward"


def _values(answer: Answer) -> dict[str, Any]:
    """The report for JSON: of the context ranks where heads are split, seconds with the exchanges of heads."""
    return {
        **answer.report.to_dict(),
        "head_degree": answer.step.head_degree,
        "seconds": answer.seconds if math.isfinite(answer.seconds) else None,
        "head_degree_seconds": dict(answer.degrees),
        "planning_cpu_seconds": round(answer.cpu_seconds, 4),
        "mixers": list(answer.mixers),
    }


def _chunk_size(asked: int | None, spec: AttnMaskSpec, ranks: int) -> int:
    """What is asked for, or a sixteenth of a rank's tokens."""
    if not 1 <= ranks <= MAX_RANKS:
        raise ValueError(f"--ranks is {ranks}: it must be at least 1, and at most {MAX_RANKS:,}")
    chunk = max(1, spec.total_seqlen // (16 * ranks)) if asked is None else asked
    if chunk > 0 and max(spec.total_seqlen, spec.seqlen_k) > MAX_CHUNKS * chunk:
        raise ValueError(f"--chunk-size is {chunk}: {spec.total_seqlen:,} tokens have more than {MAX_CHUNKS:,} of them")
    return chunk


def _check_balance(report: PlanReport, limit: float | None) -> None:
    if limit is not None and not limit >= 1:
        raise ValueError(f"--imbalance is {limit}: the largest share is never below the mean, so it is at least 1")
    if limit is not None and report.imbalance > limit:
        raise ValueError(
            f"the plan's imbalance is {report.imbalance:.3f}, above --imbalance {limit}: allow more, or let token "
            f"counts differ more (--chunk-size), or search longer (--search-effort)"
        )


def _nodes(asked: int | None, ranks: int, hardware: Hardware) -> int | None:
    """Ranks in a node; what is asked for must divide, what the hardware has is used where it does."""
    if asked is None:
        asked = hardware.ranks_per_node if ranks % hardware.ranks_per_node == 0 else 0
    return asked or None


def _table(answer: Answer) -> Grid:
    report, plan, degree = answer.report, answer.plan, answer.step.head_degree
    kind = "queries and keys travel" if report.moves_queries else "keys travel"
    travel = ", rows travel on" if plan.relays else ""
    levels = f"{report.ranks_per_node} ranks to a node" if 1 < report.ranks_per_node < report.cp_size else "one level"
    on = f"{report.cp_size:,} ranks ({levels})"
    if degree > 1:
        on = f"{report.cp_size:,} x {degree} ranks ({levels}), rows below are those of {degree} ranks that share heads"
    table = Grid(
        ("", "mean", "max", "max / mean", "bound on max", "max / bound"),
        title=f"{report.seqlen_q:,} x {report.seqlen_k:,} tokens on {on}: {kind}{travel}",
        caption=f"{answer.asked}; {answer.hardware.name}; bytes and time: forward + backward; planned in "
        f"{answer.cpu_seconds:.2f} CPU s",
    )
    areas, tokens = plan.areas(), plan.q_placement.num_tokens
    _row(table, "visible pairs", areas.mean(), areas.max(), areas.mean())
    _row(table, "tokens owned", tokens.mean(), tokens.max(), None)
    worst_keys = None if report.moves_queries else report.kv_rows_worst_bound
    _row(table, "key rows received", report.kv_rows / report.cp_size, report.kv_rows_worst, worst_keys)
    _row(table, "key rows sent", report.kv_rows / report.cp_size, report.kv_rows_sent_worst, None)
    if report.moves_queries:
        _row(table, "query rows received", report.q_rows / report.cp_size, report.q_rows_worst, None)
    _row(table, "bytes received", report.bytes_mean, report.bytes_worst, report.bytes_worst_bound, _bytes)
    table.add_line()
    if report.kv_rows_bound and not report.moves_queries:
        _total(table, "key rows, all ranks", report.kv_rows, report.kv_rows_bound, _count)
    _total(table, "bytes, all ranks", report.bytes_total, report.bytes_bound, _bytes)
    if degree > 1:
        table.add("exchanges of heads", "", _seconds(answer.seconds - report.seconds), "", "-", "-")
    stages = "1 remote stage" if report.num_stages == 1 else f"{report.num_stages} remote stages"
    _total(table, f"step, {stages}", answer.seconds, report.seconds_bound, _seconds)
    return table


def _row(table: Grid, name: str, mean: float, most: float, bound: float | None, show: Any = None) -> None:
    show = show or _count
    ratio = f"{most / mean:.3f}" if mean else "-"
    known = bound is not None and bound > 0
    table.add(
        name,
        show(mean),
        show(most),
        ratio,
        show(bound) if known else "-",
        f"{most / bound:.2f}" if known else "-",  # type: ignore[operator]
    )


def _total(table: Grid, name: str, value: float, bound: float, show: Any) -> None:
    ratio = f"{value / bound:.2f}" if bound > 0 and value == value else "-"
    table.add(name, "", show(value), "", show(bound) if bound > 0 else "-", ratio)


def _rivals(answer: Answer) -> Grid:
    report = answer.report
    table = Grid(
        ("", "imbalance", "all ranks", "to ours", "busiest", "step", "note"),
        title="the same attention by other means: bytes received, predicted step",
        words=("note",),
    )
    ours = report.bytes_total
    mine = Rival("this plan", report.imbalance, ours, report.bytes_worst, answer.seconds)
    if answer.step.head_degree > 1:  # bytes of rows traded for heads do not compare with those of keys
        mine, ours = Rival("this plan", report.imbalance, math.nan, math.nan, answer.seconds), 0.0
    for rival in (mine, *report.rivals):
        table.add(rival.name, *_rival_cells(rival, ours), rival.note)
    return table


def _advice(answer: Answer) -> list[str]:
    """What mixers move; and where another way is predicted to be faster: which, by how much, and what to try."""
    lines = list(answer.mixers)
    if answer.degrees:
        shown = ", ".join(f"{degree}: {_seconds(seconds)}" for degree, seconds in answer.degrees)
        lines.append(f"head degrees planned: {shown}; taken: {answer.step.head_degree}")
    others = [rival for rival in answer.report.rivals if rival.seconds < 0.99 * answer.seconds]
    if others:
        best = min(others, key=lambda rival: rival.seconds)
        lines.append(
            f"The cost model puts {best.name} ahead here: {_seconds(best.seconds)} against {_seconds(answer.seconds)}."
        )
        if answer.step.head_degree == 1 and not answer.degrees:
            lines.append("--head-degree auto plans with heads split among ranks as well, and takes the fastest.")
    return lines


def _rival_cells(rival: Rival, ours: float) -> tuple[str, str, str, str, str]:
    """ours: bytes of this plan."""
    if rival.imbalance != rival.imbalance:  # it does not serve
        return ("-",) * 5
    ratio = f"{rival.bytes_total / ours:.2f}" if ours else "-"
    total, worst = _bytes(rival.bytes_total), _bytes(rival.bytes_worst)
    return f"{rival.imbalance:.3f}", total, ratio, worst, _seconds(rival.seconds)


def _count(value: float) -> str:
    """Up to nine digits; more as 8.59e9."""
    return f"{value:,.0f}" if value < 1e7 else f"{value:.4g}".replace("e+0", "e").replace("e+", "e")


def _bytes(value: float) -> str:
    """Bytes with a decimal unit."""
    if value != value:
        return "-"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.3g} PB"


def _seconds(value: float) -> str:
    if value != value:
        return "-"
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"
