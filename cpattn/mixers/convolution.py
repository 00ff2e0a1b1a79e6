"""Short causal convolutions: each fragment is given the rows of its document that lie before it."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cpattn.collectives import RowRoutes
from cpattn.keys.key import AttnKey, require_key
from cpattn.ops.layout import cached_tensor
from cpattn.ops.travel import RowSaying, cast_rows

from .fragments import fragments_of, index_tensor, locate, routes_of
from .fused import Kernel, convolve, refuse_convolution, takes_fused

Activation = Literal["silu", "swish"]


@torch.compiler.disable  # indices differ with the batch: a graph would serve one
def causal_conv1d(
    x_TC: Tensor,
    weight_CW: Tensor,
    key: AttnKey,
    *,
    bias_C: Tensor | None = None,
    activation: Activation | None = None,
    kernel: Kernel = "auto",
) -> Tensor:
    """Depthwise causal convolution along each document, whatever ranks its tokens lie on.

    Row t becomes the sum over w of weight[:, w] * x[t - (W - 1) + w], over rows of its own document; what would lie
    before the document's first token counts as zero. A fragment fetches the W - 1 rows before it, forward; their
    gradients go home, backward.

    Args:
        x_TC: [T_local, C], this rank's rows of `key`.
        weight_CW: [C, W], as the depthwise weight [C, 1, W] of `torch.nn.Conv1d` without its middle axis.
        key: whose placement the rows have; its mask must have documents.
        bias_C: [C], or None.
        activation: "silu" (or its other name "swish") applied to the result, or None.
        kernel: "torch", "fused" (causal_conv1d, on CUDA, widths 2 to 4), or "auto": fused where it serves.

    Returns:
        [T_local, C] in x's dtype.

    Raises:
        ValueError: shapes do not fit the key or each other, the mask has no documents, or `kernel` does not serve.
    """
    require_key(key, "causal_conv1d")
    with key.checking("causal_conv1d"):
        _check(x_TC, weight_CW, bias_C, activation, key)
        width = weight_CW.shape[1]
        plan = _plan(key, width, x_TC.device)
    saying = RowSaying(key, "causal_conv1d", {"width": width, "bias": bias_C is not None, "activation": activation})
    fetched = cast_rows(x_TC, plan.routes, saying)
    rows = torch.cat([x_TC, fetched, x_TC.new_zeros(1, x_TC.shape[1])]).index_select(0, plan.source)
    if not key.num_tokens:  # still a link of the graph: gradients of what others fetched, and zeros for the parameters
        nothing = weight_CW.sum() if bias_C is None else weight_CW.sum() + bias_C.sum()
        return rows + 0 * nothing.to(rows.dtype)
    # One convolution over all fragments, each behind its own W - 1 rows; what straddles two of them is left out.
    if takes_fused(kernel, "causal_conv1d", refuse_convolution(x_TC, width)):
        return convolve(rows, weight_CW, bias_C, activation)[width - 1 :].index_select(0, plan.result)
    out = F.conv1d(rows.T[None], weight_CW[:, None].to(x_TC.dtype), bias_C, groups=x_TC.shape[1])[0].T
    out = out.index_select(0, plan.result)
    return out if activation is None else F.silu(out)


class _ConvPlan(NamedTuple):
    """routes: rows that come from other ranks. source: rows of [own, fetched, one of zeros] in the order of the
    convolution. result: for each own row its place in what the convolution gives.
    """

    routes: RowRoutes
    source: Tensor
    result: Tensor


def _plan(key: AttnKey, width: int, device: torch.device) -> _ConvPlan:
    table = fragments_of(key, "causal_conv1d")
    placement, rank = key.q_placement, key.cp_rank

    def make() -> _ConvPlan:
        reach = width - 1
        needed = table.rows_before(reach)
        mine = table.of_rank(rank)
        lengths = table.ends[mine] - table.starts[mine]
        fragment = np.repeat(np.arange(len(mine)), lengths + reach)
        nth = np.arange(len(fragment)) - np.repeat(np.cumsum(lengths + reach) - lengths - reach, lengths + reach)
        tokens = table.starts[mine][fragment] - reach + nth
        source = locate(tokens, needed, placement, rank)
        routes = routes_of(needed, placement, rank, device)
        source[tokens < table.documents[mine][fragment]] = key.num_tokens + routes.num_received
        assert (source >= 0).all(), "a row before a fragment was not fetched"
        # The convolution loses its first W - 1 rows, so the result of a row stands where its window begins.
        result = np.flatnonzero(nth >= reach) - reach
        return _ConvPlan(routes, index_tensor(source, device), index_tensor(result, device))

    return cached_tensor(key, ("conv", width, device), make)  # type: ignore[no-any-return]


def _check(
    x_TC: Tensor, weight_CW: Tensor, bias_C: Tensor | None, activation: str | None, key: AttnKey
) -> None:
    for name, tensor in (("x", x_TC), ("weight", weight_CW)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise ValueError(f"causal_conv1d: {name} is no tensor of floating-point numbers")
    if x_TC.dim() != 2 or x_TC.shape[0] != key.num_tokens:
        raise ValueError(
            f"causal_conv1d: x has shape {tuple(x_TC.shape)}: the key expects ({key.num_tokens}, channels), the rows "
            f"of rank {key.cp_rank}; did you dispatch with this key?"
        )
    channels = x_TC.shape[1]
    if weight_CW.dim() != 2 or weight_CW.shape[0] != channels or not weight_CW.shape[1]:
        raise ValueError(
            f"causal_conv1d: weight has shape {tuple(weight_CW.shape)} and x has {channels} channels: give "
            f"[channels, width] (squeeze(1) of a depthwise Conv1d's weight)"
        )
    if bias_C is not None and bias_C.shape != (channels,):
        raise ValueError(f"causal_conv1d: bias has shape {tuple(bias_C.shape)}: expected ({channels},)")
    if activation not in (None, "silu", "swish"):
        raise ValueError(f"causal_conv1d: activation is {activation!r}: use 'silu', 'swish' or None")
