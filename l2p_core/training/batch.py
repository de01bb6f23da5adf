"""Batches of samples for the training loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
