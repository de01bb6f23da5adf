"""Linear layers whose weights train in the computer's memory, so that the device holds those of two blocks at a time.

The weight itself, float32, never leaves the CPU. Its working copy comes to the device with its block (`block_stream`),
and the gradient is handed over in the middle of the backward pass, when nothing of that pass needs the weight any more.
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
    """A linear layer in the place of one whose weight trains.

    Attributes:
        weight: (out_features, in_features) float32 on the CPU; nothing computes with it, and it never has a `grad`.
        bias: on the device, trained as any parameter, or None.
        working: what is computed with, to be filled with the weight.
        take: is given the gradient (out_features, in_features) of each backward pass, on the device.
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
        return _Product.apply(x.to(dtype), self.weight, bias, self)


class _Product(torch.autograd.Function):
    """x working^T + bias. The weight is an argument only for autograd to see that there is something to train."""

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
        # The last use of the working copy was above: taking the gradient may change it.
        layer.take(rows.mT @ x.flatten(0, -2))
        return of_x, None, of_bias, None
