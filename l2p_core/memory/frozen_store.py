"""Storage of frozen weights in few bits or in RAM.

A frozen linear layer needs its weight twice per step, for its output and for the gradient of its input, and never has a
weight gradient. The weight may therefore be stored as float8 with one factor per output row, or in bfloat16, and is
converted to the compute dtype where it is used; only the stored form persists. With streaming, even the stored form
lies in RAM; the device holds two blocks, the current one and the next, which is copied meanwhile.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..ops.precision import computed_in
from .block_stream import StreamedTensor

FLOAT8 = torch.float8_e4m3fn
_LARGEST_EXPONENT = 8  # of float8 e4m3fn, which reaches 448 = 1.75 * 2^8
_MOST_SHIFTED = 100  # binary places; rows with smaller values are practically zero
_AT_ONCE = 1 << 20  # elements that a CPU converts at a time; their indices take four bytes each


class PackedWeight(NamedTuple):
    """A stored weight: elements (rows, columns) and, for float8, the factor (rows, 1) float32 of each row."""

    numbers: Tensor
    scale: Tensor | None

    def as_dtype(self, dtype: torch.dtype) -> Tensor:
        """The weight in `dtype`; float32 and bfloat16 represent the stored values exactly."""
        if self.scale is None:
            return self.numbers.to(dtype)
        return _from_float8(self.numbers, dtype).mul_(self.scale.to(dtype))


def packed(weight: Tensor, dtype: torch.dtype) -> PackedWeight:
    """A weight (rows, columns) stored in `dtype`."""
    return quantised(weight) if dtype == FLOAT8 else PackedWeight(weight.to(dtype), None)


def quantised(weight: Tensor) -> PackedWeight:
    """A weight (rows, columns) in float8 (e4m3fn), with each row scaled to its range.

    Factors are powers of two, so multiplying by them is exact in every dtype. The only error is rounding to three bits:
    at most 1/16 of a value, or 2^-17 of the largest value in its row if that is more, as long as that largest value is
    above 1e-27.
    """
    weight = weight.float()
    largest = weight.abs().amax(dim=1, keepdim=True)
    # largest = m 2^exponent with m in [0.5, 1), so it is scaled to [128, 256).
    exponent = torch.frexp(largest).exponent
    shift = torch.where(largest > 0, _LARGEST_EXPONENT - exponent, 0).clamp(max=_MOST_SHIFTED).float()
    return PackedWeight((weight * shift.exp2()).to(FLOAT8), (-shift).exp2())


def _from_float8(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    if numbers.device.type != "cpu":
        return numbers.to(dtype)
    # On CPUs torch converts element by element; looking up the 256 values takes a fifth of the time.
    values = torch.arange(256).to(torch.uint8).view(FLOAT8).to(dtype)
    converted = torch.empty(numbers.shape, dtype=dtype)
    codes = numbers.view(torch.uint8).flatten()
    for part, target in zip(codes.split(_AT_ONCE), converted.view(-1).split(_AT_ONCE), strict=True):
        torch.index_select(values, 0, part.int(), out=target)
    return converted


class Resident:
    """A weight that stays on the device.

    Args:
        dtype: to store it in.
        device: to compute on.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self._dtype, self._device = dtype, device
        self._stored: PackedWeight | None = None

    @property
    def bytes_in_computer(self) -> int:
        return 0

    def put(self, weight: Tensor) -> None:
        """Set the weight."""
        self._stored = packed(weight.detach().to(self._device), self._dtype)

    def read(self) -> PackedWeight:
        """The weight on the device."""
        assert self._stored is not None, "read before it was put"
        return self._stored


class Streamed:
    """A weight that is streamed with its block.

    Args:
        dtype: to store it in.
        device: to compute on.
        numbers: its position in the block.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, numbers: StreamedTensor):
        self._dtype, self._device, self._numbers = dtype, device, numbers
        self._scale: Tensor | None = None

    @property
    def bytes_in_computer(self) -> int:
        return self._numbers.nbytes

    def put(self, weight: Tensor) -> None:
        """Set the weight."""
        numbers, self._scale = packed(weight.detach().to(self._device), self._dtype)
        self._numbers.fill(numbers)

    def read(self) -> PackedWeight:
        """The weight on the device; use it before another block is read."""
        return PackedWeight(self._numbers.read(), self._scale)


class FrozenLinear(nn.Module):
    """A linear layer that computes gradients of its input only.

    Its weight and bias are neither parameters nor buffers, so that nothing trains, synchronises or converts them.
    """

    def __init__(self, layer: nn.Linear, weight: Resident | Streamed, device: torch.device):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self._weight, self._device = weight, device
        self._bias: Tensor | None = None

    @property
    def bytes_in_computer(self) -> int:
        """Bytes of RAM that its weight takes instead of the device's memory."""
        return self._weight.bytes_in_computer

    def put_bias(self, bias: Tensor) -> None:
        """Set the bias; without a call there is none."""
        self._bias = bias.detach().to(self._device)

    def read_weight(self) -> Tensor:
        """A copy of the weight, (out_features, in_features) float32."""
        return self._weight.read().as_dtype(torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        dtype = computed_in(x)
        bias = None if self._bias is None else self._bias.to(dtype)
        return _Product.apply(x.to(dtype), self._weight, bias)


class _Product(torch.autograd.Function):
    """x weight^T + bias. Saves the location of the weight for the backward pass, not the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Resident | Streamed, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight.read().as_dtype(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient @ ctx.weight.read().as_dtype(gradient.dtype), None, None
