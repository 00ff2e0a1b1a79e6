"""Rows on their way between ranks, with gradients: started in one place, waited for in another.

What computes in between hides the exchange; recurrences and convolutions fetch this way.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cpattn.collectives import PendingRows, RowRoutes, group_cast, group_reduce
from cpattn.keys.key import AttnKey


def cast_rows(x: Tensor, routes: RowRoutes, saying: RowSaying) -> Tensor:
    """Rows that routes bring here from other ranks, [num_received, ...]; their gradients go home and are summed."""
    return start_cast_rows(x, routes, saying).wait()


def start_cast_rows(x: Tensor, routes: RowRoutes, saying: RowSaying) -> TravellingRows:
    """Start `cast_rows`. What runs before `wait` hides the exchange, and its backward hides that of the gradients:
    autograd runs the nodes made last first, so those made in between run between the two ends of the way home.
    """
    flight = _Flight(routes, saying)
    return TravellingRows(_StartCast.apply(x, flight), flight)


class RowSaying(NamedTuple):
    """What the ranks of a key's group tell each other of rows that travel. fields: further ones that must be equal."""

    key: AttnKey
    what: str
    fields: dict[str, Any]

    def calling(self, rows: Tensor) -> AbstractContextManager[int]:
        """Around what starts the exchange; gives the number of the call."""
        return self.key.calling(self.what, rows.device, **self._told(rows))

    def arriving(self, rows: Tensor, number: int) -> AbstractContextManager[None]:
        """Around what waits for it; number: of the call."""
        return self.key.arriving(self.what, number, **self._told(rows))

    def backward_of(self, number: int) -> RowSaying:
        """Of the gradients' way home."""
        return RowSaying(self.key, f"{self.what} backward", {"of call": number, **self.fields})

    def _told(self, rows: Tensor) -> dict[str, Any]:
        return {"row": tuple(rows.shape[1:]), "dtype": rows.dtype, **self.fields}


class TravellingRows(NamedTuple):
    """Rows on their way, see `start_cast_rows`."""

    link: Tensor
    flight: _Flight

    def wait(self) -> Tensor:
        """The rows, [num_received, ...]. Call it once."""
        return _FinishCast.apply(self.link, self.flight)  # type: ignore[no-any-return]


class _Flight:
    """What the two ends of an exchange share."""

    def __init__(self, routes: RowRoutes, saying: RowSaying) -> None:
        self.routes, self.saying, self.group = routes, saying, saying.key.cp_group
        self.num_rows = self.call = 0
        self.forward: PendingRows | None = None
        self.backward: _Homeward | None = None


class _Homeward(NamedTuple):
    """Gradients on their way home, to be added up in `total`."""

    saying: RowSaying
    call: int
    pending: PendingRows
    total: Tensor


class _StartCast(torch.autograd.Function):
    """Starts a GroupCast of rows; backward waits for the GroupReduce along the same routes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, flight: _Flight) -> Tensor:
        ctx.flight, flight.num_rows = flight, x.shape[0]
        with flight.saying.calling(x) as flight.call:
            flight.forward = group_cast((x,), flight.routes, flight.group)
        return x.new_empty(()).expand(flight.routes.num_received, *x.shape[1:])  # a link of the graph, no memory

    @staticmethod
    def backward(ctx: Any, link: Tensor) -> tuple[Tensor, None]:
        home, ctx.flight.backward = ctx.flight.backward, None
        assert home is not None
        with home.saying.arriving(home.total, home.call):
            home.pending.wait()
        return home.total, None


class _FinishCast(torch.autograd.Function):
    """Waits for the GroupCast; backward starts the GroupReduce."""

    @staticmethod
    def forward(ctx: Any, link: Tensor, flight: _Flight) -> Tensor:
        assert flight.forward is not None, "rows are waited for once"
        ctx.flight, pending, flight.forward = flight, flight.forward, None
        with flight.saying.arriving(link, flight.call):
            (received,) = pending.wait()
        return received

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        flight, saying = ctx.flight, ctx.flight.saying.backward_of(ctx.flight.call)
        total = grad.new_zeros((flight.num_rows, *grad.shape[1:]))
        with saying.calling(grad) as number:
            pending = group_reduce((grad,), (total,), flight.routes, flight.group, async_op=True)
        flight.backward = _Homeward(saying, number, pending, total)
        return grad, None
