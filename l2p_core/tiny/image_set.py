"""The tiny training set in memory: images with captions and the seeds they were generated from, and their batches."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..dataset.images import from_uint8, to_uint8
from ..dataset.schedule import shuffled
from ..files.metadata import KIND as KIND_KEY
from ..files.tensor_file import load_tensors, save
from ..files.tensor_io import ProgressCallback
from ..training.batch import Batch
from . import shapes

PART = 256  # images of a cached file; a stop can lose as many

Generate = Callable[[Sequence[str], Sequence[int]], Tensor]
"""Captions and seeds -> (B, 3, H, W) in [-1, 1]."""


@dataclass(frozen=True)
class ImageSet:
    """Images in memory.

    Attributes:
        pixels: (N, 3, H, W) uint8.
        captions: N texts.
        seeds: N seeds, of the noise each image was generated from.
    """

    pixels: Tensor
    captions: list[str]
    seeds: list[int]


class Batches:
    """Shuffled micro-batches of an image set, as a pure function of their number (`batch.BatchSource`).

    Every epoch has its own order, drawn from the seed and the epoch's number; a batch may cross into the next.

    Args:
        images: at least one.
        encode: caption to features (L, caption_dim); called once per caption.
        batch_size: images of this process's micro-batch.
        seed: of the shuffling.
        rank, world_size: this process's rank and the number of processes, see `dataset.loader.Loader`.
    """

    def __init__(
        self,
        images: ImageSet,
        encode: Callable[[str], Tensor],
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.images = images
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self._features = {caption: encode(caption) for caption in dict.fromkeys(images.captions)}
        # A batch touches two epochs at most, more only for sets smaller than a batch.
        self._order = functools.lru_cache(maxsize=2)(
            lambda epoch: shuffled(len(images.captions), f"order of epoch {epoch}", seed)
        )

    def batch(self, number: int) -> Batch:
        """The micro-batch `number`, counted from 0 over the whole run."""
        first = (number * self.world_size + self.rank) * self.batch_size
        numbers = list(range(first, first + self.batch_size))
        rows = [self._row(sample) for sample in numbers]
        return Batch(
            pixels=from_uint8(self.images.pixels[rows]),
            captions=[self._features[self.images.captions[row]] for row in rows],
            numbers=numbers,
            seeds=[self.images.seeds[row] for row in rows],
        )

    def _row(self, sample: int) -> int:
        epoch, position = divmod(sample, len(self.images.captions))
        return int(self._order(epoch)[position])


def caption_of(number: int, seed: int = 0) -> str:
    """The caption of image `number` of the tiny training set."""
    rng = random.Random(f"caption {number}, seed {seed}")
    return shapes.random_caption(rng, shapes.random_scene(rng).attributes)


def seed_of(number: int, seed: int = 0) -> int:
    """The noise seed of image `number` of the tiny training set, apart from those used for evaluation."""
    return random.Random(f"noise {number}, seed {seed}").randrange(1 << 32, 1 << 48)


def generated(
    generate: Generate,
    count: int,
    seed: int,
    folder: Path,
    name: str,
    progress: ProgressCallback | None = None,
    caption_of: Callable[[int, int], str] = caption_of,
) -> ImageSet:
    """The first `count` images of a generated training set, generated once and cached in parts.

    Image i has a caption and noise that depend only on i and `seed`, so a larger set begins with the smaller one and
    both share their files.

    Args:
        generate: generates images, see `Generate`.
        count: images, 1 or more.
        seed: of captions and noise.
        folder: of the cached files, created if missing.
        name: prefix of the files' names; identifies the model and settings of the images.
        progress: called with (images present, total images).
        caption_of: an image's caption, from its number and `seed`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for start in range(0, count, PART):
        path = folder / f"{name}-{seed}-{start:06d}.safetensors"
        if not path.exists():
            _make_part(generate, start, seed, path, caption_of)
        parts.append(_load_part(path))
        if progress:
            progress(min(start + PART, count), count)
    return ImageSet(
        torch.cat([part.pixels for part in parts])[:count],
        [caption for part in parts for caption in part.captions][:count],
        [number for part in parts for number in part.seeds][:count],
    )


def rendered(captions: Sequence[str], seeds: Sequence[int]) -> Tensor:
    """Clean renderings of the captions, a `Generate`: the comparison with the source's images."""
    scenes = [
        shapes.random_scene(random.Random(seed), shapes.parse_caption(caption))
        for caption, seed in zip(captions, seeds, strict=True)
    ]
    return shapes.render(scenes)


def _make_part(generate: Generate, start: int, seed: int, path: Path, caption_of: Callable[[int, int], str]) -> None:
    numbers = range(start, start + PART)
    captions, seeds = [caption_of(number, seed) for number in numbers], [seed_of(number, seed) for number in numbers]
    pixels = to_uint8(generate(captions, seeds))
    metadata = {KIND_KEY: "images", "captions": json.dumps(captions), "seeds": json.dumps(seeds)}
    save({"pixels": pixels}, path, metadata)


def _load_part(path: Path) -> ImageSet:
    tensors, metadata = load_tensors(path)
    if metadata.get(KIND_KEY) != "images":
        raise ValueError(f"{path} is not a file of cached images: move it away; it will be created again.")
    return ImageSet(tensors["pixels"], json.loads(metadata["captions"]), json.loads(metadata["seeds"]))
