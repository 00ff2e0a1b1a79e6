"""Between the global sequence and the ranks' rows: dispatch, undispatch, roll, position_ids.

Gradient convention, here and in `attention`: each rank has a loss of its own and the objective is
their sum. Every backward gives the exact gradient of that sum with respect to the local tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from cpattn.collectives import PendingRows, RowRoutes, all_gather, group_cast, group_reduce
from cpattn.keys.key import AttnKey
from cpattn.masks.spec import Document
from cpattn.runtime.bound import bind_exchange, runs_to_index
from cpattn.solver import (
    Intervals,
    Placement,
    exchange_of,
    expand_counts,
    make_routes,
    merge_intervals,
    received_runs,
)

Side = Literal["q", "k"]
Calling: TypeAlias = Callable[[str, Tensor], AbstractContextManager[Any]]


def dispatch(x: Tensor, key: AttnKey, dim: int = 0, *, side: Side = "q") -> Tensor:
    """This rank's rows of a tensor that all ranks hold whole.

    Args:
        x: [..., T, ...], the same on every rank, T at `dim`; any dtype.
        key: says which rows are this rank's.
        dim: the token dimension.
        side: "q" for query tokens (self-attention has only these), "k" for the key tokens of
            cross-attention.

    Returns:
        [..., T_local, ...], a copy, rows in ascending order of token.

    Gradient: the rows' gradient in their places and zero elsewhere; no communication. Summed over
    the ranks this is the gradient of x (and so it is for parameters that x was made from).

    Raises:
        ValueError: x does not have the key's number of tokens at `dim`.
    """
    total = _placement(key, side).total_seqlen
    _check_rows(x, dim, total, "dispatch", "tokens of the key's mask")
    return x.index_select(dim, _local_tokens(key, side, x.device))


def undispatch(x_local: Tensor, key: AttnKey, dim: int = 0, *, side: Side = "q") -> Tensor:
    """The whole tensor on every rank, from every rank's rows: the inverse of `dispatch`.

    Args:
        x_local: [..., T_local, ...], this rank's rows at `dim`.
        key, dim, side: as in `dispatch`.

    Returns:
        [..., T, ...].

    Gradient: each rank gets the sum over all ranks of the gradients of its rows (reduce-scatter).
    A loss that every rank computes alike from the whole tensor is thus counted cp_size times: divide
    it by `key.cp_size`, or leave it to the mean that DDP and FSDP2 take over the ranks.

    Raises:
        ValueError: x_local does not have this rank's number of rows at `dim`.
    """
    rows = int(_placement(key, side).num_tokens[key.cp_rank])
    _check_rows(x_local, dim, rows, "undispatch", f"rows of rank {key.cp_rank}")
    moved = x_local.movedim(dim, 0)
    return _GatherRows.apply(moved, key, side).movedim(0, dim)  # type: ignore[no-any-return]


def position_ids(key: AttnKey, *, stream: bool = False, device: torch.device | str | None = None) -> Tensor:
    """Positions of this rank's query rows, int64 [T_local].

    Args:
        key: the key.
        stream: give the index in the whole packed sequence instead of the position in the document.
        device: where to put them; None is the CPU.

    Raises:
        ValueError: the mask has no documents (it was made from raw rectangles) and stream is False.
    """
    device = torch.device(device or "cpu")

    def make() -> Tensor:
        tokens = key.q_placement.tokens_of(key.cp_rank)
        if stream:
            return torch.from_numpy(tokens).to(device)
        starts, _, first = _document_columns(key, "position_ids")
        document = np.searchsorted(starts, tokens, side="right") - 1
        return torch.from_numpy(tokens - starts[document] + first[document]).to(device)

    return cached_tensor(key, ("positions", stream, device), make).clone()  # the caller may write to it


def roll(
    x_local: Tensor, key: AttnKey, shift: int = -1, dim: int = 0, *, fill_value: float | None = None
) -> Tensor:
    """Rows moved by `shift` tokens within each document, across the ranks' shards.

    With shift -1 each token gets the row of the next token of its document: next-token labels.

    Args:
        x_local: [..., T_local, ...], this rank's rows at `dim`.
        key: says where the rows lie; its mask must have documents.
        shift: row t receives row t - shift.
        dim: the token dimension.
        fill_value: for rows whose source lies outside their document; None is -100 (the label that
            losses ignore) for integer tensors and 0 for all others. In a prefix tree each node is a
            document: what follows its last token depends on the branch.

    Gradient: rolled back by -shift; filled rows give none.

    Raises:
        ValueError: wrong number of rows, or the mask has no documents.
    """
    _check_rows(x_local, dim, key.num_tokens, "roll", f"rows of rank {key.cp_rank}")
    if fill_value is None:
        is_label = not (x_local.dtype.is_floating_point or x_local.dtype.is_complex or x_local.dtype == torch.bool)
        fill_value = -100 if is_label else 0
    if x_local.dtype == torch.uint8 and not 0 <= fill_value < 256:
        raise ValueError(f"roll: fill_value is {fill_value}, which {x_local.dtype} cannot hold: pass another")
    shift = int(shift)
    plan = _roll_plan(key, shift, x_local.device)
    moved = x_local.movedim(dim, 0)

    def tell(way: str, rows: Tensor) -> AbstractContextManager[int]:
        return _calling(key, f"roll{way}", rows, "q", shift=shift)

    received = start_cast_rows(moved, plan.routes, key.cp_group, tell).wait()
    fill = moved.new_full((1, *moved.shape[1:]), fill_value)
    rows = torch.cat([moved, received, fill])
    return rows.index_select(0, plan.source).movedim(0, dim)


class _RollPlan(NamedTuple):
    """routes: rows that come from other ranks. source: for each local row its index in
    [local rows, received rows, one fill row]."""

    routes: RowRoutes
    source: Tensor


def _roll_plan(key: AttnKey, shift: int, device: torch.device) -> _RollPlan:
    def make() -> _RollPlan:
        placement, wanted = key.q_placement, _roll_wanted(key, shift)
        routes = make_routes(merge_intervals(*wanted), placement)
        return _RollPlan(
            bind_exchange(exchange_of(routes, placement, key.cp_rank), device),
            _roll_source(key, wanted, received_runs(routes, key.cp_rank), shift, device),
        )

    return cached_tensor(key, ("roll", shift, device), make)


def _roll_wanted(key: AttnKey, shift: int) -> Intervals:
    """The rows that each rank wants: t - shift for its rows t, where both are of one document."""
    placement = key.q_placement
    starts, ends, _ = _document_columns(key, "roll")
    first = np.searchsorted(ends, placement.starts, side="right")
    last = np.searchsorted(starts, placement.ends, side="left")
    run, nth = expand_counts(last - first)
    document = first[run] + nth
    a = np.maximum(placement.starts[run], starts[document] + max(shift, 0))
    b = np.minimum(placement.ends[run], ends[document] + min(shift, 0))
    some = b > a
    return Intervals(placement.owners[run[some]], a[some] - shift, b[some] - shift)


def _roll_source(
    key: AttnKey, sources: Intervals, received: Any, shift: int, device: torch.device
) -> Tensor:
    placement, rank = key.q_placement, key.cp_rank
    mine = sources.ranks == rank
    num_received = int((received.ends - received.starts).sum())
    source = np.full(key.num_tokens, key.num_tokens + num_received)  # the fill row
    own = placement.tokens_of(rank)
    for start, end in zip(sources.starts[mine].tolist(), sources.ends[mine].tolist(), strict=True):
        tokens = np.arange(start, end)
        row = np.searchsorted(own, tokens).clip(max=max(len(own) - 1, 0))
        local = own[row] == tokens
        if not local.all():
            run = np.searchsorted(received.ends, tokens[~local], side="right")
            row[~local] = key.num_tokens + received.offsets[run] + tokens[~local] - received.starts[run]
        source[np.searchsorted(own, tokens + shift)] = row
    return torch.from_numpy(source).to(device)


def cast_rows(x: Tensor, routes: RowRoutes, group: dist.ProcessGroup | None) -> Tensor:
    """Rows that routes bring here from other ranks, [num_received, ...]; their gradients go home and are summed."""
    return start_cast_rows(x, routes, group).wait()


def start_cast_rows(
    x: Tensor, routes: RowRoutes, group: dist.ProcessGroup | None, calling: Calling | None = None
) -> TravellingRows:
    """Start `cast_rows`. What runs before `wait` hides the exchange, and its backward hides that of the gradients:
    autograd runs the nodes made last first, so those made in between run between the two ends of the way home.

    calling: tells the other ranks of the call; takes "" or " backward", and the rows.
    """
    flight = _Flight(routes, group, calling)
    return TravellingRows(_StartCast.apply(x, flight), flight)


class TravellingRows(NamedTuple):
    """Rows on their way, see `start_cast_rows`."""

    link: Tensor
    flight: _Flight

    def wait(self) -> Tensor:
        """The rows, [num_received, ...]. Call it once."""
        return _FinishCast.apply(self.link, self.flight)  # type: ignore[no-any-return]


class _Flight:
    """What the two ends of an exchange share."""

    def __init__(self, routes: RowRoutes, group: dist.ProcessGroup | None, calling: Calling | None) -> None:
        self.routes, self.group, self.num_rows = routes, group, 0
        self.calling: Calling = calling or (lambda way, rows: nullcontext())
        self.forward: PendingRows | None = None
        self.backward: tuple[PendingRows, Tensor] | None = None


class _StartCast(torch.autograd.Function):
    """Starts a GroupCast of rows; backward waits for the GroupReduce along the same routes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, flight: _Flight) -> Tensor:
        ctx.flight, flight.num_rows = flight, x.shape[0]
        with flight.calling("", x):
            flight.forward = group_cast((x,), flight.routes, flight.group)
        return x.new_empty(()).expand(flight.routes.num_received, *x.shape[1:])  # a link of the graph, no memory

    @staticmethod
    def backward(ctx: Any, link: Tensor) -> tuple[Tensor, None]:
        assert ctx.flight.backward is not None
        (pending, total), ctx.flight.backward = ctx.flight.backward, None
        pending.wait()
        return total, None


