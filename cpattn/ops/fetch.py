"""The exchange alone, and attention over what it brought: so that anything can happen to rows between the two.

    latent = cpattn.fetch(latent_local, key)              # this rank's rows, and those that its queries need
    k, v = expand(latent)                                 # where they are used: MLA sends 576 numbers, not 40960
    out = cpattn.local_attention(q_local, k, v, key)      # exact attention over the whole sequence; no communication

Shape legend: T local query tokens, K local key tokens, F fetched key tokens (own ones first), N query heads, G key
heads, D head dim of q and k, E of v.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cpattn.keys.key import AttnKey, key_of_handle, require_key
from cpattn.runtime.bound import bind_hops
from cpattn.runtime.exchanges import Exchanges, Trip
from cpattn.solver import fetched_at_once

from .attention import attention
from .layout import cached_tensor
from .order import exchanging_op
from .transforms import refuse_transforms


def fetch(rows: Tensor, key: AttnKey) -> Tensor:
    """The rows that this rank's queries need: its own first, then those of other ranks, in the plan's order.

    Call it on all ranks of the key's group, in the same order.

    Args:
        rows: [K, ...], one for each of this rank's key tokens (`key.num_keys`); any dtype.
        key: made with schedule "keys" (queries stay) and without head sharding. Tell it what travels by
            `latent_dim`, and it counts these bytes in the place of keys and values.

    Returns:
        [F, ...]; F differs between ranks, and is the number of rows that `local_attention` takes.

    Gradient: of the sum over ranks of the local losses: what each rank has for a row goes home along the same routes
    and is added up there, in fp32 at least, in a fixed order. Parameters by which fetched rows are then expanded get
    this rank's share: sum it over the ranks, as for any replicated parameter.

    Raises:
        ValueError: the number of rows is not the key's, or its plan moves queries or shards heads.
    """
    _require_keys_only(key, "fetch")
    refuse_transforms("fetch", rows)
    if not isinstance(rows, Tensor):
        raise ValueError(f"fetch: rows is {type(rows).__name__}: expected a tensor")
    if rows.dim() == 0 or rows.shape[0] != key.num_keys:
        raise ValueError(
            f"fetch: rows has shape {tuple(rows.shape)}: the key expects {key.num_keys} rows, one for each key token "
            f"of rank {key.cp_rank}; did you dispatch with this key?"
        )
    return torch.ops.cpattn.fetch_rows(rows, key.handle)  # type: ignore[no-any-return]


def local_attention(
    q_TND: Tensor,
    k_FGD: Tensor,
    v_FGE: Tensor,
    key: AttnKey,
    *,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of this rank's queries over keys and values made from what `fetch` brought; nothing travels.

    Args:
        q_TND: [T_local, num_heads_q, head_dim].
        k_FGD, v_FGE: [F, num_heads_kv, head_dim] and [F, num_heads_kv, head_dim_v], in the order of `fetch`.
        key: the one that was fetched with.
        softmax_scale, softcap, sink, return_lse: as in `cpattn.attention`, and so are results and errors.

    Raises:
        ValueError: also where the key's plan moves queries or shards heads.
    """
    _require_keys_only(key, "local_attention")
    return attention(
        q_TND,
        k_FGD,
        v_FGE,
        _over_fetched(key),
        softmax_scale=softmax_scale,
        softcap=softcap,
        sink=sink,
        return_lse=return_lse,
    )


class _FetchedKey(AttnKey):
    """A key's share of work on this rank, over all of its rows at once; it belongs to no group."""

    def __init__(self, key: AttnKey) -> None:
        ranks = key.ranks._replace(group=None)
        super().__init__(key.planned, fetched_at_once(key.rank_plan), ranks)

    @property
    def num_keys(self) -> int:
        """Rows that `fetch` gives."""
        return self.rank_plan.num_keys


def _over_fetched(key: AttnKey) -> _FetchedKey:
    return cached_tensor(key, "fetched", lambda: _FetchedKey(key))  # type: ignore[no-any-return]


def _require_keys_only(key: Any, call: str) -> None:
    require_key(key, call)
    if key.sharding is not None:
        raise ValueError(f"{call}: the key shards heads (head_degree {key.options.head_degree}): make it with 1")
    if len(key.plan.q_routes):
        raise ValueError(f"{call}: queries travel under this key's plan: make it with schedule='keys'")


def _trips(key: AttnKey, device: torch.device) -> Sequence[Trip]:
    """What brings the rows of each remote stage."""

    def make() -> tuple[Trip, ...]:
        plan = key.rank_plan
        return tuple(
            Trip(f"rows {number}", f"gradients {number}", number, bind_hops(hops, plan.num_keys, device, key.transport))
            for number, hops in enumerate((stage.kv for stage in plan.stages[1:]), start=1)
        )

    return cached_tensor(key, ("fetch", device), make)  # type: ignore[no-any-return]


def _run_fetch(rows: Tensor, key_handle: Tensor) -> Tensor:
    key = key_of_handle(key_handle)
    exchanges = Exchanges(key.cp_group)
    rows = rows.contiguous()
    with key.calling("fetch", rows.device, row=tuple(rows.shape[1:]), dtype=rows.dtype):
        pending = [exchanges.cast(trip, (rows,), ()) for trip in _trips(key, rows.device)]
        return torch.cat([rows, *(came for trip in pending for came in trip.wait())])


def _fake_fetch(rows: Tensor, key_handle: Tensor) -> Tensor:
    fetched = torch.library.get_ctx().new_dynamic_size()
    return rows.new_empty((fetched, *rows.shape[1:]))


def _run_fetch_backward(grad: Tensor, key_handle: Tensor, num_rows: int) -> Tensor:
    key = key_of_handle(key_handle)
    exchanges = Exchanges(key.cp_group)
    trips = _trips(key, grad.device)
    own, *others = grad.split([num_rows, *(trip.num_received for trip in trips)])
    total = own.to(torch.promote_types(grad.dtype, torch.float32), copy=True)
    with key.calling("fetch backward", grad.device, row=tuple(grad.shape[1:]), dtype=grad.dtype):
        for trip, part in zip(trips, others, strict=True):
            exchanges.reduce(trip, (part.contiguous(),), (total,)).wait()
    return total.to(grad.dtype)


def _fake_fetch_backward(grad: Tensor, key_handle: Tensor, num_rows: int) -> Tensor:
    return grad.new_empty((num_rows, *grad.shape[1:]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, key_handle = inputs
    ctx.save_for_backward(key_handle)
    ctx.num_rows = rows.shape[0]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (key_handle,) = ctx.saved_tensors
    return torch.ops.cpattn.fetch_rows_backward(grad, key_handle, ctx.num_rows), None


_fetch_rows = exchanging_op("cpattn::fetch_rows", _run_fetch, _fake_fetch)
_fetch_rows.register_autograd(_backward, setup_context=_setup_context)
exchanging_op("cpattn::fetch_rows_backward", _run_fetch_backward, _fake_fetch_backward)
