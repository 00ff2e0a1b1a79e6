"""How the rows of a plan travel between the ranks of its group: what `execute` asks for, and a profile wraps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from cpattn.collectives import (
    HeadExchange,
    PendingRows,
    RowCodec,
    RowRoutes,
    cast_encoded,
    group_cast,
    group_reduce,
    heads_to_rows,
    rows_to_heads,
)

from .identity import exchange_of

Rows: TypeAlias = tuple[Tensor, ...]


class Trip(NamedTuple):
    """Where rows go and whence results come back, hop by hop.

    name, home: what travels there and back, in words ("keys 1", "gradients 1"). stage: whose keys they are; None:
    those of queries.
    """

    name: str
    home: str
    stage: int | None
    hops: tuple[RowRoutes, ...]

    @property
    def active(self) -> bool:
        """Whether any rank of the group moves a row; equal on all ranks."""
        return any(hop.active for hop in self.hops)

    @property
    def num_received(self) -> int:
        return self.hops[-1].num_received

    @property
    def there(self) -> str:
        """What travels, for messages."""
        return self.name if self.stage is None else f"{self.name}, stage {self.stage}"

    @property
    def back(self) -> str:
        """What comes home, for messages."""
        return self.home if self.stage is None else f"{self.home}, stage {self.stage}"


@dataclass(frozen=True, slots=True)
class Exchanges:
    """The exchanges of a group.

    group: None is one rank. codec: how rows travel, if not as they are. gradients: the dtype in which those of keys
    travel, if not that of their sums.
    """

    group: dist.ProcessGroup | None = None
    codec: RowCodec | None = None
    gradients: torch.dtype | None = None

    def encode(self, rows: Sequence[Tensor]) -> Rows:
        """What travels in the place of rows where the wire is compressed; else nothing. It serves several trips."""
        return () if self.codec is None else self.codec.encode(rows)

    def decode(self, travelled: Rows, dtype: torch.dtype) -> Rows:
        """The rows of what travelled."""
        return travelled if self.codec is None else self.codec.decode(travelled, dtype)

    def travelling(self, rows: Sequence[Tensor]) -> Rows:
        """Tensors with the row shapes and dtypes in which these rows travel, and no rows."""
        none = tuple(t[:0] for t in rows)
        return none if self.codec is None else self.codec.encode(none)

    def cast(
        self,
        trip: Trip,
        rows: Rows,
        encoded: Rows,
        *,
        into: Tensor | None = None,
        then: Callable[[Rows], Rows] | None = None,
    ) -> PendingRows:
        """Start to send rows, the first of them as `encoded` where that is not empty.

        into: what they are received into. then: what is made of them on arrival.
        """
        with _named(trip.there):
            if self.codec is None:
                pending = group_cast(rows, trip.hops, self.group, into=into)
            else:
                dtypes, plain = [t.dtype for t in rows[: len(encoded)]], rows[len(encoded) :]
                pending = cast_encoded(encoded, plain, trip.hops, self.group, self.codec, dtypes=dtypes, into=into)
        return _Named(pending, trip.there, then)

    def reduce(
        self,
        trip: Trip,
        rows: Rows,
        into: Rows,
        *,
        op: Literal["sum", "lse"] = "sum",
        packed: Tensor | None = None,
    ) -> PendingRows:
        """Start to send results home along the trip; `into` is unchanged until they are waited for."""
        with _named(trip.back):
            pending = group_reduce(rows, into, trip.hops, self.group, op=op, packed=packed, async_op=True)
        return _Named(pending, trip.back)

    def to_heads(self, name: str, x_TND: Tensor, by: HeadExchange) -> PendingRows:
        """Start to trade rows for heads; name: of what is traded ("heads of q")."""
        assert self.group is not None, "heads are traded in a group"
        with _named(name):
            return _Named(rows_to_heads(x_TND, by, self.group), name)

    def to_rows(self, name: str, x_BMD: Tensor, by: HeadExchange) -> PendingRows:
        """Start to trade heads for rows; name: of what is traded ("rows of out")."""
        assert self.group is not None, "heads are traded in a group"
        with _named(name):
            return _Named(heads_to_rows(x_BMD, by, self.group), name)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """What fails in the block says which exchange it was: `exchange_of(error)`."""
    try:
        yield
    except RuntimeError as error:
        if exchange_of(error) is None:
            error.cpattn_exchange = name  # type: ignore[attr-defined]
        raise


class _Named(PendingRows):
    """An exchange under way whose failure says what travelled; `convert` makes its result of its rows."""

    def __init__(self, pending: PendingRows, name: str, convert: Callable[[Rows], Rows] | None = None) -> None:
        self._pending, self._name, self._convert = pending, name, convert

    @property
    def work(self) -> dist.Work | None:
        return self._pending.work

    @property
    def more_hops(self) -> bool:
        return self._pending.more_hops

    def arrive(self) -> None:
        with _named(self._name):
            self._pending.arrive()

    def advance(self) -> None:
        with _named(self._name):
            self._pending.advance()

    def wait(self) -> Rows:
        with _named(self._name):
            rows = self._pending.wait()
        return rows if self._convert is None else self._convert(rows)
