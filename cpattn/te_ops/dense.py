"""Attention over slices with what fused kernels hide: bias, dropout, 8-bit probabilities, the largest logit.

The `reference` backend's blocks with a hook on scores and one on probabilities; everything without those goes to a
fast backend instead. Shape legend: Q, K rows, N query heads, D and E head dims.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cpattn.backends.base import Attending, KeyRows, Returning
from cpattn.backends.reference import masked_scores, per_key_head, per_query_head, row_blocks
from cpattn.collectives import merge_partials
from cpattn.solver import SliceTable

from .quantizers import Quantizer, dequantized

_M32 = (1 << 32) - 1


@dataclass(frozen=True, slots=True, eq=False)
class Extras:
    """What a call has beyond plain attention.

    bias: [1 or B, 1 or N, 1 or max_q, max_kv], added to the scaled scores. dropout: probability; its mask is a function
    of rng_state (int64 [seed, offset]), sequence, head, query and key alone. s_quantizer, dp_quantizer: rounding of
    the probabilities and of their gradient.
    """

    bias: Tensor | None = None
    dropout: float = 0.0
    rng_state: Tensor | None = None
    s_quantizer: Quantizer | None = None
    dp_quantizer: Quantizer | None = None


class SequenceSlices(NamedTuple):
    """One sequence: its number, its first query and key row, and its slices."""

    number: int
    q_start: int
    k_start: int
    table: SliceTable


def forward(
    queries: Attending, all_keys: KeyRows, sequences: list[SequenceSlices], extras: Extras, scale: float
) -> None:
    """Attention merged into the accumulators, as a Backend's forward does it; lse is that without dropout."""
    q_QND, out_QNE, lse_QN = queries
    k_KGD, v_KGE = all_keys
    groups = q_QND.shape[1] // k_KGD.shape[1]
    for sequence, rows, keys, masked in _all_blocks(sequences, q_QND):
        k, v = (per_query_head(t[keys], groups, out_QNE) for t in (k_KGD, v_KGE))
        scores = _biased_scores(q_QND[rows].to(out_QNE.dtype), k, masked, scale, extras, sequence, rows, keys)
        lse = torch.logsumexp(scores, dim=-1)
        # A row of the block that sees nothing (a band may leave some out) has lse -inf.
        p = torch.exp(scores - lse.masked_fill(lse == -torch.inf, torch.inf)[..., None])
        p = _rounded(p, extras.s_quantizer)
        p = p * _keep_factor(extras, sequence, rows, keys, p)
        merge_partials(out_QNE[rows], lse_QN[rows], torch.einsum("nqk,kne->qne", p, v), lse.T)


def backward(
    queries: Returning,
    all_keys: KeyRows,
    sequences: list[SequenceSlices],
    extras: Extras,
    scale: float,
    dkeys: KeyRows,
    dbias: Tensor | None = None,
) -> None:
    """Gradients added to the accumulators, as a Backend's backward does it; dbias has the shape of the bias."""
    dout_QNE, q_QND, out_QNE, lse_QN, dq_QND = queries
    (k_KGD, v_KGE), (dk_KGD, dv_KGE) = all_keys, dkeys
    groups = q_QND.shape[1] // k_KGD.shape[1]
    dtype = dq_QND.dtype
    for sequence, rows, keys, masked in _all_blocks(sequences, q_QND):
        k, v = (per_query_head(t[keys], groups, dq_QND) for t in (k_KGD, v_KGE))
        q, dout = q_QND[rows].to(dtype), dout_QNE[rows].to(dtype)
        scores = _biased_scores(q, k, masked, scale, extras, sequence, rows, keys)
        p = torch.exp(scores - lse_QN[rows].T[..., None])
        factor = _keep_factor(extras, sequence, rows, keys, p)
        # With dropout, out holds the dropped probabilities, so its product with dout is still sum(p * dp).
        delta = (dout * out_QNE[rows].to(dtype)).sum(-1)
        dp = torch.einsum("qne,kne->nqk", dout, v) * factor
        ds = p * (dp - delta.T[..., None])
        ds_rounded = _rounded(ds, extras.dp_quantizer) * scale
        dq_QND[rows] += torch.einsum("nqk,knd->qnd", ds_rounded, k)
        dk_KGD[keys] += per_key_head(torch.einsum("nqk,qnd->knd", ds_rounded, q), groups)
        dropped = _rounded(p, extras.s_quantizer) * factor
        dv_KGE[keys] += per_key_head(torch.einsum("nqk,qne->kne", dropped, dout), groups)
        if dbias is not None:
            view = _bias_block(dbias, sequence, rows, keys)
            view += _summed_to(ds, view.shape)


