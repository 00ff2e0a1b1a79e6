"""`make_key`: plan a mask for a group of ranks and bind this rank's share to it.

A key holds everything that a step needs besides the tensors. It is made once per mask and reused by
all layers; keys are cached, so asking for the same one again costs microseconds.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from cpattn.backends import Backend, Problem, backend_names, choose_backend, explain_choice
from cpattn.collectives import Fp8Rows, RowCodec, RowRoutes
from cpattn.solver import (
    Exchange,
    Heads,
    Layout,
    Plan,
    PlanReport,
    RankPlan,
    ScheduleKind,
    SliceTable,
    assemble_plan,
    keys_schedule,
    make_dispatch_plan,
    plan_report,
    row_costs,
)

from .agreement import require_agreement
from .mask_spec import AttnMaskSpec, lower_mask
from .planning import ReadyPlan, normal_window

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


class AttnKey:
    """A mask planned for a group, and this rank's share of the plan.

    Made by `make_key`. Attributes of interest: `spec`, `plan` (all ranks), `rank_plan` (this rank),
    `cp_group`, `cp_size`, `cp_rank`, `num_tokens` (local query rows), `num_keys` (local key rows).

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
    ) -> None:
        self.spec, self.options = spec, options
        self.plan, self.rank_plan = plan, rank_plan
        self.cp_group, self.cp_size, self.cp_rank = cp_group, cp_size, cp_rank
        self.num_heads_q, self.num_heads_kv = num_heads_q, num_heads_kv
        self.head_dim, self.head_dim_v = head_dim, head_dim_v
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

    @property
    def num_tokens(self) -> int:
        """Query rows of this rank."""
        return self.rank_plan.num_queries

    @property
    def num_keys(self) -> int:
        """Key and value rows of this rank (the same as `num_tokens` in self-attention)."""
        return self.rank_plan.num_keys

    @property
    def codec(self) -> RowCodec | None:
        """How rows travel between ranks, if not as they are."""
        return None if self.options.wire is None else Fp8Rows(self.options.wire)

    def bind(self, device: torch.device, dtype: torch.dtype, softcap: bool = False) -> BoundPlan:
        """This rank's plan on a device, for the backend that serves it; made once."""
        kind = (device, dtype, softcap)
        if kind not in self._bound:
            backend = choose_backend(self._problem(device.type, dtype, softcap), self.options.backend)
            self._bound[kind] = _bind(self.rank_plan, backend, device)
        return self._bound[kind]

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
        options are this key's; the rows of each rank stay what they are.
        """
        mine = (self.spec.total_seqlen, self.spec.seqlen_k)
        theirs = (spec.total_seqlen, spec.seqlen_k)
        if mine != theirs or self.spec.is_cross != spec.is_cross:
            raise ValueError(
                f"with_mask: the key is over {mine} query and key tokens and the mask over {theirs}: "
                f"masks of one placement are over the same sequence"
            )
        options = replace(self.options, window=normal_window(window, spec))
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
            _check_heads(*heads)
            base = (self.spec, self.options, self.plan, self.rank_plan, self.cp_group, self.cp_size, self.cp_rank)
            self._by_heads[heads] = AttnKey(*base, *heads)
        return self._by_heads[heads]

    def _plan_with_mask(self, spec: AttnMaskSpec, options: KeyOptions) -> AttnKey:
        q_placement, k_placement = self.plan.q_placement, self.plan.k_placement
        schedule = keys_schedule(lower_mask(spec, options.window), q_placement)
        heads = (self.num_heads_q, self.num_heads_kv, self.head_dim, self.head_dim_v)
        plan = assemble_plan(
            *schedule,
            q_placement,
            k_placement,
            num_stages=options.num_stages,
            ranks_per_node=options.ranks_per_node,
            costs=row_costs(*heads),
        )
        return _bind_to_group(spec, options, plan, self.cp_group, heads)

    def describe(self, dtype: torch.dtype = torch.bfloat16, device: str | None = None) -> str:
        """Balance, tokens and bytes per rank, stages and backend, as text.

        Args:
            dtype: of q, k and v, for the bytes and the backend.
            device: device type for the backend's choice; None is CUDA where there is one.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        backend = explain_choice(self._problem(device, dtype, False), self.options.backend)
        plan = self.plan
        row = self.num_heads_kv * (self.head_dim + self.head_dim_v) * dtype.itemsize
        received = plan.kv_routes.rows_received(self.cp_size)
        gathered = (self.cp_size - 1) * self.spec.seqlen_k
        tokens = plan.q_placement.num_tokens
        share = f"{received.sum() / gathered:.1%} of an all-gather" if gathered else "one rank"
        return "\n".join(
            [
                f"mask: {self.spec.total_seqlen} x {self.spec.seqlen_k} tokens, "
                f"{plan.tasks.area():,} visible pairs in {len(plan.tasks)} tasks",
                f"ranks: {self.cp_size}, layout {self.options.layout}, "
                f"work max/mean {plan.imbalance():.3f}, tokens {tokens.min()} to {tokens.max()}",
                f"keys and values received, forward: {received.sum() * row:,} bytes over all ranks "
                f"({share}), {received.max(initial=0) * row:,} on the busiest",
                f"stages: {plan.num_stages} remote",
                f"backend ({str(dtype).removeprefix('torch.')} on {device}): {backend}",
                *self._report(dtype).lines(),
            ]
        )

    def _report(self, dtype: torch.dtype) -> PlanReport:
        """The plan against lower bounds and the usual alternatives, for q, k and v of a dtype."""
        heads = Heads(self.num_heads_q, self.num_heads_kv, self.head_dim, self.head_dim_v, dtype.itemsize)
        mask = lower_mask(self.spec, self.options.window)
        return plan_report(self.plan, mask=mask, heads=heads, chunk_size=self.options.chunk_size)

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
    ranks_per_node: int | None = None,
    window: int | Sequence[int | None] | None = None,
    search_effort: int = 0,
    wire: str | None = None,
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
            slower than within: a row then crosses between nodes once per node. None: one level.
        window: limit on top of the mask, in positions of the documents: an int W lets a query see
            keys fewer than W positions back (what lies ahead stays as the mask has it); a pair
            (left, right) limits both sides, None on a side not at all.
        search_effort: iterations of extra placement search (0: the fast default).
        wire: "e4m3" or "e5m2": k and v, and q and the gradient of out where they move, travel as
            8-bit floats with a scale for each row and head; half the bytes of bf16, and its error
            (docs/te_ops.md has figures; prefer e4m3). None: as they are.
        plan: what `make_plan` or `plan_ahead` made for this mask, these heads and this number of ranks;
            nothing is planned then, and the plan's own chunk_size, layout, schedule, num_stages,
            ranks_per_node and search_effort hold, whatever is given here. All ranks pass theirs.

    Raises:
        ValueError: a value is out of range, this rank is not in the group, or ranks differ.
    """
    if not isinstance(spec, AttnMaskSpec):
        raise ValueError(f"spec is {spec!r}: expected an AttnMaskSpec, for example AttnMaskSpec.varlen(seqlens)")
    heads = (num_heads_q, num_heads_kv, head_dim, head_dim if head_dim_v is None else head_dim_v)
    _check_heads(*heads)
    _check_positive("chunk_size", chunk_size)
    if backend != "auto" and backend not in backend_names():
        raise ValueError(f"backend {backend!r} is unknown: use auto, {', '.join(backend_names())}")
    if wire not in (None, "e4m3", "e5m2"):
        raise ValueError(f"wire is {wire!r}: use 'e4m3', 'e5m2' or None")
    group = _resolve_group(cp_group)
    options = KeyOptions(
        int(chunk_size),
        layout,
        schedule,
        backend,
        num_stages,
        ranks_per_node,
        normal_window(window, spec),
        search_effort,
        wire,
    )
    heads = (int(heads[0]), int(heads[1]), int(heads[2]), int(heads[3]))  # numpy's too: ranks compare by repr
    if plan is not None:
        plan.require_fit(spec, heads, options.window, 1 if group is None else dist.get_world_size(group))
        options = replace(
            options,
            chunk_size=plan.chunk_size,
            layout=plan.layout,
            schedule=plan.schedule,
            num_stages=plan.num_stages,
            ranks_per_node=plan.ranks_per_node,
            search_effort=plan.search_effort,
        )
    identity = (spec.fingerprint(), heads, options)
    return _cached(group, identity, lambda: _make_key(spec, options, group, heads, plan))


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
    spec: AttnMaskSpec,
    options: KeyOptions,
    group: dist.ProcessGroup | None,
    heads: tuple[int, int, int, int],
    ready: ReadyPlan | None,
) -> AttnKey:
    if ready is not None:
        return _bind_to_group(spec, options, ready.plan, group, heads)
    plan = make_dispatch_plan(
        lower_mask(spec, options.window),
        total_seqlen=spec.total_seqlen,
        total_seqlen_k=spec.total_seqlen_k,
        cp_size=1 if group is None else dist.get_world_size(group),
        chunk_size=options.chunk_size,
        layout=options.layout,
        num_stages=options.num_stages,
        schedule=options.schedule,
        costs=row_costs(*heads),
        ranks_per_node=options.ranks_per_node,
        search_effort=options.search_effort,
    )
    return _bind_to_group(spec, options, plan, group, heads)


def _bind_to_group(
    spec: AttnMaskSpec,
    options: KeyOptions,
    plan: Plan,
    group: dist.ProcessGroup | None,
    heads: tuple[int, int, int, int],
) -> AttnKey:
    fields = {
        "mask": spec.fingerprint(),
        "heads and head dims": heads,
        "key options": options,
        "plan": plan.fingerprint,
    }
    require_agreement("make_key", fields, group)
    rank = 0 if group is None else dist.get_rank(group)
    # The caller may go on to change the spec's lists; the key keeps its own.
    own = AttnMaskSpec(
        spec.q_ranges, spec.k_ranges, spec.mask_types, spec.total_seqlen, spec.total_seqlen_k, spec.documents
    )
    return AttnKey(own, options, plan, plan.for_rank(rank), group, plan.cp_size, rank, *heads)


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


def _check_heads(num_heads_q: Any, num_heads_kv: Any, head_dim: Any, head_dim_v: Any) -> None:
    named = {"num_heads_q": num_heads_q, "num_heads_kv": num_heads_kv, "head_dim": head_dim, "head_dim_v": head_dim_v}
    for name, value in named.items():
        _check_positive(name, value)
    if num_heads_q % num_heads_kv:
        raise ValueError(
            f"num_heads_q is {num_heads_q} and num_heads_kv is {num_heads_kv}: query heads must be a "
            f"multiple of key heads; did they swap places?"
        )


def _check_positive(name: str, value: Any) -> None:
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is {value!r}: it must be an int of at least 1")


def _bind(rank_plan: RankPlan, backend: Backend, device: torch.device) -> BoundPlan:
    queries = _bind_hops(rank_plan.queries, device)

    num_guests = rank_plan.queries[-1].num_received

    def prepare(slices: SliceTable, num_queries: int, num_keys: int) -> Any:
        return backend.prepare(slices, num_queries, num_keys, device)

    stages = tuple(
        BoundStage(
            kv=_bind_hops(stage.kv, device),
            num_keys=stage.num_keys,
            host_work=prepare(stage.host, rank_plan.num_queries, stage.num_keys),
            guest_work=prepare(stage.guest, num_guests, stage.num_keys),
        )
        for stage in rank_plan.stages
    )
    moves_queries = any(hop.active for hop in queries)
    return BoundPlan(backend, queries, moves_queries, stages)


def _bind_hops(hops: tuple[Exchange, ...], device: torch.device) -> tuple[RowRoutes, ...]:
    return tuple(bind_exchange(hop, device) for hop in hops)


def bind_exchange(exchange: Exchange, device: torch.device) -> RowRoutes:
    """An exchange of the plan with its row indices on a device."""
    return RowRoutes(
        runs_to_index(exchange.send_runs, device), exchange.send_splits, exchange.recv_splits, exchange.active
    )


def runs_to_index(runs: np.ndarray, device: torch.device) -> Tensor:
    """Row indices int64 of [start, end) runs, one after the other."""
    parts = [np.arange(start, end) for start, end in runs.tolist()]
    index = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
    return torch.from_numpy(index.astype(np.int64)).to(device)

