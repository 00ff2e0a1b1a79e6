"""`cpattn.verify` on one rank and on two: right runs pass, planted faults are found by the check that is theirs."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import cpattn
from cpattn import AttnMaskSpec, backends
from cpattn.backends.reference import ReferenceBackend
from cpattn.checks.sampled import Rows, dense_rows, visible_keys
from cpattn.keys.key import AttnKey
from cpattn.masks.spec import lower_mask
from tests_dist.support.harness import run_on_ranks
from tests_dist.support.oracle import dense_attention, make_inputs

SPEC = AttnMaskSpec.varlen([61, 0, 17, 50])


def _made(
    spec: AttnMaskSpec = SPEC, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[AttnKey, list[Tensor]]:
    group = dist.group.WORLD if dist.is_initialized() else None
    key = cpattn.make_key(spec, num_heads_q=4, num_heads_kv=2, head_dim=16, cp_group=group, **options)
    inputs = make_inputs(spec, heads=(4, 2), dtype=dtype)
    return key, [cpattn.dispatch(t, key) for t in inputs[:3]]


def _failed(report: cpattn.Verification) -> set[str]:
    assert report.ok == (not [c for c in report.checks if not c.ok])
    return {check.name for check in report.checks if not check.ok}


@pytest.mark.parametrize("cp_size", [1, 2])
def test_right_runs_pass(cp_size: int) -> None:
    run_on_ranks(cp_size, check_right_runs)


def check_right_runs() -> None:
    sink = torch.randn(4, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16):
        key, qkv = _made(dtype=dtype)
        report = cpattn.verify(key, *qkv, sink=sink, parameters=[torch.ones(3)], backends=["sdpa", "reference"])
        assert report, str(report)
        assert {c.backend for c in report.checks} == {"", "sdpa", "reference"}
    options: dict[str, Any] = {"head_degree": dist.get_world_size()}
    key, qkv = _made(AttnMaskSpec.sliding_window([90, 30], 9), **options)
    report = cpattn.verify(key, *qkv, softcap=5.0, softmax_scale=-0.3)
    assert report, str(report)
    assert json.loads(report.to_json())["ok"]


def test_a_leaked_mask_is_found() -> None:
    run_on_ranks(2, check_leak)


def check_leak() -> None:
    """The plan of a mask in which documents see those before them."""
    key, qkv = _made(AttnMaskSpec.causal(128))
    leaking = AttnKey(key.planned._replace(spec=SPEC), key.rank_plan, key.ranks)
    report = cpattn.verify(leaking, *qkv)
    assert {"leak probe", "out", "gradients elsewhere"} <= _failed(report)
    assert "rows changed that see none of the probed tokens" in str(report)
    # And one that hides what must be seen.
    key, qkv = _made()
    hiding = AttnKey(key.planned._replace(spec=AttnMaskSpec.causal(128)), key.rank_plan, key.ranks)
    assert {"leak probe", "out"} <= _failed(cpattn.verify(hiding, *qkv))


class WrongBackend(ReferenceBackend):
    """Its scale is off by two percent; or its gradients, or it is another each time."""

    name = "wrong"

    def forward(self, queries: Any, keys: Any, work: Any, scoring: Any, **options: Any) -> None:
        super().forward(queries, keys, work, scoring._replace(scale=scoring.scale * 1.02), **options)


class WrongGradients(ReferenceBackend):
    name = "wrong gradients"

    def backward(self, queries: Any, keys: Any, work: Any, scoring: Any, dkeys: Any) -> None:
        super().backward(queries, keys, work, scoring, dkeys)
        dkeys.k[3] += 1


class Restless(ReferenceBackend):
    name = "restless"

    def forward(self, queries: Any, *args: Any, **options: Any) -> None:
        super().forward(queries, *args, **options)
        queries.out.add_(torch.rand(1) * 1e-6)


@pytest.mark.parametrize(
    ("backend", "found"),
    [(WrongBackend(), {"out", "dq"}), (WrongGradients(), {"dk"}), (Restless(), {"repeatability", "leak probe"})],
    ids=lambda x: getattr(x, "name", None),
)
def test_a_wrong_backend_is_found(backend: Any, found: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_backends", [*backends._backends, backend])
    key, qkv = _made(AttnMaskSpec.causal(128))
    report = cpattn.verify(key, *qkv, backends=["sdpa", backend.name])
    assert found <= _failed(report), str(report)
    assert all(c.ok for c in report.checks if c.backend == "sdpa")


def test_unequal_weights_are_found() -> None:
    run_on_ranks(2, check_weights)


def check_weights() -> None:
    key, qkv = _made()
    model = torch.nn.Linear(3, 2)
    torch.nn.init.ones_(model.weight)
    torch.nn.init.constant_(model.bias, float(dist.get_rank()))
    report = cpattn.verify(key, *qkv, parameters=model)
    assert _failed(report) == {"parameters"}
    assert "1 of 2 differ: bias of ranks [1] from that of rank 0" in str(report)
    sink = torch.full((4,), float(dist.get_rank()))
    assert "parameters" in _failed(cpattn.verify(key, *qkv, sink=sink))


def test_sampled_rows_are_those_of_dense_attention() -> None:
    """The check's own arithmetic, against the oracle and autograd."""
    inputs = make_inputs(SPEC, heads=(4, 2), dtype=torch.float64)
    leaves = [t.requires_grad_() for t in inputs[:3]]
    sink, tokens = torch.randn(4, dtype=torch.float64), torch.tensor([0, 60, 61, 77, 100])
    out, _ = dense_attention(*leaves, SPEC.to_dense(), scale=0.3, softcap=2.0, sink=sink)
    truth = torch.autograd.grad(out[tokens], leaves, inputs.dout[tokens])
    visible = torch.from_numpy(visible_keys(lower_mask(SPEC), tokens.numpy(), torch.arange(128).numpy()))
    q, k, v = (t.detach() for t in leaves)
    ours = dense_rows(
        Rows(q[tokens], inputs.dout[tokens], k, v, visible), scale=0.3, softcap=2.0, sink=sink, group=None
    )
    expected = (out.detach()[tokens], truth[0][tokens], truth[1], truth[2])
    for mine, right in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-11, atol=1e-12)
