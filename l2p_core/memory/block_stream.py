"""Blocks of weights in CPU memory, of which two at a time are on the device: the current one and the next.

A block is asked for by number, in the forward pass upwards and in the backward pass downwards. Whichever way it goes,
the neighbour in that direction is copied while the block is computed, on a stream of its own. Weights that train are
streamed like those that do not: what is filled in while a block is on the device is copied there when it is next read,
if it is before the block has made room for another. A step's new weights are hardly ever.
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

_ALIGNMENT = 256  # bytes, of each tensor in its block
_SLOTS = 2


@dataclass(frozen=True)
class _Piece:
    """Where a tensor lies in its block's bytes."""

    start: int
    stop: int
    dtype: torch.dtype
    shape: torch.Size

    def of(self, block: Tensor) -> Tensor:
        return block[self.start : self.stop].view(self.dtype).view(self.shape)


class BlockStream:
    """The memory of the blocks.

    Args:
        blocks: of each block the dtypes and shapes of its tensors.
        device: where they are computed with; copies are made even if it is the CPU.
    """

    def __init__(self, blocks: Sequence[Sequence[tuple[torch.dtype, torch.Size]]], device: torch.device):
        self._pieces = [_laid_out(tensors) for tensors in blocks]
        sizes = [block_bytes(tensors) for tensors in blocks]
        self._homes = [home for group in allocations(sizes) for home in _cpu_memory(sum(group), device).split(group)]
        largest = max(len(home) for home in self._homes)
        self._slots = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(_SLOTS)]
        self._held: list[int | None] = [None] * _SLOTS
        self._stale: list[set[_Piece]] = [set() for _ in range(_SLOTS)]
        self._lock = threading.Lock()
        self._last = 0
        self._direction = 1
        self._gpu: Any = accelerator.module(device) if accelerator.has_own_memory(device.type) else None
        self._copying = self._gpu.Stream(device) if self._gpu else None
        self._arrived: list[Any] = [None] * _SLOTS

    def tensor(self, block: int, position: int) -> StreamedTensor:
        """One of a block's tensors, to be filled before it is read."""
        return StreamedTensor(self, block, self._pieces[block][position])

    def write(self, block: int, piece: _Piece, tensor: Tensor) -> None:
        """Set the elements of a piece, from any thread; it must not be read before this returns."""
        slot = block % _SLOTS
        with self._lock:
            held = self._held[slot] == block
            arrived = self._arrived[slot]
            if held:
                self._stale[slot].add(piece)
        if held and arrived:
            arrived.synchronize()  # the copy reads what is about to change
        piece.of(self._homes[block]).copy_(tensor)

    def read(self, block: int, piece: _Piece) -> Tensor:
        """A piece on the device, good until one of another block is read; the next block sets out."""
        with self._lock:
            return self._read(block, piece)

    def _read(self, block: int, piece: _Piece) -> Tensor:
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
        here = piece.of(self._slots[slot])
        if piece in self._stale[slot]:
            self._stale[slot].discard(piece)
            here.copy_(piece.of(self._homes[block]), non_blocking=True)
            if self._gpu:
                self._arrived[slot] = self._gpu.current_stream(here.device).record_event()
        return here

    def _bring(self, block: int) -> int:
        """Start copying a block unless it is there; the slot that it is in."""
        slot = block % _SLOTS
        if self._held[slot] == block:
            return slot
        home = self._homes[block]
        if self._copying:
            # What was computed with the block that is overwritten has been queued before this.
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

    def __init__(self, stream: BlockStream, block: int, piece: _Piece):
        self._stream, self._block, self._piece = stream, block, piece

    @property
    def nbytes(self) -> int:
        return self._piece.stop - self._piece.start

    def fill(self, tensor: Tensor) -> None:
        """Set its numbers."""
        self._stream.write(self._block, self._piece, tensor)

    def read(self) -> Tensor:
        """It on the device, to be used before a tensor of another block is read."""
        return self._stream.read(self._block, self._piece)


def allocations(sizes: Sequence[int]) -> list[list[int]]:
    """Blocks of these bytes, in order, as they share allocations.

    torch rounds each allocation of pinned memory up to a power of two, so that one for all may waste nearly half of
    itself: each takes as many blocks as the largest power of two in what is left holds.
    """
    groups: list[list[int]] = []
    left = list(sizes)
    while left:
        room = 1 << (sum(left).bit_length() - 1)
        ends = list(accumulate(left))
        count = max(1, sum(end <= room for end in ends))
        groups.append(left[:count])
        left = left[count:]
    return groups


def pinned_bytes(sizes: Sequence[int]) -> int:
    """What blocks of these bytes take of pinned memory."""
    return sum(1 << (sum(group) - 1).bit_length() for group in allocations(sizes))


def block_bytes(tensors: Sequence[tuple[torch.dtype, torch.Size]]) -> int:
    """What a block of tensors takes, in RAM and of each of the two places on the device."""
    return _aligned(_laid_out(tensors)[-1].stop)


def _laid_out(tensors: Sequence[tuple[torch.dtype, torch.Size]]) -> list[_Piece]:
    pieces, end = [], 0
    for dtype, shape in tensors:
        start = _aligned(end)
        end = start + math.prod(shape) * dtype.itemsize
        pieces.append(_Piece(start, end, dtype, shape))
    return pieces


def _aligned(count: int) -> int:
    return -(-count // _ALIGNMENT) * _ALIGNMENT


def _cpu_memory(count: int, device: torch.device) -> Tensor:
    """Bytes in RAM; pinned for a GPU, as far as the system allows."""
    if accelerator.has_own_memory(device.type):
        return accelerator.pinned((count,), torch.uint8)
    return torch.empty(count, dtype=torch.uint8)
