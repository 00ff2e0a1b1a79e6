"""Planning off the critical path: make plans in a worker and hand them to `make_key` ready-made.

    for batch, ready in cpattn.plan_ahead(batches, mask_of, cp_size=8, num_heads_q=32, num_heads_kv=8, head_dim=128):
        key = cpattn.make_key(mask_of(batch), cp_group=group, num_heads_q=32, num_heads_kv=8, head_dim=128, plan=ready)

Or call `make_plan` in a DataLoader's collate function and put the `ReadyPlan` into the batch: it pickles,
and neither this module nor the solver loads torch. All ranks must see the same masks, as for `make_key`.
"""

from __future__ import annotations

import math
import multiprocessing
import operator
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np

from cpattn.masks.spec import AttnMaskSpec, lower_mask
from cpattn.solver import (
    DEFAULT_HARDWARE,
    Hardware,
    Layout,
    Plan,
    RowCosts,
    ScheduleKind,
    make_dispatch_plan,
    make_joint_plans,
    row_costs,
)

from .hardware import find_hardware

Item = TypeVar("Item")
Workers = Literal["process", "thread"]
Window = tuple[int | None, int | None] | None


class LayerKind(NamedTuple):
    """A mask that some layers of a model have, beside the one that a key is made for.

    spec: None is the key's own. window: as in `make_key`. num_layers: layers that have it, or any number
    in proportion.
    """

    spec: AttnMaskSpec | None = None
    window: int | Sequence[int | None] | None = None
    num_layers: float = 1.0


class LayerMask(NamedTuple):
    """A mask by what tells it from others: the fingerprint of its spec, and a window; and its layers."""

    mask: tuple[Any, ...]
    window: Window
    num_layers: float

    def is_of(self, spec: AttnMaskSpec, window: Window) -> bool:
        return self.window == window and self.mask == spec.fingerprint()


class LayerPlan(NamedTuple):
    """The plan of the layers that have a mask."""

    layers: LayerMask
    plan: Plan


@dataclass(frozen=True, slots=True, eq=False)
class ReadyPlan:
    """Plans with what they were made for, so that `make_key` can tell whether they fit.

    layer_plans: of the key's own mask, then of those in `also`. The other fields are the arguments of
    `make_plan`.
    """

    layer_plans: tuple[LayerPlan, ...]
    heads: tuple[int, int, int, int]
    chunk_size: int
    layout: Layout
    schedule: ScheduleKind
    num_stages: int | None
    ranks_per_node: int | None
    search_effort: int
    wire: str | None

    @property
    def plan(self) -> Plan:
        """The plan of the key's own mask."""
        return self.layer_plans[0].plan

    def require_fit(
        self,
        masks: Sequence[LayerMask],
        heads: tuple[int, int, int, int],
        cp_size: int,
        wire: str | None,
        *,
        head_degree: int = 1,
    ) -> None:
        """Check that the plan is for these masks (or has more of them), these heads and a group of cp_size ranks.

        Raises:
            ValueError: names what differs.
        """
        planned_masks = [planned.layers for planned in self.layer_plans]
        if planned_masks[0].mask != masks[0].mask:
            raise ValueError(
                "plan was made for another mask: make_key must get the spec that make_plan got; did batches and plans "
                "get out of step?"
            )
        for name, planned, asked in (
            ("heads and head dims", self.heads, heads),
            ("window", planned_masks[0].window, masks[0].window),
            ("wire", self.wire, wire),
        ):
            if planned != asked:
                raise ValueError(f"plan was made for {name} {planned} and make_key is called with {asked}")
        if self.plan.cp_size * head_degree != cp_size:
            of = f", each of {head_degree} ranks (head_degree)" if head_degree > 1 else ""
            raise ValueError(
                f"plan was made for cp_size {self.plan.cp_size}{of} and the group has {cp_size} ranks: give make_plan "
                f"cp_size={cp_size // head_degree}"
            )
        missing = {mask[:2] for mask in masks} - {mask[:2] for mask in planned_masks}
        if missing:
            raise ValueError(
                f"plan was made without {len(missing)} of the masks in also: give make_plan the same also as make_key"
            )


def with_layers(
    spec: AttnMaskSpec, window: Window, num_layers: float, also: Sequence[LayerKind]
) -> tuple[tuple[LayerMask, AttnMaskSpec], ...]:
    """The masks that one placement is to serve, the key's own first, each with its spec.

    Raises:
        ValueError: a mask is over another sequence or cross-attention, or a number is not a finite one above 0.
    """
    if not also:
        return ((LayerMask(spec.fingerprint(), window, 1.0), spec),)
    masks = [(LayerMask(spec.fingerprint(), window, float(num_layers)), spec)]
    for kind in also:
        if not isinstance(kind, LayerKind):
            raise ValueError(f"also has {kind!r}: expected cpattn.LayerKind(spec, window, num_layers)")
        other = spec if kind.spec is None else kind.spec
        check_spec("a mask in also", other)
        if other.is_cross or spec.is_cross or other.total_seqlen != spec.total_seqlen:
            raise ValueError(
                f"also has a mask over {other.total_seqlen} x {other.seqlen_k} tokens and the key's is over "
                f"{spec.total_seqlen} x {spec.seqlen_k}: masks that are planned together are of self-attention over "
                f"the same sequence"
            )
        layers = LayerMask(other.fingerprint(), normal_window(kind.window, other), float(kind.num_layers))
        masks.append((layers, other))
    for layers, _ in masks:
        if not math.isfinite(layers.num_layers) or layers.num_layers <= 0:
            raise ValueError(f"num_layers is {layers.num_layers}: it must be a finite number above 0")
    return tuple(masks)


