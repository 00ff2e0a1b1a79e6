"""Rows in 8-bit floats on the wire: half the bytes of bf16, a quarter of fp32's.

A codec turns rows into what travels and back. It works row by row, so any row can be sent alone, passed on by another
rank, or sent to several, and it is applied once to all rows before they are chosen: a row reads the same wherever it
goes, and in backward as in forward.

Shape legend: T rows, H heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from . import row_kernels
from .exchange import PendingRows, RowRoutes, group_cast

_DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
_MANTISSA = 23


class RowCodec(Protocol):
    """How rows travel."""

    def encode(self, rows: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What travels, one tensor [T, ...] for each of `rows`."""
        ...

    def decode(self, received: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The rows again, in `dtype`."""
        ...


@dataclass(frozen=True, slots=True)
class Fp8Rows:
    """[T, H, D] as 8-bit floats with one power-of-two scale for each row and head, taken from its largest magnitude.

    Travels as uint8 [T, H, D + 1]: D values and the scale's exponent, which NCCL and gloo carry alike. A scale costs
    1 / D of the values' bytes. A power of two scales without rounding, so the only error is that of the 8-bit cast:
    at most 2 ** -4 of a value for e4m3 (2 ** -3 for e5m2), and 2 ** -17 of the row's largest (2 ** -31) for tiny ones.

    fmt: "e4m3" has the finer mantissa and, with a scale per row, range enough for gradients too.
    """

    fmt: str = "e4m3"

    def encode(self, rows: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """uint8 [T, H, D + 1] for each [T, H, D]; a row and head that is not finite arrives as NaN."""
        return tuple(self._encode(x) for x in rows)

    def decode(self, received: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        """[T, H, D] for each, exact in fp32 and bf16; what would be beyond the largest number of dtype is that."""
        return tuple(self._decode(x, dtype) for x in received)

    def _encode(self, x_THD: Tensor) -> Tensor:
        fp8 = _DTYPES[self.fmt]
        largest = torch.finfo(fp8).max
        x = x_THD.detach()
        travelling = torch.empty((*x.shape[:-1], x.shape[-1] + 1), dtype=torch.uint8, device=x.device)
        if x.numel() == 0:
            return travelling
        if row_kernels.fused(x):
            row_kernels.encode_fp8(x, travelling, self.fmt)
            return travelling
        amax = torch.linalg.vector_norm(x, torch.inf, dim=-1, keepdim=True).float()
        quotient = (amax / largest).view(torch.int32)
        # The smallest power of two that is no smaller than the quotient. Exponent 0 would have no finite inverse, and
        # from 254 on it would be subnormal.
        up = ((quotient & ((1 << _MANTISSA) - 1)) != 0).to(torch.int32)
        exponent = ((quotient >> _MANTISSA) + up).clamp_(1, 253)
        inverse = ((254 - exponent) << _MANTISSA).view(torch.float32)
        # What is not finite makes its whole row and head NaN: whatever attends to that would be NaN anyway.
        inverse = inverse.masked_fill_(~torch.isfinite(amax), torch.nan)
        # Clamping stops rounding above the largest value, where versions of torch differ.
        y = (x * inverse).clamp_(-largest, largest)
        travelling[..., :-1] = y.to(fp8).view(torch.uint8)
        travelling[..., -1:] = exponent
        return travelling

    def _decode(self, received: Tensor, dtype: torch.dtype) -> Tensor:
        if row_kernels.fused(received.new_empty(0, dtype=dtype)):
            x = torch.empty((*received.shape[:-1], received.shape[-1] - 1), dtype=dtype, device=received.device)
            row_kernels.decode_fp8(received, x, self.fmt)
            return x
        values = received[..., :-1].contiguous().view(_DTYPES[self.fmt]).float()
        scale = (received[..., -1:].to(torch.int32) << _MANTISSA).view(torch.float32)
        # What is nearly as large as the dtype's largest value may have been rounded up beyond it; NaN stays.
        largest = torch.finfo(dtype).max
        return values.mul_(scale).clamp_(-largest, largest).to(dtype)


class DecodedRows(PendingRows):
    """An exchange of encoded rows under way: `wait()` gives them decoded.

    pending: the exchange of what was encoded. dtypes: those of the decoded tensors, which come first; further tensors
    of the exchange arrive as they are.
    """

    def __init__(self, pending: PendingRows, codec: RowCodec, dtypes: Sequence[torch.dtype]) -> None:
        self._pending, self._codec, self._dtypes = pending, codec, tuple(dtypes)

    @property
    def work(self) -> dist.Work | None:
        return self._pending.work

    @property
    def more_hops(self) -> bool:
        return self._pending.more_hops

    def arrive(self) -> None:
        self._pending.arrive()

    def advance(self) -> None:
        self._pending.advance()

    def wait(self) -> tuple[Tensor, ...]:
        received = self._pending.wait()
        encoded, plain = received[: len(self._dtypes)], received[len(self._dtypes) :]
        decoded = [
            self._codec.decode((bits,), dtype)[0] for bits, dtype in zip(encoded, self._dtypes, strict=True)
        ]
        return (*decoded, *plain)


def cast_encoded(
    encoded: Sequence[Tensor],
    plain: Sequence[Tensor],
    hops: RowRoutes | Sequence[RowRoutes],
    group: dist.ProcessGroup | None,
    codec: RowCodec,
    *,
    dtypes: Sequence[torch.dtype],
    into: Tensor | None = None,
) -> PendingRows:
    """`group_cast` of encoded rows and plain ones in one exchange; delivers the rows decoded.

    Args:
        encoded: what `codec.encode` gave; one encoding serves several exchanges.
        plain: tensors that travel beside them as they are.
        dtypes: of what was encoded, and will be delivered.
        into: where the encoded rows are received, as in `group_cast`.
    """
    return DecodedRows(group_cast((*encoded, *plain), hops, group, into=into), codec, dtypes)
