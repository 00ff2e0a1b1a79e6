"""8-bit floats: the two OCP formats, their casts bit for bit, and the scales that fit tensors into them.

The casts are written in 32-bit integer arithmetic and agree with torch's float8 casts in every bit, so a device
or a torch without float8 kernels gives the same numbers. Data is carried as uint8, which every collective moves.

Source: Micikevicius et al., "FP8 formats for deep learning", arXiv:2209.05433; OCP Microscaling Formats (MX) v1.0
for E8M0 scales.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Fp8Format:
    """An 8-bit float format.

    max: the largest finite magnitude. has_inf: whether infinity exists (E5M2); E4M3 has only NaN above `max`.
    """

    name: str
    mantissa_bits: int
    exponent_bias: int
    max: float
    has_inf: bool

    @property
    def torch_dtype(self) -> torch.dtype:
        """torch's dtype of this format."""
        return {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[self.name]


E4M3 = Fp8Format("e4m3", mantissa_bits=3, exponent_bias=7, max=448.0, has_inf=False)
E5M2 = Fp8Format("e5m2", mantissa_bits=2, exponent_bias=15, max=57344.0, has_inf=True)

_FLOAT32_BIAS = 127
_FLOAT32_MANTISSA = 23
_INFINITY = 0x7F800000


def to_fp8_bits(x: Tensor, fmt: Fp8Format, *, saturate: bool | None = None) -> Tensor:
    """The bits of `x.to(fmt.torch_dtype)`: round to nearest, ties to even.

    Args:
        x: any float dtype; fp64 is rounded to fp32 first, as torch does.
        saturate: what becomes of magnitudes that round above `fmt.max`, infinity included: the largest finite value
            (True), or infinity, NaN where the format has none (False). None does as the installed torch does, which
            for E4M3 differs between versions (2.13 saturates).

    Returns:
        uint8 of x's shape. NaN stays NaN.
    """
    saturate = _torch_saturates(fmt) if saturate is None else saturate
    bits = x.float().contiguous().view(torch.int32)
    sign = (bits >> 24) & 0x80
    magnitude = bits & 0x7FFFFFFF
    dropped = _FLOAT32_MANTISSA - fmt.mantissa_bits
    # Adding half an ulp less one, plus the last kept bit, carries exactly when ties-to-even rounds up.
    last_kept = (magnitude >> dropped) & 1
    rebias = (_FLOAT32_BIAS - fmt.exponent_bias) << fmt.mantissa_bits
    normal = ((magnitude + last_kept + (1 << (dropped - 1)) - 1) >> dropped) - rebias
    # Below the normal range the spacing is constant: adding the float whose ulp is that spacing rounds the same way.
    ulp_exponent = 1 - fmt.exponent_bias - fmt.mantissa_bits
    anchor = torch.tensor(2.0 ** (ulp_exponent + _FLOAT32_MANTISSA), dtype=torch.float32, device=x.device)
    small = (magnitude.view(torch.float32) + anchor).view(torch.int32) - anchor.view(torch.int32)
    smallest_normal = (_FLOAT32_BIAS - fmt.exponent_bias + 1) << _FLOAT32_MANTISSA
    result = torch.where(magnitude < smallest_normal, small, normal)
    unbounded = 0x7C if fmt.has_inf else 0x7F
    above = unbounded - 1 if saturate else unbounded
    result = torch.where((result >= unbounded) | (magnitude >= _INFINITY), above, result)
    result = torch.where(magnitude > _INFINITY, 0x7F, result)
    return (result | sign).to(torch.uint8)


@lru_cache(maxsize=2)
def _torch_saturates(fmt: Fp8Format) -> bool:
    """Whether the installed torch's cast stops at the largest finite value."""
    return bool(torch.isfinite(torch.tensor([1e30]).to(fmt.torch_dtype).float()).item())


def from_fp8_bits(bits: Tensor, fmt: Fp8Format, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values of fp8 bits (uint8), exact in every float dtype but fp8."""
    return _values(fmt, bits.device).to(dtype)[bits.long()]


@lru_cache(maxsize=16)
def _values(fmt: Fp8Format, device: torch.device) -> Tensor:
    """The 256 values of a format in fp32."""
    code = torch.arange(256, device=device)
    exponent = (code & 0x7F) >> fmt.mantissa_bits
    fraction = (code & ((1 << fmt.mantissa_bits) - 1)).float() / (1 << fmt.mantissa_bits)
    lead = (exponent > 0).float()
    value = torch.ldexp(lead + fraction, exponent.clamp(min=1) - fmt.exponent_bias)
    if fmt.has_inf:
        value = torch.where(code & 0x7F == 0x7C, torch.inf, value)
        value = torch.where(code & 0x7F > 0x7C, torch.nan, value)
    else:
        value = torch.where(code & 0x7F == 0x7F, torch.nan, value)
    return torch.where(code >= 0x80, -value, value)


def quantize_bits(x: Tensor, scale: Tensor | float, fmt: Fp8Format) -> Tensor:
    """fp8 bits of x * scale, saturated to the largest finite value: what fp8 kernels store.

    Args:
        x: any float dtype.
        scale: fp32, broadcasts against x. NaN stays NaN.
    """
    return to_fp8_bits(x.float() * scale, fmt, saturate=True)


def current_scale(amax: Tensor, fmt: Fp8Format, *, power_of_two: bool = False) -> Tensor:
    """The factor that brings a largest magnitude `amax` to the format's largest value; fp32.

    1 where amax is 0 or not finite. power_of_two rounds down to a power of two, which multiplies without rounding.
    """
    amax = amax.float()
    scale = fmt.max / amax
    # amax below about 1e-36 overflows the quotient: the largest float still fits it into the format.
    scale = torch.where(torch.isinf(scale), torch.finfo(torch.float32).max, scale)
    scale = torch.where((amax > 0) & torch.isfinite(amax), scale, torch.ones_like(scale))
    if power_of_two:
        bits = scale.view(torch.int32) & _INFINITY  # an IEEE float without its fraction is a power of two
        scale = bits.view(torch.float32)
    return scale


def scale_exponents(amax: Tensor, fmt: Fp8Format) -> Tensor:
    """E8M0 exponents, uint8 biased by 127, of the smallest powers of two s with amax / s <= fmt.max.

    Exponent e stands for 2 ** (e - 127); 0 (that is 2 ** -127) where amax is 0. Not finite gives 254.
    """
    quotient = amax.float() / fmt.max
    bits = quotient.contiguous().view(torch.int32)
    exponent = bits >> _FLOAT32_MANTISSA
    up = (bits & 0x7FFFFF) != 0
    # A subnormal quotient lies below 2 ** -126, whose exponent is 1.
    rounded = torch.where(up, exponent + 1, exponent).clamp(0, 254)
    return rounded.to(torch.uint8)


def exponents_to_scale(exponents: Tensor) -> Tensor:
    """fp32 values 2 ** (e - 127) of E8M0 exponents."""
    bits = exponents.to(torch.int32) << _FLOAT32_MANTISSA
    # 2 ** -127 is subnormal: the fraction's highest bit.
    return torch.where(bits == 0, 1 << (_FLOAT32_MANTISSA - 1), bits).view(torch.float32)
