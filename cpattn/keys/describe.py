"""What a key says of its plan, line by line."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from cpattn.collectives import Transport
from cpattn.masks.spec import lower_mask
from cpattn.runtime.memory import StepMemory
from cpattn.solver import Plan, head_exchange_bytes, plan_report, split_heads

from .options import PlannedKey


def describe_plan(planned: PlannedKey, dtype: torch.dtype, *, transport: Transport, backend: str) -> list[str]:
    """Mask, ranks, traffic, stages and kernel.

    backend: the kernel and the reason for it.
    """
    plan, spec = planned.plan, planned.spec
    row = replace(planned.heads, itemsize=dtype.itemsize).row_bytes().kv
    received = plan.kv_routes.rows_received(plan.cp_size)
    gathered = (plan.cp_size - 1) * spec.seqlen_k
    tokens = plan.q_placement.num_tokens
    share = f"{received.sum() / gathered:.1%} of an all-gather" if gathered else "one rank"
    return [
        f"mask: {spec.total_seqlen} x {spec.seqlen_k} tokens, "
        f"{plan.tasks.area():,} visible pairs in {len(plan.tasks)} tasks",
        f"ranks: {plan.cp_size}, layout {planned.options.planning.layout}, "
        f"work max/mean {plan.imbalance():.3f}, tokens {tokens.min()} to {tokens.max()}",
        *_describe_layers(planned),
        f"keys and values received, forward: {received.sum() * row:,} bytes over all ranks "
        f"({share}), {received.max(initial=0) * row:,} on the busiest",
        f"stages: {plan.num_stages} remote, by {transport}{_describe_relays(plan)}",
        backend,
    ]


def describe_report(planned: PlannedKey, dtype: torch.dtype) -> list[str]:
    """The plan against lower bounds and the usual alternatives, for q, k and v of a dtype."""
    mask = lower_mask(planned.spec, planned.options.window)
    heads = replace(planned.heads, itemsize=dtype.itemsize)
    chunk_size = planned.options.planning.chunk_size
    return list(plan_report(planned.plan, mask=mask, heads=heads, chunk_size=chunk_size).lines())


def describe_memory(stated: StepMemory, *, keeps: bool) -> str:
    """The peaks of a call. keeps: whether forward keeps what it fetched."""
    kept = f", of which {stated.kept:,} fetched keys and values are kept" if keeps else ""
    return (
        f"memory of a call beyond its inputs, this rank's peak: {stated.forward:,} bytes forward{kept}, "
        f"{stated.backward:,} backward"
    )


def describe_choice(planned: PlannedKey) -> list[str]:
    """Of the head degree, where it was chosen."""
    if not planned.degree_seconds:
        return []
    predicted = ", ".join(f"{degree}: {seconds * 1e3:.3g} ms" for degree, seconds in planned.degree_seconds)
    degree, hardware = planned.options.head_degree, planned.options.planning.hardware
    return [f"head_degree {degree}, chosen by the predicted step on {hardware.name}: {predicted}"]


def describe_sharding(planned: PlannedKey, dtype: torch.dtype) -> str:
    """How heads are shared out; what follows is of the attention between."""
    degree, placements = planned.options.head_degree, (planned.plan.q_placement, planned.plan.k_placement)
    parts = split_heads(planned.heads.num_q, planned.heads.num_kv, degree)
    counts = [part.num_q for part in parts]
    moved = head_exchange_bytes(placements, parts, replace(planned.heads, itemsize=dtype.itemsize))
    return (
        f"head sharding: {degree} ranks share a context rank's rows, {min(counts)} to {max(counts)} query heads "
        f"each; {moved:,} bytes each way and pass on the busiest\nbetween the {planned.plan.cp_size} context ranks, "
        f"with this rank's heads:"
    )


def _describe_relays(plan: Plan) -> str:
    if not plan.relays:
        return ""
    at_once, sent = plan.kv_routes.rows_sent(plan.cp_size).max(), plan.key_rows_moved().sent.max()
    nodes = plan.ranks_per_node
    over = f", over nodes of {nodes} ranks" if 1 < nodes < plan.cp_size else ""
    return f"; rows travel on{over}: the busiest rank sends {sent:,} rows, {at_once:,} if owners sent them all"


def _describe_layers(planned: PlannedKey) -> list[str]:
    if len(planned.layer_plans) < 2:
        return []
    areas = [(layers.num_layers, plan.areas()) for layers, plan in planned.layer_plans]
    largest, mean = (sum(n * float(part(a)) for n, a in areas) for part in (np.max, np.mean))
    return [
        f"masks planned together: {len(areas)}, for layers in the proportion "
        f"{':'.join(f'{n:g}' for n, _ in areas)}; work max/mean over all layers {largest / max(mean, 1):.3f}"
    ]
