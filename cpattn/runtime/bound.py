"""A rank plan bound to a group, a device and a kernel: all that execution needs beside the tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cpattn.backends import Backend, Problem
from cpattn.backends.base import Turn, turns_of
from cpattn.collectives import RowRoutes, Transport, one_copy, put_on
from cpattn.collectives.row_kernels import serves as row_kernels_serve
from cpattn.solver import LATE_SHARE, Exchange, RankPlan, SliceTable

from .exchanges import Exchanges, Trip

# Rows at which own work may be cut in backward, beside the beginnings of slices: a block of most kernels.
_LATE_GRAIN = 128


class BoundStage(NamedTuple):
    """Keys that arrive together, and the kernel's work on them.

    kv: the trip that brings them; of no hops where they are this rank's own.
    own_work, guest_work: for this rank's queries and for those that it works on for others.
    in_backward: own_work in the parts in which backward does it. Where keys travel, own keys have several: the first
        hides the first keys on their way here, the others, one for each hop, the last gradients on their way home. None
        is a part without work: hops begin in the same order on all ranks.
    """

    kv: Trip
    own_work: Any
    guest_work: Any
    in_backward: tuple[Any, ...]


class BoundPlan(NamedTuple):
    """A rank plan on a device, for one kernel.

    exchanges: by which rows travel in the plan's group, and how they are encoded. queries: the trip of queries that
    move. stages: own keys first, then those that are fetched. keep_kv: whether forward leaves what it fetched to
    backward; equal on all ranks. num_queries, num_keys: this rank's rows.
    """

    backend: Backend
    exchanges: Exchanges
    queries: Trip
    moves_queries: bool
    stages: tuple[BoundStage, ...]
    keep_kv: bool
    num_queries: int
    num_keys: int

    @property
    def home(self) -> BoundStage:
        """The stage of this rank's own keys."""
        return self.stages[0]

    @property
    def remote(self) -> tuple[BoundStage, ...]:
        """The stages whose keys are fetched."""
        return self.stages[1:]

    @property
    def num_hops(self) -> int:
        """Hops of each trip; also the exchanges of one kind that are under way at once."""
        return len(self.queries.hops)


def bind_plan(
    rank_plan: RankPlan,
    backend: Backend,
    exchanges: Exchanges,
    device: torch.device,
    *,
    transport: Transport,
    keep_kv: bool,
    problem: Problem | None = None,
) -> BoundPlan:
    """A rank plan with its routes on a device and its slices as the kernel wants them.

    On CUDA all indices go there in one copy that the host does not wait for. problem: what will be computed; with it
    the kernel makes at once what it would make at its first call (`warm` of `Backend`).
    """
    with one_copy(device):
        return _bind(rank_plan, backend, exchanges, device, transport=transport, keep_kv=keep_kv, problem=problem)


def _bind(
    rank_plan: RankPlan,
    backend: Backend,
    exchanges: Exchanges,
    device: torch.device,
    *,
    transport: Transport,
    keep_kv: bool,
    problem: Problem | None,
) -> BoundPlan:
    warm = getattr(backend, "warm", None)

    def prepare(slices: SliceTable, num_queries: int, num_keys: int, turn: Turn | None = None) -> Any:
        in_turn: dict[str, Any] = {} if turn is None else {"turn": turn}
        work = backend.prepare(slices, num_queries, num_keys, device, **in_turn)
        if warm is not None and problem is not None:
            warm(work, problem)
        return work

    num_guests = rank_plan.queries[-1].num_received
    queries = Trip("queries", "results", None, bind_hops(rank_plan.queries, rank_plan.num_queries, device, transport))
    parts = _in_backward(rank_plan)
    # Where queries move, dq also comes home from elsewhere, at any time.
    placing = getattr(backend, "takes_turns", False) and row_kernels_serve(device) and not queries.active
    untold = ([None] * len(rank_plan.stages), [None] * len(parts))
    stage_turns, part_turns = _turns(rank_plan, parts) if placing else untold
    stages = []
    for number, stage in enumerate(rank_plan.stages):
        hops = bind_hops(stage.kv, rank_plan.num_keys, device, transport)
        own = prepare(stage.own, rank_plan.num_queries, stage.num_keys, stage_turns[number])
        guest = prepare(stage.guest, num_guests, stage.num_keys)
        in_backward: tuple[Any, ...] = (own,)
        if number == 0 and len(parts) > 1:
            first, *late = zip(parts, part_turns, strict=True)
            rows = (rank_plan.num_queries, stage.num_keys)
            in_backward = (
                prepare(first[0], *rows, first[1]) if len(stage.own) else own,
                *(prepare(table, *rows, turn) if len(table) else None for table, turn in late),
            )
        trip = Trip(f"keys {number}", f"gradients {number}", number, hops)
        stages.append(BoundStage(trip, own, guest, in_backward))
    sizes = (rank_plan.num_queries, rank_plan.num_keys)
    return BoundPlan(backend, exchanges, queries, queries.active, tuple(stages), keep_kv, *sizes)


def _in_backward(rank_plan: RankPlan) -> list[SliceTable]:
    """The work on own keys in parts: what comes first, and where keys travel for each hop what is left till last."""
    own, num_hops = rank_plan.stages[0].own, len(rank_plan.queries)
    if len(rank_plan.stages) == 1:
        return [own]
    if not len(own):
        return [own] * (1 + num_hops)
    return own.in_row_parts((1 - LATE_SHARE, *(LATE_SHARE / num_hops,) * num_hops), _LATE_GRAIN)


def _turns(rank_plan: RankPlan, parts: list[SliceTable]) -> tuple[Sequence[Turn | None], Sequence[Turn | None]]:
    """Of the stages in backward, and of the parts of the first, all but one of which come last."""
    num_stages = len(rank_plan.stages)
    in_order = [parts[0], *(stage.own for stage in rank_plan.stages[1:]), *parts[1:]]
    turns = turns_of(in_order, rank_plan.num_queries)
    return turns[:num_stages], [turns[0], *turns[num_stages:]]


def bind_hops(
    hops: tuple[Exchange, ...], num_local: int, device: torch.device, transport: Transport
) -> tuple[RowRoutes, ...]:
    """The hops of an exchange over that many local rows, with their row indices on a device."""
    cpu = torch.device("cpu")
    bound = tuple(bind_exchange(hop, cpu, transport) for hop in hops)
    bound = (*bound[:1], *(later.relaying(num_local) for later in bound[1:]))
    if row_kernels_serve(device):
        bound = tuple(hop.with_segments() for hop in bound)
    return tuple(hop.on(device) for hop in bound)


def bind_exchange(exchange: Exchange, device: torch.device, transport: Transport = "all_to_all") -> RowRoutes:
    """An exchange of the plan with its row indices on a device."""
    index = runs_to_index(exchange.send_runs, device)
    return RowRoutes(index, exchange.send_splits, exchange.recv_splits, exchange.active, transport)


def runs_to_index(runs: np.ndarray, device: torch.device) -> Tensor:
    """Row indices int64 of [start, end) runs, one after the other."""
    parts = [np.arange(start, end) for start, end in runs.tolist()]
    index = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
    return put_on(device, torch.from_numpy(index.astype(np.int64)))
