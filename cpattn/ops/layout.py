"""Between the global sequence and the ranks' rows: dispatch, undispatch, roll, position_ids.

Gradient convention, here and in `attention`: each rank has a loss of its own and the objective is
their sum. Every backward gives the exact gradient of that sum with respect to the local tensors.
"""

from __future__ import annotations

import operator
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.types import Number

from cpattn.collectives import RowRoutes, all_gather, group_cast
from cpattn.keys.key import AttnKey, key_of_handle, require_key
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

from .order import exchanging_op
from .transforms import refuse_transforms

Side = Literal["q", "k"]
_FAR = 1 << 62  # no two tokens are so far apart


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
    require_key(key, "dispatch")
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
    require_key(key, "undispatch")
    total = _placement(key, side).total_seqlen
    refuse_transforms("undispatch", x_local)
    _check_dim(x_local, dim, "undispatch")
    return torch.ops.cpattn.undispatch_rows(x_local, key.handle, dim, side, total)  # type: ignore[no-any-return]


def position_ids(key: AttnKey, *, stream: bool = False, device: torch.device | str | None = None) -> Tensor:
    """Positions of this rank's query rows, int64 [T_local].

    Args:
        key: the key.
        stream: give the index in the whole packed sequence instead of the position in the document.
        device: where to put them; None is the CPU.

    Raises:
        ValueError: the mask has no documents (it was made from raw rectangles) and stream is False.
    """
    require_key(key, "position_ids")
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
    x_local: Tensor, key: AttnKey, shift: int = -1, dim: int = 0, *, fill_value: complex | None = None
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
    require_key(key, "roll")
    _check_dim(x_local, dim, "roll")
    refuse_transforms("roll", x_local)
    fill = _read_fill(fill_value, x_local.dtype)
    return torch.ops.cpattn.roll_rows(x_local, key.handle, dim, _read_shift(shift), fill, "roll")  # type: ignore[no-any-return]


def _read_shift(shift: Any) -> int:
    if not isinstance(shift, int):
        try:
            shift = operator.index(shift)
        except TypeError:
            raise ValueError(f"roll: shift is {shift!r}: it must be an int") from None
    if not -_FAR <= shift <= _FAR:
        raise ValueError(f"roll: shift is {shift}: it must lie within 62 bits")
    return int(shift)


def _read_fill(fill: Any, dtype: torch.dtype) -> Number:
    """A number that the dtype holds."""
    is_int = not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)
    if fill is None:
        fill = -100 if is_int else 0
    elif hasattr(fill, "item"):
        fill = fill.item()
    fits = isinstance(fill, (int, float)) or (isinstance(fill, complex) and dtype.is_complex)
    if fits and is_int:
        limits = torch.iinfo(dtype)
        fits = limits.min <= fill <= limits.max and int(fill) == fill
    if not fits:
        raise ValueError(f"roll: fill_value is {fill}, which {dtype} cannot hold: pass another")
    return fill  # type: ignore[no-any-return]


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


def _roll_source(key: AttnKey, sources: Intervals, received: Any, shift: int, device: torch.device) -> Tensor:
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


def _run_undispatch(x: Tensor, key_handle: Tensor, dim: int, side: str, num_tokens: int) -> Tensor:
    """All ranks' rows in token order. Rows are padded to the largest shard, so that one all-gather moves them."""
    key = key_of_handle(key_handle)
    counts = _placement(key, side).num_tokens
    _check_local(x, dim, int(counts[key.cp_rank]), key, "undispatch")
    if key.cp_group is None:
        return x.movedim(dim, 0).clone(memory_format=torch.contiguous_format).movedim(0, dim)
    x = x.movedim(dim, 0)
    padded = x.new_zeros((int(counts.max()), *x.shape[1:]))
    padded[: x.shape[0]] = x
    with _calling(key, "undispatch", x, side=side):
        gathered = all_gather(padded, key.cp_group)
        return gathered.index_select(0, _gathered_rows(key, side, x.device)).movedim(0, dim)


def _fake_undispatch(x: Tensor, key_handle: Tensor, dim: int, side: str, num_tokens: int) -> Tensor:
    return _empty_rows(x, dim, num_tokens)


def _run_undispatch_backward(grad: Tensor, key_handle: Tensor, dim: int, side: str, num_rows: int) -> Tensor:
    """Of each of this rank's rows the sum over all ranks, in rank order, so that it repeats bit for bit."""
    key = key_of_handle(key_handle)
    grad = grad.movedim(dim, 0)
    if key.cp_group is None:
        return grad.clone(memory_format=torch.contiguous_format).movedim(0, dim)
    counts = _placement(key, side).num_tokens.tolist()
    send = grad.index_select(0, _tokens_by_rank(key, side, grad.device))
    parts = grad.new_empty((key.cp_size * num_rows, *grad.shape[1:]))
    with _calling(key, "undispatch backward", grad, side=side):
        dist.all_to_all_single(parts, send, [num_rows] * key.cp_size, counts, group=key.cp_group)
        first, *others = parts.split(num_rows) if num_rows else (parts,)
        total = first.to(torch.promote_types(grad.dtype, torch.float32), copy=True)
        for part in others:
            total += part
    return total.to(grad.dtype).movedim(0, dim)


