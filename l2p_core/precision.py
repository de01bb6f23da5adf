"""Autocast, kept out of what shall stay in the dtype of its inputs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


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
