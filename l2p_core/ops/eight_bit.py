"""Weights in 8 bits: the formats and the rounding for frozen blocks in training, sampling, files and the host.

A weight is stored in float8 (e4m3fn) with a factor: one for each output row, or one for the whole weight if a file
format holds only one. Factors are powers of two, so multiplying by them is exact in every dtype. The only error is
rounding to three bits: at most 1/16 of a value, or 2^-17 of the largest value that shares its factor if that is more,
as long as that largest value is above 1e-27.

Files may also hold 8-bit integers (ComfyUI's `int8_tensorwise`), with a factor for each row of any value: each element
is then within 1/254 of the largest in its row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn
FACTOR_BYTES = torch.float32.itemsize  # of each factor
ROUNDING_BYTES = torch.float32.itemsize + FLOAT8.itemsize  # per element while a weight is rounded, beside the weight
_LARGEST_EXPONENT = 8  # of float8 e4m3fn, which reaches 448 = 1.75 * 2^8
_MOST_SHIFTED = 100  # binary places; weights with smaller values are practically zero
_LARGEST_INTEGER = 127.0
_IN_CACHE = 1 << 18  # elements whose float32 copy stays in a processor's cache while they are rounded
_AT_ONCE = 1 << 20  # elements that a CPU converts at a time; their indices take four bytes each


class PackedWeight(NamedTuple):
    """A stored weight: elements (rows, columns) and, for float8, its factors, float32 of (rows, 1) or ()."""

    elements: Tensor
    scale: Tensor | None

    def as_dtype(self, dtype: torch.dtype) -> Tensor:
        """The weight in `dtype`; float32 and bfloat16 represent the stored values exactly."""
        if self.scale is None:
            return self.elements.to(dtype)
        return _from_float8(self.elements, dtype).mul_(self.scale.to(dtype))


def packed(weight: Tensor, dtype: torch.dtype) -> PackedWeight:
    """A weight (rows, columns) stored in `dtype`, float8 or another."""
    return PackedWeight(*quantised(weight)) if dtype == FLOAT8 else PackedWeight(weight.to(dtype), None)


def quantised(weight: Tensor, by_row: bool = True) -> tuple[Tensor, Tensor]:
    """A weight (rows, columns) of any floating dtype in float8, and its factors, (rows, 1) or () float32."""
    largest = _largest(weight, by_row)
    # largest = m 2^exponent with m in [0.5, 1), so it is scaled to [128, 256).
    exponent = torch.frexp(largest).exponent
    shift = torch.where(largest > 0, _LARGEST_EXPONENT - exponent, 0).clamp(max=_MOST_SHIFTED).float()
    scale = (-shift).exp2()
    return _divided(weight, scale, FLOAT8), scale


def integers(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight (rows, columns) of any floating dtype in int8, and its factors (rows, 1) float32."""
    scale = (_largest(weight, by_row=True) / _LARGEST_INTEGER).clamp(min=torch.finfo(torch.float32).tiny)
    return _divided(weight, scale, torch.int8), scale


def _largest(weight: Tensor, by_row: bool) -> Tensor:
    """The largest absolute value of each row, (rows, 1), or of all, (); float32."""
    # Extremes along a dimension take torch far less time apart than together.
    low, high = (weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)) if by_row else weight.aminmax()
    return torch.maximum(high.float(), -low.float())


def _divided(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight divided by its factors and rounded to `dtype`."""
    elements = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    rows = max(1, _IN_CACHE // weight.shape[1])
    factors = scale.expand(len(weight), 1)
    for part, factor, target in zip(weight.split(rows), factors.split(rows), elements.split(rows), strict=True):
        divided = part.to(torch.float32, copy=True).div_(factor)
        target.copy_(divided if dtype.is_floating_point else divided.round_())
    return elements


def dequantised(elements: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Dequantise 8-bit elements: multiply them by their factors, () or (rows, 1), in float32."""
    wide = _from_float8(elements, torch.float32) if elements.dtype == FLOAT8 else elements.float()
    return wide.mul_(scale.float()).to(dtype)


def _from_float8(elements: Tensor, dtype: torch.dtype) -> Tensor:
    if elements.device.type != "cpu" or torch.compiler.is_compiling():
        return elements.to(dtype)
    # On CPUs torch converts element by element; looking up the 256 values takes a fifth of the time.
    values = torch.arange(256).to(torch.uint8).view(FLOAT8).to(dtype)
    converted = torch.empty(elements.shape, dtype=dtype)
    codes = elements.view(torch.uint8).flatten()
    for part, target in zip(codes.split(_AT_ONCE), converted.view(-1).split(_AT_ONCE), strict=True):
        torch.index_select(values, 0, part.int(), out=target)
    return converted