def _fake_undispatch_backward(grad: Tensor, key_handle: Tensor, dim: int, side: str, num_rows: int) -> Tensor:
    return _empty_rows(grad, dim, num_rows)


def _run_roll(x: Tensor, key_handle: Tensor, dim: int, shift: int, fill_value: Number, what: str) -> Tensor:
    key = key_of_handle(key_handle)
    _check_local(x, dim, key.num_tokens, key, what)
    with key.checking(what):
        plan = _roll_plan(key, shift, x.device)
    x = x.movedim(dim, 0)
    with _calling(key, what, x, shift=shift, fill_value=fill_value):
        (received,) = group_cast((x,), plan.routes, key.cp_group).wait()
    fill = x.new_full((1, *x.shape[1:]), fill_value)
    return torch.cat([x, received, fill]).index_select(0, plan.source).movedim(0, dim)


def _fake_roll(x: Tensor, key_handle: Tensor, dim: int, shift: int, fill_value: Number, what: str) -> Tensor:
    return _empty_rows(x, dim, x.shape[dim])


def _empty_rows(x: Tensor, dim: int, num_rows: int) -> Tensor:
    """Another number of rows at `dim`, which lie one after the other in memory."""
    return x.new_empty((num_rows, *x.movedim(dim, 0).shape[1:])).movedim(0, dim)


def _check_local(x: Tensor, dim: int, rows: int, key: AttnKey, call: str) -> None:
    """Ranks that wait for this one hear of what is raised."""
    with key.checking(call):
        _check_rows(x, dim, rows, call, f"rows of rank {key.cp_rank}")


def _calling(key: AttnKey, what: str, x: Tensor, **fields: Any) -> AbstractContextManager[int]:
    """Tell the other ranks of an exchange of rows."""
    return key.calling(what, x.device, row=tuple(x.shape[1:]), dtype=x.dtype, **fields)


def _save_rows(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, key_handle, dim, side, _ = inputs
    ctx.save_for_backward(key_handle)
    ctx.dim, ctx.side, ctx.num_rows = dim, side, x.shape[dim]


def _save_shift(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, key_handle, dim, shift, _, _ = inputs
    ctx.save_for_backward(key_handle)
    ctx.dim, ctx.shift = dim, shift


def _backward_of_undispatch(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (key_handle,) = ctx.saved_tensors
    rows = torch.ops.cpattn.undispatch_rows_backward(grad, key_handle, ctx.dim, ctx.side, ctx.num_rows)
    return rows, None, None, None, None


def _backward_of_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (key_handle,) = ctx.saved_tensors
    whole = torch.ops.cpattn.undispatch_rows(grad, key_handle, ctx.dim, ctx.side, ctx.num_rows)
    return whole, None, None, None, None


def _backward_of_roll(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """A row goes to one place at most, so its gradient is found there: no sums."""
    (key_handle,) = ctx.saved_tensors
    rows = torch.ops.cpattn.roll_rows(grad, key_handle, ctx.dim, -ctx.shift, 0, "roll backward")
    return rows, None, None, None, None, None


_undispatch_rows = exchanging_op("cpattn::undispatch_rows", _run_undispatch, _fake_undispatch)
_undispatch_rows.register_autograd(_backward_of_undispatch, setup_context=_save_rows)
_undispatch_rows_backward = exchanging_op(
    "cpattn::undispatch_rows_backward", _run_undispatch_backward, _fake_undispatch_backward
)
_undispatch_rows_backward.register_autograd(_backward_of_gradients, setup_context=_save_rows)
_roll_rows = exchanging_op("cpattn::roll_rows", _run_roll, _fake_roll)
_roll_rows.register_autograd(_backward_of_roll, setup_context=_save_shift)


def _placement(key: AttnKey, side: str) -> Placement:
    if side not in ("q", "k"):
        raise ValueError(f"side is {side!r}: 'q' for query tokens or 'k' for key tokens")
    return key.q_placement if side == "q" else key.k_placement


def _check_dim(x: Tensor, dim: int, call: str) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f"{call}: expected a tensor, and this is {type(x).__name__}")
    if not isinstance(dim, int) or not -x.ndim <= dim < x.ndim:
        raise ValueError(f"{call}: dim is {dim!r}, the tensor has shape {tuple(x.shape)}")


def _check_rows(x: Tensor, dim: int, rows: int, call: str, what: str) -> None:
    _check_dim(x, dim, call)
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


def _local_tokens(key: AttnKey, side: str, device: torch.device) -> Tensor:
    def make() -> Tensor:
        return runs_to_index(_placement(key, side).runs_of(key.cp_rank), device)

    return cached_tensor(key, ("local_tokens", side, device), make)


def _tokens_by_rank(key: AttnKey, side: str, device: torch.device) -> Tensor:
    """All tokens, rank by rank, each rank's in its row order."""

    def make() -> Tensor:
        placement = _placement(key, side)
        tokens = [placement.tokens_of(rank) for rank in range(key.cp_size)]
        return torch.from_numpy(np.concatenate(tokens)).to(device)

    return cached_tensor(key, ("tokens_by_rank", side, device), make)


def _gathered_rows(key: AttnKey, side: str, device: torch.device) -> Tensor:
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