class _FinishCast(torch.autograd.Function):
    """Waits for the GroupCast; backward starts the GroupReduce."""

    @staticmethod
    def forward(ctx: Any, link: Tensor, flight: _Flight) -> Tensor:
        assert flight.forward is not None, "rows are waited for once"
        ctx.flight = flight
        (received,), flight.forward = flight.forward.wait(), None
        return received

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        flight = ctx.flight
        total = grad.new_zeros((flight.num_rows, *grad.shape[1:]))
        with flight.calling(" backward", grad):
            flight.backward = group_reduce((grad,), (total,), flight.routes, flight.group, async_op=True), total
        return grad, None


class _GatherRows(torch.autograd.Function):
    """All ranks' rows in token order; backward sums each row's gradients at its owner.

    Rows are padded to the largest shard, so that one all-gather moves them.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, key: AttnKey, side: Side) -> Tensor:
        ctx.key, ctx.side = key, side
        if key.cp_group is None:
            return x.clone()
        counts = _placement(key, side).num_tokens
        most = int(counts.max())
        padded = x.new_zeros((most, *x.shape[1:]))
        padded[: x.shape[0]] = x
        with _calling(key, "undispatch", x, side):
            gathered = all_gather(padded, key.cp_group)
        return gathered.index_select(0, _gathered_rows(key, side, x.device))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        key, side = ctx.key, ctx.side
        if key.cp_group is None:
            return grad, None, None
        counts = _placement(key, side).num_tokens.tolist()
        mine = counts[key.cp_rank]
        send = grad.index_select(0, _tokens_by_rank(key, side, grad.device))
        parts = grad.new_empty((key.cp_size * mine, *grad.shape[1:]))
        with _calling(key, "undispatch backward", grad, side):
            dist.all_to_all_single(parts, send, [mine] * key.cp_size, counts, group=key.cp_group)
        total = parts[:mine].to(torch.promote_types(grad.dtype, torch.float32), copy=True)
        for rank in range(1, key.cp_size):  # rank order, so that the sum repeats bit for bit
            total += parts[rank * mine : (rank + 1) * mine]
        return total.to(grad.dtype), None, None


def _calling(key: AttnKey, what: str, x: Tensor, side: Side, **fields: Any) -> AbstractContextManager[int]:
    """Tell the other ranks of an exchange of rows; not in a graph that is being traced, which holds no messages."""
    if torch.compiler.is_compiling():
        return nullcontext(-1)
    return key.calling(what, x.device, row=tuple(x.shape[1:]), dtype=x.dtype, side=side, **fields)


def _placement(key: AttnKey, side: Side) -> Placement:
    if side not in ("q", "k"):
        raise ValueError(f"side is {side!r}: 'q' for query tokens or 'k' for key tokens")
    return key.q_placement if side == "q" else key.k_placement


def _check_rows(x: Tensor, dim: int, rows: int, call: str, what: str) -> None:
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(f"{call}: dim is {dim}, the tensor has shape {tuple(x.shape)}")
    if x.shape[dim] != rows:
        raise ValueError(
            f"{call}: the tensor has {x.shape[dim]} rows at dim {dim} (shape {tuple(x.shape)}), "
            f"expected {rows}, the {what}"
        )


def _document_columns(key: AttnKey, call: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Starts, ends and first positions of the documents that have tokens."""
    if key.spec.documents is None:
        raise ValueError(
            f"{call}: the mask has no documents, so positions within them are unknown; pass "
            f"documents=[(start, end), ...] to AttnMaskSpec (position_ids also takes stream=True)"
        )
    filled: list[Document] = [d for d in key.spec.documents if d.end > d.start]
    columns = np.array(filled, dtype=np.int64).reshape(-1, 3).T
    return columns[0], columns[1], columns[2]


