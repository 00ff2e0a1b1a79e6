"""Runtime layer: when exchanges start, and by which calls rows travel."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import cpattn
from cpattn import AttnMaskSpec
from cpattn.backends import CpuSdpaBackend
from cpattn.collectives import RowRoutes, backend_of, control_device, exchange, group_cast
from cpattn.launch.calibrate import _transfer_load, measure_transports
from cpattn.solver import DEFAULT_HARDWARE, Hardware, Link, TransportTimes
from tests_dist.support.harness import run_on_ranks
from tests_dist.support.masks import MASKS
from tests_dist.support.oracle import Results, make_inputs
from tests_dist.support.profiles import each_once

# ----------------------------------------------------------------------------------------------------
# Two levels: what starts when.


def events(ranks_per_node: int | None, num_stages: int) -> tuple[str, str]:
    """Forward and backward as the order of started exchanges (x) and kernels (K)."""
    spec = AttnMaskSpec.causal(256)
    inputs = make_inputs(spec, heads=(2, 2))
    key = cpattn.make_key(
        spec,
        num_heads_q=2,
        num_heads_kv=2,
        head_dim=16,
        cp_group=dist.group.WORLD,
        chunk_size=8,
        schedule="keys",
        num_stages=num_stages,
        ranks_per_node=ranks_per_node,
    )
    q, k, v, dout = (cpattn.dispatch(t, key).requires_grad_() for t in inputs)
    cpattn.attention(q, k, v, key)  # ranks agree on the first call
    happened: list[str] = []

    def noting(event: str, function):  # type: ignore[no-untyped-def]
        def noted(*args, **options):  # type: ignore[no-untyped-def]
            happened.append(event)
            return function(*args, **options)

        return noted

    with (
        mock.patch.object(dist, "all_to_all_single", noting("x", dist.all_to_all_single)),
        mock.patch.object(CpuSdpaBackend, "forward", noting("K", CpuSdpaBackend.forward)),
        mock.patch.object(CpuSdpaBackend, "backward", noting("K", CpuSdpaBackend.backward)),
    ):
        out = cpattn.attention(q, k, v, key)
        forward = "".join(happened)
        happened.clear()
        torch.autograd.grad(out, (q, k, v), dout)
    return forward, "".join(happened)


@pytest.mark.parametrize(
    ("ranks_per_node", "num_stages", "forward", "backward"),
    [
        # The last gradients behind own work that is left till then.
        (None, 1, "xKK", "xKKxK"),
        # The first two behind the work on own keys.
        (None, 3, "xxKKxKK", "xxKKxxKxKxK"),
        # First hops of two stages; then a second hop and the first one of the stage after next travel together.
        (2, 1, "xKxK", "xKxKxKx"),
        (2, 3, "xxKxxxKxKK", "xxKxxxKxxKxxKxxKx"),
    ],
)
def test_hops_start_before_the_work_that_hides_them(ranks_per_node, num_stages, forward, backward):
    """The same order on all ranks. Of a stage's fan-out inside the nodes only the first one's is exposed."""
    assert run_on_ranks(4, events, ranks_per_node, num_stages) == [(forward, backward)] * 4


# ----------------------------------------------------------------------------------------------------
# Transports.


class Way(NamedTuple):
    """Results of attention by one transport, and which calls moved its rows."""

    results: Results
    used: tuple[bool, bool]  # all_to_all_single, batch_isend_irecv


def by_transport(mask: str, heads: tuple[int, int], options: dict[str, Any]) -> list[Way]:
    """All results of attention by each transport; undispatch is no part of it."""
    spec, ways = MASKS[mask], []
    inputs = make_inputs(spec, heads=heads)
    for transport in ("all_to_all", "p2p"):
        key = cpattn.make_key(
            spec,
            num_heads_q=heads[0],
            num_heads_kv=heads[1],
            head_dim=16,
            cp_group=dist.group.WORLD if dist.is_initialized() else None,
            transport=transport,
            chunk_size=8,
            **options,
        )
        with (
            mock.patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single) as collective,
            mock.patch.object(dist, "batch_isend_irecv", wraps=dist.batch_isend_irecv) as direct,
        ):
            q, k, v, dout = (cpattn.dispatch(t, key, side=s) for t, s in zip(inputs, "qkkq", strict=True))
            leaves = [t.requires_grad_() for t in (q, k, v)]
            out, lse = cpattn.attention(*leaves, key, return_lse=True)
            local = (out.detach(), lse, *torch.autograd.grad(out, leaves, dout))
            ways.append(Way(Results(*local), (collective.called, direct.called)))
    return ways


OPTIONS: dict[str, dict[str, Any]] = {
    "keys": {"schedule": "keys", "num_stages": 2},
    "tiles": {"schedule": "tiles"},
    "wire": {"wire": "e4m3"},
    "heads": {"head_degree": 2},
    "two levels": {"ranks_per_node": 2, "num_stages": 2},
    "tiles on two levels": {"ranks_per_node": 2, "schedule": "tiles"},
}


@each_once(
    ranks=[
        (8, "two levels"),
        (4, "tiles on two levels"),
        (4, "wire"),
        (3, "keys"),
        (2, "keys"),
        (8, "keys"),
        (4, "heads"),
        (3, "tiles"),
        (4, "two levels"),
    ],
    mask=["causal", "varlen", "prefix_tree", "one_token", "all_blind", "cross"],
)
def test_transports_agree_bit_for_bit(ranks, mask):
    """Ranks that send nothing, peers without rows, two hops in which ranks send to themselves."""
    size, options = ranks
    if mask == "cross" and "tiles" in options:
        pytest.skip("tiles need self-attention")
    used = False
    for collective, direct in run_on_ranks(size, by_transport, mask, (6, 2), OPTIONS[options]):
        for mine, theirs in zip(direct.results, collective.results, strict=True):
            assert torch.equal(mine, theirs)
        assert not collective.used[1]
        assert not direct.used[0]
        used |= direct.used[1]
    # Rows are traded for heads whatever they see.
    assert used == (options == "heads" or mask not in ("one_token", "all_blind"))


def calibrated(sizes: tuple[int, ...]) -> list[TransportTimes]:
    told: list[str] = []
    times = list(measure_transports(None, torch.device("cpu"), sizes, repeats=2, tell=told.append))
    assert len(told) == len(times), "told of each"
    return times


@pytest.mark.parametrize(("size", "peers"), [(2, [1.0]), (4, [1 / 3, 2 / 3, 1.0])])
def test_calibration_measures_both_at_every_sparsity_and_size(size, peers):
    everyone = run_on_ranks(size, calibrated, (64, 4096))
    assert all(times == everyone[0] for times in everyone), "equal on all ranks"
    assert [(t.peers, t.peer_bytes) for t in everyone[0]] == [(p, n) for p in peers for n in (64.0, 4096.0)]


def loads_by_cores() -> list[float]:
    found = []
    for cores in (1, 64):
        with mock.patch("cpattn.launch.calibrate.num_cores", return_value=cores):
            found.append(_transfer_load(None))
    return found


def test_calibration_finds_the_load_of_transfers_unless_there_are_cores_for_them():
    for busy, spare in run_on_ranks(2, loads_by_cores):
        assert 0 < busy <= 1
        assert spare == 0


def times(peers: float, peer_bytes: float, faster: str) -> TransportTimes:
    return TransportTimes(peers, peer_bytes, *((1.0, 2.0) if faster == "all_to_all" else (2.0, 1.0)))


def measured(*transports: TransportTimes) -> Hardware:
    return dataclasses.replace(DEFAULT_HARDWARE, name="here", transports=transports)


def test_the_nearest_measurement_decides():
    """Sparsity first, then size; without measurements all_to_all."""
    hardware = measured(
        times(0.25, 1e4, "p2p"), times(0.25, 1e6, "all_to_all"), times(1.0, 1e4, "all_to_all"), times(1.0, 1e6, "p2p")
    )
    assert hardware.transport_for(0.3, 2e4) == "p2p"
    assert hardware.transport_for(0.3, 9e5) == "all_to_all"
    assert hardware.transport_for(0.9, 2e4) == "all_to_all"
    assert hardware.transport_for(1.0, 1e9) == "p2p"
    assert hardware.transport_for(0.0, 1e9) == "all_to_all"
    assert DEFAULT_HARDWARE.transport_for(0.3, 2e4) == "all_to_all"
    assert Hardware.from_json(hardware.to_json()) == hardware
    with pytest.raises(ValueError, match="all must be finite and above 0, and peers at most 1"):
        times(1.5, 1.0, "p2p")


def key_with(**options: Any) -> cpattn.AttnKey:
    defaults = {"num_heads_q": 4, "num_heads_kv": 2, "head_dim": 16, "cp_group": dist.group.WORLD, "chunk_size": 8}
    return cpattn.make_key(AttnMaskSpec.causal(400), **{**defaults, **options})


def plan_with(**options: Any) -> cpattn.ReadyPlan:
    shape = {"num_heads_q": 4, "num_heads_kv": 2, "head_dim": 16, "chunk_size": 8}
    return cpattn.make_plan(AttnMaskSpec.causal(400), cp_size=dist.get_world_size(), **shape, **options)


def keys_of_hardware(folder: str) -> None:
    direct, sparse = measured(times(1.0, 1e4, "p2p")), measured(times(1.0, 1e4, "all_to_all"), times(1 / 3, 1e4, "p2p"))
    path = Path(folder) / f"rank{dist.get_rank()}.json"
    path.write_text(direct.to_json())
    assert key_with().transport == "all_to_all"
    for hardware in (direct, path, str(path)):
        key = key_with(hardware=hardware)
        assert key.transport == "p2p"
        assert "remote, by p2p" in key.describe()
        assert key.with_mask(AttnMaskSpec.varlen([100, 300])).transport == "p2p"
    path.write_text(measured(times(1.0, 1e4, "all_to_all")).to_json())
    os.utime(path, ns=(1, 1))  # the clock of a file may be coarse
    assert key_with(hardware=path).transport == "all_to_all", "a file that has changed is read again"
    assert key_with(hardware=direct, transport="all_to_all").transport == "all_to_all"
    split = key_with(hardware=sparse, head_degree=2)
    assert split.sharding is not None
    ways = (split.transport, split.sharding.inner.transport, split.sharding.trades.queries.transport)
    assert ways == ("p2p",) * 3, "one peer of three, between blocks and inside them"
    # Work of 5 ms: worth several stages if the transfer takes as long, and not if it takes none.
    links = [Link(0.0, rate) for rate in (4e6, 1e15)]
    slow, fast = (
        dataclasses.replace(direct, forward_flops=1e9, launch_s=0.0, within=link, across=link) for link in links
    )
    assert key_with(hardware=slow).plan.num_stages > key_with(hardware=fast).plan.num_stages
    # Made elsewhere, by the same description the same plan; on a group of gloo that is the one of "cpu".
    path.write_text(slow.to_json())
    stages = {}
    for machine, given in ((slow, path), (fast, fast), (None, "cpu")):
        ready = plan_with(hardware=given)
        assert ready.plan.fingerprint == key_with(hardware=machine).plan.fingerprint
        stages[given] = ready.plan.num_stages
    assert stages[path] > stages[fast]

    for message, options in (
        ("hardware is 'h1': give one of h100, ", {"hardware": "h1"}),
        ("hardware is 3: give one of", {"hardware": 3}),
        ("transport is 'udp': use 'auto', 'all_to_all' or 'p2p'", {"transport": "udp"}),
    ):
        with pytest.raises(ValueError, match=message):
            key_with(**options)
    with pytest.raises(ValueError, match="hardware is 'h1': give one of h100, "):
        plan_with(hardware="h1")
    with pytest.raises(ValueError, match="hardware differs between ranks: ranks"):
        key_with(hardware=direct if dist.get_rank() else slow, chunk_size=16)


def test_hardware_steers_a_key(tmp_path):
    run_on_ranks(4, keys_of_hardware, str(tmp_path))


# ----------------------------------------------------------------------------------------------------
# NCCL's first operation on a group, and what a group says of itself.


def first_messages() -> str:
    """The calls of two exchanges in which rank 2 takes no part, as on a group of NCCL's: a collective, messages."""
    group, happened = dist.group.WORLD, []
    rank, size = dist.get_rank(), dist.get_world_size()
    real = dist.all_reduce, dist.batch_isend_irecv

    def noted(sign: str, call: Any) -> Any:
        return lambda *args, **kwargs: (happened.append(sign), call(*args, **kwargs))[1]

    splits = [int(rank < 2 and peer == 1 - rank) for peer in range(size)]
    routes = RowRoutes(torch.zeros(sum(splits), dtype=torch.int64), tuple(splits), tuple(splits), True, "p2p")
    with (
        mock.patch.object(exchange, "backend_of", return_value="nccl"),
        mock.patch.object(dist, "all_reduce", noted("A", real[0])),
        mock.patch.object(dist, "batch_isend_irecv", noted("M", real[1])),
    ):
        for _ in range(2):
            (rows,) = group_cast([torch.full((1, 2), float(rank))], routes, group).wait()
            assert rows.flatten().tolist() == [1.0 - rank] * 2 * sum(splits)
    return "".join(happened)


def test_ranks_of_nccl_meet_before_their_first_message():
    """`batch_isend_irecv` is undefined as a group's first operation unless all ranks take part in it."""
    assert run_on_ranks(3, first_messages) == ["AMM", "AMM", "A"]


@pytest.mark.parametrize(
    ("config", "on_cuda", "control"),
    [
        ("cpu:gloo,cuda:gloo", "gloo", "cpu"),
        ("cpu:gloo,cuda:nccl", "nccl", "cpu"),  # also of a group whose backend is "undefined"
        ("cuda:nccl", "nccl", "cuda:1"),
        ("cpu:gloo", "", "cpu"),
    ],
)
def test_a_group_is_asked_by_device(config, on_cuda, control, monkeypatch):
    monkeypatch.setattr(dist, "get_backend_config", lambda group: config)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert backend_of(None, "cuda") == on_cuda
    assert control_device(None) == torch.device(control)
