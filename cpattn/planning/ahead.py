"""Planning off the critical path: make plans in a worker and hand them to `make_key` ready-made.

    for batch, ready in cpattn.plan_ahead(batches, mask_of, cp_size=8, num_heads_q=32, num_heads_kv=8, head_dim=128):
        key = cpattn.make_key(mask_of(batch), cp_group=group, num_heads_q=32, num_heads_kv=8, head_dim=128, plan=ready)

Or call `make_plan` in a DataLoader's collate function and put the `ReadyPlan` into the batch: it pickles,
and neither this module nor the solver loads torch. All ranks must see the same masks, as for `make_key`.
"""

from __future__ import annotations

import multiprocessing
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing.context import SpawnContext, SpawnProcess
from types import ModuleType
from typing import Any, Literal, TypeVar

from cpattn.masks.reading import read_int
from cpattn.masks.spec import AttnMaskSpec

from .ready import ReadyPlan, make_plan

Item = TypeVar("Item")
Workers = Literal["process", "thread"]


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
        ValueError: depth or num_workers is below 1, workers is unknown, or processes cannot be started from here (in
            a DataLoader's worker); at once.
    """
    depth, num_workers = read_int("depth", depth), read_int("num_workers", num_workers)
    if workers not in ("process", "thread"):
        raise ValueError(f"workers is {workers!r}: use 'process' or 'thread'")
    if workers == "process" and multiprocessing.current_process().daemon:
        raise ValueError(
            "plan_ahead(workers='process') in a worker process, which may start no others: use workers='thread', or "
            "make_plan where the batch is made"
        )
    return _planned_ahead(iter(dataset_iter), spec_of, depth, _executor(workers, num_workers), options)


def _executor(workers: Workers, num_workers: int) -> Executor:
    if workers == "thread":
        return ThreadPoolExecutor(num_workers, thread_name_prefix="cpattn-plan")
    # Not fork: the parent may hold CUDA and OpenMP threads.
    return ProcessPoolExecutor(num_workers, mp_context=_SpawnContext())


class _SpawnProcess(SpawnProcess):
    """A process that does not run the script which starts it: what it plans needs nothing of that.

    Spawned processes import the main module, and a training script without `if __name__ == "__main__"` would join its
    process group once more.
    """

    @staticmethod
    def _Popen(process_obj: Any) -> Any:  # noqa: N802 (its name in multiprocessing)
        with _main_lock:
            main = sys.modules["__main__"]
            sys.modules["__main__"] = ModuleType("__main__")  # neither a file nor a module that could be imported
            try:
                return SpawnProcess._Popen(process_obj)  # type: ignore[attr-defined]
            finally:
                sys.modules["__main__"] = main


class _SpawnContext(SpawnContext):
    Process = _SpawnProcess  # type: ignore[assignment]


_main_lock = threading.Lock()


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
