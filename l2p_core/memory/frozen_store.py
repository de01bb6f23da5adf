"""Frozen blocks in few bits, or in CPU memory: how the weights that do not train are kept while others do.

A frozen linear layer needs its weight twice a step, for its output and for the gradient of its input, and never a
gradient of its own. So the weight may be stored as float8 with a factor for each output row, or in bfloat16, and is
turned into the numbers of the computation where it is used: only the stored form outlives that. Streamed, even this
lies in CPU memory; the device has room for two blocks, the one that is computed and the one that comes next, which is
copied meanwhile.
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
_MOST_SHIFTED = 100  # binary places; rows of numbers yet smaller are as good as zero
_AT_ONCE = 1 << 20  # numbers that a CPU converts at a time, for their indices take four bytes each


class Stored(NamedTuple):
    """A weight as it is kept: numbers (rows, columns) and, of float8, the factor (rows, 1) float32 of each row."""

    numbers: Tensor
    scale: Tensor | None

    def as_dtype(self, dtype: torch.dtype) -> Tensor:
        """The weight in `dtype`, exactly what the stored numbers mean, in float32 and bfloat16."""
        if self.scale is None:
            return self.numbers.to(dtype)
        return _from_float8(self.numbers, dtype).mul_(self.scale.to(dtype))


def stored(weight: Tensor, dtype: torch.dtype) -> Stored:
    """A weight (rows, columns) as it is kept in `dtype`."""
    return quantised(weight) if dtype == FLOAT8 else Stored(weight.to(dtype), None)


def quantised(weight: Tensor) -> Stored:
    """A weight (rows, columns) in float8 (e4m3fn), each row scaled to its range.

    Factors are powers of two, so that multiplying by them is exact in every dtype: all error is that of rounding to
    three bits, at most 1/16 of a number, or 2^-17 of the largest in its row where that is more, as long as that
    largest is above 1e-27.
    """
    weight = weight.float()
    largest = weight.abs().amax(dim=1, keepdim=True)
    # largest = m 2^exponent with m in [0.5, 1), so that it is scaled to [128, 256).
    exponent = torch.frexp(largest).exponent
    shift = torch.where(largest > 0, _LARGEST_EXPONENT - exponent, 0).clamp(max=_MOST_SHIFTED).float()
    return Stored((weight * shift.exp2()).to(FLOAT8), (-shift).exp2())


def _from_float8(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    if numbers.device.type != "cpu":
        return numbers.to(dtype)
    # On CPUs torch converts number by number; to look the 256 values up takes a fifth of the time.
    values = torch.arange(256).to(torch.uint8).view(FLOAT8).to(dtype)
    converted = torch.empty(numbers.shape, dtype=dtype)
    codes = numbers.view(torch.uint8).flatten()
    for part, target in zip(codes.split(_AT_ONCE), converted.view(-1).split(_AT_ONCE), strict=True):
        torch.index_select(values, 0, part.int(), out=target)
    return converted


class Resident:
    """A weight that stays on the device.

    Args:
        dtype: to keep it in.
        device: to compute on.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self._dtype, self._device = dtype, device
        self._stored: Stored | None = None

    @property
    def bytes_in_computer(self) -> int:
        return 0

    def put(self, weight: Tensor) -> None:
        """Set the numbers."""
        self._stored = stored(weight.detach().to(self._device), self._dtype)

    def read(self) -> Stored:
        """The weight on the device."""
        assert self._stored is not None, "read before it was put"
        return self._stored


class Streamed:
    """A weight that comes with its block.

    Args:
        dtype: to keep it in.
        device: to compute on.
        numbers: its place in the block.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, numbers: StreamedTensor):
        self._dtype, self._device, self._numbers = dtype, device, numbers
        self._scale: Tensor | None = None

    @property
    def bytes_in_computer(self) -> int:
        return self._numbers.nbytes

    def put(self, weight: Tensor) -> None:
        """Set the numbers."""
        numbers, self._scale = stored(weight.detach().to(self._device), self._dtype)
        self._numbers.fill(numbers)

    def read(self) -> Stored:
        """The weight on the device, to be used before another block is asked for."""
        return Stored(self._numbers.read(), self._scale)


class FrozenLinear(nn.Module):
    """A linear layer that takes gradients of its input only.

    Its weight and bias are neither parameters nor buffers: nothing shall train, synchronise or convert them.
    """

    def __init__(self, layer: nn.Linear, weight: Resident | Streamed, device: torch.device):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self._weight, self._device = weight, device
        self._bias: Tensor | None = None

    @property
    def bytes_in_computer(self) -> int:
        """What its weight takes of the computer's memory rather than of the device's."""
        return self._weight.bytes_in_computer

    def put_bias(self, bias: Tensor) -> None:
        """Set the bias; without a call there is none."""
        self._bias = bias.detach().to(self._device)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        dtype = computed_in(x)
        bias = None if self._bias is None else self._bias.to(dtype)
        return _Product.apply(x.to(dtype), self._weight, bias)


class _Product(torch.autograd.Function):
    """x weight^T + bias, remembering for its backward pass where the weight is, not the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Resident | Streamed, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight.read().as_dtype(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient @ ctx.weight.read().as_dtype(gradient.dtype), None, None
