"""Operations that keep only their inputs for the backward pass, with gradients derived by hand.

What autograd keeps for norms and SwiGLU is a third of everything that a block holds until its backward pass, and more
where a norm widens bfloat16 to float32; it also takes more passes over memory. Results have the dtype of the inputs.
A compiler decides by itself what to keep and what to fuse, so it gets the plain formulas.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from .precision import unwidened


class Recomputing(nn.Module):
    """A module whose parts may be recomputed in the backward pass, if `gradient_checkpointing` is set."""

    gradient_checkpointing = False

    def _run(self, part: Callable[..., Any], *inputs: Any) -> Any:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(part, *inputs, use_reentrant=False, preserve_rng_state=False)
        return part(*inputs)


def scaled_norm(x: Tensor, weight: Tensor, factor: Tensor | None, eps: float) -> Tensor:
    """RMS norm over the last dimension, times `weight` and, if there is one, `factor`; in the dtype of `x`.

    x (B, ..., N, D) in up to 32 bits, weight (D,), factor (B, 1, D) for x (B, N, D).
    """
    if not torch.compiler.is_compiling():
        return ScaledNorm.apply(x, weight, factor, eps)
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps) * weight.float()
    return (normed if factor is None else normed * factor.float()).to(x.dtype)


def gated_silu(gate: Tensor, x: Tensor) -> Tensor:
    """silu(gate) * x, of any one shape and dtype."""
    return F.silu(gate) * x if torch.compiler.is_compiling() else GatedSilu.apply(gate, x)


class ScaledNorm(torch.autograd.Function):
    """`scaled_norm` without a compiler. Saves x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, factor: Tensor | None, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight, factor)
        ctx.eps = eps
        if factor is not None and len(factor) == 1:
            # One pass over x: a single sample's factor goes into the weight.
            weight, factor = (weight * factor).flatten(), None
        # Newer versions of torch would widen the norm, and with it the residual stream, to float32 under autocast.
        with unwidened(x):
            if x.device.type == "cpu":
                return _on_cpu(x, weight, factor, eps)
            normed = F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)
        return normed if factor is None else normed.mul_(factor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, factor = ctx.saved_tensors
        of_weight, of_factor = ctx.needs_input_grad[1:3]
        dim = x.shape[-1]
        inverse = _inverse(x, ctx.eps)
        # With r = inverse, y = x r s and G the gradient of y: dx = r (G s - x r^2 mean(G x s)); ds = sum of G x r.
        product = gradient * x if x.dtype == torch.float32 else x.float().mul_(gradient)
        scale = weight.float() if factor is None else weight.float() * factor.float()
        weight_gradient = factor_gradient = None
        if factor is None:
            if of_weight:
                weight_gradient = (inverse.flatten() @ product.flatten(0, -2)).to(weight.dtype)
            mean = (product @ scale)[..., None]
        else:
            mean = product @ scale.mT
            if of_weight or of_factor:
                summed = inverse.mT @ product
                factor_gradient = (summed * weight.float()).to(factor.dtype)
                weight_gradient = (summed * factor.float()).sum((0, 1)).to(weight.dtype)
        scaled = torch.mul(gradient, scale, out=product)
        changed = scaled.mul_(inverse).addcmul_(x, mean.mul_(inverse.pow_(3)), value=-1 / dim)
        return changed.to(x.dtype), weight_gradient if of_weight else None, factor_gradient, None


def _inverse(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean of squares + eps) over the last dimension, with that dimension kept, in float32."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _on_cpu(x: Tensor, weight: Tensor, factor: Tensor | None, eps: float) -> Tensor:
    """The norm in half the time of torch's: three passes over memory instead of five."""
    wide = x.float()
    inverse = _inverse(wide, eps)
    normed = (wide * inverse if wide is x else wide.mul_(inverse)).mul_(weight.float())
    return (normed if factor is None else normed.mul_(factor)).to(x.dtype)


class GatedSilu(torch.autograd.Function):
    """`gated_silu` without a compiler. Saves both inputs."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(gate, x)
        return F.silu(gate).mul_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, x = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradient * x, gate), F.silu(gate).mul_(gradient)
