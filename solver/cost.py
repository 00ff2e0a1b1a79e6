"""What moving and computing cost: bytes of a row, seconds of a transfer, seconds of a kernel.

Bytes are counted for both passes of one attention call: keys and values go out twice (they are
fetched again in backward) and their gradients come back in fp32; queries that are computed elsewhere
go out twice, with dO, lse and delta in backward, and bring back a partial out and lse, and dQ in fp32.

Seconds follow the alpha-beta model (Hockney 1994): a transfer takes `latency_s` plus bytes over
`bytes_per_s`, with one such pair for links within a node and one for links between nodes. A kernel
call takes `launch_s`, plus `slice_s` for each slice, plus its FLOP over the device's rate.
"""

from __future__ import annotations

import json
import math
from dataclasses import MISSING, asdict, dataclass, fields
from numbers import Integral, Real
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .outside import parse_json

FloatArray = NDArray[np.float64]

_FP32 = 4

# Point-to-point messages must take less than this share of the collective's time to be chosen.
_P2P_GAIN = 0.95


@dataclass(frozen=True, slots=True)
class Heads:
    """Heads of one attention call.

    itemsize: bytes of an element of q, k, v and out. wire_8bit: whether q, k, v and the gradient of out
    travel as a byte for each element and one for the scale of each row and head. latent_dim: elements of the row
    that is fetched in the place of keys and values (`cpattn.fetch`) and kept until backward; 0: these travel.
    """

    num_q: int = 32
    num_kv: int = 8
    head_dim: int = 128
    head_dim_v: int = 128
    itemsize: int = 2
    wire_8bit: bool = False
    latent_dim: int = 0

    @property
    def numbers(self) -> tuple[int, int, int, int]:
        """Query heads, key heads, head dim of queries and keys, head dim of values."""
        return self.num_q, self.num_kv, self.head_dim, self.head_dim_v

    def row_bytes(self) -> RowBytes:
        """What a row weighs in each exchange of the two passes, in bytes."""
        q_row, out_row = self.num_q * self.head_dim, self.num_q * self.head_dim_v
        kv_row = self.num_kv * (self.head_dim + self.head_dim_v)
        statistic = _FP32 * self.num_q  # lse, or delta
        q_sent, dout_sent = (self.num_q * self._sent(dim) for dim in (self.head_dim, self.head_dim_v))
        kv_sent = self.num_kv * (self._sent(self.head_dim) + self._sent(self.head_dim_v))
        latent = self.latent_dim * self.itemsize
        return RowBytes(
            q=q_sent,
            partial=self.itemsize * out_row + statistic,
            kv=latent or kv_sent,
            q_again=q_sent + dout_sent + 2 * statistic,
            kv_again=0 if latent else kv_sent,
            dq=_FP32 * q_row,
            dkv=latent or _FP32 * kv_row,
        )

    def row_costs(self) -> RowCosts:
        """What a row costs over forward and backward."""
        row = self.row_bytes()
        return RowCosts(q=row.q + row.partial + row.q_again + row.dq, kv=row.kv + row.kv_again + row.dkv, heads=self)

    def _sent(self, dim: int) -> int:
        """Bytes on the wire of one row of one head."""
        return dim + 1 if self.wire_8bit else dim * self.itemsize

    @property
    def forward_flop(self) -> int:
        """FLOP of one visible pair over all heads: q.k and p.v, two each for a multiply and an add."""
        return 2 * self.num_q * (self.head_dim + self.head_dim_v)

    @property
    def backward_flop(self) -> int:
        """FLOP of one visible pair: q.k again, dq and dk over head_dim; dp and dv over head_dim_v."""
        return self.num_q * (6 * self.head_dim + 4 * self.head_dim_v)


