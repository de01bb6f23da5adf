"""Memory of the device that grows."""

from __future__ import annotations

import torch
from torch import Tensor


class VRAMBuffer:
    """Bytes for weights that are there for one use only."""

    def __init__(self, max_size: int, device: int):
        self._bytes = torch.empty(0, dtype=torch.uint8, device="npu:0")

    def size(self) -> int:
        """Bytes that it has."""
        return len(self._bytes)

    def get(self, size: int, offset: int = 0) -> tuple[VRAMBuffer, int, int]:
        """A place in it."""
        if offset + size > len(self._bytes):
            self._bytes = torch.empty(offset + size, dtype=torch.uint8, device="npu:0")
        return self, offset, size

    def memory(self, start: int) -> Tensor:
        """What is behind a place, as bytes."""
        return self._bytes[start:]
