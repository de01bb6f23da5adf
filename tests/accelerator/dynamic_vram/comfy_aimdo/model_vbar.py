"""A model's weights in the device's memory, each there or not."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from typing import Any

import torch
from torch import Tensor

KEPT_FREE = int(os.environ.get("SIMULATED_AIMDO_KEPT_FREE", 64 * 2**20))
"""Bytes of the device that weights leave to computing; the real library makes weights give way instead."""

Allocation = tuple[Any, int, int]
_serial = itertools.count()


class ModelVBAR:
    """Places for a model's weights; memory is behind a place only while its weight is there."""

    def __init__(self, size: float, device: int):
        self._end = 0
        self._there: dict[int, Tensor] = {}
        self._came: dict[int, int] = {}
        self._pins: Counter[int] = Counter()

    def alloc(self, size: int) -> Allocation:
        """A place of so many bytes."""
        start = self._end
        self._end += size
        return self, start, size

    def fault(self, start: int, size: int) -> list[int] | None:
        """Bring memory behind a place and keep it until `unpin`; what names this stay, None if there is no room."""
        if start not in self._there:
            free, _ = torch.npu.mem_get_info()  # type: ignore[attr-defined]
            if free - size < KEPT_FREE:
                return None
            self._there[start] = torch.empty(size, dtype=torch.uint8, device="npu:0")
            self._came[start] = next(_serial)
        self._pins[start] += 1
        return [self._came[start]]

    def unpin(self, start: int, size: int) -> None:
        """Let memory go when others need it."""
        self._pins[start] -= 1

    def memory(self, start: int) -> Tensor:
        """What is behind a place, as bytes."""
        return self._there[start]

    def loaded_size(self) -> int:
        """Bytes that are there."""
        return sum(map(len, self._there.values()))

    def free_memory(self, size: int) -> int:
        """Take away what is not pinned until so many bytes are free; the bytes that became free."""
        freed = 0
        for start in [start for start in reversed(self._there) if self._pins[start] <= 0]:
            if freed >= size:
                break
            freed += len(self._there.pop(start))
        return freed

    def prioritize(self, *_: object) -> None:
        """Let other models' weights go first."""

    def deprioritize(self) -> None:
        """Let this model's weights go first."""

    def set_watermark_limit(self, size: int) -> None:
        """Keep weights from filling more than this."""


def vbar_fault(allocation: Allocation) -> list[int] | None:
    """See `ModelVBAR.fault`."""
    bar, start, size = allocation
    return bar.fault(start, size)


def vbar_unpin(allocation: Allocation | None) -> None:
    """See `ModelVBAR.unpin`."""
    if allocation is not None:
        bar, start, size = allocation
        bar.unpin(start, size)


def vbar_signature_compare(one: list[int] | None, other: list[int] | None) -> bool:
    """Whether a weight has stayed since."""
    return one is not None and one == other


def vbars_reset_watermark_limits() -> None:
    """Forget all limits."""


def vbars_analyze(device: int | None = None) -> int:
    """Bytes that weights would give way from."""
    return 0
