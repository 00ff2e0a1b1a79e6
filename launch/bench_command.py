"""`cpattn bench`: run one attention layer under any mask, and say where its time goes on every rank.

    cpattn bench --seqlen 8K                                      # one rank
    cpattn bench --lengths 8K,3000,512 --ranks 4 --trace out      # four
"""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
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

from .calibrate import calibrate, parts_of_calibration
from .options import (
    BackendOption,
    Dtypes,
    JsonOption,
    LayerOptions,
    MaskOptions,
    RanksOption,
    RunHeadOptions,
    require_folder,
    require_module,
    takes_options,
)
from .predict import Prediction, predict
from .session import Tell, answering, launched_ranks, num_ranks, start_ranks, telling, writing

if TYPE_CHECKING:
    import torch

    from cpattn import AttnKey
    from cpattn.runtime.trace import Trace

# Steps before those that are measured.
_WARM_UP = 2


@takes_options
def bench_command(
    mask: MaskOptions,
    ranks: RanksOption = None,
    *,
    heads: RunHeadOptions,
    layer: LayerOptions,
    backend: BackendOption = "auto",
    repeats: Annotated[int, typer.Option(help="Steps that are measured, after two that are not.", min=1)] = 5,
    hardware: Annotated[
        str, typer.Option(help=f"For the prediction: measure, {', '.join(HARDWARE)}, or a file of cpattn calibrate.")
    ] = "measure",
    trace: Annotated[
        Path | None, typer.Option(help="Write trace.json, timeline.png, timeline.pdf and report.json here.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Run an attention layer, forward and backward, and show compute, transfers and exposed waits of every rank."""
    with answering():
        spec, shape = mask.spec(), heads.read()
        layer.require(shape, num_ranks(ranks))
        require_folder("--trace", trace)
        if trace is not None:
            require_module("--trace", "matplotlib")
        if hardware != "measure":
            find_hardware(hardware)
        if start_ranks(ranks):
            return
    with answering(), launched_ranks() as (device, group):
        key = layer.key(spec, shape, group, backend)
        inner = key if key.sharding is None else key.sharding.inner
        inner.bind(device, _torch_dtype(heads.dtype))  # or it says why the backend does not serve it
        machine = _machine(hardware, shape, device, quiet=as_json)
        with telling("measuring steps", repeats + _WARM_UP, quiet=as_json) as tell:
            measured = measure(key, _torch_dtype(heads.dtype), device, repeats, tell)
    if measured is None:
        return
    predicted = predict(key.plan, key.options.head_degree, machine, shape)
    report = bench_report(key, measured, predicted, machine, _torch_dtype(heads.dtype), device)
    if as_json:
        print(json.dumps(report, indent=2, default=str))
    else:
        _print(key, report, measured)
    if trace is not None:
        with writing(trace):
            _write(trace, measured, predicted, report)


def measure(key: AttnKey, dtype: torch.dtype, device: torch.device, repeats: int, tell: Tell) -> Trace | None:
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
        tell("")

    for _ in range(_WARM_UP):
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


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def _print(key: AttnKey, report: dict[str, Any], trace: Trace) -> None:
    plan, steps = report["plan"], sorted(report["steps_s"])
    memory = report["memory_of_rank_0"]
    stated = f"{memory['forward']:,} bytes forward, {memory['backward']:,} backward" if memory else "not stated"
    print(
        f"{key.spec.total_seqlen:,} x {key.spec.seqlen_k:,} tokens on {_counted(key.cp_size, 'rank')} "
        f"({report['machine']}, {_counted(report['threads'], 'thread')} each), {report['dtype']}, "
        f"backend {report['backend']}, {_counted(plan['num_stages'], 'remote stage')}\n"
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


def _machine(hardware: str, heads: Heads, device: torch.device, *, quiet: bool = False) -> Hardware:
    """The hardware of an option; "measure" calibrates this one, which every rank takes part in."""
    if hardware != "measure":
        return find_hardware(hardware)
    parts = parts_of_calibration(num_ranks(None))
    with telling("measuring this machine for the prediction", parts, quiet=quiet) as tell:
        return calibrate(heads, device=device.type, tokens=1 << 15 if device.type == "cuda" else 1 << 11, tell=tell)


def _plain(value: Any) -> Any:
    """An option's value for JSON."""
    return asdict(value) if isinstance(value, Hardware) else value


def _torch_dtype(dtype: Dtypes) -> torch.dtype:
    import torch

    found: torch.dtype = getattr(torch, dtype.torch_name)
    return found
