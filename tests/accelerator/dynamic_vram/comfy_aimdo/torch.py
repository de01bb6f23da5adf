"""Memory as tensors."""

from __future__ import annotations

from torch import Tensor

from .model_vbar import Allocation


def aimdo_to_tensor(allocation: Allocation, device: object) -> Tensor:
    """The bytes of a place, (size,) uint8."""
    memory, start, size = allocation
    return memory.memory(start)[:size]
