"""`cpattn calibrate`: measure the numbers of the cost model on this machine and write them to a file.

    cpattn calibrate --out hardware.json                # the kernel, on one device
    cpattn calibrate --out hardware.json --ranks 8      # the links as well; over several nodes under torchrun

Rank 0's numbers are the ones that count and are sent to all: what steers a plan must be equal on all ranks.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
import typer
from rich.console import Console

from cpattn.solver import Hardware, Heads, Link, TransportTimes

from .options import JsonOption, RanksOption, heads_of_option, require_file, takes_options
from .session import Tell, answering, launched_ranks, num_ranks, start_ranks, telling, write_whole, writing
from .tables import Grid, show
from .torchrun import num_cores

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

# Exchanges of these sizes, bytes for each peer: the small one gives the latency, the large one the rate.
_SMALL, _LARGE = 1 << 10, 4 << 20
# Transports are compared at these sizes, bytes for each peer.
_PEER_BYTES = (1 << 12, 1 << 16, 1 << 20, 1 << 23)
_LEAST_TOKENS = 256
# A link that was not measured: no slower than memory, so that it never decides.
_NO_LINK = Link(0.0, 1e12)


@takes_options
def calibrate_command(
    ranks: RanksOption = None,
    out: Annotated[Path | None, typer.Option(help="Write the result here, for cpattn plan --hardware.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of the largest kernel measured; 0: 2K on CPU, 32K on CUDA.")] = 0,
    heads: Annotated[str, typer.Option(help="Query and key heads, q:kv.")] = "8:8",
    head_dim: Annotated[int, typer.Option(help="Dim of a head.")] = 64,
    as_json: JsonOption = False,
) -> None:
    """Measure the kernel, copies and, on several ranks, the links and transports of this machine.

    The kernel is measured in bf16 on CUDA and in fp32 on the CPU.
    """
    with answering():
        shape = heads_of_option(heads, head_dim)
        if tokens and tokens < _LEAST_TOKENS:
            raise ValueError(f"--tokens is {tokens}: give at least {_LEAST_TOKENS}, or 0 for the default")
        require_file("--out", out)
        if start_ranks(ranks):
            return
    parts = parts_of_calibration(num_ranks(ranks))
    with answering(), launched_ranks() as (device, group), telling("calibrating", parts, quiet=as_json) as tell:
        cuda = device.type == "cuda"
        shape = replace(shape, itemsize=2 if cuda else 4)
        hardware = calibrate(shape, device=device.type, tokens=tokens or (1 << 15 if cuda else 1 << 11), tell=tell)
        if group is not None and group.rank() > 0:
            return
    if out is not None:
        with writing(out):
            write_whole(out, hardware.to_json() + "\n")
    if as_json:
        print(hardware.to_json())
    else:
        _print(hardware, linked=group is not None)
    if out is not None:
        Console(stderr=True).print(f"wrote {out}", highlight=False, markup=False)


def _print(hardware: Hardware, *, linked: bool) -> None:
    grid = Grid(("", "measured"), title=f"{hardware.name}; {hardware.source}")
    grid.add("kernel, forward", f"{hardware.forward_flops / 1e9:,.1f} GFLOP/s")
    grid.add("kernel, backward", f"{hardware.backward_flops / 1e9:,.1f} GFLOP/s")
    grid.add("a kernel call", f"{1e6 * hardware.launch_s:,.1f} us")
    grid.add("a rectangle of a mask", f"{1e6 * hardware.slice_s:,.1f} us")
    grid.add("rows gathered", f"{hardware.copy_bytes_per_s / 1e9:,.2f} GB/s")
    if linked:
        for name, link in (("link in a node", hardware.within), ("link between nodes", hardware.across)):
            grid.add(name, f"{link.bytes_per_s / 1e9:,.2f} GB/s, {1e6 * link.latency_s:,.1f} us")
    show([grid])
    if not linked:
        show(["The links were not measured, on one process there are none: plans take them to be free. Give --ranks."])


def calibrate(
    heads: Heads, *, device: str, tokens: int, group: dist.ProcessGroup | None = None, tell: Tell = lambda now: None
) -> Hardware:
    """Measure this machine; every rank of the group (or of the default one) calls it and gets rank 0's numbers.

    Args:
        heads: of the kernel measured; itemsize 2 is bf16, 4 fp32.
        device: "cpu" or "cuda".
        tokens: of the largest mask measured, at least 256.
        tell: called with the name of each part once it is measured, `parts_of_calibration` times.
    """
    import torch
    import torch.distributed as dist

    together = dist.is_available() and dist.is_initialized()
    dtype = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[heads.itemsize]
    kernel = _fit_kernel(heads, torch.device(device), dtype, tokens, tell)
    within, across, per_node = _links(group, torch.device(device)) if together else (_NO_LINK, _NO_LINK, 1)
    tell("links")
    transports = measure_transports(group, torch.device(device), tell=tell) if together else ()
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    hardware = Hardware(
        name=name,
        forward_flops=kernel.forward_flops,
        backward_flops=kernel.backward_flops,
        slice_s=kernel.slice_s,
        launch_s=kernel.launch_s,
        copy_bytes_per_s=measure_copy_rate(torch.device(device)),
        within=within,
        across=across,
        ranks_per_node=per_node,
        source=f"cpattn calibrate, torch {torch.__version__}, {heads}, {tokens} tokens"
        + ("" if together else "; links not measured (one process): taken to be free"),
        transports=transports,
        transfer_load=_transfer_load(group) if together and device == "cpu" else 0.0,  # on CUDA it is not measured
        hops_by_host=device == "cpu",  # gloo
    )
    if together:
        first = dist.get_global_rank(group, 0) if group is not None else 0
        text = [hardware.to_json()]
        dist.broadcast_object_list(text, src=first, group=group)
        hardware = Hardware.from_json(text[0])
    return hardware


def parts_of_calibration(num_ranks: int) -> int:
    """How often `calibrate` tells of a part that it has measured: kernels, links, and pairs of transports."""
    return len(_kernel_masks(_LEAST_TOKENS)) + 1 + len(_peer_counts(num_ranks)) * len(_PEER_BYTES)


class Kernel(NamedTuple):
    """Fitted speeds of the local kernel."""

    forward_flops: float
    backward_flops: float
    slice_s: float
    launch_s: float


def _kernel_masks(tokens: int) -> list[list[int]]:
    """Lengths of documents: one and many, so that calls and slices can be told from work."""
    return [[tokens], [tokens // 2], [tokens // 4], [tokens // 16] * 16, [tokens // 64] * 16]


def _fit_kernel(heads: Heads, device: torch.device, dtype: torch.dtype, tokens: int, tell: Tell) -> Kernel:
    """Fit launch + slices * slice_s + FLOP / rate to masks of one and of many documents."""
    rows, forward, backward = [], [], []
    for lengths in _kernel_masks(tokens):
        area = sum(n * (n + 1) // 2 for n in lengths)
        f, b = _kernel_seconds(lengths, heads, device, dtype)
        rows.append((1.0, float(len(lengths)), float(area)))
        forward.append(f)
        backward.append(b)
        tell("the kernel")
    launch, per_slice, pair = _least_squares(np.array(rows), np.array(forward))
    b_launch, b_slice, b_pair = _least_squares(np.array(rows), np.array(backward))
    return Kernel(
        heads.forward_flop / pair, heads.backward_flop / b_pair, (per_slice + b_slice) / 2, (launch + b_launch) / 2
    )


def _least_squares(rows: np.ndarray, seconds: np.ndarray) -> tuple[float, float, float]:
    """Coefficients of at least 0 with the smallest relative error: columns that come out negative are left out."""
    columns = [0, 1, 2]
    while True:
        scaled = rows[:, columns] / seconds[:, None]
        found = np.linalg.lstsq(scaled, np.ones(len(seconds)), rcond=None)[0]
        if (found >= 0).all() or len(columns) == 1:
            result = dict(zip(columns, np.maximum(found, 0.0).tolist(), strict=True))
            return result.get(0, 0.0), result.get(1, 0.0), max(result.get(2, 0.0), 1e-18)
        # The work itself always counts.
        candidates = [at for at, column in enumerate(columns) if column != 2]
        del columns[min(candidates, key=lambda at: found[at])]


def _kernel_seconds(lengths: list[int], heads: Heads, device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Seconds of forward and backward of packed causal documents on one rank."""
    import torch

    import cpattn

    spec = cpattn.AttnMaskSpec.varlen(lengths)
    key = cpattn.make_key(
        spec, num_heads_q=heads.num_q, num_heads_kv=heads.num_kv, head_dim=heads.head_dim, head_dim_v=heads.head_dim_v
    )
    shapes = [(heads.num_q, heads.head_dim), (heads.num_kv, heads.head_dim), (heads.num_kv, heads.head_dim_v)]
    options: dict[str, Any] = {"device": device, "dtype": dtype, "requires_grad": True}
    q, k, v = (torch.randn(spec.total_seqlen, *shape, **options) for shape in shapes)
    out: Any = cpattn.attention(q, k, v, key)
    dout = torch.randn_like(out)

    def backward() -> None:
        torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)

    return _seconds(lambda: cpattn.attention(q, k, v, key), device), _seconds(backward, device)


