"""What mixers move, stated before they run: rows and maps that each rank receives, and their bytes."""

from __future__ import annotations

from typing import NamedTuple

from cpattn.keys.key import AttnKey
from cpattn.solver import Recurrence

from .fragments import IntArray, fragments_of


class MixerTraffic(NamedTuple):
    """What one call of a mixer brings to each rank in forward; backward takes the same way home.

    rows: convolution rows, or maps of fragments, received by each rank [cp_size]. row_bytes: of one.
    """

    rows: IntArray
    row_bytes: int

    @property
    def total_bytes(self) -> int:
        """Over all ranks."""
        return int(self.rows.sum()) * self.row_bytes

    @property
    def busiest_bytes(self) -> int:
        """On the rank that receives most."""
        return int(self.rows.max(initial=0)) * self.row_bytes


def map_bytes(num_heads: int, dim_k: int, dim_v: int, *, delta: bool, by_channel: bool = False) -> int:
    """Bytes of the map of one fragment as it travels, in fp32: the state, and what it is multiplied with.

    Args:
        num_heads: value heads. dim_k, dim_v: head dims of k and v (of B and x in Mamba-2).
        delta: whether the rule is the delta rule, whose factor is a matrix. by_channel: a decay for each channel.
    """
    return Recurrence(num_heads, dim_k, dim_v, delta, by_channel).map_bytes


def recurrence_traffic(key: AttnKey, row_bytes: int) -> MixerTraffic:
    """Maps that `linear_attention` brings to each rank under this key; row_bytes as `map_bytes` gives them."""
    return MixerTraffic(fragments_of(key, "recurrence_traffic").maps_received(), row_bytes)


def convolution_traffic(key: AttnKey, width: int, channels: int, itemsize: int = 2) -> MixerTraffic:
    """Rows that `causal_conv1d` brings to each rank under this key.

    Args:
        width: of the convolution. channels: of a row. itemsize: bytes of an element.
    """
    table = fragments_of(key, "convolution_traffic")
    received = table.convolution_rows_received(width, key.q_placement)
    return MixerTraffic(received, channels * itemsize)
