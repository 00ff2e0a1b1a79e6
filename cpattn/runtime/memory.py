"""Peak memory of an attention call, stated before it runs.

The runtime itself is run on tensors without data, with exchanges that move nothing, and the storages that
are alive are counted: a buffer added there counts here at once. What kernels allocate inside, where no
dispatcher sees it, is declared beside them (`KERNEL_SCRATCH`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cpattn.backends import KERNEL_SCRATCH
from cpattn.solver import Heads

from .bound import BoundPlan, BoundStage
from .exchanges import Trip
from .execute import Attending, KeyRows, Scoring, accumulator_dtype, kept_bytes, run_backward, run_forward
from .trades import HeadTrades, trade_dout, trade_gradients, trade_inputs, trade_result

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


def step_memory(bound: BoundPlan, heads: Heads, dtype: torch.dtype, device: torch.device) -> StepMemory:
    """The peaks of a call without sink and softcap, for contiguous q, k, v and dout of a dtype.

    Args:
        bound: this rank's plan, for that dtype and device.
        heads: of q, k and v here.

    Raises:
        ValueError: the backend runs its kernel outside torch's operators (`_OUTSIDE_TORCH`).
    """
    if bound.backend.name in _OUTSIDE_TORCH:
        raise ValueError(
            f"memory is not stated for backend {bound.backend.name!r}: its kernel cannot be run without data; "
            f"measure a step with torch.cuda.max_memory_allocated()"
        )
    plan, scoring = _light(bound, dtype), Scoring(1.0)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        q, k, v = _empty_inputs(plan.num_queries, plan.num_keys, heads, dtype, device)
        kv, results = KeyRows(k, v), _empty_results(plan.num_queries, heads, dtype, device)
        out, lse = results
        num_kept = kept_bytes(plan, kv) if plan.keep_kv else 0
        kept = torch.empty(num_kept, dtype=torch.uint8, device=device)
        forward = num_kept + _peak(lambda: run_forward(plan, q, kv, None, kept, scoring), [q, k, v, kept])
        backward = _peak(
            lambda: run_backward(plan, out, Attending(q, out, lse), kv, kept, scoring), [q, k, v, kept, out, lse]
        )
    in_results = sum(t.nbytes for t in results)
    return StepMemory(forward, backward, num_kept, max(forward, in_results + num_kept + backward))


def memory_with_trades(
    trades: HeadTrades, between: StepMemory, heads: Heads, dtype: torch.dtype, device: torch.device
) -> StepMemory:
    """The same around the attention of the block's rows; its q, k, v, out and lse are kept for backward.

    Args:
        between: of that attention.
        heads: of q, k and v outside.
    """
    still = trades._replace(
        queries=replace(trades.queries, active=False), keys=replace(trades.keys, active=False)
    )
    mine, part = trades.queries.part, trades.part
    inside = replace(heads, num_q=part.num_q, num_kv=len(part.kv))
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        rows = _empty_inputs(trades.queries.rows[mine], trades.keys.rows[mine], heads, dtype, device)
        block = _empty_inputs(sum(trades.queries.rows), sum(trades.keys.rows), inside, dtype, device)
        out, lse = _empty_results(len(block[0]), inside, dtype, device)
        dout, _ = _empty_results(len(rows[0]), heads, dtype, device)
        in_block = sum(t.nbytes for t in block)
        results = out.nbytes + lse.nbytes
        before = _peak(lambda: trade_inputs(still, *rows), rows)
        after = _peak(lambda: trade_result(still, out), [out])
        dout_traded = _peak(lambda: trade_dout(still, dout), [dout])
        gradients = in_block + _peak(lambda: trade_gradients(still, *block), block)
    forward = max(before, in_block + between.forward, in_block + results + between.kept + after)
    attention_backward = max(dout_traded, out.nbytes + between.backward)
    kept = in_block + results + between.kept
    # When gradients are traded, autograd has let go of what was kept.
    step = max(forward, dout.nbytes + max(kept + attention_backward, gradients))
    return StepMemory(forward, max(attention_backward, gradients), kept, step)


def _empty_inputs(
    num_queries: int, num_keys: int, heads: Heads, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v."""
    shapes = (
        (num_queries, heads.num_q, heads.head_dim),
        (num_keys, heads.num_kv, heads.head_dim),
        (num_keys, heads.num_kv, heads.head_dim_v),
    )
    q, k, v = (torch.empty(shape, dtype=dtype, device=device) for shape in shapes)
    return q, k, v


def _empty_results(
    num_queries: int, heads: Heads, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """out and lse."""
    out = torch.empty((num_queries, heads.num_q, heads.head_dim_v), dtype=dtype, device=device)
    return out, torch.empty((num_queries, heads.num_q), dtype=accumulator_dtype(dtype), device=device)


def _light(plan: BoundPlan, dtype: torch.dtype) -> BoundPlan:
    """A plan of the same memory that is cheap to run: exchanges have their buffers and move nothing, and of many
    kernel calls those are left that take most, where the backend tells which.
    """
    heaviest = getattr(plan.backend, "heaviest", lambda work, dtype: work)

    def still(trip: Trip) -> Trip:
        return trip._replace(hops=tuple(replace(hop, active=False) for hop in trip.hops))

    stages = tuple(
        BoundStage(
            still(stage.kv),
            heaviest(stage.own_work, dtype),
            heaviest(stage.guest_work, dtype),
            tuple(None if part is None else heaviest(part, dtype) for part in stage.in_backward),
        )
        for stage in plan.stages
    )
    return plan._replace(queries=still(plan.queries), stages=stages)


def _peak(run: Callable[[], Any], given: Sequence[Tensor]) -> int:
    """Most bytes alive at once while it runs, besides the tensors given."""
    with _Meter(given) as meter:
        run()
    return meter.peak


class _Meter(TorchDispatchMode):
    """Counts the bytes of storages made while it is on."""

    def __init__(self, given: Sequence[Tensor]) -> None:
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