def plan_layers(
    masks: Sequence[tuple[LayerMask, AttnMaskSpec]],
    *,
    cp_size: int,
    chunk_size: int,
    layout: Layout,
    schedule: ScheduleKind,
    num_stages: int | None,
    ranks_per_node: int | None,
    search_effort: int,
    costs: RowCosts,
    hardware: Hardware,
) -> tuple[LayerPlan, ...]:
    """A plan for each mask; several are planned jointly, over one placement.

    Raises:
        ValueError: as `make_dispatch_plan` does, or schedule "tiles" with several masks.
    """
    kinds, specs = zip(*masks, strict=True)
    spec = specs[0]
    options: dict[str, Any] = {
        "total_seqlen": spec.total_seqlen,
        "cp_size": cp_size,
        "chunk_size": chunk_size,
        "layout": layout,
        "num_stages": num_stages,
        "ranks_per_node": ranks_per_node,
        "search_effort": search_effort,
        "costs": costs,
        "hardware": hardware,
    }
    tables = [lower_mask(other, layers.window) for layers, other in masks]
    if len(masks) == 1:
        plan = make_dispatch_plan(tables[0], total_seqlen_k=spec.total_seqlen_k, schedule=schedule, **options)
        return (LayerPlan(kinds[0], plan),)
    if schedule == "tiles":
        raise ValueError(
            "schedule 'tiles' with several masks (also): tiles place tokens for one mask; use 'auto', with which the "
            "queries of one mask move where that is faster, or 'keys'"
        )
    joint = make_joint_plans(tables, [layers.num_layers for layers in kinds], schedule=schedule, **options)
    return tuple(map(LayerPlan, kinds, joint.plans))


def normal_window(window: int | Sequence[int | None] | None, spec: AttnMaskSpec) -> Window:
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
        if isinstance(window, bool):
            raise TypeError
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


def check_heads(num_heads_q: Any, num_heads_kv: Any, head_dim: Any, head_dim_v: Any) -> None:
    """Check heads and head dims.

    Raises:
        ValueError: one is not an int of at least 1, or query heads are no multiple of key heads.
    """
    named = {"num_heads_q": num_heads_q, "num_heads_kv": num_heads_kv, "head_dim": head_dim, "head_dim_v": head_dim_v}
    for name, value in named.items():
        check_int(name, value)
    if num_heads_q % num_heads_kv:
        raise ValueError(
            f"num_heads_q is {num_heads_q} and num_heads_kv is {num_heads_kv}: query heads must be a "
            f"multiple of key heads; did they swap places?"
        )


def check_options(
    spec: Any, heads: tuple[Any, Any, Any, Any], *, chunk_size: Any, num_stages: Any, search_effort: Any, wire: Any
) -> None:
    """Check what `make_key` and `make_plan` take alike, whether or not a plan is made; the solver knows upper limits.

    Raises:
        ValueError: names the value and the rule.
    """
    check_spec("spec", spec)
    check_heads(*heads)
    check_int("chunk_size", chunk_size)
    if num_stages is not None:
        check_int("num_stages", num_stages)
    check_int("search_effort", search_effort, least=0)
    if wire not in (None, "e4m3", "e5m2"):
        raise ValueError(f"wire is {wire!r}: use 'e4m3', 'e5m2' or None")


def check_spec(name: str, spec: Any) -> None:
    """Check that something is a mask.

    Raises:
        ValueError: it is not an `AttnMaskSpec`.
    """
    if not isinstance(spec, AttnMaskSpec):
        raise ValueError(f"{name} is {spec!r}: expected an AttnMaskSpec, for example AttnMaskSpec.varlen(seqlens)")


def check_int(name: str, value: Any, *, least: int = 1) -> None:
    """Check a number of things.

    Raises:
        ValueError: it is not an int of at least `least`.
    """
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} is {value!r}: it must be an int of at least {least}")


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
    wire: str | None = None,
    num_layers: float = 1.0,
    also: Sequence[LayerKind] = (),
    hardware: Hardware | str | Path | None = None,
) -> ReadyPlan:
    """Plan a mask for a group of `cp_size` ranks; for all of them at once, without torch.

    The other arguments are those of `make_key`, which takes the result as `plan=`. It knows no launcher and no
    group: `ranks_per_node` None is one level, `hardware` None is "h100" ("cpu" gives the plan that `make_key` makes
    for a group of gloo).

    >>> ready = make_plan(AttnMaskSpec.causal(1000), cp_size=4, num_heads_q=8, num_heads_kv=2, head_dim=64)
    >>> ready.plan.cp_size
    4
    """
    if isinstance(ranks_per_node, str):
        raise ValueError(f"ranks_per_node is {ranks_per_node!r}: a plan is made without a launcher; give an int")
    heads = (num_heads_q, num_heads_kv, head_dim, head_dim if head_dim_v is None else head_dim_v)
    check_int("cp_size", cp_size)
    check_options(
        spec, heads, chunk_size=chunk_size, num_stages=num_stages, search_effort=search_effort, wire=wire
    )
    plans = plan_layers(
        with_layers(spec, normal_window(window, spec), num_layers, also),
        cp_size=cp_size,
        chunk_size=chunk_size,
        layout=layout,
        schedule=schedule,
        num_stages=num_stages,
        ranks_per_node=ranks_per_node,
        search_effort=search_effort,
        costs=row_costs(*heads, wire_8bit=wire is not None),
        hardware=DEFAULT_HARDWARE if hardware is None else find_hardware(hardware),
    )
    return ReadyPlan(
        plans, heads, chunk_size, layout, schedule, num_stages, ranks_per_node, search_effort, wire
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
        ValueError: depth or num_workers is below 1, workers is unknown, or processes cannot be started from here (in
            a DataLoader's worker); at once.
    """
    check_int("depth", depth)
    check_int("num_workers", num_workers)
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
