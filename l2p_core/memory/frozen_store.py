"""Storage of frozen weights in few bits or in RAM.

A frozen linear layer needs its weight twice per step, for its output and for the gradient of its input, and never has a
weight gradient. The weight may therefore be stored in float8 (`ops.eight_bit`) or in bfloat16 and is converted to the
compute dtype where it is used; only the stored form persists. With streaming, even the stored form lies in RAM; the
device holds two blocks, the current one and the next, which is copied meanwhile.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..ops.eight_bit import PackedWeight, packed
from ..ops.precision import computed_in
from .block_stream import StreamedTensor


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
        home: its position in the block.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, home: StreamedTensor):
        self._dtype, self._device, self._home = dtype, device, home
        self._scale: Tensor | None = None

    @property
    def bytes_in_computer(self) -> int:
        return self._home.nbytes

    def put(self, weight: Tensor) -> None:
        """Set the weight."""
        elements, self._scale = packed(weight.detach().to(self._device), self._dtype)
        self._home.fill(elements)

    def read(self) -> PackedWeight:
        """The weight on the device; use it before another block is read."""
        return PackedWeight(self._home.read(), self._scale)


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

    def tensors(self) -> tuple[Tensor | None, ...]:
        """What it holds on the device, or reads there."""
        return *self._weight.read(), self._bias

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
