"""`cpattn bench`: run one attention layer under any mask, and say where its time goes on every rank.

    cpattn bench --seqlen 8K                                                                  # one rank
    torchrun --nproc-per-node 4 -m cpattn.launch.cli bench --lengths 8K,3000,512 --trace out  # several
"""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from cpattn.planning.hardware import find_hardware
from cpattn.solver import (
    HARDWARE,
    Hardware,
    Heads,
    plan_report,
)

from .calibrate import calibrate, launched_ranks
from .options import (
    TORCH_NAMES,
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
from .predict import Prediction, predict

if TYPE_CHECKING:
    import torch

    from cpattn import AttnKey
    from cpattn.runtime.trace import Trace

_ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2}


class Dtypes(str, Enum):
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


def bench_command(
    mask: MaskOption = MaskName.causal,
    seqlen: SeqlenOption = "",
    lengths: LengthsOption = "",
    file: FileOption = None,
    window: WindowOption = None,
    block: BlockOption = None,
    heads: HeadsOption = "8:8",
    head_dim: HeadDimOption = 64,
    dtype: Annotated[Dtypes, typer.Option(help="Of q, k and v.")] = Dtypes.bf16,
    chunk_size: Annotated[int, typer.Option(help="Tokens by which ranks may differ.")] = 512,
    layout: LayoutOption = Layouts.balanced,
    schedule: ScheduleOption = Schedules.auto,
    num_stages: StagesOption = None,
    head_degree: Annotated[int, typer.Option(help="Ranks that share rows, each with some of the heads.")] = 1,
    keep_kv: Annotated[bool, typer.Option("--keep-kv", help="Keep fetched keys for backward.")] = False,
    wire: Annotated[str | None, typer.Option(help="8-bit rows on the wire: e4m3 or e5m2.")] = None,
    backend: Annotated[str, typer.Option(help="Local kernel.")] = "auto",
    repeats: Annotated[int, typer.Option(help="Steps that are measured, after two that are not.", min=1)] = 5,
    hardware: Annotated[
        str, typer.Option(help=f"For the prediction: measure, {', '.join(HARDWARE)}, or a file of cpattn calibrate.")
    ] = "measure",
    trace: Annotated[
        Path | None, typer.Option(help="Write trace.json, timeline.png, timeline.pdf and report.json here.")
    ] = None,
) -> None:
    """Run an attention layer, forward and backward, and show compute, transfers and exposed waits of every rank."""
    with launched_ranks() as (device, group):
        with answering():
            from cpattn import make_key

            require_folder("--trace", trace)
            spec = spec_of_options(mask, seqlen, lengths, file, window, block)
            shape = replace(heads_of_option(heads, head_dim), itemsize=_ITEMSIZE[dtype.value])
            key = make_key(
                spec,
                num_heads_q=shape.num_q,
                num_heads_kv=shape.num_kv,
                head_dim=shape.head_dim,
                cp_group=group,
                chunk_size=chunk_size,
                layout=layout.value,
                schedule=schedule.value,
                backend=backend,
                num_stages=num_stages,
                head_degree=head_degree,
                wire=wire,
                keep_kv=keep_kv,
            )
            inner = key if key.sharding is None else key.sharding.inner
            inner.bind(device, _torch_dtype(dtype))  # or it says why the backend does not serve it
            machine = _machine(hardware, shape, device)
        measured = measure(key, _torch_dtype(dtype), device, repeats)
        if measured is None:
            return
        predicted = predict(key.plan, key.options.head_degree, machine, shape)
        report = bench_report(key, measured, predicted, machine, _torch_dtype(dtype), device)
        _print(key, report, measured)
        if trace is not None:
            _write(trace, measured, predicted, report)


def measure(key: AttnKey, dtype: torch.dtype, device: torch.device, repeats: int) -> Trace | None:
    """A trace of some steps on rank 0, None elsewhere. Every rank begins each pass together, as `simulate` has it."""
    import torch
    import torch.distributed as dist

    import cpattn

    def rows(count: int, num_heads: int, head_dim: int) -> torch.Tensor:
        return torch.randn(count, num_heads, head_dim, device=device).to(dtype)

    q = rows(key.num_tokens, key.num_heads_q, key.head_dim).requires_grad_()
    k, v = (rows(key.num_keys, key.num_heads_kv, key.head_dim).requires_grad_() for _ in range(2))
    dout = rows(key.num_tokens, key.num_heads_q, key.head_dim_v)

    def together() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if key.cp_group is not None:
            dist.barrier(key.cp_group)

    def step() -> None:
        together()
        out = cpattn.attention(q, k, v, key)
        together()
        torch.autograd.grad(out, (q, k, v), dout)

    for _ in range(2):
        step()
    with cpattn.profile() as profile:
        for _ in range(repeats):
            step()
    return profile.gather(key.cp_group)


