"""The scripts to copy: one node, and two nodes that meet at a host, in two network namespaces."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests_dist.support.namespaces import skip_without_namespaces
from tests_dist.support.pages import ROOT

SCRIPTS = ROOT / "launch" / "scripts"
PROGRAM = """
import os
import torch, torch.distributed as dist
import cpattn
dist.init_process_group("gloo")
spec = cpattn.AttnMaskSpec.varlen([300, 17])
key = cpattn.make_key(spec, num_heads_q=2, num_heads_kv=1, head_dim=8, cp_group=dist.group.WORLD, chunk_size=8)
torch.manual_seed(0)
q, k, v = (torch.randn(317, heads, 8, dtype=torch.float64) for heads in (2, 1, 1))
out = cpattn.undispatch(cpattn.attention(*(cpattn.dispatch(x, key) for x in (q, k, v)), key), key)
alone = cpattn.make_key(spec, num_heads_q=2, num_heads_kv=1, head_dim=8, cp_group="self")
torch.testing.assert_close(out, cpattn.attention(q, k, v, alone))
if dist.get_rank() == 0:
    print("ranks", dist.get_world_size(), "in a node", key.options.planning.ranks_per_node, flush=True)
dist.destroy_process_group()
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "train.py"
    path.write_text(PROGRAM)
    return path


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**kept, "PYTHON": sys.executable, "RANKS": "2", "OMP_NUM_THREADS": "1", **more}


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_bash(script: Path) -> None:
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0


@pytest.mark.nightly  # by default test_readme.py runs the quickstart with it
def test_one_node(program: Path) -> None:
    command = ["bash", str(SCRIPTS / "one_node.sh"), str(program)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "ranks 2 in a node None" in done.stdout


@pytest.mark.nightly
def test_two_nodes_meet(program: Path) -> None:
    """Two agents with two ranks each; each host knows nothing but the address of one of them."""
    from cpattn.launch.benchmarks.hosts import _ADDRESSES, _DEVICES, _NAMES, two_hosts

    script = str(SCRIPTS / "several_nodes.sh")
    skip_without_namespaces()
    with two_hosts(None):
        agents = [
            subprocess.Popen(
                ["ip", "netns", "exec", name, "bash", script, str(program)],
                env=environment(
                    NODES="2", HOST=_ADDRESSES[0], ADDRESS=address, GLOO_SOCKET_IFNAME=device, TP_SOCKET_IFNAME=device
                ),
                stdout=subprocess.PIPE,
                text=True,
            )
            for name, device, address in zip(_NAMES, _DEVICES, _ADDRESSES, strict=True)
        ]
        try:
            printed = [agent.communicate(timeout=250)[0] for agent in agents]
        finally:
            for agent in agents:
                agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0]
    assert "ranks 4 in a node 2" in "".join(printed)


# What the script asks of Slurm: names of the job's nodes, and its own command once on each of them.
SCONTROL = """#!/usr/bin/env bash
[ "$*" = "show hostnames node[1-2]" ] || { echo "scontrol: $*" >&2; exit 1; }
printf '%s\\n' ADDRESSES
"""
SRUN = """#!/usr/bin/env bash
[ "$1" = --cpus-per-task=3 ] || { echo "srun: $*" >&2; exit 1; }
shift
started=
while read -r name device address; do
    ip netns exec "$name" env ADDRESS=$address GLOO_SOCKET_IFNAME=$device TP_SOCKET_IFNAME=$device "$@" &
    started="$started $!"
done <<< "NODES"
for one in $started; do wait "$one" || exit; done
"""


@pytest.mark.nightly
def test_slurm(program: Path, tmp_path: Path) -> None:
    """A copy of the script, as sbatch makes one, with programs in Slurm's place (it has run under Slurm 22.05 too)."""
    from cpattn.launch.benchmarks.hosts import _ADDRESSES, _DEVICES, _NAMES, two_hosts

    skip_without_namespaces()
    nodes = "\n".join(map(" ".join, zip(_NAMES, _DEVICES, _ADDRESSES, strict=True)))
    texts = {"scontrol": SCONTROL.replace("ADDRESSES", " ".join(_ADDRESSES)), "srun": SRUN.replace("NODES", nodes)}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    job = {"SUBMIT_DIR": str(SCRIPTS), "JOB_NUM_NODES": "2", "JOB_ID": "7"}
    job |= {"JOB_NODELIST": "node[1-2]", "CPUS_PER_TASK": "3"}
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    env = environment(**{f"SLURM_{name}": value for name, value in job.items()}, PATH=path)
    (tmp_path / "spooled").write_text((SCRIPTS / "slurm.sh").read_text())
    with two_hosts(None):
        command = ["bash", str(tmp_path / "spooled"), str(program)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert "ranks 4 in a node 2" in done.stdout
