"""The images of each micro-batch: a pure function of the batch's number, with all images from one bucket.

Every bucket has an endless stream of its images, epoch after epoch, each shuffled again; its batches are consecutive
slices of it, and may cross from one epoch into the next. Over the epochs, a bucket gets batches in proportion to its
images, so that every image is shown equally often, however small its bucket. Nothing depends on earlier draws.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


class Schedule:
    """The order of batches over buckets.

    Args:
        counts: images of each bucket, 1 or more.
        batch_size: images of a micro-batch, over all processes.
        seed: of the shuffling.
    """

    def __init__(self, counts: Sequence[int], batch_size: int, seed: int):
        self.counts = list(counts)
        self.batch_size = batch_size
        self.seed = seed
        # Buckets of the same size would otherwise all be due in the same epochs.
        self._lead = [batch_size * bucket // len(self.counts) for bucket in range(len(self.counts))]
        self._turns = functools.lru_cache(maxsize=2)(self._make_turns)
        # A batch touches two epochs of its bucket at most, more only for buckets smaller than a batch.
        self._orders = functools.lru_cache(maxsize=2 * len(self.counts) + 2)(self._make_order)

    def batch(self, number: int) -> tuple[int, list[int]]:
        """The bucket of micro-batch `number`, and the positions in the bucket's stream of its images."""
        epoch = self.epoch(number)
        turns = self._turns(epoch)
        turn = number - self.batches_before(epoch)
        bucket = int(turns[turn])
        index = self._due(bucket, epoch) + int((turns[:turn] == bucket).sum())
        first = index * self.batch_size
        return bucket, list(range(first, first + self.batch_size))

    def order(self, bucket: int, position: int) -> tuple[Tensor, int]:
        """The order of a bucket's images in the epoch of a stream position, and the index within it."""
        epoch, place = divmod(position, self.counts[bucket])
        return self._orders(bucket, epoch), place

    def epoch(self, number: int) -> int:
        """The epoch that micro-batch `number` is in, from 0."""
        # Flooring delays each bucket by less than one batch, which bounds the epoch from above.
        most = (number + 1 + len(self.counts)) * self.batch_size // sum(self.counts) + 1
        return bisect.bisect_right(range(most + 1), number, key=self.batches_before) - 1

    def batches_before(self, epoch: int) -> int:
        """Micro-batches in all epochs before this one."""
        return sum(self._due(bucket, epoch) for bucket in range(len(self.counts)))

    def _due(self, bucket: int, epoch: int) -> int:
        """Batches of a bucket in all epochs before this one."""
        return (epoch * self.counts[bucket] + self._lead[bucket]) // self.batch_size

    def _make_turns(self, epoch: int) -> Tensor:
        """The bucket of each batch of an epoch, shuffled."""
        buckets = range(len(self.counts))
        repeats = torch.tensor([self._due(bucket, epoch + 1) - self._due(bucket, epoch) for bucket in buckets])
        turns = torch.arange(len(self.counts)).repeat_interleave(repeats)
        return turns[shuffled(len(turns), f"turns of epoch {epoch}", self.seed)]

    def _make_order(self, bucket: int, epoch: int) -> Tensor:
        return shuffled(self.counts[bucket], f"order of bucket {bucket} in epoch {epoch}", self.seed)


def shuffled(count: int, purpose: str, seed: int) -> Tensor:
    """The indices below `count` in an order of their own for each purpose and seed."""
    digest = hashlib.sha256(f"{purpose}, seed {seed}".encode()).digest()
    return torch.randperm(count, generator=torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1))
