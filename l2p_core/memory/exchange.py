"""Copies gradients to RAM and weights back to the device, in parallel with the backward pass.

It uses two pinned buffers, a copy stream and a thread. While the GPU computes the gradient of one weight, the previous
gradient is copied, and the thread uses the one before, mostly to step AdamW. When both buffers are in use the backward
pass waits, so neither gradients nor pinned memory accumulate. The stream runs copies in the order in which they were
queued, and a gradient's memory is freed only when its copy is complete.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, pairwise
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from ..device import accelerator

BUFFERS = 2
PIECE = 1 << 20
"""Elements of a gradient in RAM that are processed at a time: a processor's cache holds them with their moments."""

Renewed = Iterable[tuple[Tensor, Tensor]]
"""Weights (float32, on the CPU), and the device tensors to fill with them."""
Use = Callable[[list[Tensor]], Renewed]
"""Receives gradients in RAM, which it may change but must not keep."""


class Exchange:
    """The exchange with a device that shares the CPU's memory: nothing can overlap."""

    def bring(self, gradients: Sequence[Tensor], use: Use) -> None:
        """Use gradients in RAM, in the order of these calls, and renew weights on the device."""
        self.send(use([gradient.cpu() for gradient in gradients]))

    @torch.no_grad()
    def send(self, renewed: Renewed) -> None:
        """Fill tensors on the device with weights."""
        for weight, target in renewed:
            target.copy_(weight)

    def finish(self) -> None:
        """Wait until everything has been used; later computations run only after the weights they need have arrived."""


@dataclass
class _Buffer:
    memory: Tensor
    sent: Any = None
    """The event that marks the end of the last copy from it to the device."""

    def views(self, like: Sequence[Tensor]) -> list[Tensor]:
        """Views of it in the shapes of these tensors."""
        ends = accumulate((tensor.numel() for tensor in like), initial=0)
        pieces = zip(pairwise(ends), like, strict=True)
        return [self.memory[start:stop].view(tensor.shape) for (start, stop), tensor in pieces]


class Overlapping(Exchange):
    """The exchange with a GPU.

    Args:
        device: the GPU.
        elements: the most elements of gradients that are brought together, or of one weight that is sent.
        dtype: of gradients and of renewed weights.
    """

    def __init__(self, device: torch.device, elements: int, dtype: torch.dtype):
        self._device, self._elements = device, elements
        self._gpu: Any = accelerator.module(device)
        self._stream = self._gpu.Stream(device)
        self._free: SimpleQueue[_Buffer] = SimpleQueue()
        for _ in range(BUFFERS):
            self._free.put(_Buffer(accelerator.pinned((elements,), dtype)))
        self._thread = ThreadPoolExecutor(1, "l2p-optimiser")
        self._begun: list[Future[None]] = []

    @torch.no_grad()
    def bring(self, gradients: Sequence[Tensor], use: Use) -> None:
        gradients = [gradient.contiguous() for gradient in gradients]
        buffer = self._free.get()
        views = buffer.views(gradients)
        # A copy to the device that still reads the buffer was queued on this stream earlier.
        self._stream.wait_stream(self._gpu.current_stream(self._device))
        with self._gpu.stream(self._stream):
            for view, gradient in zip(views, gradients, strict=True):
                view.copy_(gradient, non_blocking=True)
            arrived = self._stream.record_event()
        self._begun.append(self._thread.submit(self._used, buffer, views, gradients, arrived, use))

    @torch.no_grad()
    def send(self, renewed: Renewed) -> None:
        self._stream.wait_stream(self._gpu.current_stream(self._device))
        for together in _portions(renewed, self._elements):
            buffer = self._free.get()
            try:
                self._sent(buffer, together)
            finally:
                self._free.put(buffer)

    def finish(self) -> None:
        begun, self._begun = self._begun, []
        for done in begun:
            done.result()
        self._gpu.current_stream(self._device).wait_stream(self._stream)

    @torch.no_grad()
    def _used(self, buffer: _Buffer, views: list[Tensor], gradients: list[Tensor], arrived: Any, use: Use) -> None:
        """Runs in the thread."""
        try:
            arrived.synchronize()
            gradients.clear()
            self._sent(buffer, list(use(views)))
        finally:
            self._free.put(buffer)

    def _sent(self, buffer: _Buffer, renewed: list[tuple[Tensor, Tensor]]) -> None:
        """Queue copies of weights to the device."""
        if not renewed:
            return
        if buffer.sent:
            buffer.sent.synchronize()
        for view, (weight, target) in zip(buffer.views([weight for weight, _ in renewed]), renewed, strict=True):
            view.copy_(weight)
            with self._gpu.stream(self._stream):
                target.copy_(view, non_blocking=True)
        with self._gpu.stream(self._stream):
            buffer.sent = self._stream.record_event()


def make(device: torch.device, elements: int, dtype: torch.dtype) -> Exchange:
    """The exchange with a device; arguments as for `Overlapping`."""
    return Overlapping(device, elements, dtype) if accelerator.has_own_memory(device.type) else Exchange()


def _portions(renewed: Renewed, elements: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Weights in groups that fit into a buffer."""
    portion: list[tuple[Tensor, Tensor]] = []
    held = 0
    for weight, target in renewed:
        if portion and held + weight.numel() > elements:
            yield portion
            portion, held = [], 0
        portion.append((weight, target))
        held += weight.numel()
    if portion:
        yield portion