def _local_tokens(key: AttnKey, side: Side, device: torch.device) -> Tensor:
    def make() -> Tensor:
        return runs_to_index(_placement(key, side).runs_of(key.cp_rank), device)

    return cached_tensor(key, ("local_tokens", side, device), make)


def _tokens_by_rank(key: AttnKey, side: Side, device: torch.device) -> Tensor:
    """All tokens, rank by rank, each rank's in its row order."""

    def make() -> Tensor:
        placement = _placement(key, side)
        tokens = [placement.tokens_of(rank) for rank in range(key.cp_size)]
        return torch.from_numpy(np.concatenate(tokens)).to(device)

    return cached_tensor(key, ("tokens_by_rank", side, device), make)


def _gathered_rows(key: AttnKey, side: Side, device: torch.device) -> Tensor:
    """For each token its row among the padded shards of all ranks."""

    def make() -> Tensor:
        placement = _placement(key, side)
        most = int(placement.num_tokens.max())
        run, nth = expand_counts(placement.ends - placement.starts)
        rows = placement.owners[run] * most + placement.local_starts[run] + nth
        return torch.from_numpy(rows).to(device)

    return cached_tensor(key, ("gathered_rows", side, device), make)


def cached_tensor(key: AttnKey, name: Any, make: Any) -> Any:
    """What `make` makes for this key (an index tensor, routes), made once under that name."""
    if name not in key.cached_tensors:
        with torch.inference_mode(False):  # an evaluation step may be first; training saves these tensors
            key.cached_tensors[name] = make()
    return key.cached_tensors[name]
