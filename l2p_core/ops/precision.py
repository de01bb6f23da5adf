"""Autocast, kept out of what shall stay in the dtype of its inputs; products in dtypes that a processor lacks."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor


def _lacks(name: str) -> bool:
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", None)
    return supported is not None and not supported()


LACKED = {torch.bfloat16: _lacks("bf16"), torch.float16: _lacks("fp16")}
"""Whether this CPU has no instructions for products in a dtype. Torch then takes seven times as long as in float32."""


def unwidened(x: Tensor) -> AbstractContextManager[object]:
    """Within it, operations on tensors of this one's device do not become float32.

    Autocast widens some that need no wider numbers: nearest-neighbour resizing, and RMS norm in newer versions of
    torch. A residual stream or map that has become float32 takes twice the memory from there on.
    """
    device = x.device.type
    if torch.compiler.is_compiling():
        return torch.autocast(device, enabled=False)  # compilers follow this, and no question before it
    # On "meta", which is only measured, there is no autocast.
    on = device != "meta" and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` of tensors of one dtype and in that dtype, for use without gradients.

    A CPU that lacks the dtype computes in float32, which is what sums are kept in anyway, and rounds the result once.
    """
    if x.device.type != "cpu" or not LACKED.get(x.dtype, False):
        return F.linear(x, weight, bias)
    with unwidened(x):
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


def computed_in(x: Tensor) -> torch.dtype:
    """The dtype that a linear layer computes in: that of autocast where it is on, else that of its input."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
