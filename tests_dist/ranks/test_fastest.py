"""Runtime layer: `backend="fastest"` on real ranks, among candidates of which one is wrong and one is slow."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from typer.testing import CliRunner

import cpattn
from cpattn import AttnMaskSpec, backends
from cpattn.backends.reference import ReferenceBackend
from cpattn.launch.commands import app
from tests_dist.support.harness import run_on_ranks
from tests_dist.support.oracle import assert_as_exact_as_sdpa, make_inputs
from tests_dist.support.rank_cases import run_attention

HEADS = {"num_heads_q": 4, "num_heads_kv": 2, "head_dim": 16}


class Wrong(ReferenceBackend):
    """Fast, for it does nothing but say that all rows have seen something; on the ranks named."""

    name, kernel = "wrong", "zeros"

    def __init__(self, ranks: tuple[int, ...] = (0, 1, 2)) -> None:
        self.here = not dist.is_initialized() or dist.get_rank() in ranks

    def forward(self, queries: Any, *args: Any, **options: Any) -> None:  # type: ignore[override]
        if not self.here:
            super().forward(queries, *args, **options)
            return
        queries.lse.zero_()

    def backward(self, *args: Any) -> None:  # type: ignore[override]
        if not self.here:
            super().backward(*args)


class Slow(ReferenceBackend):
    """Right, and slow."""

    name, kernel = "slow", "reference after a nap"

    def forward(self, *args: Any, **options: Any) -> None:  # type: ignore[override]
        time.sleep(0.3)
        super().forward(*args, **options)


class Counting(ReferenceBackend):
    """Right, and how often it ran."""

    name, kernel, runs = "counting", "reference, counted", 0

    def forward(self, *args: Any, **options: Any) -> None:  # type: ignore[override]
        type(self).runs += 1
        super().forward(*args, **options)


def chosen(monkeypatch_to: list[Any], head_degree: int = 1, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """What a rank says of its choice among these candidates, before and after the first call, and its results."""
    saved = list(backends._backends)
    backends._backends[:] = [make() for make in monkeypatch_to]
    spec = AttnMaskSpec.varlen([70, 0, 41, 1])
    inputs = make_inputs(spec, heads=(4, 2), head_dim=16, dtype=dtype)
    options = {"chunk_size": 8, "backend": "fastest", "head_degree": head_degree}
    cpattn.clear_key_cache()
    try:
        key = cpattn.make_key(spec, **HEADS, cp_group=dist.group.WORLD, **options)
        before = key.describe(dtype, "cpu")
        results = run_attention(spec, inputs, key_options=options)
        after = key.describe(dtype, "cpu")
        first, runs = Counting.runs, Counting.runs
        other = cpattn.make_key(AttnMaskSpec.causal(90), **HEADS, cp_group=dist.group.WORLD, **options)
        other.prepare("cpu", dtype)  # remembered: nothing is tried again
        runs = Counting.runs
        inner = other if other.sharding is None else other.sharding.inner
        return {
            "before": before,
            "after": after,
            "tried again": runs - first,
            "name": inner.bind(torch.device("cpu"), dtype).backend.name,
            "results": results,
        }
    finally:
        backends._backends[:] = saved
        cpattn.clear_key_cache()


def wrong_on_rank_1() -> Wrong:
    return Wrong((1,))


@pytest.mark.parametrize(("wrong", "head_degree"), [(Wrong, 1), (wrong_on_rank_1, 1), (Wrong, 3)])
def test_the_fastest_that_is_right_everywhere(wrong: Any, head_degree: int) -> None:
    """Four candidates; the wrong one is the fastest, on all ranks or on one, and is taken on none."""
    told = run_on_ranks(3, chosen, [wrong, Slow, backends.CpuSdpaBackend, Counting], head_degree)
    assert len({rank["name"] for rank in told}) == 1
    assert told[0]["name"] in ("sdpa", "counting")
    assert {rank["tried again"] for rank in told} == {0}
    spec = AttnMaskSpec.varlen([70, 0, 41, 1])
    for rank in told:
        assert "fastest, not yet tried" in rank["before"]
        assert "call key.prepare(device, dtype) on all ranks first" in rank["before"]  # in the place of the memory
        assert f"): {told[0]['name']} (" in rank["after"]
        assert "fastest of those that agree with reference (" in rank["after"]
        assert "not wrong (zeros): " in rank["after"]
        inputs = make_inputs(spec, heads=(4, 2), head_dim=16, dtype=torch.bfloat16)
        assert_as_exact_as_sdpa(rank["results"], spec, inputs, "fastest")


def refused() -> str:
    with pytest.raises(ValueError, match="agrees with reference on all ranks") as raised:
        chosen([Wrong])
    return str(raised.value)


def test_nothing_is_taken_where_nothing_is_right() -> None:
    """The same words on all ranks, and a group that goes on working."""
    first, *others = run_on_ranks(2, refused)
    assert "wrong (zeros): " in first
    assert others == [first]
    run_on_ranks(2, chosen, [ReferenceBackend])


def test_doctor_lets_them_race(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_backends", [backends.CpuSdpaBackend(), Wrong()])
    monkeypatch.setenv("COLUMNS", "200")
    said = CliRunner().invoke(app, ["doctor", "--device", "cpu", "--backend", "fastest", "--heads", "8:8"])
    assert said.exit_code == 0, said.output
    assert "fastest would run: sdpa (torch's CPU flash attention" in said.output
    assert "not wrong (zeros): " in said.output
