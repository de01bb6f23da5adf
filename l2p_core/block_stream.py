"""Blocks of weights in CPU memory, of which two at a time are on the device: the current one and the next.

A block is asked for by number, in the forward pass upwards and in the backward pass downwards. Whichever way it goes,
the neighbour in that direction is copied while the block is computed, on a stream of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass

import torch
from torch import Tensor

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
        ends = [0]
        for pieces in self._pieces:
            ends.append(ends[-1] + _aligned(pieces[-1].stop))
        # One allocation: torch rounds each of pinned memory up to a power of two.
        memory = _cpu_memory(ends[-1], device)
        self._homes = [memory[start:stop] for start, stop in zip(ends, ends[1:], strict=False)]
        largest = max(len(home) for home in self._homes)
        self._slots = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(_SLOTS)]
        self._held: list[int | None] = [None] * _SLOTS
        self._last = 0
        self._direction = 1
        self._copying = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._arrived: list[torch.cuda.Event | None] = [None] * _SLOTS

    def tensor(self, block: int, position: int) -> StreamedTensor:
        """One of a block's tensors, to be filled before it is read."""
        return StreamedTensor(self, block, self._pieces[block][position])

    def home(self, block: int) -> Tensor:
        """The bytes of a block in CPU memory."""
        return self._homes[block]

    def fetch(self, block: int) -> Tensor:
        """The bytes of a block on the device, good until another block is fetched; the next one sets out."""
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
        return self._slots[slot]

    def _bring(self, block: int) -> int:
        """Start copying a block unless it is there; the slot that it is in."""
        slot = block % _SLOTS
        if self._held[slot] == block:
            return slot
        home = self._homes[block]
        if self._copying:
            # What was computed with the block that is overwritten has been queued before this.
            self._copying.wait_stream(torch.cuda.current_stream(self._slots[slot].device))
        with torch.cuda.stream(self._copying) if self._copying else nullcontext():
            self._slots[slot][: len(home)].copy_(home, non_blocking=True)
            if self._copying:
                self._arrived[slot] = self._copying.record_event()
        self._held[slot] = block
        return slot


class StreamedTensor:
    """A tensor of a block."""

    def __init__(self, stream: BlockStream, block: int, piece: _Piece):
        self._stream, self._block, self._piece = stream, block, piece

    @property
    def nbytes(self) -> int:
        return self._piece.stop - self._piece.start

    def fill(self, tensor: Tensor) -> None:
        """Set its numbers in CPU memory."""
        self._piece.of(self._stream.home(self._block)).copy_(tensor)

    def read(self) -> Tensor:
        """It on the device, to be used before a tensor of another block is read."""
        return self._piece.of(self._stream.fetch(self._block))


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
    """Bytes in CPU memory; pinned, so that a GPU copies them while it computes, where the system allows as many."""
    if device.type == "cuda":
        # Systems limit how much may be pinned; what is not is copied too, only not beside the computation.
        with suppress(RuntimeError):
            return torch.empty(count, dtype=torch.uint8, pin_memory=True)
    return torch.empty(count, dtype=torch.uint8)
