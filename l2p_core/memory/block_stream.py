"""Blocks of weights in RAM, of which the device holds two at a time: the current one and the next.

Blocks are read by number, ascending in the forward pass and descending in the backward pass. The next block in the
current direction is copied on its own stream while the current one is computed. Weights that train are streamed in the
same way: a new value written while its block is on the device is copied there when the block is next read, unless the
block has been replaced by then, which is the usual case.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..device import accelerator

_ALIGNMENT = 256  # bytes, of each tensor within its block
SLOTS = 2


@dataclass(frozen=True)
class _Span:
    """The position of a tensor in its block's bytes."""

    start: int
    stop: int
    dtype: torch.dtype
    shape: torch.Size

    def of(self, block: Tensor) -> Tensor:
        return block[self.start : self.stop].view(self.dtype).view(self.shape)


class BlockStream:
    """The memory of the blocks, in RAM and on the device.

    Args:
        blocks: for each block the dtypes and shapes of its tensors.
        device: where they are computed with; they are copied even if it is the CPU.
    """

    def __init__(self, blocks: Sequence[Sequence[tuple[torch.dtype, torch.Size]]], device: torch.device):
        self._pieces = [_laid_out(tensors) for tensors in blocks]
        sizes = [block_bytes(tensors) for tensors in blocks]
        self._homes = [home for group in allocations(sizes) for home in _cpu_memory(sum(group), device).split(group)]
        largest = max(len(home) for home in self._homes)
        self._slots = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(SLOTS)]
        self._held: list[int | None] = [None] * SLOTS
        self._stale: list[set[_Span]] = [set() for _ in range(SLOTS)]
        self._lock = threading.Lock()
        self._last = 0
        self._direction = 1
        self._gpu: Any = accelerator.module(device) if accelerator.has_own_memory(device.type) else None
        self._copying = self._gpu.Stream(device) if self._gpu else None
        self._arrived: list[Any] = [None] * SLOTS

    def tensor(self, block: int, position: int) -> StreamedTensor:
        """One of a block's tensors; fill it before reading it."""
        return StreamedTensor(self, block, self._pieces[block][position])

    def write(self, block: int, span: _Span, tensor: Tensor) -> None:
        """Set a tensor's elements, from any thread; do not read it before this returns."""
        slot = block % SLOTS
        with self._lock:
            held = self._held[slot] == block
            arrived = self._arrived[slot]
            if held:
                self._stale[slot].add(span)
        if held and arrived:
            arrived.synchronize()  # the copy still reads the bytes that change below
        span.of(self._homes[block]).copy_(tensor)

    def read(self, block: int, span: _Span) -> Tensor:
        """A tensor on the device, valid until one of another block is read; starts copying the next block."""
        with self._lock:
            if block != self._last:
                self._direction = 1 if block > self._last else -1
                self._last = block
            slot = self._bring(block)
            following = block + self._direction
            if 0 <= following < len(self._homes):
                self._bring(following)
            arrived = self._arrived[slot]
            if arrived:
                arrived.wait()
            here = span.of(self._slots[slot])
            if span in self._stale[slot]:
                self._stale[slot].discard(span)
                here.copy_(span.of(self._homes[block]), non_blocking=True)
                if self._gpu:
                    self._arrived[slot] = self._gpu.current_stream(here.device).record_event()
            return here

    def _bring(self, block: int) -> int:
        """Start copying a block unless it is on the device; returns its slot."""
        slot = block % SLOTS
        if self._held[slot] == block:
            return slot
        home = self._homes[block]
        if self._copying:
            # Computations with the block that is being replaced were queued before this.
            self._copying.wait_stream(self._gpu.current_stream(self._slots[slot].device))
        with self._gpu.stream(self._copying) if self._gpu else nullcontext():
            self._slots[slot][: len(home)].copy_(home, non_blocking=True)
            if self._copying:
                self._arrived[slot] = self._copying.record_event()
        self._held[slot] = block
        self._stale[slot].clear()
        return slot


class StreamedTensor:
    """A tensor of a block."""

    def __init__(self, stream: BlockStream, block: int, span: _Span):
        self._stream, self._block, self._piece = stream, block, span

    @property
    def nbytes(self) -> int:
        return self._piece.stop - self._piece.start

    def fill(self, tensor: Tensor) -> None:
        """Set its elements."""
        self._stream.write(self._block, self._piece, tensor)

    def read(self) -> Tensor:
        """The tensor on the device; use it before a tensor of another block is read."""
        return self._stream.read(self._block, self._piece)


def allocations(sizes: Sequence[int]) -> list[list[int]]:
    """Group blocks of these sizes, in order, into allocations.

    torch rounds each pinned allocation up to a power of two, so a single one could waste nearly half. Each allocation
    therefore takes as many blocks as fit into the largest power of two within what is left.
    """
    groups: list[list[int]] = []
    left = list(sizes)
    while left:
        room = 1 << (sum(left).bit_length() - 1)
        count = max(1, sum(end <= room for end in accumulate(left)))
        groups.append(left[:count])
        left = left[count:]
    return groups


def pinned_bytes(sizes: Sequence[int]) -> int:
    """Bytes of pinned memory that blocks of these sizes take."""
    return sum(1 << (sum(group) - 1).bit_length() for group in allocations(sizes))


def block_bytes(tensors: Sequence[tuple[torch.dtype, torch.Size]]) -> int:
    """Bytes of a block of tensors, in RAM and in each of the two slots on the device."""
    return _aligned(_laid_out(tensors)[-1].stop)


def _laid_out(tensors: Sequence[tuple[torch.dtype, torch.Size]]) -> list[_Span]:
    spans, end = [], 0
    for dtype, shape in tensors:
        start = _aligned(end)
        end = start + math.prod(shape) * dtype.itemsize
        spans.append(_Span(start, end, dtype, shape))
    return spans


def _aligned(count: int) -> int:
    return -(-count // _ALIGNMENT) * _ALIGNMENT


def _cpu_memory(count: int, device: torch.device) -> Tensor:
    """Bytes in RAM, pinned for a GPU as far as the system allows."""
    if accelerator.has_own_memory(device.type):
        return accelerator.pinned((count,), torch.uint8)
    return torch.empty(count, dtype=torch.uint8)
