"""Batches streamed from disk: threads decode images in advance, captions are read from their cache.

A micro-batch is a pure function of its number (`batch.BatchSource`), broken images included: an image that cannot be
decoded is replaced by the next good one in its bucket's order, which depends on the files alone, so that a resumed run
or one with other processes uses the same replacement.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..deep_images.dicom import WINDOW
from ..training.batch import Batch
from . import images
from .buckets import ImageSize
from .image_folder import Image, ImageFolder
from .problems import MAX_BAD_SHARE, Problem, check_share
from .readers import Sample
from .schedule import Schedule

_READ_TRIES = 3
_SECONDS_BETWEEN_TRIES = 1.0


class Loader(AbstractContextManager["Loader"]):
    """Shuffled micro-batches of a data folder, each from one bucket; a `batch.BatchSource`, and a context manager.

    `world_size` processes with batches of b together see the samples that one process with batches of world_size * b
    sees.

    Args:
        data: see `image_folder.open_folder`.
        features: a caption's features (L, caption_dim), such as `CaptionCache.read`; called in threads.
        batch_size: images of this process's micro-batch.
        seed: of the shuffling.
        rank, world_size: this process's rank and the number of processes.
        workers: threads. Each holds at most one file's pixels at 4 bytes per pixel, or 20 with more than 8 bits.
        prefetch: micro-batches prepared in advance, at 3 bytes per pixel, or 12 with more than 8 bits.
        max_bad_share: share of bad samples above which the run stops.
        window: how values of DICOM files become grey, see `deep_images.dicom.check_window`.

    Raises:
        ValueError: for numbers out of range.
    """

    def __init__(
        self,
        data: ImageFolder,
        features: Callable[[str], Tensor],
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 4,
        prefetch: int = 2,
        max_bad_share: float = MAX_BAD_SHARE,
        window: str = WINDOW,
    ):
        if min(batch_size, world_size, workers) < 1 or prefetch < 0 or not 0 <= rank < world_size:
            raise ValueError(
                "batch_size, world_size and workers must be 1 or more, prefetch 0 or more, and rank below world_size."
            )
        self.data = data
        self.batch_size, self.rank = batch_size, rank
        self.prefetch, self.max_bad_share = prefetch, max_bad_share
        self._features, self._window = features, window
        groups: dict[ImageSize, list[Image]] = {}
        for image in data.images:
            groups.setdefault(image.bucket, []).append(image)
        self._sizes = sorted(groups)
        self._groups = [groups[size] for size in self._sizes]
        self.schedule = Schedule([len(group) for group in self._groups], batch_size * world_size, seed)
        self._broken: dict[Path, str] = {}
        self._lock = threading.Lock()
        self._ahead: dict[int, list[Future[_Loaded]]] = {}
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="l2p-loader")

    def batch(self, number: int) -> Batch:
        """The micro-batch `number`, counted from 0 over the whole run: pixels (B, 3, H, W) in [-1, 1].

        Raises:
            TooManyProblems: a ValueError with the list, when more than the allowed share of samples is bad.
            ValueError: when a file cannot be read, or a caption is not in the cache.
        """
        wanted = range(number, number + 1 + self.prefetch)
        for stale in [other for other in self._ahead if other not in wanted]:
            self._cancel(stale)
        for upcoming in wanted:
            if upcoming not in self._ahead:
                self._ahead[upcoming] = self._submit(upcoming)
        loaded = [future.result() for future in self._ahead.pop(number)]
        pixels = torch.stack([images.as_pixels(sample.pixels) for sample in loaded])
        first = number * self.schedule.batch_size + self.rank * self.batch_size
        return Batch(
            pixels=pixels,
            captions=[sample.caption for sample in loaded],
            numbers=list(range(first, first + self.batch_size)),
            seeds=[sample.image.sample.seed for sample in loaded],
        )

    @property
    def problems(self) -> list[Problem]:
        """Skipped samples: the data folder's problems, and images that could not be decoded since."""
        with self._lock:
            broken = dict(self._broken)
        met = [
            Problem(image.sample.name, broken[image.sample.path])
            for image in self.data.images
            if image.sample.path in broken
        ]
        return self.data.problems + met

    def close(self) -> None:
        """Stop the threads; no batches may be requested afterwards."""
        for number in list(self._ahead):
            self._cancel(number)
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __exit__(self, *_: object) -> None:
        self.close()

    def _submit(self, number: int) -> list[Future[_Loaded]]:
        bucket, positions = self.schedule.batch(number)
        own = positions[self.rank * self.batch_size :][: self.batch_size]
        return [self._pool.submit(self._load, bucket, position) for position in own]

    def _cancel(self, number: int) -> None:
        for future in self._ahead.pop(number):
            future.cancel()

    def _load(self, bucket: int, position: int) -> _Loaded:
        """The image at a position of a bucket's stream, or the next one that can be decoded."""
        for image in self._candidates(bucket, position):
            if image.sample.path in self._broken:
                continue
            try:
                pixels = _decode(image.sample, self._sizes[bucket], self._window)
            except images.BrokenImage as error:
                self._leave_out(image, str(error))
            else:
                return _Loaded(image, pixels, self._features(image.sample.caption))
        raise ValueError(f"No image of {self.data.folder} can be decoded.")

    def _candidates(self, bucket: int, position: int) -> Iterator[Image]:
        """The intended image, then its replacements: its bucket's images in order, then all others."""
        order, place = self.schedule.order(bucket, position)
        for step in range(len(order)):
            yield self._groups[bucket][int(order[(place + step) % len(order)])]
        yield from itertools.chain.from_iterable(self._groups)

    def _leave_out(self, image: Image, reason: str) -> None:
        with self._lock:
            self._broken[image.sample.path] = reason
        check_share(self.problems, self.data.total, self.max_bad_share)


class _Loaded(NamedTuple):
    """A sample ready for a batch: pixels (3, H, W) as `images.load` returns them, caption features (L, caption_dim)."""

    image: Image
    pixels: Tensor
    caption: Tensor


def _decode(sample: Sample, size: ImageSize, window: str) -> Tensor:
    """Decode a sample's image; a failing disk or network is retried and does not count against the image.

    Raises:
        BrokenImage: if the content is not a complete image.
        ValueError: if the file cannot be read.
    """
    for left in reversed(range(_READ_TRIES)):
        try:
            return images.load(sample.path, *size, sample.frame, window)
        except OSError as error:
            if not left:
                raise ValueError(
                    f"{sample.path} cannot be read ({error.strerror or error}): restore it or repair its disk, then "
                    "resume from the last save."
                ) from error
            time.sleep(_SECONDS_BETWEEN_TRIES)
    raise AssertionError
