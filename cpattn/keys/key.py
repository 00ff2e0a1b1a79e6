"""`make_key`: plan a mask for a group of ranks and bind this rank's share to it.

A key holds everything that a step needs besides the tensors. It is made once per mask and reused by
all layers; keys are cached, so asking for the same one again costs microseconds.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn
from weakref import WeakValueDictionary

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from cpattn.backends import Backend, Problem, backend_names, choose_backend, explain_choice
from cpattn.collectives import Fp8Rows, HeadExchange, RowCodec, RowRoutes, Transport
from cpattn.masks.spec import AttnMaskSpec, lower_mask
from cpattn.planning.head_degree import choose_head_degree, inner_costs
from cpattn.planning.ready import (
    LayerKind,
    LayerMask,
    LayerPlan,
    ReadyPlan,
    check_heads,
    check_int,
    check_options,
    check_spec,
    normal_window,
    plan_layers,
    with_layers,
)
from cpattn.runtime.agreement import require_agreement
from cpattn.solver import (
    DEFAULT_HARDWARE,
    Exchange,
    Hardware,
    HeadPart,
    Heads,
    Layout,
    Placement,
    Plan,
    PlanReport,
    RankPlan,
    RowCosts,
    ScheduleKind,
    SliceTable,
    assemble_plan,
    context_ranks_per_node,
    head_exchange_bytes,
    keys_schedule,
    plan_report,
    split_heads,
    split_rows,
    spread_rank_plan,
)

from .nodes import RanksPerNode, resolve_ranks_per_node

if TYPE_CHECKING:
    from cpattn.runtime.memory import StepMemory
from .transports import TransportChoice, choose_head_transport, choose_transport, read_hardware

MAX_CACHED_KEYS = 64


@dataclass(frozen=True, slots=True)
class KeyOptions:
    """How a key is planned and run; part of the key's identity.

    chunk_size: tokens by which ranks' token counts may differ, and the grain of placement.
    layout: "balanced", "contiguous" or "zigzag".
    schedule: "auto", "keys" or "tiles".
    backend: name of the local kernel, or "auto".
    num_stages: parts in which remote keys are fetched; None chooses.
    ranks_per_node: ranks that share a node in a two-level network; None: one level.
    window: (left, right) limit on the distance in positions; None on a side is no limit.
    search_effort: extra placement search, in iterations.
    wire: 8-bit format in which rows travel; None: as they are.
    keep_kv: whether forward keeps the keys and values that it fetched for backward.
    head_degree: ranks that share a context rank's rows, each with some of the heads; 1: no head sharding.
    hardware: speeds that the plan is made for. transport: by which calls rows travel; "auto": by its measurements.
    """

    chunk_size: int
    layout: Layout
    schedule: ScheduleKind
    backend: str
    num_stages: int | None
    ranks_per_node: int | None
    window: tuple[int | None, int | None] | None
    search_effort: int
    wire: str | None = None
    head_degree: int = 1
    keep_kv: bool = False
    hardware: Hardware = DEFAULT_HARDWARE
    transport: TransportChoice = "auto"


class BoundStage(NamedTuple):
    """A stage of a rank plan with its exchange and kernel work on a device."""

    kv: tuple[RowRoutes, ...]
    num_keys: int
    host_work: Any
    guest_work: Any


class BoundPlan(NamedTuple):
    """A rank plan on a device, for one backend."""

    backend: Backend
    queries: tuple[RowRoutes, ...]
    moves_queries: bool
    stages: tuple[BoundStage, ...]


class HeadSharding(NamedTuple):
    """How a block of ranks shares the heads, from the view of one of them.

    inner: the key of the attention between the exchanges: all rows of this rank's block, for its heads.
    part: this rank's heads. queries, keys: the exchange of rows for heads of q, out and lse, and of k and v.
    """

    inner: AttnKey
    part: HeadPart
    queries: HeadExchange
    keys: HeadExchange


class AttnKey:
    """A mask planned for a group, and this rank's share of the plan.

    Made by `make_key`. Attributes of interest: `spec`, `plan` (all ranks), `rank_plan` (this rank),
    `q_placement` and `k_placement` (which rank has which rows), `cp_group`, `cp_size`, `cp_rank`,
    `num_tokens` (local query rows), `num_keys` (local key rows).

    With head sharding the plan is one for cp_size / head_degree context ranks, each of them a block of ranks;
    `sharding` then says how a block exchanges rows for heads, and holds the key of the attention inside.

    Not a dataclass: FSDP2 takes dataclasses among a module's arguments apart to cast what is in them.
    """

    def __init__(
        self,
        spec: AttnMaskSpec,
        options: KeyOptions,
        plan: Plan,
        rank_plan: RankPlan,
        cp_group: dist.ProcessGroup | None,
        cp_size: int,
        cp_rank: int,
        num_heads_q: int,
        num_heads_kv: int,
        head_dim: int,
        head_dim_v: int,
        layer_plans: tuple[LayerPlan, ...] = (),
    ) -> None:
        self.spec, self.options = spec, options
        self.plan, self.rank_plan = plan, rank_plan
        self.cp_group, self.cp_size, self.cp_rank = cp_group, cp_size, cp_rank
        self.num_heads_q, self.num_heads_kv = num_heads_q, num_heads_kv
        self.head_dim, self.head_dim_v = head_dim, head_dim_v
        self.layer_plans = layer_plans
        self.degree_seconds: tuple[tuple[int, float], ...] = ()
        self.q_placement = split_rows(plan.q_placement, options.head_degree)
        self.k_placement = (
            self.q_placement
            if plan.k_placement is plan.q_placement
            else split_rows(plan.k_placement, options.head_degree)
        )
        self.transport = choose_transport(
            plan,
            _costs((num_heads_q, num_heads_kv, head_dim, head_dim_v), options).heads,
            num_ranks=cp_size,
            choice=options.transport,
            hardware=options.hardware,
        )
        self.sharding = None if options.head_degree == 1 else _shard_heads(self)
        self.cached_tensors: dict[Any, Any] = {}
        self._bound: dict[Any, BoundPlan] = {}
        self._agreed: set[Any] = set()
        self._by_heads: dict[Any, AttnKey] = {}
        number = next(_handles)
        # The key hangs on the tensor, so that it lives as long as an autograd graph that saved it.
        with torch.inference_mode(False):  # autograd saves it; the key may be made while evaluating
            self.handle = torch.tensor(number, device="cpu")
        self.handle.attn_key = self  # type: ignore[attr-defined]
        _keys_by_handle[number] = self

    def __repr__(self) -> str:
        return (
            f"<AttnKey of {self.spec.total_seqlen} x {self.spec.seqlen_k} tokens, heads {self.num_heads_q}:"
            f"{self.num_heads_kv} of {self.head_dim} and {self.head_dim_v}, rank {self.cp_rank} of {self.cp_size}>"
        )

    def __copy__(self) -> AttnKey:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> AttnKey:
        """Itself: it does not change, and the copy of a model attends under the key that the model has."""
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"{self!r} cannot be pickled: it belongs to this process and its group. Send what make_plan returns, and "
            f"call make_key(spec, ..., plan=...) where it is used"
        )

    @property
    def num_tokens(self) -> int:
        """Query rows of this rank."""
        return int(self.q_placement.num_tokens[self.cp_rank])

    @property
    def num_keys(self) -> int:
        """Key and value rows of this rank (the same as `num_tokens` in self-attention)."""
        return int(self.k_placement.num_tokens[self.cp_rank])

    @property
    def codec(self) -> RowCodec | None:
        """How rows travel between ranks, if not as they are."""
        return None if self.options.wire is None else Fp8Rows(self.options.wire)

    def bind(self, device: torch.device, dtype: torch.dtype, softcap: bool = False) -> BoundPlan:
        """This rank's plan on a device, for the backend that serves it; made once."""
        assert self.sharding is None, "attention between head exchanges runs on the inner key"
        kind = (device, dtype, softcap)
        if kind not in self._bound:
            backend = choose_backend(self._problem(device.type, dtype, softcap), self.options.backend)
            self._bound[kind] = _bind(self.rank_plan, backend, device, self.transport)
        return self._bound[kind]

    def require_shapes(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Check that q, k and v have this rank's rows and the key's heads.

        Raises:
            ValueError: names the tensor, its shape and what is expected.
        """
        expected = {
            "q": (q, (self.num_tokens, self.num_heads_q, self.head_dim)),
            "k": (k, (self.num_keys, self.num_heads_kv, self.head_dim)),
            "v": (v, (self.num_keys, self.num_heads_kv, self.head_dim_v)),
        }
        for name, (tensor, shape) in expected.items():
            if tuple(tensor.shape) != shape:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}: the key expects {shape} (rows of rank "
                    f"{self.cp_rank}, heads, head dim); did you dispatch with this key?"
                )

    def agree(self, **fields: Any) -> None:
        """Compare the fields of a first call between ranks; later calls with the same cost nothing."""
        kind = tuple(fields.items())
        if kind not in self._agreed:
            require_agreement("attention", fields, self.cp_group)
            self._agreed.add(kind)

    def with_mask(
        self, spec: AttnMaskSpec, *, window: int | Sequence[int | None] | None = None
    ) -> AttnKey:
        """A key for another mask over the same placement: one dispatch serves both.

        For models whose layers have different masks (full and sliding-window layers). The heads and
        options are this key's; the rows of each rank stay what they are. A mask that this key was made
        with (`also` of `make_key`) has been planned; any other is planned now, over a placement that was not
        made for it.
        """
        check_spec("spec", spec)
        mine = (self.spec.total_seqlen, self.spec.seqlen_k)
        theirs = (spec.total_seqlen, spec.seqlen_k)
        if mine != theirs or self.spec.is_cross != spec.is_cross:
            raise ValueError(
                f"with_mask: the key is over {mine} query and key tokens and the mask over {theirs}: "
                f"masks of one placement are over the same sequence"
            )
        options = replace(self.options, window=normal_window(window, spec))
        if options == self.options and spec.fingerprint() == self.spec.fingerprint():
            return self
        identity = ("with_mask", int(self.handle), spec.fingerprint(), options)
        return _cached(self.cp_group, identity, lambda: self._plan_with_mask(spec, options))

    def with_heads(
        self, num_heads_q: int, num_heads_kv: int, head_dim: int, head_dim_v: int | None = None
    ) -> AttnKey:
        """The same plan for other heads: a tensor-parallel rank's, or those of a layer that differs.

        Nothing is planned again and nothing communicated.
        """
        heads = (num_heads_q, num_heads_kv, head_dim, head_dim if head_dim_v is None else head_dim_v)
        if heads == (self.num_heads_q, self.num_heads_kv, self.head_dim, self.head_dim_v):
            return self
        if heads not in self._by_heads:
            check_heads(*heads)
            base = (self.spec, self.options, self.plan, self.rank_plan, self.cp_group, self.cp_size, self.cp_rank)
            self._by_heads[heads] = AttnKey(*base, *heads, self.layer_plans)
        return self._by_heads[heads]

    def _plan_with_mask(self, spec: AttnMaskSpec, options: KeyOptions) -> AttnKey:
        heads = (self.num_heads_q, self.num_heads_kv, self.head_dim, self.head_dim_v)
        for layers, plan in self.layer_plans:
            if layers.is_of(spec, options.window):
                return _bind_to_group(spec, options, plan, self.cp_group, heads, self.layer_plans)
        q_placement, k_placement = self.plan.q_placement, self.plan.k_placement
        schedule = keys_schedule(lower_mask(spec, options.window), q_placement)
        plan = assemble_plan(
            *schedule,
            q_placement,
            k_placement,
            num_stages=options.num_stages,
            hardware=options.hardware,
            ranks_per_node=context_ranks_per_node(options.ranks_per_node, options.head_degree),
            costs=_costs(heads, options),
        )
        return _bind_to_group(spec, options, plan, self.cp_group, heads, self.layer_plans)

    def describe(self, dtype: torch.dtype = torch.bfloat16, device: str | None = None) -> str:
        """Balance, tokens and bytes per rank, stages and backend, as text.

        Args:
            dtype: of q, k and v, for the bytes and the backend.
            device: device type for the backend's choice; None is CUDA where there is one.
        """
        if self.sharding is not None:
            head_lines = (*self._describe_choice(), self._describe_sharding(dtype))
            return "\n".join([*head_lines, self.sharding.inner.describe(dtype, device)])
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        backend = explain_choice(self._problem(device, dtype, False), self.options.backend)
        plan = self.plan
        row = self._heads(dtype).row_bytes().kv
        received = plan.kv_routes.rows_received(self.cp_size)
        gathered = (self.cp_size - 1) * self.spec.seqlen_k
        tokens = plan.q_placement.num_tokens
        share = f"{received.sum() / gathered:.1%} of an all-gather" if gathered else "one rank"
        return "\n".join(
            [
                *self._describe_choice(),
                f"mask: {self.spec.total_seqlen} x {self.spec.seqlen_k} tokens, "
                f"{plan.tasks.area():,} visible pairs in {len(plan.tasks)} tasks",
                f"ranks: {self.cp_size}, layout {self.options.layout}, "
                f"work max/mean {plan.imbalance():.3f}, tokens {tokens.min()} to {tokens.max()}",
                *self._describe_layers(),
                f"keys and values received, forward: {received.sum() * row:,} bytes over all ranks "
                f"({share}), {received.max(initial=0) * row:,} on the busiest",
                f"stages: {plan.num_stages} remote, by {self.transport}",
                f"backend ({str(dtype).removeprefix('torch.')} on {device}): {backend}",
                self._describe_memory(dtype, device),
                *self._report(dtype).lines(),
            ]
        )

    def _describe_layers(self) -> list[str]:
        if len(self.layer_plans) < 2:
            return []
        areas = [(layers.num_layers, plan.areas()) for layers, plan in self.layer_plans]
        largest, mean = (sum(n * float(part(a)) for n, a in areas) for part in (np.max, np.mean))
        return [
            f"masks planned together: {len(areas)}, for layers in the proportion "
            f"{':'.join(f'{n:g}' for n, _ in areas)}; work max/mean over all layers {largest / max(mean, 1):.3f}"
        ]

    def _describe_memory(self, dtype: torch.dtype, device: str) -> str:
        if device != "cpu" and not torch.cuda.is_available():
            return f"memory: not stated, there is no {device} device here"
        try:
            stated = self.memory(dtype, device)
        except ValueError as reason:
            return f"memory: {reason}"
        kept = f", of which {stated.kept:,} fetched keys and values are kept" if self.options.keep_kv else ""
        return (
            f"memory of a call beyond its inputs, this rank's peak: {stated.forward:,} bytes forward{kept}, "
            f"{stated.backward:,} backward"
        )

    def _describe_choice(self) -> list[str]:
        if not self.degree_seconds:
            return []
        predicted = ", ".join(f"{degree}: {seconds * 1e3:.3g} ms" for degree, seconds in self.degree_seconds)
        return [
            f"head_degree {self.options.head_degree}, chosen by the predicted step on {self.options.hardware.name}: "
            f"{predicted}"
        ]

    def _describe_sharding(self, dtype: torch.dtype) -> str:
        degree, placements = self.options.head_degree, (self.plan.q_placement, self.plan.k_placement)
        parts = split_heads(self.num_heads_q, self.num_heads_kv, degree)
        counts = [part.num_q for part in parts]
        moved = head_exchange_bytes(placements, parts, self._heads(dtype))
        return (
            f"head sharding: {degree} ranks share a context rank's rows, {min(counts)} to {max(counts)} query heads "
            f"each; {moved:,} bytes each way and pass on the busiest\nbetween the {self.plan.cp_size} context ranks, "
            f"with this rank's heads:"
        )

    def memory(self, dtype: torch.dtype = torch.bfloat16, device: str | None = None) -> StepMemory:
        """Peak bytes that one attention call allocates on this rank beyond its inputs, forward and backward.

        Without sink and softcap; see docs/profiling.md. dtype: of q, k and v. device: device type; None is
        CUDA where there is one.

        Raises:
            ValueError: the backend's kernel cannot be run without data.
        """
        from cpattn.runtime.memory import step_memory  # it runs the runtime, which imports this module

        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        kind = ("memory", dtype, device)
        if kind not in self.cached_tensors:
            self.cached_tensors[kind] = step_memory(self, dtype, torch.device(device))
        stated: StepMemory = self.cached_tensors[kind]
        return stated

    def _report(self, dtype: torch.dtype) -> PlanReport:
        """The plan against lower bounds and the usual alternatives, for q, k and v of a dtype."""
        mask = lower_mask(self.spec, self.options.window)
        return plan_report(self.plan, mask=mask, heads=self._heads(dtype), chunk_size=self.options.chunk_size)

    def _heads(self, dtype: torch.dtype) -> Heads:
        """Heads of a call in a dtype, with what travels in 8 bits priced as such."""
        dims = (self.head_dim, self.head_dim_v)
        return Heads(self.num_heads_q, self.num_heads_kv, *dims, dtype.itemsize, self.options.wire is not None)

    def _problem(self, device_type: str, dtype: torch.dtype, softcap: bool) -> Problem:
        return Problem(
            device_type,
            dtype,
            self.num_heads_q,
            self.num_heads_kv,
            self.head_dim,
            self.head_dim_v,
            softcap,
        )


def make_key(
    spec: AttnMaskSpec,
    *,
    num_heads_q: int,
    num_heads_kv: int,
    head_dim: int,
    head_dim_v: int | None = None,
    cp_group: Any = None,
    chunk_size: int = 512,
    layout: Layout = "balanced",
    schedule: ScheduleKind = "auto",
    backend: str = "auto",
    num_stages: int | None = None,
    ranks_per_node: RanksPerNode = "auto",
    window: int | Sequence[int | None] | None = None,
    num_layers: float = 1.0,
    also: Sequence[LayerKind] = (),
    search_effort: int = 0,
    wire: str | None = None,
    keep_kv: bool = False,
    head_degree: int | Literal["auto"] = 1,
    hardware: Hardware | str | Path | None = None,
    transport: TransportChoice = "auto",
    plan: ReadyPlan | None = None,
) -> AttnKey:
    """Plan attention under a mask for a context-parallel group.

    On the first call for a mask the ranks compare what they planned, with one small all-gather;
    call it on all ranks of the group. The same arguments give the same key from a bounded cache.

    Args:
        spec: the mask. It is read now; changing it later does not change the key.
        num_heads_q, num_heads_kv: heads of q and of k and v; the first a multiple of the second.
        head_dim, head_dim_v: dims of q and k, and of v (None: the same).
        cp_group: ProcessGroup, DeviceMesh (1-D, or with an axis named "cp"), or None for one rank.
        chunk_size: tokens by which ranks' token counts may differ, and the grain of placement.
        layout: "balanced" (even work and tokens, least traffic), "contiguous" or "zigzag".
        schedule: "keys": only keys and values travel. "tiles": each rank computes a tile of queries
            x keys, and queries travel too. "auto": tiles where they move clearly fewer bytes.
        backend: local kernel by name, or "auto".
        num_stages: parts in which remote keys are fetched, to overlap with compute; None chooses.
        ranks_per_node: consecutive ranks of the group that share a node, if links between nodes are
            slower than within: a row then crosses between nodes once per node. "auto": what torchrun (or
            whatever sets its variables) says, where every node has as many of the group's ranks. None: one level.
        window: limit on top of the mask, in positions of the documents: an int W lets a query see
            keys fewer than W positions back (what lies ahead stays as the mask has it); a pair
            (left, right) limits both sides, None on a side not at all.
        num_layers: layers that have this mask, or any number in proportion to those in `also`.
        also: masks of the model's other layers, `LayerKind(spec, window, num_layers)` each: tokens are placed
            for all layers together, and `key.with_mask` gives the key of each mask. With schedule "auto" the
            queries of one of the masks may travel; "tiles" is refused. Six full layers and 26 with a window:
            num_layers=6, also=[LayerKind(None, 1024, 26)].
        search_effort: iterations of extra placement search (0: the fast default).
        wire: "e4m3" or "e5m2": k and v, and q and the gradient of out where they move, travel as
            8-bit floats with a scale for each row and head; half the bytes of bf16, and its error
            (docs/te_ops.md has figures; prefer e4m3). None: as they are.
        keep_kv: keep the keys and values that forward fetched until backward, which then fetches none: fewer
            exchanges for the memory of `key.memory().kept`. Gradients are the same bits. Queries that move
            (schedule "tiles") travel again, with the gradient of out.
        head_degree: U, a divisor of the group's size and at most num_heads_q. Blocks of U consecutive
            ranks exchange rows for heads before attention and back after it, so that each computes some of
            the heads over the block's rows, and the plan is one for size / U context ranks
            (docs/planning.md). Any head counts; 1: no head sharding. "auto": the divisor with the shortest
            predicted step (`key.describe()` lists them), at the cost of a plan for each that may be it; with
            `plan`, what it was made for.
        hardware: speeds by which schedule, num_stages, head_degree and transport are chosen: a preset's name
            ("h100"), the file that `cpattn calibrate --out` wrote, or a `cpattn.solver.Hardware`; the same on
            all ranks. None: "cpu" for a group of gloo, else "h100".
        transport: "all_to_all": one collective for each exchange. "p2p": sends and receives between the ranks
            that have rows for each other. The same results bit for bit. "auto": the faster by the measurements
            of `hardware`, all_to_all where it has none.
        plan: what `make_plan` or `plan_ahead` made for this mask, these heads and this number of ranks;
            nothing is planned then, and the plan's own chunk_size, layout, schedule, num_stages, num_layers,
            ranks_per_node and search_effort hold, whatever is given here. `also` need not be repeated. All
            ranks pass theirs.

    Raises:
        ValueError: a value is out of range, this rank is not in the group, or ranks differ.
    """
    heads = (num_heads_q, num_heads_kv, head_dim, head_dim if head_dim_v is None else head_dim_v)
    check_options(
        spec, heads, chunk_size=chunk_size, num_stages=num_stages, search_effort=search_effort, wire=wire
    )
    if plan is not None and not isinstance(plan, ReadyPlan):
        raise ValueError(f"plan is {plan!r}: give what make_plan or plan_ahead returned")
    if backend != "auto" and backend not in backend_names():
        raise ValueError(f"backend {backend!r} is unknown: use auto, {', '.join(backend_names())}")
    if transport not in ("auto", "all_to_all", "p2p"):
        raise ValueError(f"transport is {transport!r}: use 'auto', 'all_to_all' or 'p2p'")
    group = _resolve_group(cp_group)
    cp_size = 1 if group is None else dist.get_world_size(group)
    auto_degree = head_degree == "auto"
    degree = _checked_degree(head_degree, plan, cp_size, heads)
    per_node = resolve_ranks_per_node(ranks_per_node, group, cp_size)
    if ranks_per_node == "auto" and per_node and per_node % degree and degree % per_node:
        per_node = None  # blocks would lie in one node here and in two there
    options = KeyOptions(
        int(chunk_size),
        layout,
        schedule,
        backend,
        num_stages,
        per_node,
        normal_window(window, spec),
        search_effort,
        wire,
        degree,
        bool(keep_kv),
        read_hardware(hardware, group),
        transport,
    )
    heads = (int(heads[0]), int(heads[1]), int(heads[2]), int(heads[3]))  # numpy's too: ranks compare by repr
    masks = with_layers(spec, options.window, num_layers, also)
    layers = tuple(kind for kind, _ in masks) if plan is None else tuple(kind for kind, _ in plan.layer_plans)
    if plan is not None:
        plan.require_fit([layers for layers, _ in masks], heads, cp_size, wire, head_degree=degree)
        options = replace(
            options,
            chunk_size=plan.chunk_size,
            layout=plan.layout,
            schedule=plan.schedule,
            num_stages=plan.num_stages,
            ranks_per_node=None if plan.ranks_per_node is None else plan.ranks_per_node * degree,
            search_effort=plan.search_effort,
        )
    identity = (layers, heads, options, auto_degree)
    return _cached(group, identity, lambda: _make_key(masks, options, group, heads, plan, auto_degree))


def clear_key_cache() -> None:
    """Forget all cached keys (those still referenced go on working)."""
    with _cache_lock:
        _caches.clear()


def key_of_handle(handle: Tensor) -> AttnKey:
    """The live key with this handle; custom ops carry the handle because they take no objects."""
    number = int(handle)
    key = _keys_by_handle.get(number)
    if key is None:
        raise RuntimeError(
            f"attention key {number} no longer exists: keep a reference to the key until backward has run"
        )
    return key


_handles = itertools.count(1)
_keys_by_handle: WeakValueDictionary[int, AttnKey] = WeakValueDictionary()
# One for each group, by its id (its keys hold the group, so the id is not reused while they live). In a common
# one, keys of a group that only some ranks belong to would push out others on those ranks alone; a hit there and
# a miss here would leave ranks waiting in the comparison of a new key.
_caches: dict[int, OrderedDict[Any, AttnKey]] = {}
_cache_lock = threading.Lock()


def _cached(group: dist.ProcessGroup | None, identity: Any, make: Callable[[], AttnKey]) -> AttnKey:
    with _cache_lock:
        cache = _caches.setdefault(id(group), OrderedDict())
        key = cache.get(identity)
        if key is not None:
            cache.move_to_end(identity)
            return key
    key = make()
    with _cache_lock:
        cache = _caches.setdefault(id(group), OrderedDict())
        cache[identity] = key
        while len(cache) > MAX_CACHED_KEYS:
            cache.popitem(last=False)
    return key


def _make_key(
    masks: Sequence[tuple[LayerMask, AttnMaskSpec]],
    options: KeyOptions,
    group: dist.ProcessGroup | None,
    heads: tuple[int, int, int, int],
    ready: ReadyPlan | None,
    auto_degree: bool,
) -> AttnKey:
    cp_size = 1 if group is None else dist.get_world_size(group)
    planning: dict[str, Any] = {
        "chunk_size": options.chunk_size,
        "layout": options.layout,
        "num_stages": options.num_stages,
        "schedule": options.schedule,
        "search_effort": options.search_effort,
        "hardware": options.hardware,
    }
    seconds: tuple[tuple[int, float], ...] = ()
    if ready is not None:
        plans = ready.layer_plans
    elif auto_degree:
        per_node, wire_8bit = options.ranks_per_node, options.wire is not None
        degree, plans, seconds = choose_head_degree(
            masks, heads, cp_size=cp_size, ranks_per_node=per_node, wire_8bit=wire_8bit, **planning
        )
        options = replace(options, head_degree=degree)
    else:
        per_node = context_ranks_per_node(options.ranks_per_node, options.head_degree)
        context_ranks, costs = cp_size // options.head_degree, _costs(heads, options)
        plans = plan_layers(masks, cp_size=context_ranks, costs=costs, ranks_per_node=per_node, **planning)
    key = _bind_to_group(masks[0][1], options, plans[0].plan, group, heads, plans)
    key.degree_seconds = seconds
    return key


def _bind_to_group(
    spec: AttnMaskSpec,
    options: KeyOptions,
    plan: Plan,
    group: dist.ProcessGroup | None,
    heads: tuple[int, int, int, int],
    layer_plans: tuple[LayerPlan, ...],
) -> AttnKey:
    # The caller may go on to change the spec's lists; the key keeps its own.
    own = AttnMaskSpec(
        spec.q_ranges, spec.k_ranges, spec.mask_types, spec.total_seqlen, spec.total_seqlen_k, spec.documents
    )
    shared = {
        "mask": own,
        "heads and head dims": heads,
        **{field.name: getattr(options, field.name) for field in fields(options)},
        "layers": [(kind.num_layers, kind.window, kind.mask) for kind, _ in layer_plans],
        "plan": (plan.fingerprint, *(other.fingerprint for _, other in layer_plans)),
    }
    require_agreement("make_key", shared, group)
    rank = 0 if group is None else dist.get_rank(group)
    rank_plan, cp_size = plan.for_rank(rank // options.head_degree), plan.cp_size * options.head_degree
    return AttnKey(own, options, plan, rank_plan, group, cp_size, rank, *heads, layer_plans)


def _shard_heads(key: AttnKey) -> HeadSharding:
    degree, plan = key.options.head_degree, key.plan
    context, nth = divmod(key.cp_rank, degree)
    parts = split_heads(key.num_heads_q, key.num_heads_kv, degree)
    mine = parts[nth]
    inner = AttnKey(
        key.spec,
        # Its own heads differ between ranks, and so could its choice.
        replace(key.options, head_degree=1, transport=key.transport),
        plan,
        spread_rank_plan(key.rank_plan, degree, nth),
        key.cp_group,
        plan.cp_size,
        context,
        mine.num_q,
        len(mine.kv),
        key.head_dim,
        key.head_dim_v,
    )
    block = tuple(range(context * degree, (context + 1) * degree))
    transport = choose_head_transport(
        float(key.q_placement.num_tokens.max()),
        key._heads(torch.bfloat16),
        head_degree=degree,
        num_ranks=key.cp_size,
        choice=key.options.transport,
        hardware=key.options.hardware,
    )

    def exchange(placement: Placement, heads: Sequence[Sequence[int]], num_heads: int) -> HeadExchange:
        rows = tuple(placement.num_tokens[list(block)].tolist())
        active = placement.total_seqlen > 0
        return HeadExchange(block, nth, rows, tuple(map(tuple, heads)), num_heads, active, transport)

    q_heads = [range(part.first, part.last) for part in parts]
    return HeadSharding(
        inner,
        mine,
        exchange(key.q_placement, q_heads, key.num_heads_q),
        exchange(key.k_placement, [part.kv for part in parts], key.num_heads_kv),
    )


def _costs(heads: tuple[int, int, int, int], options: KeyOptions) -> RowCosts:
    return inner_costs(heads, options.head_degree, options.wire is not None)


def _resolve_group(cp_group: Any) -> dist.ProcessGroup | None:
    """A process group of two ranks or more, or None."""
    if cp_group is None:
        return None
    if hasattr(cp_group, "mesh_dim_names"):  # DeviceMesh
        names = cp_group.mesh_dim_names or ()
        if "cp" in names:
            cp_group = cp_group["cp"]
        elif cp_group.ndim != 1:
            raise ValueError(
                f"cp_group is a mesh with axes {names}: pass a 1-D mesh, or name the context-parallel "
                f"axis 'cp'"
            )
        # A mesh without this rank is refused below, as it is.
        cp_group = cp_group if cp_group.get_coordinate() is None else cp_group.get_group()
    if not isinstance(cp_group, dist.ProcessGroup) or dist.get_rank(cp_group) < 0:
        raise ValueError(
            f"cp_group is {cp_group!r}: this rank ({dist.get_rank() if dist.is_initialized() else 0}) is "
            f"not in it; pass a ProcessGroup or DeviceMesh that contains this rank, or None for one rank"
        )
    return cp_group if dist.get_world_size(cp_group) > 1 else None


def _checked_degree(
    asked: int | Literal["auto"], plan: ReadyPlan | None, cp_size: int, heads: tuple[int, int, int, int]
) -> int:
    """head_degree as a number; 1 for an "auto" that is yet to be chosen."""
    if isinstance(asked, str):
        if asked != "auto":
            raise ValueError(f"head_degree is {asked!r}: give an int of at least 1, or 'auto'")
        degree = 1 if plan is None else max(cp_size // plan.plan.cp_size, 1)
    else:
        degree = asked
    check_int("head_degree", degree)
    if cp_size % degree:
        raise ValueError(f"head_degree is {degree} and the group has {cp_size} ranks: it must divide them")
    if degree > 1:
        split_heads(heads[0], heads[1], degree)  # or it says why not
    return int(degree)


def _bind(rank_plan: RankPlan, backend: Backend, device: torch.device, transport: Transport) -> BoundPlan:
    queries = _bind_hops(rank_plan.queries, rank_plan.num_queries, device, transport)

    num_guests = rank_plan.queries[-1].num_received

    def prepare(slices: SliceTable, num_queries: int, num_keys: int) -> Any:
        return backend.prepare(slices, num_queries, num_keys, device)

    stages = tuple(
        BoundStage(
            kv=_bind_hops(stage.kv, rank_plan.num_keys, device, transport),
            num_keys=stage.num_keys,
            host_work=prepare(stage.host, rank_plan.num_queries, stage.num_keys),
            guest_work=prepare(stage.guest, num_guests, stage.num_keys),
        )
        for stage in rank_plan.stages
    )
    moves_queries = any(hop.active for hop in queries)
    return BoundPlan(backend, queries, moves_queries, stages)


def _bind_hops(
    hops: tuple[Exchange, ...], num_local: int, device: torch.device, transport: Transport
) -> tuple[RowRoutes, ...]:
    bound = tuple(bind_exchange(hop, device, transport) for hop in hops)
    return (*bound[:1], *(later.relaying(num_local) for later in bound[1:]))


def bind_exchange(exchange: Exchange, device: torch.device, transport: Transport = "all_to_all") -> RowRoutes:
    """An exchange of the plan with its row indices on a device."""
    index = runs_to_index(exchange.send_runs, device)
    return RowRoutes(index, exchange.send_splits, exchange.recv_splits, exchange.active, transport)


def runs_to_index(runs: np.ndarray, device: torch.device) -> Tensor:
    """Row indices int64 of [start, end) runs, one after the other."""
    parts = [np.arange(start, end) for start, end in runs.tolist()]
    index = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
    return torch.from_numpy(index.astype(np.int64)).to(device)

