"""Quantizers and the tensors that they make: none, delayed scaling, current scaling, MXFP8 blocks.

The portable side of TransformerEngine's quantizers: the same names for the same roles (scale, amax, scale_inv), the
data as uint8 bits of an fp8 format, every cast bit for bit that of torch (`cpattn.te_ops.fp8`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from .fp8 import (
    E4M3,
    Fp8Format,
    current_scale,
    exponents_to_scale,
    from_fp8_bits,
    quantize_bits,
    scale_exponents,
)

# Elements that share a scale in MXFP8.
MX_BLOCK = 32

Kind = Literal["none", "delayed", "current", "mxfp8"]


@dataclass(eq=False)
class Fp8Tensor:
    """A tensor in 8-bit floats: value = data * scale_inv.

    data: uint8, the bits. scale_inv: fp32, broadcasts against data (MXFP8: uint8 E8M0 exponents, one for each
    MX_BLOCK elements of the last dimension). dtype: what `dequantize` gives and what the tensor poses as.
    """

    data: Tensor
    scale_inv: Tensor
    fmt: Fp8Format
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    @property
    def device(self) -> torch.device:
        return self.data.device

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The values, rounded to `dtype` (None: the nominal one)."""
        values = from_fp8_bits(self.data, self.fmt)
        if self.scale_inv.dtype == torch.uint8:
            scale = exponents_to_scale(self.scale_inv).repeat_interleave(MX_BLOCK, -1)
            scale = scale[..., : values.shape[-1]]
        else:
            scale = self.scale_inv
        return (values * scale).to(dtype or self.dtype)


class Quantizer(Protocol):
    """Turns tensors into Fp8Tensors (or leaves them alone)."""

    kind: Kind

    def quantize(self, x: Tensor) -> Tensor | Fp8Tensor:
        """x in this quantizer's format."""
        ...


class NoQuantizer:
    """Leaves tensors as they are."""

    kind: Kind = "none"

    def quantize(self, x: Tensor) -> Tensor:
        return x


@dataclass(eq=False)
class DelayedScalingQuantizer:
    """Quantizes with a scale that was chosen from earlier steps, and records the largest magnitude of this one.

    scale: fp32 [1]. amax: fp32 [1], raised to the largest magnitude seen since the last `update_scale`.
    """

    fmt: Fp8Format = E4M3
    scale: Tensor = field(default_factory=lambda: torch.ones(1))
    amax: Tensor = field(default_factory=lambda: torch.zeros(1))
    kind: Kind = "delayed"

    def quantize(self, x: Tensor) -> Fp8Tensor:
        if x.numel():
            self.amax.copy_(torch.maximum(self.amax, x.detach().abs().amax().float()))
        return Fp8Tensor(quantize_bits(x, self.scale, self.fmt), 1.0 / self.scale, self.fmt, x.dtype)

    def update_scale(
        self, history: Tensor, *, margin: float = 0.0, algorithm: Literal["max", "most_recent"] = "max"
    ) -> None:
        """End a step: push amax into the history and choose the next scale from it; no host sync.

        Args:
            history: fp32 [steps], newest first; shifted by one in place.
            margin: the scale is lowered by 2 ** margin.
            algorithm: the largest amax of the history counts, or the newest.

        The scale stays as it is while amax is 0 or not finite.
        """
        history.copy_(torch.roll(history, 1))
        history[0] = self.amax[0]
        amax = history.amax() if algorithm == "max" else history[0]
        usable = (amax > 0) & torch.isfinite(amax)
        self.scale.copy_(torch.where(usable, current_scale(amax, self.fmt) / 2.0**margin, self.scale))
        self.amax.zero_()


@dataclass(eq=False)
class CurrentScalingQuantizer:
    """Quantizes with the scale that fits the tensor at hand."""

    fmt: Fp8Format = E4M3
    power_of_two: bool = False
    amax_epsilon: float = 0.0
    kind: Kind = "current"

    def quantize(self, x: Tensor) -> Fp8Tensor:
        amax = x.detach().abs().amax() if x.numel() else x.new_zeros(())
        scale = current_scale(amax.clamp(min=self.amax_epsilon), self.fmt, power_of_two=self.power_of_two).reshape(1)
        return Fp8Tensor(quantize_bits(x, scale, self.fmt), 1.0 / scale, self.fmt, x.dtype)


