"""Adapters whole, both passes, on CUDA tensors without data: their fakes' arguments, and results of the right shapes.

What a kernel computes is left out (`test_adapters.py` has that); what an adapter makes on the wrong device, in a wrong
shape or with data that it would have to wait for fails here as on a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from cpattn.backends import Backend, Problem
from cpattn.backends.cudnn import CudnnBackend
from cpattn.backends.ffa import FfaBackend
from cpattn.backends.flash_attn import FlashAttnBackend
from cpattn.backends.te import TeBackend
from cpattn.backends.trial import BoundKernel, Sample
from tests_dist.backends.test_adapters import Install, install
from tests_dist.support.backend_cases import CASES
from tests_dist.support.fake_cuda import DEVICE, fake_cuda
from tests_dist.support.fakes import flash, ragged

__all__ = ["install"]  # a fixture


def _on_cuda(*tensors: Any) -> None:
    assert {t.device for t in tensors if isinstance(t, Tensor)} == {DEVICE}


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    _on_cuda(q, k, v, *args)
    return q.new_empty((*q.shape[:2], v.shape[-1])), q.new_empty((q.shape[1], len(q)), dtype=torch.float32)


def _flash_backward(*args: Any, **options: Any) -> tuple[Tensor, ...]:
    _on_cuda(*args)
    _, q, k, v, *_ = args
    return tuple(torch.empty_like(t) for t in (q, k, v))


def _flash(generation: int, install: Install, monkeypatch: pytest.MonkeyPatch) -> Backend:
    monkeypatch.setattr(flash, "varlen_forward", _flash_forward)
    monkeypatch.setattr(flash, "varlen_backward", _flash_backward)
    module = {2: flash.flash_attn_2, 3: flash.flash_attn_3, 4: flash.flash_attn_4}[generation]()
    install(module.__name__, module)
    return FlashAttnBackend(generation)


def _cudnn(install: Install, monkeypatch: pytest.MonkeyPatch) -> Backend:
    module = ragged.cudnn()

    def execute(graph: Any, buffers: dict[Any, Tensor], workspace: Tensor, handle: Any) -> None:
        _on_cuda(workspace, *buffers.values())
        assert all(t.is_contiguous() for t in buffers.values())

    monkeypatch.setattr(module.pygraph, "execute", execute)
    monkeypatch.setattr(CudnnBackend, "_handle", lambda self, cudnn, device: None)
    install("cudnn", module)
    return CudnnBackend()


def _shaped(function: Callable[..., Any], shapes: Callable[[dict[str, Any]], Any]) -> Callable[..., Any]:
    """A kernel with the arguments of a fake, by name, that gives tensors of shapes alone."""

    @functools.wraps(function)
    def kernel(**given: Any) -> Any:
        _on_cuda(*given.values())
        return shapes(given)

    return kernel


def _te(install: Install, monkeypatch: pytest.MonkeyPatch) -> Backend:
    modules = ragged.transformer_engine()
    for name, module in modules.items():
        install(name, module)
    te = modules["transformer_engine.pytorch.cpp_extensions.fused_attn"]

    def forward(a: dict[str, Any]) -> Any:
        q = a["q"]
        return torch.empty_like(q), [q.new_empty((*q.shape[:2], 1), dtype=torch.float32), None]

    _replace(te, "fused_attn_fwd", forward)
    _replace(te, "fused_attn_bwd", lambda a: [torch.empty_like(a[n]) for n in ("q", "k", "v")])
    return TeBackend()


def _ffa(install: Install, monkeypatch: pytest.MonkeyPatch) -> Backend:
    module = ragged.ffa()
    lse = ragged.AttnForwardMeta
    install(module.__name__, module)
    _replace(
        module,
        "_flex_flash_attn_forward",
        lambda a: (a["out"], lse(a["q"].new_empty(a["q"].shape[:2], dtype=torch.float32), None)),
    )
    _replace(module, "_flex_flash_attn_backward", lambda a: (a["dq"], a["dk"], a["dv"], None))
    return FfaBackend()


def _replace(module: ModuleType, name: str, shapes: Callable[[dict[str, Any]], Any]) -> None:
    setattr(module, name, _shaped(getattr(module, name), shapes))


ADAPTERS: dict[str, Callable[[Install, pytest.MonkeyPatch], Backend]] = {
    **{f"flash_attn {n}": functools.partial(_flash, n) for n in (2, 3, 4)},
    "cudnn": _cudnn,
    "te": _te,
    "ffa": _ffa,
}


@pytest.mark.parametrize("name", ["causal", "window", "documents", "random_1", "narrow_values", "empty"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapter_on_cuda(adapter: str, name: str, install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, case = ADAPTERS[adapter](install, monkeypatch), CASES[name]
    problem = Problem("cuda", torch.bfloat16, *case.heads, case.head_dim, case.head_dim_v)
    with fake_cuda(), torch.no_grad():
        shapes = [
            (case.num_queries, case.heads[0], case.head_dim),
            (case.num_keys, case.heads[1], case.head_dim),
            (case.num_keys, case.heads[1], case.head_dim_v),
            (case.num_queries, case.heads[0], case.head_dim_v),
        ]
        inputs = (torch.empty(s, dtype=torch.bfloat16, device=DEVICE) for s in shapes)
        results = BoundKernel(backend, Sample(problem, case.table, *inputs))()
        _on_cuda(*results)
        assert [t.shape for t in (results.out, results.dq, results.dk, results.dv)] == [shapes[3], *shapes[:3]]
