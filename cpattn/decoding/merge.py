"""The merge of what each rank attended to in decoding, and who sends what for it.

Shape legend: B sequences, N query heads, E head dim of v.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from cpattn.collectives import all_gather, merge_partials
from cpattn.runtime.sinks import fold_sink

MergeMethod = Literal["auto", "gather", "scatter"]


def merge_over_ranks(
    out_BNE: Tensor,
    lse_BN: Tensor,
    group: dist.ProcessGroup | None,
    *,
    dtype: torch.dtype,
    sink: Tensor | None = None,
    method: MergeMethod = "auto",
) -> Tensor:
    """The attention over the keys of all ranks, from each rank's part; the same bits on every rank.

    Args:
        out_BNE, lse_BN: this rank's part, fp32 or fp64.
        sink: [N], a further logit of each head.
        method: see `PagedKVCache.decode`. Per rank and direction, with X the bytes of a part: gather (cp - 1) X in one
            collective; scatter about 2 (cp - 1) / cp X in two, of which the second is in `dtype`. A tree (recursive
            doubling) would move log2(cp) X.

    Returns:
        out [B, N, E] in `dtype`.
    """
    batch, num_heads, head_dim = out_BNE.shape
    packed = torch.cat([out_BNE, lse_BN.unsqueeze(-1)], dim=-1).flatten(0, 1)
    cp_size, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    costs = merge_costs(len(packed), head_dim, cp_size, packed.element_size(), dtype.itemsize)
    if choose_merge(costs, method) == "gather" or cp_size == 1:
        parts = packed if group is None else all_gather(packed, group)
        rows = torch.arange(len(packed), device=packed.device)
        merged = _fold(parts.view(cp_size, *packed.shape), rows, sink, num_heads)
        return merged.view(batch, num_heads, head_dim).to(dtype)
    share = -(-len(packed) // cp_size)
    padded = packed.new_zeros(share * cp_size, head_dim + 1)
    padded[: len(packed)] = packed
    parts = torch.empty_like(padded)
    dist.all_to_all_single(parts, padded, group=group)
    rows = torch.arange(rank * share, (rank + 1) * share, device=packed.device)
    merged = _fold(parts.view(cp_size, share, head_dim + 1), rows, sink, num_heads).to(dtype)
    assert group is not None
    return all_gather(merged, group)[: len(packed)].view(batch, num_heads, head_dim)


def check_merge(merge: str) -> None:
    """
    Raises:
        ValueError: no such method.
    """
    if merge not in get_args(MergeMethod):
        raise ValueError(f"merge is {merge!r}: use {', '.join(get_args(MergeMethod))}")


def _fold(parts: Tensor, rows: Tensor, sink: Tensor | None, num_heads: int) -> Tensor:
    """Parts [ranks, rows, E + 1] merged in rank order, and the sink of each row's head."""
    out, lse = parts[0, :, :-1].clone(), parts[0, :, -1].clone()
    for part in parts[1:]:
        merge_partials(out, lse, part[:, :-1], part[:, -1])
    if sink is not None:
        fold_sink(out, lse, sink[rows % num_heads])
    return out


def merge_costs(rows: int, head_dim: int, cp_size: int, accumulator: int, itemsize: int) -> dict[str, int]:
    """Bytes that a rank sends to merge `rows` partial rows, by method."""
    if cp_size == 1:
        return {"gather": 0, "scatter": 0}
    share = -(-rows // cp_size)
    return {
        "gather": (cp_size - 1) * rows * (head_dim + 1) * accumulator,
        "scatter": (cp_size - 1) * share * ((head_dim + 1) * accumulator + head_dim * itemsize),
    }


def choose_merge(costs: dict[str, int], method: MergeMethod) -> str:
    if method != "auto":
        return method
    # The second collective of "scatter" has to save something for its latency.
    return "scatter" if costs["scatter"] < 0.9 * costs["gather"] else "gather"


def broadcast(tensors: Sequence[Tensor], source: int, group: dist.ProcessGroup) -> list[Tensor]:
    """Tensors of one rank of the group, on all of them, in one message."""
    packed = torch.cat([t.flatten() for t in tensors])
    dist.broadcast(packed, dist.get_global_rank(group, source), group=group)
    parts = packed.split([t.numel() for t in tensors])
    return [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]
