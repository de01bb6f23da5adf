"""Batches of samples for the training loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor


@dataclass
class Batch:
    """The samples of one micro-batch.

    Attributes:
        pixels: (B, 3, H, W) in [-1, 1].
        captions: B captions, see `backbone.Caption`.
        numbers: each sample's number in the run, counted over all epochs; its randomness depends on it.
        seeds: the seed that the source drew each image's noise from, None if unknown.
    """

    pixels: Tensor
    captions: Sequence[Any]
    numbers: list[int]
    seeds: list[int | None]


class BatchSource(Protocol):
    """A data source: a pure function of the micro-batch's number, including shuffling."""

    def batch(self, number: int) -> Batch:
        """This process's part of the micro-batch `number`, counted from 0 over the whole run."""
        ...


class BatchShare:
    """One process's share of a batch source in memory: a part of each of its micro-batches.

    Args:
        batches: returns whole micro-batches.
        index, count: which of how many equal parts, see `ranks.Ranks.part`.
    """

    def __init__(self, batches: BatchSource, index: int, count: int):
        self.batches, self.index, self.count = batches, index, count

    def batch(self, number: int) -> Batch:
        """The part of micro-batch `number`."""
        batch = self.batches.batch(number)
        size = len(batch.numbers) // self.count
        own = slice(self.index * size, (self.index + 1) * size)
        return replace(
            batch,
            pixels=batch.pixels[own],
            captions=batch.captions[own],
            numbers=batch.numbers[own],
            seeds=batch.seeds[own],
        )
