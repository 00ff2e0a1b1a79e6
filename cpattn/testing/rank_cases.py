"""The whole path on every rank: dispatch, attention, its backward, and global results again."""

from __future__ import annotations

from typing import Any

import torch

import cpattn
from cpattn import AttnMaskSpec
from cpattn.ops.layout import Side

from .dense import Inputs, Results


def run_attention(
    spec: AttnMaskSpec, inputs: Inputs, *, key_options: dict[str, Any] | None = None, **call: Any
) -> Results:
    """dispatch, attention, backward, undispatch on the default group; global results on every rank."""
    group = torch.distributed.group.WORLD if torch.distributed.is_initialized() else None
    key = cpattn.make_key(
        spec,
        num_heads_q=inputs.q.shape[1],
        num_heads_kv=inputs.k.shape[1],
        head_dim=inputs.q.shape[2],
        head_dim_v=inputs.v.shape[2],
        cp_group=group,
        **(key_options or {}),
    )
    return run_with_key(key, inputs, **call)


def run_with_key(key: cpattn.AttnKey, inputs: Inputs, **call: Any) -> Results:
    """The same with a key at hand."""
    q, dout = (cpattn.dispatch(t, key) for t in (inputs.q, inputs.dout))
    k, v = (cpattn.dispatch(t, key, side="k") for t in (inputs.k, inputs.v))
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    out, lse = cpattn.attention(q, k, v, key, return_lse=True, **call)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    local = (out.detach(), lse, *grads)
    sides: tuple[Side, ...] = ("q", "q", "q", "k", "k")
    return Results(*(cpattn.undispatch(t, key, side=s) for t, s in zip(local, sides, strict=True)))
