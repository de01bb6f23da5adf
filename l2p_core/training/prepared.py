"""Micro-batches prepared for the device in advance: noise drawn, captions dropped, everything in pinned memory.

On a GPU this happens in a thread while the previous micro-batch is computed; the loop then only queues copies, which
the GPU performs while Python continues. Torch reuses the pinned memory of a batch only after the copies from it are
done.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backbone import Caption, each_tensor
from ..device import accelerator
from ..ops.sample_randomness import draw
from ..training_config import TrainingConfig
from .batch import BatchSource

_AHEAD = 1
"""Micro-batches that are prepared in addition to the next one."""
_PINNED_AT_MOST = 1 << 28
"""Largest tensor, in bytes, that is pinned. Larger ones, of images above 4096 pixels, would take gigabytes of RAM that
cannot be swapped, and copying them is a negligible part of a step."""


class Prepared(NamedTuple):
    """A micro-batch: pixels (B, 3, H, W) float32 in [-1, 1], their noise, sigma (B,), B captions (see `backbone`)."""

    pixels: Tensor
    noise: Tensor
    sigma: Tensor
    captions: list[Any]

    def to(self, device: torch.device) -> Prepared:
        """Copy it to the device. Copies from pinned memory are queued, not waited for."""

        def there(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        captions = [each_tensor(caption, there) for caption in self.captions]
        return Prepared(there(self.pixels), there(self.noise), there(self.sigma), captions)


@dataclass(frozen=True)
class Preparation:
    """Prepares micro-batches of a source; random choices depend only on the samples' numbers.

    Attributes:
        batches: the source.
        config: of the training.
        sigmas: (levels,) grid of noise levels.
        empty_caption: replaces dropped captions.
        device: target of the batches.
    """

    batches: BatchSource
    config: TrainingConfig
    sigmas: Tensor
    empty_caption: Caption | None
    device: torch.device

    def __call__(self, number: int) -> Prepared:
        """The micro-batch `number`, counted from 0 over the whole run."""
        batch = self.batches.batch(number)
        config, noise = self.config, self._empty(batch.pixels.shape)
        seeds = batch.seeds if config.noise == "seeded" else [None] * len(batch.seeds)
        of_sample = partial(draw, config.seed, levels=len(self.sigmas), dropout=config.caption_dropout)
        samples = zip(batch.numbers, noise, seeds, strict=True)
        draws = [of_sample(number, row.shape, out=row, own_seed=seed) for number, row, seed in samples]
        captions = [
            self.empty_caption if drawn.drop_caption and self.empty_caption is not None else caption
            for drawn, caption in zip(draws, batch.captions, strict=True)
        ]
        sigma = self.sigmas[[drawn.sigma_index for drawn in draws]]
        pinned = [each_tensor(caption, self._pinned) for caption in captions]
        return Prepared(self._pinned(batch.pixels.float()), noise, self._pinned(sigma), pinned)

    def _empty(self, shape: Sequence[int]) -> Tensor:
        pins = self._pins(torch.Size(shape).numel() * torch.float32.itemsize)
        return accelerator.pinned(shape, torch.float32) if pins else torch.empty(tuple(shape))

    def _pinned(self, tensor: Tensor) -> Tensor:
        pins = self._pins(tensor.nbytes)
        return accelerator.pinned(tensor.shape, tensor.dtype).copy_(tensor) if pins else tensor

    def _pins(self, size: int) -> bool:
        return accelerator.has_own_memory(self.device.type) and size <= _PINNED_AT_MOST


@contextmanager
def ahead(
    prepare: Callable[[int], Prepared], numbers: Iterable[int], device: torch.device
) -> Iterator[Iterator[Prepared]]:
    """Micro-batches with these numbers in order; for a GPU prepared in a thread that ends with the block.

    For a CPU, which computes the model with all its cores, they are prepared on demand.
    """
    if not accelerator.has_own_memory(device.type):
        yield map(prepare, numbers)
        return
    # The thread pins memory for the process's own GPU instead of creating a context on the first one.
    with ThreadPoolExecutor(1, "l2p-batches", accelerator.choose, (device,)) as pool:
        try:
            yield _taken_ahead(pool, prepare, numbers)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _taken_ahead(
    pool: ThreadPoolExecutor, prepare: Callable[[int], Prepared], numbers: Iterable[int]
) -> Iterator[Prepared]:
    waiting: deque[Future[Prepared]] = deque()
    for number in numbers:
        waiting.append(pool.submit(prepare, number))
        if len(waiting) > _AHEAD:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