class RowBytes(NamedTuple):
    """Bytes of one row on the wire.

    Forward: q out, partial (out, lse) home, kv out. Backward: q_again (q, dout, lse, delta) out, dq
    home, kv_again out, dkv home.
    """

    q: int
    partial: int
    kv: int
    q_again: int
    kv_again: int
    dq: int
    dkv: int

    @property
    def of_queries(self) -> tuple[int, int, int, int]:
        """Of what moves with queries: there in forward and backward, home in forward and backward."""
        return self.q, self.q_again, self.partial, self.dq

    @property
    def of_keys(self) -> tuple[int, int, int, int]:
        """The same of what moves with keys, of which forward brings nothing home."""
        return self.kv, self.kv_again, 0, self.dkv


@dataclass(frozen=True, slots=True)
class RowCosts:
    """Bytes that one row costs over forward and backward, when it is not where it is used."""

    q: int
    kv: int
    heads: Heads = Heads()


def row_costs(
    num_heads_q: int,
    num_heads_kv: int,
    head_dim: int,
    head_dim_v: int,
    itemsize: int = 2,
    wire_8bit: bool = False,
) -> RowCosts:
    """Row costs for heads and head dims; itemsize and wire_8bit as in `Heads`."""
    return Heads(num_heads_q, num_heads_kv, head_dim, head_dim_v, itemsize, wire_8bit).row_costs()


@dataclass(frozen=True, slots=True)
class Link:
    """One direction of a rank's connection: seconds before the first byte, then bytes per second."""

    latency_s: float
    bytes_per_s: float

    def seconds(self, num_bytes: FloatArray) -> FloatArray:
        """Time to move each number of bytes; 0 where there is nothing to move."""
        return np.where(num_bytes > 0, self.latency_s + num_bytes / self.bytes_per_s, 0.0)


TransportName = Literal["all_to_all", "p2p"]


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True, slots=True)
class TransportTimes:
    """Seconds of one exchange by either transport, measured.

    peers: share of the other ranks that each rank sends to, in (0, 1]. peer_bytes: bytes for each of them.
    """

    peers: float
    peer_bytes: float
    all_to_all_s: float
    p2p_s: float

    def __post_init__(self) -> None:
        numbers = (self.peers, self.peer_bytes, self.all_to_all_s, self.p2p_s)
        if not all(_is_number(x) and x > 0 for x in numbers) or self.peers > 1:
            raise ValueError(f"{self}: all must be finite and above 0, and peers at most 1")

    @property
    def faster(self) -> TransportName:
        """p2p where it is clearly faster: measurements are noisy."""
        return "p2p" if self.p2p_s < _P2P_GAIN * self.all_to_all_s else "all_to_all"


