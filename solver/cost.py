"""What rows cost to move: bytes of a forward and backward pass.

Counted for both passes of one attention call: keys and values go out twice (they are fetched again
in backward) and their gradients come back in fp32; queries that are computed elsewhere go out
twice, with dO, lse and delta in backward, and bring back a partial out and lse, and dQ in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

_FP32 = 4


@dataclass(frozen=True, slots=True)
class RowCosts:
    """Bytes that one row costs over forward and backward, when it is not where it is used."""

    q: int
    kv: int


def row_costs(
    num_heads_q: int, num_heads_kv: int, head_dim: int, head_dim_v: int, itemsize: int = 2
) -> RowCosts:
    """Row costs for heads and head dims; itemsize: bytes of an element of q, k, v and out."""
    q_row, out_row = num_heads_q * head_dim, num_heads_q * head_dim_v
    forward = itemsize * q_row + itemsize * out_row + _FP32 * num_heads_q
    backward = itemsize * (q_row + out_row) + 2 * _FP32 * num_heads_q + _FP32 * q_row
    kv_row = num_heads_kv * (head_dim + head_dim_v)
    return RowCosts(q=forward + backward, kv=2 * itemsize * kv_row + _FP32 * kv_row)
