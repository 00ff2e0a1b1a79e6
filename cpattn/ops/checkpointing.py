"""Activation checkpointing that keeps attention's results, so that recomputation does not repeat it."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from cpattn.ops import attention  # noqa: F401  (registers the ops that the policy names)

_KEPT = (
    torch.ops.cpattn.attention_forward.default,
    torch.ops.cpattn.shard_heads.default,
    torch.ops.cpattn.gather_rows.default,
)


def attention_checkpoint_policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep what `cpattn.attention` computes and exchanges (out and lse; with head sharding also the head-sharded
    q, k, v and out); recompute everything else.

    A policy for `torch.utils.checkpoint.create_selective_checkpoint_contexts`, to be used alone or
    called from a policy of one's own.
    """
    if op in _KEPT:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def attention_checkpoint_contexts() -> tuple[Any, Any]:
    """The `context_fn` for `torch.utils.checkpoint.checkpoint` that saves attention's out and lse.

    Recomputation then neither communicates nor runs the attention kernel again; it costs the memory
    of out and lse of each attention call:

        checkpoint(block, x, use_reentrant=False, context_fn=cpattn.attention_checkpoint_contexts)
    """
    return create_selective_checkpoint_contexts(attention_checkpoint_policy)  # type: ignore[no-any-return]
