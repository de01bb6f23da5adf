"""Linear layers whose weights are trained in RAM, so that the device holds those of two blocks at a time.

The float32 weight itself never leaves the CPU. Its working copy comes to the device with its block (`block_stream`),
and the gradient is handed over during the backward pass, when that pass no longer needs the weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..ops.precision import computed_in
from .block_stream import StreamedTensor


class TrainedLinear(nn.Module):
    """Replaces a linear layer whose weight is trained in RAM.

    Attributes:
        weight: (out_features, in_features) float32 on the CPU; not used in computation, and its `grad` is always None.
        bias: on the device, trained like any parameter, or None.
        working: the copy to compute with; fill it with the weight.
        take: receives the gradient (out_features, in_features) of each backward pass, on the device.
    """

    def __init__(self, layer: nn.Linear, working: StreamedTensor):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias, self.working = layer.weight, layer.bias, working
        self.take: Callable[[Tensor], None] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        dtype = computed_in(x)
        bias = None if self.bias is None else self.bias.to(dtype)
        return _TrainedProduct.apply(x.to(dtype), self.weight, bias, self)


class _TrainedProduct(torch.autograd.Function):
    """x working^T + bias. The weight is an argument only so that autograd sees something to train."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: TrainedLinear) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer = layer
        return F.linear(x, layer.working.read().to(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        (x,), layer = ctx.saved_tensors, ctx.layer
        rows = gradient.flatten(0, -2)
        of_x = gradient @ layer.working.read().to(gradient.dtype) if ctx.needs_input_grad[0] else None
        of_bias = rows.sum(0) if ctx.needs_input_grad[2] else None
        # The working copy was last used above: taking the gradient may change it.
        layer.take(rows.mT @ x.flatten(0, -2))
        return of_x, None, of_bias, None