def _seconds(run: Callable[[], Any], device: torch.device, repeats: int = 5) -> float:
    """The least time of a few runs: other work on the machine only ever adds."""
    import torch

    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def measure_copy_rate(device: torch.device) -> float:
    """Bytes of rows per second that can be gathered into a buffer."""
    import torch

    rows = torch.randn(1 << 14, 256, device=device)
    index = torch.arange(0, 1 << 14, 2, device=device)
    return rows[index].numel() * rows.element_size() / _seconds(lambda: rows.index_select(0, index), device)


def _links(group: dist.ProcessGroup | None, device: torch.device) -> tuple[Link, Link, int]:
    """Links within a node and between nodes, and ranks in a node, by LOCAL_WORLD_SIZE."""
    import torch.distributed as dist

    size = dist.get_world_size(group)
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    if group is not None or size % per_node:
        per_node = size
    if per_node in (1, size):
        link = measure_link(group, device)
        return link, link, per_node
    rank = dist.get_rank()
    within = [dist.new_group(list(range(a, a + per_node))) for a in range(0, size, per_node)][rank // per_node]
    across = [dist.new_group(list(range(a, size, per_node))) for a in range(per_node)][rank % per_node]
    return measure_link(within, device), measure_link(across, device), per_node


def measure_link(group: dist.ProcessGroup | None, device: torch.device, large: int = _LARGE) -> Link:
    """Fit latency and rate of one rank's link from all-to-alls of two sizes, all ranks at once.

    Args:
        large: bytes for each peer in the larger exchange.
    """
    import torch
    import torch.distributed as dist

    peers = dist.get_world_size(group) - 1
    if peers < 1:
        return _NO_LINK
    points = []
    for nbytes in (_SMALL, large):
        send = torch.zeros((peers + 1) * nbytes, dtype=torch.uint8, device=device)
        splits = [nbytes] * (peers + 1)
        splits[dist.get_rank(group)] = 0
        received = torch.empty(peers * nbytes, dtype=torch.uint8, device=device)
        send = send[: peers * nbytes]
        times = []
        for _ in range(6):
            dist.barrier(group)
            start = time.perf_counter()
            dist.all_to_all_single(received, send, splits, splits, group=group)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        points.append((peers * nbytes, min(times[1:])))
    (b0, t0), (b1, t1) = points
    slope = max(t1 - t0, 1e-9) / (b1 - b0)
    return Link(max(t0 - b0 * slope, 0.0), 1 / slope)


def _transfer_load(group: dist.ProcessGroup | None, repeats: int = 6) -> float:
    """Share of an exchange's time in which its threads keep a core busy; 0 where there are cores for them."""
    import torch
    import torch.distributed as dist

    size = dist.get_world_size(group)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    if size < 2 or here * (torch.get_num_threads() + 1) <= num_cores():
        return 0.0
    send = torch.zeros(size * _LARGE, dtype=torch.uint8)
    received = torch.empty_like(send)
    shares = []
    for _ in range(repeats):
        dist.barrier(group)
        wall, busy = time.perf_counter(), time.process_time() - time.thread_time()
        dist.all_to_all_single(received, send, group=group)
        busy = time.process_time() - time.thread_time() - busy
        shares.append(busy / (time.perf_counter() - wall))
    return float(np.clip(np.median(shares), 0.0, 1.0))


def measure_transports(
    group: dist.ProcessGroup | None,
    device: torch.device,
    sizes: Sequence[int] = _PEER_BYTES,
    repeats: int = 15,
    tell: Tell = lambda now: None,
) -> tuple[TransportTimes, ...]:
    """Time both transports on exchanges with one, half and all of the peers, in turns; rank 0's times on all ranks.

    Rank r sends to the next ranks after it, so that all ranks send and receive equally much.

    Args:
        sizes: bytes for each peer.
        tell: called after each exchange.
    """
    import torch.distributed as dist

    times = []
    for peers in _peer_counts(dist.get_world_size(group)):
        for nbytes in sizes:
            times.append(_transport_times(group, device, peers, nbytes, repeats))
            tell("transports")
    return tuple(times)


def _peer_counts(size: int) -> list[int]:
    """Of how many peers transports are compared in a group; none in a group of one."""
    return [] if size < 2 else sorted({1, max(size // 2, 1), size - 1})


def _transport_times(
    group: dist.ProcessGroup | None, device: torch.device, peers: int, nbytes: int, repeats: int
) -> TransportTimes:
    import torch
    import torch.distributed as dist

    from cpattn.collectives import RowRoutes, Transport, group_cast

    rank, size = dist.get_rank(group), dist.get_world_size(group)
    send_splits = tuple(int(0 < (to - rank) % size <= peers) for to in range(size))
    recv_splits = tuple(int(0 < (rank - sender) % size <= peers) for sender in range(size))
    row, index = torch.zeros(1, nbytes, dtype=torch.uint8, device=device), torch.zeros(peers, dtype=torch.int64)
    names: tuple[Transport, ...] = ("all_to_all", "p2p")
    routes = [RowRoutes(index.to(device), send_splits, recv_splits, True, name) for name in names]
    times: list[list[float]] = [[], []]
    for _ in range(repeats + 1):
        for mine, way in zip(times, routes, strict=True):
            dist.barrier(group)
            start = time.perf_counter()
            group_cast((row,), way, group or dist.group.WORLD).wait()
            if device.type == "cuda":
                torch.cuda.synchronize()
            mine.append(time.perf_counter() - start)
    # An exchange is over when the last rank has its rows. The first round opens connections; of the others the
    # least counts, as other work on the machine only ever adds.
    slowest = torch.tensor([mine[1:] for mine in times], dtype=torch.float64, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX, group=group)
    collective, direct = slowest.amin(1).tolist()
    return TransportTimes(peers / (size - 1), float(nbytes), collective, direct)
