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


class DeviceTensor:
    """The place of a tensor that stays on the device; `StreamedTensor` is that of one in RAM."""

    nbytes = 0  # of RAM

    def fill(self, tensor: Tensor) -> None:
        """Set the tensor."""
        self._tensor = tensor

    def read(self) -> Tensor:
        """The tensor."""
        return self._tensor


class FrozenLinear(nn.Module):
    """A linear layer that computes gradients of its input only.

    Its weight and bias are neither parameters nor buffers, so that nothing trains, synchronises or converts them.

    Args:
        layer: gives its sizes.
        dtype: to store the weight in.
        place: of the stored weight.
        device: to compute on.

    Attributes:
        device: to compute on.
        place: of the stored weight.
        traced: whether a compiler may convert the weight within its own kernels while nothing needs gradients. With
            gradients, it would keep converted weights for the backward pass.
    """

    def __init__(
        self, layer: nn.Linear, dtype: torch.dtype, place: DeviceTensor | StreamedTensor, device: torch.device
    ):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.device = device
        self.place, self._dtype = place, dtype
        self._scale: Tensor | None = None
        self._bias: Tensor | None = None
        self.traced = False

    def put_weight(self, weight: Tensor) -> None:
        """Set the weight."""
        elements, self._scale = packed(weight.detach().to(self.device), self._dtype)
        self.place.fill(elements)

    def put_bias(self, bias: Tensor) -> None:
        """Set the bias; without a call there is none."""
        self._bias = bias.detach().to(self.device)

    def tensors(self) -> tuple[Tensor | None, ...]:
        """What it holds on the device, or reads there."""
        return *self.read(), self._bias

    def read(self) -> PackedWeight:
        """The weight on the device; if it is streamed, use it before another block is read."""
        return PackedWeight(self.place.read(), self._scale)

    def read_weight(self) -> Tensor:
        """A copy of the weight, (out_features, in_features) float32."""
        return self.read().as_dtype(torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        dtype = computed_in(x)
        bias = None if self._bias is None else self._bias.to(dtype)
        if self.traced and not torch.is_grad_enabled():
            return F.linear(x.to(dtype), self.read().as_dtype(dtype), bias)
        return self.product(x.to(dtype), bias)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x weight^T + bias, keeping no weight for the backward pass."""
        return _FrozenProduct.apply(x, self, bias)


class _FrozenProduct(torch.autograd.Function):
    """x weight^T + bias. Saves the layer for the backward pass, not its weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear, bias: Tensor | None) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.read().as_dtype(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient @ ctx.layer.read().as_dtype(gradient.dtype), None, None