def max_logit(
    q_QND: Tensor, k_KGD: Tensor, sequences: list[SequenceSlices], extras: Extras, *, scale: float, dtype: torch.dtype
) -> Tensor:
    """Largest visible scaled score of each head, [N]; -inf for a head that sees nothing."""
    groups = q_QND.shape[1] // k_KGD.shape[1]
    best = torch.full((q_QND.shape[1],), -torch.inf, dtype=dtype, device=q_QND.device)
    for sequence, rows, keys, masked in _all_blocks(sequences, q_QND):
        k = per_query_head(k_KGD[keys], groups, best)
        scores = _biased_scores(q_QND[rows].to(dtype), k, masked, scale, extras, sequence, rows, keys)
        best = torch.maximum(best, scores.amax((1, 2)))
    return best


def dropout_keep(
    rng_state: Tensor, dropout: float, sequence: int, heads: Tensor, queries: Tensor, keys: Tensor
) -> Tensor:
    """Which probabilities dropout keeps, bool [N, Q, K]: a hash of the place, the same on every device and rank.

    Args:
        rng_state: int64 [seed, offset], as `fused_attn_fwd` returns it.
        dropout: probability that a place is dropped.
        sequence, heads [N], queries [Q], keys [K]: the place; tokens count from the start of their sequence.
    """
    seed, offset = (rng_state[i].to(heads.device) for i in (0, 1))
    base = _mix(_mix(seed) + offset)
    x = _mix(base + (sequence << 20) + heads)[:, None, None]
    x = _mix(x + queries[:, None])
    x = _mix(x + keys)
    uniform = (x & _M32).to(torch.float64) / (_M32 + 1)
    return uniform >= dropout


def _mix(x: Tensor) -> Tensor:
    """A bijection of int64 that scatters every bit (the finaliser of splitmix64; products wrap)."""
    x = x - 0x61C8864680B583EB
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def _keep_factor(extras: Extras, sequence: SequenceSlices, rows: slice, keys: slice, p: Tensor) -> Tensor | float:
    if not extras.dropout:
        return 1.0
    if extras.dropout >= 1:
        return 0.0
    assert extras.rng_state is not None

    def count(start: int, stop: int) -> Tensor:
        return torch.arange(start, stop, device=p.device)

    keep = dropout_keep(
        extras.rng_state,
        extras.dropout,
        sequence.number,
        count(0, p.shape[0]),
        count(rows.start - sequence.q_start, rows.stop - sequence.q_start),
        count(keys.start - sequence.k_start, keys.stop - sequence.k_start),
    )
    return keep.to(p.dtype) / (1 - extras.dropout)


def _all_blocks(
    sequences: list[SequenceSlices], q_QND: Tensor
) -> Iterator[tuple[SequenceSlices, slice, slice, Tensor]]:
    for sequence in sequences:
        for rows, keys, masked in row_blocks(tuple(sequence.table), q_QND):
            yield sequence, rows, keys, masked


def _biased_scores(
    q_QND: Tensor,
    k_KND: Tensor,
    masked: Tensor,
    scale: float,
    extras: Extras,
    sequence: SequenceSlices,
    rows: slice,
    keys: slice,
) -> Tensor:
    scores, _ = masked_scores(q_QND, k_KND, masked, scale, None)
    if extras.bias is None:
        return scores
    return scores + _bias_block(extras.bias, sequence, rows, keys).to(scores.dtype)


def _bias_block(bias: Tensor, sequence: SequenceSlices, rows: slice, keys: slice) -> Tensor:
    """The bias of a block, [1 or N, 1 or Q, K], as a view."""
    own_rows = slice(rows.start - sequence.q_start, rows.stop - sequence.q_start)
    return bias[
        sequence.number if bias.shape[0] > 1 else 0,
        :,
        own_rows if bias.shape[2] > 1 else slice(None),
        keys.start - sequence.k_start : keys.stop - sequence.k_start,
    ]


def _summed_to(x_NQK: Tensor, shape: torch.Size) -> Tensor:
    return x_NQK.sum_to_size(shape)


def _rounded(x: Tensor, quantizer: Quantizer | None) -> Tensor:
    """x as it comes out of a quantizer's format."""
    return x if quantizer is None else dequantized(quantizer.quantize(x), x.dtype)


def split_by_sequence(
    table: SliceTable, parent: np.ndarray, q_start: np.ndarray, k_start: np.ndarray
) -> list[SequenceSlices]:
    """The slices of each sequence that has any; `parent` is the sequence of each slice."""
    return [
        SequenceSlices(int(i), int(q_start[i]), int(k_start[i]), table.take(parent == i)) for i in np.unique(parent)
    ]
