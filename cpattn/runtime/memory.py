"""Peak memory of an attention call, stated before it runs.

The runtime itself is run on tensors without data, with exchanges that move nothing, and the storages that
are alive are counted: a buffer added there counts here at once. What kernels allocate inside, where no
dispatcher sees it, is declared beside them (`KERNEL_SCRATCH`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cpattn.backends import KERNEL_SCRATCH
from cpattn.collectives import RowRoutes, heads_to_rows, rows_to_heads
from cpattn.keys.key import AttnKey, BoundPlan, HeadSharding
from cpattn.ops.heads import trade_heads, trade_rows

from .execute import accumulator_dtype, kept_bytes, run_backward, run_forward

# Backends whose kernels need data, or allocate where no dispatcher sees it. Of these only flex attention is torch's
# own: a higher-order operator, into which no dispatch mode is let, compiled at first use. On CPU, for tests,
# it holds the scores of a block of rows in copies of torch's choice; on CUDA the compiler decides.
_OUTSIDE_TORCH = ("flash_attn", "cudnn", "te", "ffa", "flex")


class StepMemory(NamedTuple):
    """Bytes that one attention call allocates on this rank beyond its inputs.

    forward, backward: at the peak of each pass, results included. kept: what forward leaves to backward
    beside inputs and results: the fetched keys and values with `keep_kv`, and with head sharding the
    block's q, k, v, out and lse. step: at the peak of both passes of one call after the other, with out and lse and
    what is kept alive as long as backward needs them.
    """

    forward: int
    backward: int
    kept: int
    step: int


def step_memory(key: AttnKey, dtype: torch.dtype, device: torch.device) -> StepMemory:
    """The peaks of a call without sink and softcap, for contiguous q, k, v and dout of a dtype.

    Raises:
        ValueError: no backend serves the dtype and device, or the one that does runs its kernel outside
            torch's operators (`_OUTSIDE_TORCH`).
    """
    if key.sharding is not None:
        return _memory_with_head_exchanges(key, key.sharding, dtype, device)
    bound = key.bind(device, dtype)
    if bound.backend.name in _OUTSIDE_TORCH:
        raise ValueError(
            f"memory is not stated for backend {bound.backend.name!r}: its kernel cannot be run without data; "
            f"measure a step with torch.cuda.max_memory_allocated()"
        )
    plan = _light(bound, dtype)
    numbers = {"scale": 1.0, "softcap": None}
    heads, kv_heads, rows, keys = key.num_heads_q, key.num_heads_kv, key.num_tokens, key.num_keys

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        q, k = empty(rows, heads, key.head_dim), empty(keys, kv_heads, key.head_dim)
        v, out = empty(keys, kv_heads, key.head_dim_v), empty(rows, heads, key.head_dim_v)
        lse = empty(rows, heads, dtype=accumulator_dtype(dtype))
        num_kept = kept_bytes(key, plan, k, v) if key.options.keep_kv else 0
        kept = empty(num_kept, dtype=torch.uint8)
        forward = num_kept + _peak(lambda: run_forward(key, plan, q, k, v, None, kept, numbers), [q, k, v, kept])
        backward = _peak(
            lambda: run_backward(key, plan, out, q, k, v, out, lse, kept, numbers), [q, k, v, kept, out, lse]
        )
    results = out.nbytes + lse.nbytes
    return StepMemory(forward, backward, num_kept, max(forward, results + num_kept + backward))


def _memory_with_head_exchanges(
    key: AttnKey, sharding: HeadSharding, dtype: torch.dtype, device: torch.device
) -> StepMemory:
    """The same around the attention of the block's rows; its q, k, v, out and lse are kept for backward."""
    group, inner = key.cp_group, sharding.inner
    assert group is not None
    still = sharding._replace(
        queries=replace(sharding.queries, active=False), keys=replace(sharding.keys, active=False)
    )
    between = step_memory(inner, dtype, device)

    def empty(rows: int, *heads: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty((rows, *heads), dtype=dtype, device=device)

    def inputs(of: AttnKey) -> list[Tensor]:
        rows_q, rows_k = sharding.queries.rows, sharding.keys.rows
        num_q, num_k = (sum(rows_q), sum(rows_k)) if of is inner else (of.num_tokens, of.num_keys)
        kv_heads = of.num_heads_kv
        return [
            empty(num_q, of.num_heads_q, of.head_dim),
            empty(num_k, kv_heads, of.head_dim),
            empty(num_k, kv_heads, of.head_dim_v),
        ]

    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        rows, block = inputs(key), inputs(inner)
        out = empty(len(block[0]), inner.num_heads_q, inner.head_dim_v)
        lse = empty(len(block[0]), inner.num_heads_q, dtype=accumulator_dtype(dtype))
        dout = empty(key.num_tokens, key.num_heads_q, key.head_dim_v)
        in_block = sum(t.nbytes for t in block)
        results = out.nbytes + lse.nbytes
        before = _peak(lambda: trade_rows(still, group, *rows), rows)
        after = _peak(lambda: heads_to_rows(out, still.queries, group).wait(), [out])
        dout_traded = _peak(lambda: rows_to_heads(dout, still.queries, group).wait(), [dout])
        gradients = in_block + _peak(lambda: trade_heads(still, group, *block), block)
    forward = max(before, in_block + between.forward, in_block + results + between.kept + after)
    attention_backward = max(dout_traded, out.nbytes + between.backward)
    kept = in_block + results + between.kept
    # When gradients are traded, autograd has let go of what was kept.
    step = max(forward, dout.nbytes + max(kept + attention_backward, gradients))
    return StepMemory(forward, max(attention_backward, gradients), kept, step)


def _light(plan: BoundPlan, dtype: torch.dtype) -> BoundPlan:
    """A plan of the same memory that is cheap to run: exchanges have their buffers and move nothing, and of many
    kernel calls those are left that take most, where the backend tells which.
    """
    heaviest = getattr(plan.backend, "heaviest", lambda work, dtype: work)

    def still(hops: tuple[RowRoutes, ...]) -> tuple[RowRoutes, ...]:
        return tuple(replace(hop, active=False) for hop in hops)

    stages = tuple(
        stage._replace(
            kv=still(stage.kv),
            host_work=heaviest(stage.host_work, dtype),
            guest_work=heaviest(stage.guest_work, dtype),
        )
        for stage in plan.stages
    )
    return plan._replace(queries=still(plan.queries), stages=stages)


def _peak(run: Callable[[], Any], given: list[Tensor]) -> int:
    """Most bytes alive at once while it runs, besides the tensors given."""
    with _Meter(given) as meter:
        run()
    return meter.peak


class _Meter(TorchDispatchMode):
    """Counts the bytes of storages made while it is on."""

    def __init__(self, given: list[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known = {id(storage): storage for storage in (t.untyped_storage() for t in given)}
        self._finalizers: dict[int, weakref.finalize[Any, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        scratch = _cast_bytes if func is torch.ops.aten.add_.Tensor else KERNEL_SCRATCH.get(func)
        self.peak = max(self.peak, self.live + (0 if scratch is None else scratch(*args)))
        return result

    def _count(self, storage: Any) -> None:
        number = id(storage)
        if number in self._known or number in self._finalizers:
            return
        self.live += storage.nbytes()
        self._finalizers[number] = weakref.finalize(storage, self._release, number, storage.nbytes())

    def _release(self, number: int, num_bytes: int) -> None:
        del self._finalizers[number]
        self.live -= num_bytes


def _cast_bytes(total: Tensor, part: Tensor, *_: Any) -> int:
    """Bytes of the copy that torch's element-wise operators make on CPU of an operand of another dtype."""
    return part.numel() * total.itemsize if part.device.type == "cpu" and part.dtype != total.dtype else 0
