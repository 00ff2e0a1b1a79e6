"""The merge of partial attention results by their log-sum-exp.

Shape legend: T tokens, H heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor


def merge_partials(out_THD: Tensor, lse_TH: Tensor, other_out_THD: Tensor, other_lse_TH: Tensor) -> None:
    """Merge attention over a second, disjoint key set into the first, in place.

    Args:
        out_THD: [T, H, D], fp32 or fp64: softmax(scores) @ v over the first key set.
        lse_TH: [T, H], the same dtype, natural log of the sum of exp(scores); -inf (and out 0)
            where a query sees no key of the set.
        other_out_THD, other_lse_TH: the same for the second key set; out may have any float dtype.
    Raises:
        ValueError: shapes differ.
    Source: arXiv:1805.02867 (online softmax). out becomes out + w * (other - out) with
        w = exp(other_lse - total) = sigmoid(other_lse - lse), which needs one pass over out.
    """
    if out_THD.shape != other_out_THD.shape or lse_TH.shape != other_lse_TH.shape:
        raise ValueError(
            f"partials of shapes {tuple(out_THD.shape)}, {tuple(lse_TH.shape)} and "
            f"{tuple(other_out_THD.shape)}, {tuple(other_lse_TH.shape)}: both must be over the same rows"
        )
    # Where both are -inf the difference is NaN: neither side saw a key, so keep the first (out 0).
    weight_TH = torch.sigmoid(other_lse_TH - lse_TH).nan_to_num_(nan=0.0)
    out_THD.lerp_(other_out_THD.to(out_THD.dtype), weight_TH.unsqueeze(-1))
    torch.logaddexp(lse_TH, other_lse_TH.to(lse_TH.dtype), out=lse_TH)
