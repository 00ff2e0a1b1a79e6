"""A cluster on one machine: a network namespace for each rank, joined by a switch, links of chosen rates (Linux, root).

Every rank's traffic is shaped on its way out and on its way in: to and from ranks of its node at one rate, to and from
others at another, as if a rank had one link inside its node and one between nodes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from cpattn.launch.benchmarks.hosts import call, remove_namespaces, run_in_namespaces
from cpattn.launch.torchrun import rank_command

_SWITCH, _BRIDGE, _PORT = "cpattn-switch", "cpattn-br", 29578
# Bytes that pass unhindered, one of the largest packets that a virtual link carries, and that may wait: no packet is
# dropped, since a virtual link that drops waits for a retransmission longer than any step.
_BURST, _QUEUE = 1 << 16, 1 << 28
# No probing for bandwidth, which these links do not bear well, and a window of some milliseconds.
_TCP = (
    "net.ipv4.tcp_congestion_control=reno",
    "net.ipv4.tcp_slow_start_after_idle=0",
    "net.ipv4.tcp_rmem=4096 131072 524288",
)


@contextlib.contextmanager
def cluster(num_ranks: int, ranks_per_node: int, within_mbit: float, across_mbit: float) -> Iterator[None]:
    """Namespaces and links of so many ranks; rates in Mbit/s each way."""
    names = (_SWITCH, *map(_host, range(num_ranks)))
    remove_namespaces(names)
    try:
        call("ip", "netns", "add", _SWITCH)
        call("ip", "-n", _SWITCH, "link", "add", _BRIDGE, "type", "bridge")
        call("ip", "-n", _SWITCH, "link", "set", _BRIDGE, "up")
        for rank in range(num_ranks):
            host, plug, socket = _host(rank), _device(rank), f"{_device(rank)}s"
            call("ip", "netns", "add", host)
            call("ip", "link", "add", plug, "netns", host, "type", "veth", "peer", "name", socket, "netns", _SWITCH)
            for setting in _TCP:
                call("ip", "netns", "exec", host, "sysctl", "-q", "-w", setting)
            call("ip", "-n", host, "addr", "add", f"{_address(rank)}/24", "dev", plug)
            call("ip", "-n", _SWITCH, "link", "set", socket, "master", _BRIDGE)
            for name, up in ((host, "lo"), (host, plug), (_SWITCH, socket)):
                call("ip", "-n", name, "link", "set", up, "up")
            others = [other for other in range(num_ranks) if other // ranks_per_node != rank // ranks_per_node]
            for name, device, side in ((host, plug, "dst"), (_SWITCH, socket, "src")):
                _shape(name, device, within_mbit, across_mbit, [(side, _address(other)) for other in others])
        yield
    finally:
        remove_namespaces(names)


def run_on_cluster(module: str, args: Sequence[str], *, num_ranks: int, ranks_per_node: int) -> None:
    """`python -m module args` as ranks of the cluster, one in each namespace, one thread each.

    Raises:
        subprocess.CalledProcessError: a rank failed.
    """
    ranks = []
    for rank in range(num_ranks):
        env = {
            "RANK": str(rank),
            "WORLD_SIZE": str(num_ranks),
            "LOCAL_RANK": str(rank % ranks_per_node),
            "LOCAL_WORLD_SIZE": str(ranks_per_node),
            "MASTER_ADDR": _address(0),
            "MASTER_PORT": str(_PORT),
            "GLOO_SOCKET_IFNAME": _device(rank),
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
        }
        ranks.append((_host(rank), [*rank_command(module), *args], env))
    run_in_namespaces(ranks, module)


def _shape(name: str, device: str, within: float, across: float, far: list[tuple[str, str]]) -> None:
    """Two classes of a token bucket hierarchy: the slow one for packets to or from the addresses in `far`."""
    tc = ("ip", "netns", "exec", name, "tc")
    call(*tc, "qdisc", "add", "dev", device, "root", "handle", "1:", "htb", "default", "1")
    for number, mbit in ((1, within), (2, across)):
        burst = ("burst", str(_BURST), "cburst", str(_BURST), "quantum", str(_BURST))
        rate = ("rate", f"{mbit:.3f}mbit", "ceil", f"{mbit:.3f}mbit", *burst)
        call(*tc, "class", "add", "dev", device, "parent", "1:", "classid", f"1:{number}", "htb", *rate)
        call(*tc, "qdisc", "add", "dev", device, "parent", f"1:{number}", "bfifo", "limit", str(_QUEUE))
    # Acknowledgements do not wait behind data of the other direction: IP packets of less than 128 bytes.
    call(
        *tc,
        "class",
        "add",
        "dev",
        device,
        "parent",
        "1:",
        "classid",
        "1:3",
        "htb",
        "rate",
        "10gbit",
        "quantum",
        str(_BURST),
    )
    short = ("u32", "match", "u16", "0x0000", "0xff80", "at", "2", "flowid", "1:3")
    call(*tc, "filter", "add", "dev", device, "protocol", "ip", "parent", "1:", "prio", "1", *short)
    for side, address in far:
        match = ("u32", "match", "ip", side, f"{address}/32", "flowid", "1:2")
        call(*tc, "filter", "add", "dev", device, "protocol", "ip", "parent", "1:", "prio", "2", *match)


def _host(rank: int) -> str:
    return f"cpattn-r{rank}"


def _device(rank: int) -> str:
    return f"cpattn{rank}"


def _address(rank: int) -> str:
    return f"10.78.0.{rank + 1}"
