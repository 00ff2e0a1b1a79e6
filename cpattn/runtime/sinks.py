"""A sink: a logit of each head that takes part in the softmax and has no value.

It is folded into results after all keys have been merged, so that no kernel needs to know it.

Shape legend: T rows, N query heads, E head dim of v.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fold_sink(out_TNE: Tensor, lse_TN: Tensor, sink: Tensor, *, where: Tensor | None = None) -> Tensor:
    """Scale out, in place, to what it is with the sink; returns the lse with it, natural log.

    A row that sees no key gets lse = sink and keeps out 0; with a sink of -inf nothing is shared out, and there is no
    NaN.

    Args:
        out_TNE, lse_TN: fp32 or fp64; lse -inf in rows that see no key. out may be of half precision where it is the
            result of one call, which the scaling rounds once more at most, as a cast would.
        sink: [N], or anything that broadcasts to [T, N].
        where: bool, broadcasts to [T, N]: rows that the sink takes part in; None is all.
    """
    total = torch.logaddexp(lse_TN, sink.to(lse_TN.dtype))
    if where is not None:
        total = torch.where(where, total, lse_TN)
    out_TNE *= torch.exp(lse_TN - total).masked_fill_(total == -torch.inf, 0).unsqueeze(-1)
    return total


def sink_gradient(delta_TN: Tensor, lse_TN: Tensor, sink: Tensor) -> Tensor:
    """Gradient of the sink, [N] in its dtype: its probability is exp(sink - lse), and its value 0.

    Args:
        delta_TN: `row_delta` of out and its gradient.
        lse_TN: with the sink.
        sink: [N].
    """
    # Where both are -inf, the row sees nothing and the sink takes no part.
    probability = torch.exp(sink.to(lse_TN.dtype) - lse_TN).masked_fill(lse_TN == -torch.inf, 0)
    return -(probability * delta_TN).sum(0).to(sink.dtype)


def row_delta(dout_TNE: Tensor, out_TNE: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over head dim of dout * out, [T, N]: all that backward needs of out."""
    return (dout_TNE.to(dtype) * out_TNE.to(dtype)).sum(-1)
