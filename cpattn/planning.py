"""Planning off the critical path: make plans in a worker and hand them to `make_key` ready-made.

    for batch, ready in cpattn.plan_ahead(batches, mask_of, cp_size=8, num_heads_q=32, num_heads_kv=8, head_dim=128):
        key = cpattn.make_key(mask_of(batch), cp_group=group, num_heads_q=32, num_heads_kv=8, head_dim=128, plan=ready)

Or call `make_plan` in a DataLoader's collate function and put the `ReadyPlan` into the batch: it pickles,
and neither this module nor the solver loads torch. All ranks must see the same masks, as for `make_key`.
"""

from __future__ import annotations

import multiprocessing
import operator
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from cpattn.solver import Layout, Plan, ScheduleKind, make_dispatch_plan, row_costs

from .mask_spec import AttnMaskSpec, lower_mask

Item = TypeVar("Item")
Workers = Literal["process", "thread"]


@dataclass(frozen=True, slots=True, eq=False)
class ReadyPlan:
    """A plan with what it was made for, so that `make_key` can tell whether it fits.

    mask: fingerprint of the spec. The other fields are the arguments of `make_plan`.
    """

    plan: Plan
    mask: tuple[Any, ...]
    heads: tuple[int, int, int, int]
    window: tuple[int | None, int | None] | None
    chunk_size: int
    layout: Layout
    schedule: ScheduleKind
    num_stages: int | None
    ranks_per_node: int | None
    search_effort: int

    def require_fit(
        self,
        spec: AttnMaskSpec,
        heads: tuple[int, int, int, int],
        window: tuple[int | None, int | None] | None,
        cp_size: int,
    ) -> None:
        """Check that the plan is for this mask, these heads and this group.

        Raises:
            ValueError: names what differs.
        """
        if self.mask != spec.fingerprint():
            raise ValueError(
                "plan was made for another mask: make_key must get the spec that make_plan got; did batches and plans "
                "get out of step?"
            )
        for name, planned, asked in (
            ("heads and head dims", self.heads, heads),
            ("window", self.window, window),
            ("number of ranks", self.plan.cp_size, cp_size),
        ):
            if planned != asked:
                raise ValueError(f"plan was made for {name} {planned} and make_key is called with {asked}")


def normal_window(
    window: int | Sequence[int | None] | None, spec: AttnMaskSpec
) -> tuple[int | None, int | None] | None:
    """A window as (left, right), None on a side for no limit; None for no window.

    Raises:
        ValueError: it is not an int or a pair, a number is negative, or the mask is one of cross-attention.
    """
    if window is None:
        return None
    if spec.is_cross:
        raise ValueError(
            f"window is {window!r} and the mask is cross-attention: queries and keys share no positions; "
            f"pass window=None"
        )
    left: int | None
    right: int | None
    try:
        if isinstance(window, Sequence):
            left, right = (None if side is None else operator.index(side) for side in window)
        else:
            left, right = operator.index(window) - 1, None
    except (TypeError, ValueError):
        left = right = -1
    if any(side is not None and side < 0 for side in (left, right)):
        raise ValueError(
            f"window is {window!r}: give an int of at least 1, or (left, right) of at least 0 each"
        )
    return (left, right)


def make_plan(
    spec: AttnMaskSpec,
    *,
    cp_size: int,
    num_heads_q: int,
    num_heads_kv: int,
    head_dim: int,
    head_dim_v: int | None = None,
    chunk_size: int = 512,
    layout: Layout = "balanced",
    schedule: ScheduleKind = "auto",
    num_stages: int | None = None,
    ranks_per_node: int | None = None,
    window: int | Sequence[int | None] | None = None,
    search_effort: int = 0,
) -> ReadyPlan:
    """Plan a mask for a group of `cp_size` ranks; for all of them at once, without torch.

    The other arguments are those of `make_key`, which takes the result as `plan=`.

    >>> ready = make_plan(AttnMaskSpec.causal(1000), cp_size=4, num_heads_q=8, num_heads_kv=2, head_dim=64)
    >>> ready.plan.cp_size
    4
    """
    heads = (num_heads_q, num_heads_kv, head_dim, head_dim if head_dim_v is None else head_dim_v)
    sides = normal_window(window, spec)
    plan = make_dispatch_plan(
        lower_mask(spec, sides),
        total_seqlen=spec.total_seqlen,
        total_seqlen_k=spec.total_seqlen_k,
        cp_size=cp_size,
        chunk_size=chunk_size,
        layout=layout,
        num_stages=num_stages,
        schedule=schedule,
        costs=row_costs(*heads),
        ranks_per_node=ranks_per_node,
        search_effort=search_effort,
    )
    return ReadyPlan(
        plan,
        spec.fingerprint(),
        heads,
        sides,
        chunk_size,
        layout,
        schedule,
        num_stages,
        ranks_per_node,
        search_effort,
    )


def plan_ahead(
    dataset_iter: Iterable[Item],
    spec_of: Callable[[Item], AttnMaskSpec],
    *,
    depth: int = 2,
    num_workers: int = 1,
    workers: Workers = "process",
    **options: Any,
) -> Iterator[tuple[Item, ReadyPlan]]:
    """Items with the plans of their masks, planned in the background `depth` items ahead.

    Items are read, and `spec_of` is called, in the caller's thread; only specs and plans travel. An
    error in a worker is raised where its item would have come; the workers end with the iterator.

    Args:
        dataset_iter: whatever yields batches; read `depth` items ahead of what is returned.
        spec_of: the mask of an item.
        depth: plans in the making or ready, at least 1.
        num_workers: processes or threads.
        workers: "process": planning costs this process nothing. "thread": no processes, but planning
            takes turns with training for the interpreter.
        **options: of `make_plan`: cp_size, num_heads_q, num_heads_kv, head_dim and so on.

    Raises:
        ValueError: depth or num_workers is below 1, or workers is unknown; at once.
    """
    if depth < 1 or num_workers < 1 or workers not in ("process", "thread"):
        raise ValueError(
            f"depth {depth}, num_workers {num_workers}, workers {workers!r}: need at least 1, at least 1, and "
            f"'process' or 'thread'"
        )
    return _planned_ahead(iter(dataset_iter), spec_of, depth, _executor(workers, num_workers), options)


def _executor(workers: Workers, num_workers: int) -> Executor:
    if workers == "thread":
        return ThreadPoolExecutor(num_workers, thread_name_prefix="cpattn-plan")
    # Not fork: the parent may hold CUDA and OpenMP threads.
    return ProcessPoolExecutor(num_workers, mp_context=multiprocessing.get_context("spawn"))


def _planned_ahead(
    items: Iterator[Item],
    spec_of: Callable[[Item], AttnMaskSpec],
    depth: int,
    executor: Executor,
    options: dict[str, Any],
) -> Iterator[tuple[Item, ReadyPlan]]:
    waiting: deque[tuple[Item, Future[ReadyPlan]]] = deque()
    try:
        for item in items:
            waiting.append((item, executor.submit(make_plan, spec_of(item), **options)))
            if len(waiting) > depth:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
