"""`cpattn plan`: plan any mask for any number of ranks, and say how good the plan is. No GPU, no torch."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.table import Table

from cpattn.masks.spec import AttnMaskSpec, lower_mask
from cpattn.planning.hardware import find_hardware
from cpattn.planning.options import PlanOptions
from cpattn.planning.ready import plan_layers, with_layers
from cpattn.solver import (
    HARDWARE,
    Hardware,
    Heads,
    Plan,
    PlanReport,
    Rival,
    plan_report,
)

from .options import (
    LIMIT_S,
    MAX_CHUNKS,
    MAX_RANKS,
    BlockOption,
    FileOption,
    HeadDimOption,
    HeadsOption,
    LayoutOption,
    Layouts,
    LengthsOption,
    MaskName,
    MaskOption,
    ScheduleOption,
    Schedules,
    SeqlenOption,
    StagesOption,
    WindowOption,
    answering,
    heads_of_option,
    require_folder,
    spec_of_options,
)


def plan_command(
    mask: MaskOption = MaskName.causal,
    seqlen: SeqlenOption = "",
    lengths: LengthsOption = "",
    file: FileOption = None,
    window: WindowOption = None,
    block: BlockOption = None,
    ranks: Annotated[int, typer.Option(help="Ranks of the context-parallel group.")] = 8,
    ranks_per_node: Annotated[
        int | None, typer.Option(help="Ranks that share a node; 0: one level; default: the hardware's.")
    ] = None,
    heads: HeadsOption = "32:8",
    head_dim: HeadDimOption = 128,
    chunk_size: Annotated[
        int | None, typer.Option(help="Tokens by which ranks may differ; default: tokens / (16 ranks).")
    ] = None,
    imbalance: Annotated[
        float | None, typer.Option(help="Fail if a rank's work exceeds this many times the mean.")
    ] = None,
    layout: LayoutOption = Layouts.balanced,
    schedule: ScheduleOption = Schedules.auto,
    num_stages: StagesOption = None,
    search_effort: Annotated[int, typer.Option(help="Iterations of extra placement search.")] = 0,
    hardware: Annotated[str, typer.Option(help=f"{', '.join(HARDWARE)}, or a JSON file of cpattn calibrate.")] = "h100",
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    limit: Annotated[float, typer.Option(min=0, help="Seconds after which to give up; 0: never.")] = LIMIT_S,
    plot: Annotated[Path | None, typer.Option(help="Draw the plan into this folder, as PNG and PDF.")] = None,
) -> None:
    """Plan a mask for a group of ranks: balance, tokens and bytes, against bounds and alternatives."""
    with answering(limit):
        spec = spec_of_options(mask, seqlen, lengths, file, window, block)
        require_folder("--plot", plot)
        machine = find_hardware(hardware)
        options = PlanOptions(
            _chunk_size(chunk_size, spec, ranks),
            layout.value,
            schedule.value,
            num_stages,
            _nodes(ranks_per_node, ranks, machine),
            search_effort,
            machine,
        )
        answer = _answer(spec, ranks, heads_of_option(heads, head_dim), options)
        _check_balance(answer.report, imbalance)
    if as_json:
        print(json.dumps({**answer.report.to_dict(), "planning_cpu_seconds": round(answer.cpu_seconds, 4)}, indent=2))
    else:
        Console().print(_table(answer), _rivals(answer.report))
    if plot is not None:
        from cpattn.launch.plan_pictures import draw_report

        for path in draw_report(answer.plan, plot, heads=answer.heads, hardware=machine):
            Console(stderr=True).print(f"wrote {path}", highlight=False, markup=False)


class Answer(NamedTuple):
    plan: Plan
    report: PlanReport
    heads: Heads
    hardware: Hardware
    cpu_seconds: float


def _answer(spec: AttnMaskSpec, ranks: int, heads: Heads, options: PlanOptions) -> Answer:
    started = time.process_time()
    (planned,) = plan_layers(with_layers(spec, None, 1, ()), heads, options, cp_size=ranks)
    seconds = time.process_time() - started
    hardware, chunk_size = options.hardware, options.chunk_size
    report = plan_report(
        planned.plan, mask=lower_mask(spec), heads=heads, hardware=hardware, chunk_size=chunk_size
    )
    return Answer(planned.plan, report, heads, hardware, seconds)


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


def _table(answer: Answer) -> Table:
    report, plan = answer.report, answer.plan
    kind = "queries and keys travel" if report.moves_queries else "keys travel"
    levels = f"{report.ranks_per_node} ranks to a node" if 1 < report.ranks_per_node < report.cp_size else "one level"
    table = Table(
        title=f"{report.seqlen_q:,} x {report.seqlen_k:,} tokens on {report.cp_size:,} ranks ({levels}): {kind}",
        title_justify="left",
        caption=f"planned in {answer.cpu_seconds:.2f} CPU s; {answer.hardware.name}; bytes, time: forward + backward",
        caption_justify="left",
    )
    for heading in ("", "mean", "max", "max / mean", "bound on max", "max / bound"):
        table.add_column(heading, justify="left" if not heading else "right", no_wrap=not heading)
    areas, tokens = plan.areas(), plan.q_placement.num_tokens
    _row(table, "visible pairs", areas.mean(), areas.max(), areas.mean())
    _row(table, "tokens owned", tokens.mean(), tokens.max(), None)
    worst_keys = None if report.moves_queries else report.kv_rows_worst_bound
    _row(table, "key rows received", report.kv_rows / report.cp_size, report.kv_rows_worst, worst_keys)
    _row(table, "key rows sent", report.kv_rows / report.cp_size, report.kv_rows_sent_worst, None)
    if report.moves_queries:
        _row(table, "query rows received", report.q_rows / report.cp_size, report.q_rows_worst, None)
    _row(table, "bytes received", report.bytes_mean, report.bytes_worst, report.bytes_worst_bound, _bytes)
    table.add_section()
    if report.kv_rows_bound and not report.moves_queries:
        _total(table, "key rows, all ranks", report.kv_rows, report.kv_rows_bound, _count)
    _total(table, "bytes, all ranks", report.bytes_total, report.bytes_bound, _bytes)
    _total(table, f"step, {report.num_stages} remote stages", report.seconds, report.seconds_bound, _seconds)
    return table


def _row(table: Table, name: str, mean: float, most: float, bound: float | None, show: Any = None) -> None:
    show = show or _count
    ratio = f"{most / mean:.3f}" if mean else "-"
    known = bound is not None and bound > 0
    table.add_row(
        name,
        show(mean),
        show(most),
        ratio,
        show(bound) if known else "-",
        f"{most / bound:.2f}" if known else "-",  # type: ignore[operator]
    )


def _total(table: Table, name: str, value: float, bound: float, show: Any) -> None:
    ratio = f"{value / bound:.2f}" if bound > 0 and value == value else "-"
    table.add_row(name, "", show(value), "", show(bound) if bound > 0 else "-", ratio)


def _rivals(report: PlanReport) -> Table:
    table = Table(title="the same attention by other means: bytes received, predicted step", title_justify="left")
    for heading in ("", "imbalance", "all ranks", "to ours", "busiest", "step", "note"):
        table.add_column(heading, justify="left" if heading in ("", "note") else "right", no_wrap=heading != "note")
    ours = report.bytes_total
    mine = Rival("this plan", report.imbalance, ours, report.bytes_worst, report.seconds)
    for rival in (mine, *report.rivals):
        table.add_row(rival.name, *_rival_cells(rival, ours), rival.note)
    return table


def _rival_cells(rival: Rival, ours: float) -> tuple[str, str, str, str, str]:
    """ours: bytes of this plan."""
    if rival.bytes_total != rival.bytes_total:  # it does not serve
        return ("-",) * 5
    ratio = f"{rival.bytes_total / ours:.2f}" if ours else "-"
    total, worst = _bytes(rival.bytes_total), _bytes(rival.bytes_worst)
    return f"{rival.imbalance:.3f}", total, ratio, worst, _seconds(rival.seconds)


def _count(value: float) -> str:
    """Up to nine digits; more as 8.59e9."""
    return f"{value:,.0f}" if value < 1e7 else f"{value:.4g}".replace("e+0", "e").replace("e+", "e")


def _bytes(value: float) -> str:
    """Bytes with a decimal unit."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.3g} PB"


def _seconds(value: float) -> str:
    if value != value:
        return "-"
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"
