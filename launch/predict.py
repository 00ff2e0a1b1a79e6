"""What the cost model says of a step of a key, head trades included. Loads no torch."""

from __future__ import annotations

from typing import NamedTuple

from cpattn.planning.head_degree import between_context_ranks, most_heads
from cpattn.solver import Hardware, Heads, Plan, StepTimeline, head_exchange_seconds, simulate, split_heads


class Prediction(NamedTuple):
    """A step by the cost model.

    attention: with head sharding, between the context ranks. heads: those that it is for, of the part with most.
    head_degree: ranks that share a context rank's rows.
    head_seconds: of the head exchanges before and after attention, in forward and in backward.
    """

    attention: StepTimeline
    heads: Heads
    head_degree: int
    head_seconds: tuple[tuple[float, float], tuple[float, float]]

    @property
    def seconds(self) -> float:
        return self.attention.seconds + sum(map(sum, self.head_seconds))


def predict(plan: Plan, head_degree: int, hardware: Hardware, heads: Heads) -> Prediction:
    """A step on links and kernels of the hardware.

    plan: of context ranks. head_degree: ranks of each. heads: of the whole group, with the size of elements.
    """
    inner, between = most_heads(heads, head_degree), between_context_ranks(hardware, head_degree)
    parts = split_heads(heads.num_q, heads.num_kv, head_degree)
    total = head_exchange_seconds((plan.q_placement, plan.k_placement), parts, heads, hardware) / 2
    # q, k and v go in and out comes home; backward is the mirror.
    into = heads.num_q * heads.head_dim + heads.num_kv * (heads.head_dim + heads.head_dim_v)
    before = total * into / (into + heads.num_q * heads.head_dim_v)
    seconds = ((before, total - before), (total - before, before))
    return Prediction(simulate(plan, between, inner), inner, head_degree, seconds)
