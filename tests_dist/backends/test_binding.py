"""Layer 1: binding a plan to a GPU and running it, on CUDA tensors without data: what is copied, and who waits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cpattn import AttnMaskSpec
from cpattn.backends import Backend, FlexBackend, Problem
from cpattn.backends.cudnn import CudnnBackend
from cpattn.backends.ffa import FfaBackend
from cpattn.backends.flash_attn import FlashAttnBackend
from cpattn.backends.sdpa_cuda import CudaSdpaBackend
from cpattn.backends.te import TeBackend
from cpattn.backends.triton import TritonBackend
from cpattn.collectives import one_copy, put_on
from cpattn.planning.ready import make_plan
from cpattn.runtime.bound import BoundPlan, bind_plan
from cpattn.runtime.exchanges import Exchanges
from cpattn.runtime.execute import Attending, KeyRows, Scoring, run_backward, run_forward
from tests_dist.support.fake_cuda import DEVICE, fake_cuda
from tests_dist.support.masks import MASKS

HEADS = {"num_heads_q": 4, "num_heads_kv": 2, "head_dim": 64}
PROBLEM = Problem("cuda", torch.bfloat16, 4, 2, 64, 64)
BACKENDS: dict[str, Callable[[], Backend]] = {
    "sdpa": CudaSdpaBackend,
    "flash_attn": lambda: FlashAttnBackend(2),
    "cudnn": CudnnBackend,
    "te": TeBackend,
    "ffa": FfaBackend,
    "flex": FlexBackend,
    "triton": TritonBackend,
}
# Operators of which the host waits for the result.
WAITS = ("_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "unique_consecutive", "is_nonzero", "equal")


class Traffic(TorchDispatchMode):
    """Copies between host and device, whether each is one that the host waits for, and operators that it waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[bool] = []
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        tensors = [t for t in tree_leaves((args, result)) if isinstance(t, torch.Tensor)]
        devices = {t.device.type for t in tensors if t.dim() or name != "copy_"}
        if name in ("_to_copy", "copy_") and len(devices) == 2:
            given = args[2] if name == "copy_" and len(args) > 2 else (kwargs or {}).get("non_blocking", False)
            self.copies.append(not given)
        if name in WAITS and any(t.device.type == "cuda" for t in tensors):
            self.waits.append(name)
        return result


def bound_for(spec: AttnMaskSpec, backend: Backend, **options: Any) -> tuple[BoundPlan, Traffic]:
    plan = make_plan(spec, cp_size=4, chunk_size=8, **HEADS, **options).plan  # type: ignore[arg-type]
    with Traffic() as traffic:
        bound = bind_plan(
            plan.for_rank(1), backend, Exchanges(), DEVICE, transport="all_to_all", keep_kv=False, problem=PROBLEM
        )
    return bound, traffic


def still(plan: BoundPlan) -> BoundPlan:
    """The plan without a group, whose exchanges have their buffers and move nothing."""

    def trip(t: Any) -> Any:
        return t._replace(hops=tuple(replace(hop, active=False) for hop in t.hops))

    stages = tuple(stage._replace(kv=trip(stage.kv)) for stage in plan.stages)
    return plan._replace(queries=trip(plan.queries), stages=stages)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("mask", "options"), [("causal", {"num_stages": 3}), ("holes", {"schedule": "tiles"})])
def test_binding_costs_one_copy(backend: str, mask: str, options: dict[str, Any]) -> None:
    """Of routes, segments and the kernel's tables, in one copy that the host does not wait for."""
    with fake_cuda():
        _, traffic = bound_for(MASKS[mask], BACKENDS[backend](), **options)
    assert traffic.copies == [False]
    assert traffic.waits == []


@pytest.mark.parametrize("backend", ["sdpa", "triton"])
@pytest.mark.parametrize("options", [{"num_stages": 3}, {"schedule": "tiles"}])
def test_a_step_copies_nothing_and_waits_for_nothing(backend: str, options: dict[str, Any]) -> None:
    """Both passes of a plan that is bound: so a step can be captured in a CUDA graph."""
    with fake_cuda(), torch.no_grad():
        plan, _ = bound_for(MASKS["causal"], BACKENDS[backend](), **options)
        plan = still(plan)
        q = torch.empty(plan.num_queries, 4, 64, dtype=torch.bfloat16, device=DEVICE)
        kv = KeyRows(*(torch.empty(plan.num_keys, 2, 64, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)))
        none = torch.empty(0, dtype=torch.uint8, device=DEVICE)
        with Traffic() as traffic:
            out, lse = run_forward(plan, q, kv, None, none, Scoring(0.1))
            run_backward(plan, out, Attending(q, out, lse), kv, none, Scoring(0.1))
    assert traffic.copies == []
    assert traffic.waits == []


def test_one_copy_hands_out_what_was_put(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values, on the CPU in the place of a GPU: dtypes of several sizes, an empty one, and one alone."""

    class Gpu:
        type = "cuda"

    given = [torch.arange(5), torch.tensor([7], dtype=torch.int32), torch.zeros(0), torch.arange(6).view(2, 3).T]
    made = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, device=None, **k: made(*a, **k))
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *a, **k: self)
    with one_copy(Gpu()):  # type: ignore[arg-type]
        put = [put_on(Gpu(), t) for t in given]  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(given, put, strict=True))
    assert torch.equal(put_on(Gpu(), given[0]), given[0])  # type: ignore[arg-type]
