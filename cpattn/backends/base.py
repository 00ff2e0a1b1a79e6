"""What a local kernel is: attention over slices of one rank's buffers, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
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


class Scoring(NamedTuple):
    """What becomes of q . k before the softmax. softcap: None is no cap."""

    scale: float
    softcap: float | None = None


class KeyRows(NamedTuple):
    """Keys [K, G, D] and values [K, G, E], or their gradients."""

    k: Tensor
    v: Tensor


class Attending(NamedTuple):
    """Queries [T, N, D] in forward, with what they have seen so far; after it, with their results.

    out: [T, N, E]. lse: [T, N], natural log; -inf (and out 0) in rows that have seen no key.
    """

    q: Tensor
    out: Tensor
    lse: Tensor


class Returning(NamedTuple):
    """Queries in backward: the gradient of out, q, the global out and lse, and the accumulator of dq.

    lse is +inf in rows that see nothing.
    """

    dout: Tensor
    q: Tensor
    out: Tensor
    lse: Tensor
    dq: Tensor


class Backend(Protocol):
    """A local attention kernel.

    Shape legend: Q local or received query rows, K key rows of a stage, N query heads, G key heads,
    D head dim of queries and keys, E head dim of values. Accumulators are fp32, or fp64 for fp64
    inputs. Slices are disjoint, canonical, and in buffer row numbers.
    """

    @property
    def name(self) -> str:
        """What `backend=` calls it."""
        ...

    @property
    def kernel(self) -> str:
        """What runs, in words."""
        ...

    def refusal(self, problem: Problem) -> str | None:
        """Why this backend cannot serve the problem, in words; None if it can."""
        ...

    def prepare(self, slices: SliceTable, num_queries: int, num_keys: int, device: torch.device) -> Any:
        """What `forward` and `backward` need of a slice table; made once per key and stage.

        Small arrays go to a GPU by `cpattn.collectives.put_on`: those of a whole key then go there in one copy. What
        cannot be made without knowing the tensors is made in `warm(work, problem)`, where a kernel has that method, and
        else at its first call.
        """
        ...

    def forward(
        self, queries: Attending, keys: KeyRows, work: Any, scoring: Scoring, *, fresh: bool = False
    ) -> None:
        """Attention over the slices of `work`, merged into the queries' out and lse in place.

        queries: out and lse are accumulators; out is in the dtype of q only where `fresh` and `writes_once(work)`.
        fresh: no row has seen a key yet, so a row's first result can be stored instead of merged.
        """
        ...

    def writes_once(self, work: Any) -> bool:
        """Whether `forward` writes each row of out once at most, so that nothing is merged."""
        ...

    def backward(
        self, queries: Returning, keys: KeyRows, work: Any, scoring: Scoring, dkeys: KeyRows
    ) -> None:
        """Gradients of the slices of `work`, added to the queries' dq and to dkeys in place.

        queries: out and lse are those of the whole attention, not of this part: with them the gradients of the
            parts add up to the gradient of the whole. lse is +inf in rows that see no key at all,
            so that their probabilities are 0.
        """
        ...


class StoringBackend(Backend, Protocol):
    """A kernel that can store what others add to zeros: it is given accumulators that hold anything.

    With `fresh`, forward writes out and lse in every row, also in those that see nothing; backward takes `fresh_dq` and
    `fresh_dkv` beside its other arguments and stores the gradients of every row, in the accumulators' dtype, whichever
    that is. lse may be -inf in rows that see nothing.
    """

    stores_first: bool


def stores_first(backend: Backend) -> bool:
    """Whether it is a `StoringBackend`."""
    return bool(getattr(backend, "stores_first", False))


class PlacingBackend(StoringBackend, Protocol):
    """A kernel that may say where results lie, so that nothing is copied to accumulators and back.

    What one call has for every row is taken over as it is, and the last merge stores out and dq in the dtype of q.
    `prepare` also takes a `turn`, for work that is one part of a backward pass.
    """

    def places(self, queries: Tensor, work: Any) -> bool:
        """Whether `attend` and `differentiate` serve these queries; `work` is that of any stage."""
        ...

    def attend(
        self, queries: Attending, keys: KeyRows, work: Any, scoring: Scoring, *, fresh: bool, last: bool
    ) -> Attending:
        """`forward`, and the queries with their results, where those now lie.

        fresh: out and lse of `queries` are not read, and may have any shape. last: nothing is merged afterwards, so out
        comes in the dtype of q; else in fp32, or in that of q where rows have one result each.
        """
        ...

    def differentiate(
        self,
        queries: Returning,
        keys: KeyRows,
        work: Any,
        scoring: Scoring,
        dkeys: KeyRows,
        *,
        fresh: tuple[bool, bool],
        last: bool,
    ) -> Tensor:
        """`backward`, and dq. fresh: of dq, which is not read then, and of dkeys. last: as above."""
        ...


class Turn(NamedTuple):
    """When a part of a backward pass comes, told to a `PlacingBackend` when it prepares: a row of dq is stored by the
    first part that has something for it, so that none fills what another will, or reads what is not there yet.

    fresh: bool [Q], rows that no earlier part meets. never: bool [Q], rows that no part meets and this one fills.
    """

    fresh: np.ndarray
    never: np.ndarray


def turns_of(parts: Sequence[SliceTable], num_queries: int) -> list[Turn]:
    """Those of the parts of a pass, in the order in which they run; the first fills what none meets."""

    def met(part: SliceTable) -> np.ndarray:
        begun, ended = (np.bincount(rows, minlength=num_queries + 1) for rows in (part.q0, part.q1))
        return np.cumsum(begun - ended)[:num_queries] > 0

    turns, fresh = [], np.ones(num_queries, dtype=bool)
    for part in parts:
        turns.append(Turn(fresh, np.zeros_like(fresh)))
        fresh = fresh & ~met(part)
    return [turns[0]._replace(never=fresh), *turns[1:]]


def places_results(backend: Backend, queries: Tensor, work: Any) -> bool:
    """Whether it is a `PlacingBackend` that serves these queries."""
    places = getattr(backend, "places", None)
    return places is not None and bool(places(queries, work))


FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HALF_DTYPES = (torch.bfloat16, torch.float16)


def refuse_dtype(problem: Problem, accepted: tuple[torch.dtype, ...]) -> str | None:
    """Words for a dtype that is not among the accepted ones."""
    if problem.dtype in accepted:
        return None
    names = ", ".join(str(d).removeprefix("torch.") for d in accepted)
    return f"dtype {str(problem.dtype).removeprefix('torch.')} is not one of {names}"


def pad_head_dim(x: Tensor, head_dim: int) -> Tensor:
    """x with zero columns up to head_dim: they add nothing to scores, and nothing to the result."""
    return torch.nn.functional.pad(x, (0, head_dim - x.shape[-1])) if x.shape[-1] < head_dim else x


def aligned(x: Tensor) -> Tensor:
    """x with rows and heads at multiples of 16 bytes, which fused kernels read at a time; copied if need be."""
    steps = [stride for n, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n > 1]
    return x.contiguous() if any(n * x.itemsize % 16 for n in (*steps, x.storage_offset())) else x


def kernel_head_dim(k: Tensor, v: Tensor, multiple: int = 8) -> int:
    """The head dim that q, k and v are padded to: one for all."""
    return -(-max(k.shape[-1], v.shape[-1]) // multiple) * multiple


def bucket(rows: int, least: int = 128) -> int:
    """Rows rounded up to one of four sizes an octave, multiples of `least`: what is compiled for a size is few."""
    grain = max(least, 1 << max(0, (rows - 1).bit_length() - 3))
    return max(least, -(-rows // grain) * grain)