@dataclass(frozen=True, slots=True)
class Hardware:
    """Speeds of a cluster of equal devices.

    forward_flops, backward_flops: FLOP/s of the local kernel on long slices, one device; masked
        pairs are not counted as work.
    slice_s: seconds that each slice adds; launch_s: seconds of a stage without any work.
    copy_bytes_per_s: packing rows to send, adding or merging rows received, and adding a stage's results to those
        of the stages before.
    within, across: links inside a node and between nodes, for one rank.
    ranks_per_node: ranks that share a node.
    source: where the numbers come from.
    transports: what exchanges of several sparsities and sizes took by either transport; none: not measured.
    transfer_load: share of a transfer's time by which it delays the compute that hides it: its copies run on the same
        cores, or a communication kernel takes multiprocessors; in [0, 1].
    hops_by_host: whether the host begins each hop of an exchange when it comes to it, and hops inside nodes and hops
        between them, of different exchanges, travel at once, as with gloo. With NCCL they wait in one queue on the
        device, each for the one before.
    """

    name: str
    forward_flops: float
    backward_flops: float
    slice_s: float
    launch_s: float
    copy_bytes_per_s: float
    within: Link
    across: Link
    ranks_per_node: int
    source: str = ""
    transports: tuple[TransportTimes, ...] = ()
    transfer_load: float = 0.0
    hops_by_host: bool = False

    def __post_init__(self) -> None:
        rates = {name: getattr(self, name) for name in ("forward_flops", "backward_flops", "copy_bytes_per_s")}
        times = {name: getattr(self, name) for name in ("slice_s", "launch_s")}
        for name, link in (("within", self.within), ("across", self.across)):
            rates[f"{name}.bytes_per_s"] = link.bytes_per_s
            times[f"{name}.latency_s"] = link.latency_s
        for name, value in rates.items():
            if not _is_number(value) or value <= 0:
                raise ValueError(f"hardware {self.name!r}: {name} is {value!r}: a rate is a finite number above 0")
        for name, value in times.items():
            if not _is_number(value) or value < 0:
                raise ValueError(f"hardware {self.name!r}: {name} is {value!r}: a time is a finite number, at least 0")
        if not _is_number(self.transfer_load) or not 0 <= self.transfer_load <= 1:
            raise ValueError(f"hardware {self.name!r}: transfer_load is {self.transfer_load!r}: a share, from 0 to 1")
        if not isinstance(self.hops_by_host, bool):
            raise ValueError(f"hardware {self.name!r}: hops_by_host is {self.hops_by_host!r}: true or false")
        nodes = self.ranks_per_node
        if not isinstance(nodes, Integral) or isinstance(nodes, bool) or nodes < 1:
            raise ValueError(f"hardware {self.name!r}: ranks_per_node is {nodes!r}: an int of at least 1")

    def to_json(self) -> str:
        """As text that `from_json` reads."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Hardware:
        """Read what `to_json` wrote (`cpattn calibrate` does).

        Raises:
            ValueError: not JSON, a field is missing or unknown, or a number is out of range.
        """
        expected = f"expected a JSON object with {', '.join(field.name for field in fields(cls))}"
        try:
            values = parse_json(text)
        except ValueError as error:
            raise ValueError(f"not a hardware description ({error}): {expected}") from error
        if not isinstance(values, dict):
            raise ValueError(f"not a hardware description (a {type(values).__name__}): {expected}")
        needed = {field.name for field in fields(cls) if field.default is MISSING}
        if missing := sorted(needed - values.keys()):
            raise ValueError(f"not a hardware description ({', '.join(missing)} missing): {expected}")
        try:
            within, across = Link(**values.pop("within")), Link(**values.pop("across"))
            transports = tuple(TransportTimes(**times) for times in values.pop("transports", ()))
            return cls(**values, within=within, across=across, transports=transports)
        except (TypeError, OverflowError) as error:
            raise ValueError(f"not a hardware description ({error}): {expected}") from error

    def transport_for(self, peers: float, peer_bytes: float) -> TransportName:
        """The faster transport where it was measured, at the nearest sparsity and there at the nearest size.

        Args:
            peers: share of the other ranks that a rank sends to. peer_bytes: bytes for each of them.
        """
        if not self.transports or peers <= 0 or peer_bytes <= 0:
            return "all_to_all"

        def distance(times: TransportTimes) -> tuple[float, float]:
            return abs(math.log(times.peers / peers)), abs(math.log(times.peer_bytes / peer_bytes))

        return min(self.transports, key=distance).faster

    def kernel_seconds(
        self, areas: FloatArray, num_slices: FloatArray, heads: Heads, *, backward: bool = False
    ) -> FloatArray:
        """Time of the local kernel on `areas` visible pairs in `num_slices` slices; 0 without slices."""
        return self._busy(areas * self._pair_seconds(heads)[int(backward)], num_slices)

    def both_kernels_seconds(self, areas: FloatArray, num_slices: FloatArray, heads: Heads) -> FloatArray:
        """The same of forward and of backward, [2, ...]; areas, num_slices: [1 or 2, ...], the passes first."""
        of_pair = np.reshape(self._pair_seconds(heads), (2,) + (1,) * (areas.ndim - 1))
        return self._busy(areas * of_pair, num_slices)

    def _busy(self, seconds: FloatArray, num_slices: FloatArray) -> FloatArray:
        return np.where(num_slices > 0, self.launch_s + num_slices * self.slice_s + seconds, 0.0)

    def _pair_seconds(self, heads: Heads) -> tuple[float, float]:
        """Of a visible pair, forward and backward."""
        return heads.forward_flop / self.forward_flops, heads.backward_flop / self.backward_flops

    def merge_seconds(
        self, rows: FloatArray, keys: FloatArray, heads: Heads, *, backward: bool = False
    ) -> FloatArray:
        """Time to add a kernel's results to what earlier stages left, in fp32: out, or dq (rows), dk and dv (keys)."""
        row = heads.num_q * (heads.head_dim if backward else heads.head_dim_v)
        key = heads.num_kv * (heads.head_dim + heads.head_dim_v) if backward else 0
        seconds: FloatArray = (rows * row + keys * key) * (_FP32 / self.copy_bytes_per_s)
        return seconds

    def both_merges_seconds(self, rows: FloatArray, keys: FloatArray, heads: Heads) -> FloatArray:
        """The same of forward and of backward, [2, ...]."""
        return np.stack([self.merge_seconds(rows, keys, heads, backward=backward) for backward in (False, True)])


