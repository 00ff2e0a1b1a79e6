"""CUDA tensors without data on a machine and a torch without CUDA: shapes, dtypes, devices, and torch's own checks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

DEVICE = torch.device("cuda", 0)


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Tensors made inside are fake; those on `DEVICE` can be computed with as if there were a GPU."""
    with FakeTensorMode(allow_non_fake_inputs=True), _ByOperators():
        yield


class _ByOperators(TorchFunctionMode):
    """Methods that ask for a guard of the device, which a torch without CUDA lacks, by operators, which do not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        if func is Tensor.__getitem__:
            return _indexed(*args)
        if func is Tensor.__setitem__:
            x, index, values = args
            aten.copy_.default(_indexed(x, index), values)
            return None
        if func is Tensor.copy_:
            return aten.copy_.default(*args)
        if func is Tensor.contiguous:
            (x,) = args
            return x if x.is_contiguous() else aten.clone(x, memory_format=torch.contiguous_format)
        return func(*args, **(kwargs or {}))


def _indexed(x: Tensor, index: Any) -> Tensor:
    aten, dim = torch.ops.aten, 0
    steps = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in [s for s in steps if not isinstance(s, Tensor)]:
        at = next(n for n, s in enumerate(steps) if s is Ellipsis)
        missing = x.dim() - sum(s is not None for s in steps) + 1
        steps[at : at + 1] = [slice(None)] * missing
    for step in steps:
        if step is None:
            x, dim = aten.unsqueeze(x, dim), dim + 1
        elif isinstance(step, int):
            x = aten.select.int(x, dim, step)
        elif isinstance(step, slice):
            x, dim = aten.slice.Tensor(x, dim, step.start, step.stop, step.step or 1), dim + 1
        else:
            x, dim = aten.index_select(x, dim, step), dim + 1
    return x