def bench_report(
    key: AttnKey,
    trace: Trace,
    predicted: Prediction,
    hardware: Hardware,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Any]:
    """What was run on what, the shares of every rank, and predictions; plain values for JSON."""
    import torch

    inner = key if key.sharding is None else key.sharding.inner
    report = plan_report(key.plan, heads=predicted.heads, hardware=hardware, chunk_size=key.options.planning.chunk_size)
    try:
        memory: dict[str, Any] | None = key.memory(dtype, device.type)._asdict()
    except ValueError:  # a kernel that cannot be run without data
        memory = None
    return {
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {platform.machine()}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": str(dtype).removeprefix("torch."),
        "backend": inner.bind(device, dtype).backend.name,
        "options": {name: _plain(value) for name, value in key.options.named().items()},
        "steps_s": _step_seconds(trace),
        "predicted_s": predicted.seconds,
        "hardware": json.loads(hardware.to_json()),
        "ranks": [{**share._asdict(), "exposed": share.exposed} for share in trace.shares()],
        "memory_of_rank_0": memory,
        "plan": report.to_dict(),
    }


def _step_seconds(trace: Trace) -> list[float]:
    """Seconds of each step: both passes, each from its first rank's start to its last rank's end."""
    passes: dict[str, list[float]] = {}
    for name in ("forward", "backward"):
        calls = zip(*([call for call in rank.calls if call.name == name] for rank in trace.ranks), strict=True)
        passes[name] = [max(c.end for c in same) - min(c.start for c in same) for same in calls]
    return [sum(step) for step in zip(*passes.values(), strict=True)]


def _print(key: AttnKey, report: dict[str, Any], trace: Trace) -> None:
    plan, steps = report["plan"], sorted(report["steps_s"])
    memory = report["memory_of_rank_0"]
    stated = f"{memory['forward']:,} bytes forward, {memory['backward']:,} backward" if memory else "not stated"
    print(
        f"{key.spec.total_seqlen:,} x {key.spec.seqlen_k:,} tokens on {key.cp_size} ranks ({report['machine']}, "
        f"{report['threads']} threads each), {report['dtype']}, backend {report['backend']}, "
        f"{plan['num_stages']} remote stages\n"
        f"{trace.table()}\n"
        f"step: {1e3 * steps[len(steps) // 2]:.3f} ms, median of {len(steps)} ({1e3 * steps[0]:.3f} to "
        f"{1e3 * steps[-1]:.3f}); predicted {1e3 * report['predicted_s']:.3f} ms\n"
        f"memory beyond inputs, rank 0: {stated}"
    )


def _write(folder: Path, trace: Trace, predicted: Prediction, report: dict[str, Any]) -> None:
    from .trace_pictures import draw_step

    folder.mkdir(parents=True, exist_ok=True)
    trace.save(folder / "trace.json")
    (folder / "report.json").write_text(json.dumps(report, indent=2, default=str) + "\n")
    drawn = draw_step(trace, predicted, folder, machine=report["machine"])
    for path in (folder / "trace.json", folder / "report.json", *drawn):
        Console(stderr=True).print(f"wrote {path}", highlight=False, markup=False)


def _machine(hardware: str, heads: Heads, device: torch.device) -> Hardware:
    """The hardware of an option; "measure" calibrates this one, which every rank takes part in."""
    if hardware != "measure":
        return find_hardware(hardware)
    return calibrate(heads, device=device.type, tokens=1 << 15 if device.type == "cuda" else 1 << 11)


def _plain(value: Any) -> Any:
    """An option's value for JSON."""
    return asdict(value) if isinstance(value, Hardware) else value


def _torch_dtype(dtype: Dtypes) -> torch.dtype:
    import torch

    found: torch.dtype = getattr(torch, TORCH_NAMES[dtype.value])
    return found
