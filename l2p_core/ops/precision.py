"""Operations that autocast must not widen, and products in dtypes that the CPU has no instructions for."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor


def _lacks(name: str) -> bool:
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", None)
    return supported is not None and not supported()


LACKED = {torch.bfloat16: _lacks("bf16"), torch.float16: _lacks("fp16")}
"""Whether this CPU has no instructions for products in a dtype. Torch is then seven times slower than in float32."""


def unwidened(x: Tensor) -> AbstractContextManager[object]:
    """A context in which autocast does not widen operations on tensors of this device to float32.

    Autocast widens some operations that do not need it: nearest-neighbour resizing, and RMS norm in newer versions of
    torch. A residual stream or feature map in float32 takes twice the memory from there on.
    """
    device = x.device.type
    if torch.compiler.is_compiling():
        return torch.autocast(device, enabled=False)  # compilers trace this, but no condition before it
    return torch.autocast(device, enabled=False) if _autocasts(device) else nullcontext()


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` of tensors of one dtype, in that dtype, for use without gradients.

    A CPU that lacks the dtype computes in float32, in which sums are accumulated anyway, and rounds the result once.
    """
    if x.device.type != "cpu" or not LACKED.get(x.dtype, False):
        return F.linear(x, weight, bias)
    with unwidened(x):
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


def computed_in(x: Tensor) -> torch.dtype:
    """The dtype that a linear layer computes in: autocast's if it is on, otherwise that of its input."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if _autocasts(device) else x.dtype


def _autocasts(device: str) -> bool:
    # The device "meta", used to measure memory, has no autocast.
    return device != "meta" and torch.is_autocast_enabled(device)