@dataclass(eq=False)
class MXFP8Quantizer:
    """OCP microscaling: each run of 32 elements of the last dimension has its own power-of-two scale."""

    fmt: Fp8Format = E4M3
    kind: Kind = "mxfp8"

    def quantize(self, x: Tensor) -> Fp8Tensor:
        """
        Raises:
            ValueError: the last dimension is not a multiple of 32.
        """
        _require_blocks(x.shape)
        blocks = x.float().unflatten(-1, (-1, MX_BLOCK))
        exponents = scale_exponents(blocks.detach().abs().amax(-1), self.fmt)
        # The inverse of a power of two is exact, but 2 ** -127 has none in fp32's normal range: divide.
        scaled = blocks / exponents_to_scale(exponents).unsqueeze(-1)
        return Fp8Tensor(quantize_bits(scaled, 1.0, self.fmt).flatten(-2), exponents, self.fmt, x.dtype)


@dataclass(eq=False)
class QuantizedBuffer:
    """What `quantizer_helper` makes: storage for a result, and where its scale and amax live.

    tensor: a plain tensor, or an Fp8Tensor over uint8 storage. kind: of the quantizer. scale, amax: shared with the
    quantizer (delayed scaling), a fresh amax (high precision now, quantized later), or None.
    """

    tensor: Tensor | Fp8Tensor
    kind: Kind
    scale: Tensor | None = None
    amax: Tensor | None = None


def quantizer_helper(
    quantizer: Quantizer | None,
    shape: Sequence[int],
    dtype: torch.dtype,
    create_hp_tensor: bool = False,
    data: Tensor | None = None,
    *,
    device: torch.device | str | None = None,
) -> QuantizedBuffer:
    """Storage for a tensor that a quantizer will fill; no arithmetic.

    Args:
        quantizer: None is high precision.
        shape: of the tensor; [0] for one that only carries scale and amax.
        dtype: nominal dtype.
        create_hp_tensor: current scaling and MXFP8: storage in `dtype`, to be quantized once it is whole.
        data: existing storage to wrap.
        device: None is that of `data`, else the CPU.

    Raises:
        ValueError: data with current scaling or MXFP8 storage (their scale comes from the data itself), a shape that
            data does not have, or an MXFP8 shape whose last dimension is not a multiple of 32.
    """
    kind: Kind = "none" if quantizer is None else quantizer.kind
    shape = tuple(shape)
    device = torch.device(device or "cpu") if data is None else data.device
    if data is not None and tuple(data.shape) != shape:
        raise ValueError(f"data has shape {tuple(data.shape)}: expected {shape}")
    if kind == "none":
        return QuantizedBuffer(torch.empty(shape, dtype=dtype, device=device) if data is None else data, kind)
    if kind == "delayed":
        assert isinstance(quantizer, DelayedScalingQuantizer)
        bits = torch.empty(shape, dtype=torch.uint8, device=device) if data is None else data
        if bits.dtype != torch.uint8:
            raise ValueError(f"data has dtype {bits.dtype}: delayed scaling wraps fp8 bits, uint8")
        tensor = Fp8Tensor(bits, 1.0 / quantizer.scale, quantizer.fmt, dtype)
        return QuantizedBuffer(tensor, kind, quantizer.scale, quantizer.amax)
    if create_hp_tensor:
        hp = torch.empty(shape, dtype=dtype, device=device) if data is None else data
        amax = torch.zeros(1, device=device) if kind == "current" else None
        return QuantizedBuffer(hp, kind, None, amax)
    if data is not None:
        name = "Float8CurrentScaling" if kind == "current" else "MXFP8"
        raise ValueError(
            f"{name} quantizer cannot wrap existing data: its scale comes from the data; pass create_hp_tensor=True "
            f"and quantize the result"
        )
    assert isinstance(quantizer, CurrentScalingQuantizer | MXFP8Quantizer)
    bits = torch.empty(shape, dtype=torch.uint8, device=device)
    if kind == "current":
        return QuantizedBuffer(Fp8Tensor(bits, torch.ones(1, device=device), quantizer.fmt, dtype), kind)
    _require_blocks(shape)
    exponents = torch.full((*shape[:-1], shape[-1] // MX_BLOCK), 127, dtype=torch.uint8, device=device)
    return QuantizedBuffer(Fp8Tensor(bits, exponents, quantizer.fmt, dtype), kind)


def _require_blocks(shape: Sequence[int]) -> None:
    if not shape or shape[-1] % MX_BLOCK:
        raise ValueError(f"MXFP8 needs a last dimension that is a multiple of {MX_BLOCK}: the shape is {tuple(shape)}")


def dequantized(x: Tensor | Fp8Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A plain tensor: fp8 ones as fp32 (or `dtype`), others as they are."""
    return x.dequantize(dtype or torch.float32) if isinstance(x, Fp8Tensor) else x
