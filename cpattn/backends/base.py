"""What a local kernel is: attention over slices of one rank's buffers, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from cpattn.solver import SliceTable


@dataclass(frozen=True, slots=True)
class Problem:
    """What a backend must know to say whether it can serve.

    head_dim is that of queries and keys, head_dim_v that of values.
    """

    device_type: str
    dtype: torch.dtype
    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    head_dim_v: int
    softcap: bool = False


class Backend(Protocol):
    """A local attention kernel.

    Shape legend: Q local or received query rows, K key rows of a stage, N query heads, G key heads,
    D head dim of queries and keys, E head dim of values. Accumulators are fp32, or fp64 for fp64
    inputs. Slices are disjoint, canonical, and in buffer row numbers.
    """

    name: str

    def refusal(self, problem: Problem) -> str | None:
        """Why this backend cannot serve the problem, in words; None if it can."""
        ...

    def prepare(self, slices: SliceTable, num_queries: int, num_keys: int, device: torch.device) -> Any:
        """What `forward` and `backward` need of a slice table; made once per key and stage."""
        ...

    def forward(
        self,
        q_QND: Tensor,
        k_KGD: Tensor,
        v_KGE: Tensor,
        work: Any,
        *,
        scale: float,
        softcap: float | None,
        out_QNE: Tensor,
        lse_QN: Tensor,
    ) -> None:
        """Attention over the slices of `work`, merged into (out, lse) in place.

        out_QNE: accumulator; 0 in rows that have seen no key yet.
        lse_QN: accumulator, natural log; -inf in such rows.
        """
        ...

    def backward(
        self,
        dout_QNE: Tensor,
        q_QND: Tensor,
        k_KGD: Tensor,
        v_KGE: Tensor,
        out_QNE: Tensor,
        lse_QN: Tensor,
        work: Any,
        *,
        scale: float,
        softcap: float | None,
        dq_QND: Tensor,
        dk_KGD: Tensor,
        dv_KGE: Tensor,
    ) -> None:
        """Gradients of the slices of `work`, added to the accumulators dq, dk, dv in place.

        out_QNE, lse_QN: of the whole attention, not of this part: with them the gradients of the
            parts add up to the gradient of the whole. lse is +inf in rows that see no key at all,
            so that their probabilities are 0.
        """
        ...
