"""The time of a schedule before its routes are made, and the stages in which its remote keys travel best.

The same clock as for a simulation runs on rough figures: a rank's work on its own keys and on each stage's is
taken to be in proportion to their rows, and every stage to have its share of what each link carries. That
costs a millisecond or two, at any number of ranks and stages.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .clock import LATE_SHARE, Clock
from .cost import FloatArray, Hardware, Heads
from .placement import Placement
from .routes import Intervals, LinkRows, merge_intervals, rows_missing, rows_owned, runs_needed
from .slices import IntArray, SliceTable

# Factors by which the first and the last stage may be smaller than the others.
_EDGES = (1, 2, 4)
# What one stage more has to save to be worth its latency and its slices, and how many in vain end the search; one that
# is so much slower does at once.
_STAGE_GAIN = 0.002
_PATIENCE = 2
_SLOWER = 1.1


@dataclass(frozen=True, slots=True, eq=False)
class Load:
    """What a schedule asks of every rank, each [cp_size].

    areas: visible pairs. own_slices, far_slices: slices with keys that it owns, and with others; gaps, cuts: so many
    more there are of the latter in one stage, as what is fetched has gaps, and in each of several stages, whose edges
    cut slices apart. own_share: of its pairs, those on keys that it
    owns. guest_share: those of queries that it receives. merged: rows of queries that see keys which it does not own,
    fetched: rows of those keys. late: rows of its own queries, and of keys, in work on its own keys. keys, queries:
    rows on its links; two_level: these go between nodes and then inside them, else at once. relays: they travel on.
    """

    areas: IntArray
    own_slices: IntArray
    far_slices: IntArray
    gaps: FloatArray
    cuts: FloatArray
    own_share: FloatArray
    guest_share: FloatArray
    merged: FloatArray
    fetched: FloatArray
    late: tuple[FloatArray, FloatArray]
    keys: LinkRows
    queries: LinkRows
    two_level: bool
    relays: bool = False

    @property
    def num_hops(self) -> int:
        return 1 + self.two_level + self.relays

    @classmethod
    def of(
        cls,
        tasks: SliceTable,
        task_ranks: IntArray,
        queries: Intervals,
        keys: Intervals,
        q_placement: Placement,
        k_placement: Placement,
        /,
        **ways: Any,
    ) -> Load:
        """That of ranks which compute these tasks and need these rows.

        ways: how these travel: the fields `keys`, `queries`, `two_level` and `relays`.
        """
        q_missing, k_missing = rows_missing(queries, q_placement), rows_missing(keys, k_placement)
        size = q_placement.cp_size
        q_needed, k_needed = (np.bincount(need.ranks, need.ends - need.starts, size) for need in (queries, keys))
        owned = k_placement.num_tokens
        owned_by_task = rows_owned(Intervals(task_ranks, tasks.k0, tasks.k1), k_placement)
        far = tasks.k1 - tasks.k0 - owned_by_task
        # As many rows as see the first so many keys.
        last = np.clip(tasks.k0 + far - tasks.lo, tasks.q0, tasks.q1)
        merged = merge_intervals(task_ranks, tasks.q0, np.where(far > 0, last, tasks.q0))
        seen = merge_intervals(task_ranks[owned_by_task > 0], *(x[owned_by_task > 0] for x in (tasks.q0, tasks.q1)))
        at_home = np.bincount(seen.ranks, rows_owned(seen, q_placement), size)
        # Each sender's rows are divided between stages: two edges, at which as many slices are cut as see one row.
        senders = np.minimum(np.bincount(keys.ranks, runs_needed(keys, k_placement)[1], size), size - 1)
        fetched = np.bincount(keys.ranks[rows_owned(keys, k_placement) < keys.ends - keys.starts], minlength=size)
        gaps = np.clip(fetched + np.bincount(k_placement.owners, minlength=size) - 2, 0, senders)
        seen_by = np.bincount(task_ranks, far, size) / np.maximum(k_missing, 1)
        return cls(
            areas=np.bincount(task_ranks, tasks.areas(), size).astype(np.int64),
            own_slices=np.bincount(task_ranks, owned_by_task > 0, size).astype(np.int64),
            far_slices=np.bincount(task_ranks, far > 0, size).astype(np.int64),
            gaps=gaps * seen_by,
            cuts=senders * seen_by,
            merged=np.bincount(merged.ranks, merged.ends - merged.starts, size).astype(np.float64),
            fetched=k_missing.astype(np.float64),
            own_share=owned / np.maximum(owned + k_missing, 1),
            guest_share=q_missing / np.maximum(q_needed, 1),
            late=(at_home.astype(np.float64), (k_needed - k_missing).astype(np.float64)),
            **ways,
        )


class Staging(NamedTuple):
    """Weights of the stages in which remote keys travel, and the time of both passes.

    relays: 0: owners send rows to all who need them. Else rows travel on, over nodes of so many ranks (1: no nodes).
    """

    weights: tuple[int, ...]
    seconds: float
    relays: int = 0


def choose_stages(load: Load, heads: Heads, hardware: Hardware, counts: Iterable[int]) -> Staging:
    """Number and sizes of the stages by the estimated time of both passes.

    The first keys and the last gradients have only parts of the work on own keys to hide behind: so the first and the
    last stage may be smaller than the others, by a factor that is chosen as well. Those between are equal,
    since the largest two make the buffers. More stages hide more, but pay more latencies and launches, and
    ranks that are not alike wait for one another more often.

    Args:
        counts: numbers of stages in ascending order; the search ends when two in a row bring less than
            0.2 %, or one is far slower. (0,) where no key travels.
    """
    best: Staging | None = None
    in_vain = 0
    for count in counts:
        edges = np.array(_EDGES if count > 2 else (1,))
        weights = np.ones((count, len(edges), 1), dtype=np.int64)
        weights[1:-1] = edges[:, None]
        seconds = _step_seconds(load, heads, hardware, weights / np.maximum(weights.sum(axis=0), 1))
        at = int(seconds.argmin())
        found = Staging(tuple(weights[:, at, 0].tolist()), float(seconds[at]))
        if best is None or found.seconds < best.seconds * (1 - _STAGE_GAIN):
            best, in_vain = found, 0
        else:
            in_vain += 1
            if in_vain == _PATIENCE or found.seconds > _SLOWER * best.seconds:
                break
    assert best is not None, "counts is empty"
    return best


def _step_seconds(load: Load, heads: Heads, hardware: Hardware, shares: FloatArray) -> FloatArray:
    """Both passes of the slowest rank, [n], for n ways to share the remote keys between stages, [stages, n, 1]."""
    row = heads.row_bytes()
    shape = (shares.shape[1], len(load.areas))
    queries = _EstimatedWire(load.queries, np.ones((1, 1)), hardware, load.two_level)
    stages = [_EstimatedWire(load.keys, share, hardware, load.two_level) for share in shares]
    own = np.broadcast_to(load.own_share, shape)
    sides = {"own": 1 - load.guest_share, **({"guest": load.guest_share} if queries.active else {})}

    late = (load.late[0] * LATE_SHARE, load.late[1] * LATE_SHARE)
    far_slices = [load.far_slices * share + (load.cuts if len(shares) > 1 else load.gaps) for share in shares]

    def kernel(part: FloatArray, slices: np.ndarray[Any, Any], *, backward: bool) -> FloatArray:
        """Seconds on a part of the pairs."""
        slices = np.where(part > 0, np.maximum(slices, 1), 0)
        return hardware.kernel_seconds(load.areas * part, slices, heads, backward=backward)

    total = np.zeros(shape[0])
    for backward in (False, True):
        kernels = [{name: kernel(own * side, load.own_slices, backward=backward) for name, side in sides.items()}]
        if backward and len(shares):
            for name, part in (("own", 1 - LATE_SHARE), ("late", LATE_SHARE)):
                kernels[0][name] = kernel(own * sides["own"] * part, load.own_slices * part, backward=True)
            # What comes last is added to what came first.
            kernels[0]["late"] = kernels[0]["late"] + hardware.merge_seconds(*late, heads, backward=True)
        for share, slices in zip(shares, far_slices, strict=True):
            merging = hardware.merge_seconds(load.merged, load.fetched * share, heads, backward=backward)
            kernels.append({
                name: kernel((1 - own) * share * side, slices, backward=backward) + side * merging
                for name, side in sides.items()
            })
        clock = Clock(shape, load.num_hops, hardware.transfer_load)
        clock.run(
            kernels,
            queries,
            stages,
            out_bytes=row.q_again if backward else row.q,
            kv_bytes=row.kv_again if backward else row.kv,
            home_bytes=row.dq if backward else row.partial,
            dkv_bytes=row.dkv if backward else 0,
        )
        total += clock.now.max(axis=1)
    return total


class _EstimatedWire(NamedTuple):
    """A share of the rows, [n, 1], and no peers in particular."""

    rows: LinkRows
    share: FloatArray
    hardware: Hardware
    two_level: bool

    @property
    def active(self) -> bool:
        return bool(self.rows.within.any() or self.rows.across.any())

    def seconds(self, row_bytes: int) -> FloatArray:
        near = self.hardware.within.seconds(self.rows.within * self.share * row_bytes)
        far = self.hardware.across.seconds(self.rows.across * self.share * row_bytes)
        seconds = near + far if self.two_level else np.maximum(near, far)
        if self.rows.before is not None:
            link = self.hardware.across if self.rows.across.any() else self.hardware.within
            seconds += link.seconds(self.rows.before * self.share * row_bytes)
        return seconds

    def packing(self, row_bytes: int, *, home: bool) -> tuple[FloatArray, FloatArray]:
        rows = self.rows.within if self.two_level else self.rows.within + self.rows.across
        seconds: FloatArray = rows * self.share * (row_bytes / self.hardware.copy_bytes_per_s)
        return seconds, seconds

    def started(self, ready: FloatArray) -> FloatArray:
        """Halfway between when it is ready and when all are: not all of them trade with one another."""
        result: FloatArray = (ready + ready.max(axis=-1, keepdims=True)) / 2
        return result