# Attention rates: FA3 on H100, causal, 32K tokens: 679 forward and 586 backward TFLOP/s, as published
# by MagiAttention (anchors.md), taken at about 0.95 of that. Links: 0.8 of the data sheet's figure for
# one direction, what NCCL's alltoall_perf commonly reports as bus bandwidth. Latencies and the cost of
# a slice and of a launch are assumptions of the right order; `cpattn calibrate` measures them.
_ASSUMED = "latencies, slice and launch costs assumed; run `cpattn calibrate` to measure"

HARDWARE: dict[str, Hardware] = {
    "h100": Hardware(
        name="h100",
        forward_flops=645e12,
        backward_flops=555e12,
        slice_s=0.5e-6,
        launch_s=15e-6,
        copy_bytes_per_s=1.5e12,
        within=Link(12e-6, 360e9),
        across=Link(25e-6, 40e9),
        ranks_per_node=8,
        source="DGX H100: FA3 causal (arXiv:2407.08608), NVLink 4 450 GB/s and one 400 Gbit/s NIC per GPU, at 0.8; "
        + _ASSUMED,
    ),
    "h200": Hardware(
        name="h200",
        forward_flops=645e12,
        backward_flops=555e12,
        slice_s=0.5e-6,
        launch_s=15e-6,
        copy_bytes_per_s=2.2e12,
        within=Link(12e-6, 360e9),
        across=Link(25e-6, 40e9),
        ranks_per_node=8,
        source="DGX H200: H100's compute and links, HBM3e at 4.8 TB/s; " + _ASSUMED,
    ),
    "b200": Hardware(
        name="b200",
        forward_flops=1400e12,
        backward_flops=1000e12,
        slice_s=0.5e-6,
        launch_s=15e-6,
        copy_bytes_per_s=3.5e12,
        within=Link(12e-6, 720e9),
        across=Link(25e-6, 40e9),
        ranks_per_node=8,
        source="DGX B200: FA4 (up to 1.6 PFLOP/s forward published, taken at 0.87; backward assumed), NVLink 5 "
        "900 GB/s and one 400 Gbit/s NIC per GPU, at 0.8; " + _ASSUMED,
    ),
    "cpu": Hardware(
        name="cpu",
        forward_flops=70e9,
        backward_flops=70e9,
        slice_s=200e-6,
        launch_s=400e-6,
        copy_bytes_per_s=4e9,
        within=Link(250e-6, 1.4e9),
        across=Link(250e-6, 1e9),
        ranks_per_node=64,
        source="one core of an x86-64 server in fp32 and gloo over its loopback, rounded from `cpattn calibrate`; "
        "copies in part into fresh memory; a core for each rank, none for its transfers; links between hosts assumed",
        transfer_load=0.5,
        hops_by_host=True,
    ),
}

DEFAULT_HARDWARE = HARDWARE["h100"]
