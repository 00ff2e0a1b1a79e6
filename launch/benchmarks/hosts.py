"""Two hosts on one machine: network namespaces joined by a link of a chosen rate (Linux, root, `ip` and `tc`).

Half of the ranks run in each namespace, so that their traffic crosses the link and takes the time that it would take
on such a network. The rate is set with a token bucket filter at both ends.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence

from cpattn.launch.torchrun import num_cores, rank_command

_NAMES = ("cpattn-a", "cpattn-b")
_DEVICES = ("cpattn-va", "cpattn-vb")
_ADDRESSES = ("10.77.0.1", "10.77.0.2")
_PORT = 29577
# Seconds of the link's rate that pass unhindered before the bucket is empty, and that may wait in the queue.
_BURST_S, _QUEUE_S = 0.004, 0.05


def require_namespaces() -> None:
    """Check that namespaces can be made.

    Raises:
        RuntimeError: not root, or `ip` or `tc` is missing.
    """
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if os.geteuid() or missing:
        raise RuntimeError(
            f"two hosts need root and the tools ip and tc (uid {os.geteuid()}, missing: {missing or 'none'}): "
            f"run as root with iproute2 installed, or leave out --hosts"
        )


@contextlib.contextmanager
def two_hosts(mbit: float | None) -> Iterator[None]:
    """Two namespaces and the link between them; mbit: its rate in Mbit/s each way, None for as fast as it goes."""
    remove_namespaces(_NAMES)
    try:
        for name in _NAMES:
            call("ip", "netns", "add", name)
        call("ip", "link", "add", _DEVICES[0], "type", "veth", "peer", "name", _DEVICES[1])
        for name, device, address in zip(_NAMES, _DEVICES, _ADDRESSES, strict=True):
            call("ip", "link", "set", device, "netns", name)
            call("ip", "-n", name, "addr", "add", f"{address}/24", "dev", device)
            for up in (device, "lo"):
                call("ip", "-n", name, "link", "set", up, "up")
            if mbit is not None:
                burst = max(64_000, int(mbit * 1e6 / 8 * _BURST_S))
                limit = burst + max(256_000, int(mbit * 1e6 / 8 * _QUEUE_S))
                rate = ("rate", f"{mbit:.3f}mbit", "burst", str(burst), "limit", str(limit))
                call("ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", device, "root", "tbf", *rate)
        yield
    finally:
        remove_namespaces(_NAMES)


def run_on_hosts(module: str, args: Sequence[str], *, num_ranks: int) -> None:
    """`python -m module args` under torchrun, half of the ranks on each of the two hosts.

    Raises:
        subprocess.CalledProcessError: a host failed.
    """
    threads = str(max(1, num_cores() // num_ranks))
    hosts = []
    for rank, (name, device) in enumerate(zip(_NAMES, _DEVICES, strict=True)):
        env = {
            "OMP_NUM_THREADS": threads,
            "OMP_WAIT_POLICY": "PASSIVE",
            "GLOO_SOCKET_IFNAME": device,
            "TP_SOCKET_IFNAME": device,
        }
        torchrun = [
            "--nnodes=2",
            f"--node-rank={rank}",
            f"--nproc-per-node={num_ranks // 2}",
            f"--master-addr={_ADDRESSES[0]}",
            f"--master-port={_PORT}",
            *rank_command(module),
            *args,
        ]
        hosts.append((name, ["-m", "cpattn.launch.torchrun", *torchrun], env))
    run_in_namespaces(hosts, module)


def run_in_namespaces(commands: Sequence[tuple[str, Sequence[str], dict[str, str]]], module: str) -> None:
    """Python with arguments in namespaces, all at once, with variables added to the environment; waits for all.

    Raises:
        subprocess.CalledProcessError: one failed; it names the module.
    """
    processes = []
    try:
        for name, args, env in commands:
            command = ["ip", "netns", "exec", name, sys.executable, *args]
            processes.append(subprocess.Popen(command, env={**os.environ, **env}))
        codes = [process.wait() for process in processes]
    finally:
        for process in processes:
            process.terminate()
    if any(codes):
        raise subprocess.CalledProcessError(max(codes, key=abs), module)


def remove_namespaces(names: Sequence[str]) -> None:
    """Where there are any of these names; links into them go too."""
    for name in names:
        subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL, check=False)


def call(*command: str) -> None:
    """Run a command that must not fail."""
    subprocess.run(command, check=True)
