"""By which calls rows travel, from what was measured; and the hardware of a group."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch.distributed as dist

from cpattn.collectives import Transport, backend_of
from cpattn.planning.hardware import find_hardware
from cpattn.solver import DEFAULT_HARDWARE, HARDWARE, Hardware, Heads, Plan, RouteTable

TransportChoice = Literal["auto", "all_to_all", "p2p"]


def read_hardware(hardware: Hardware | str | Path | None, group: dist.ProcessGroup | None) -> Hardware:
    """What `find_hardware` finds; None goes by the group: gloo alone has CPU ranks, any other the default preset.

    Raises:
        ValueError: as `find_hardware` does.
    """
    if hardware is None:
        on_cpu = group is not None and backend_of(group, "cuda") in ("", "gloo")
        return HARDWARE["cpu"] if on_cpu else DEFAULT_HARDWARE
    return find_hardware(hardware)


def choose_transport(
    plan: Plan, heads: Heads, *, num_ranks: int, choice: TransportChoice, hardware: Hardware
) -> Transport:
    """How the rows of a plan travel: as asked, or by what was measured at its mean sparsity and size.

    Equal on all ranks, since the plan and `heads` are.

    Args:
        heads: of the rank with the most, as its rows travel.
        num_ranks: of the group; with head sharding more than the plan has.
    """
    if choice != "auto":
        return choice
    if not hardware.transports:  # nothing was measured: the routes need not be looked at
        return "all_to_all"
    exchanges = [_widest_hop(plan, hops) for hops in plan.key_hops() if len(hops[-1])]
    if not exchanges or num_ranks < 2:
        return "all_to_all"
    pairs = sum(len(np.unique(routes.dsts * plan.cp_size + routes.srcs)) for routes in exchanges)
    peers = pairs / len(exchanges) / plan.cp_size / (num_ranks - 1)
    peer_bytes = sum(routes.num_rows() for routes in exchanges) * heads.row_bytes().kv / max(pairs, 1)
    return hardware.transport_for(peers, peer_bytes)


def choose_head_transport(
    rows: float, heads: Heads, *, head_degree: int, num_ranks: int, choice: TransportChoice, hardware: Hardware
) -> Transport:
    """The same for the exchange of rows for heads, `rows` of them on a rank."""
    if choice != "auto":
        return choice
    peer_bytes = rows * heads.num_q * heads.head_dim * heads.itemsize / head_degree
    return hardware.transport_for((head_degree - 1) / (num_ranks - 1), peer_bytes)


def _widest_hop(plan: Plan, hops: tuple[RouteTable, ...]) -> RouteTable:
    """The hop that leaves the nodes; the one that delivers where there are none, or nothing leaves them."""
    if not 1 < plan.ranks_per_node < plan.cp_size:
        return hops[-1]
    return hops[-2] if len(hops[-2]) else hops[-1]
