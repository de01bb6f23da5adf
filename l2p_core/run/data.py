"""A run's data, streamed in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from torch import Tensor

from .. import tiny
from ..config import VARIANTS, PixelConfig
from ..dataset.image_folder import ImageFolder
from ..dataset.images import from_uint8
from ..dataset.loader import Loader
from ..dataset.problems import Problem
from ..distributed.ranks import Ranks
from ..patch_pairs import PatchPairs, in_folder
from ..tiny import bundled, image_set
from ..tiny.image_set import ImageSet
from ..tiny.shapes import IMAGE_SIZE
from ..tiny.worlds import SHAPES, TinyWorld
from ..training.batch import BatchSource
from ..training.trainer import Working
from .recipe import DataSection, Recipe

Features = Callable[[str], Tensor]
"""A caption's features, (L, caption_dim)."""

PAIRED = 64
"""Images whose patches are paired at a time."""


@dataclass(frozen=True)
class RunData:
    """The data that a run trains on, ready to be streamed.

    Attributes:
        images: a data folder, or the tiny set in memory.
        features: of the captions, those of the montages and the empty one included.
    """

    images: ImageFolder | ImageSet
    features: Features = field(default_factory=lambda: tiny.load_words().encode)

    @property
    def fingerprint(self) -> str:
        """A fingerprint of the samples and their order, besides the recipe."""
        return self.images.fingerprint if isinstance(self.images, ImageFolder) else ""

    @contextmanager
    def stream(self, recipe: Recipe, ranks: Ranks) -> Iterator[tuple[BatchSource, Callable[[], list[Problem]]]]:
        """Batches of this process's part, to be used within the block, and what returns the samples skipped so far."""
        index, parts = ranks.part(recipe.training.accumulate, recipe.data.batch_size)
        size, seed = recipe.data.batch_size // parts, recipe.data.seed
        if isinstance(self.images, ImageSet):
            yield image_set.Batches(self.images, self.features, size, seed, index, parts), list
            return
        with Loader(
            self.images,
            self.features,
            batch_size=size,
            seed=seed,
            rank=index,
            world_size=parts,
            workers=recipe.data.workers,
            max_bad_share=recipe.data.max_bad_share,
            window=recipe.data.dicom,
        ) as loader:
            yield loader, lambda: loader.problems


def tiny_images(section: DataSection, folder: Path, working: Working, world: TinyWorld = SHAPES) -> ImageSet:
    """The images of the kinds "tiny" and "renderings", from the cache in `folder` or generated now."""
    made = partial(image_set.generated, caption_of=world.caption_of)
    if section.kind == "renderings":
        return made(world.rendered, section.images, section.seed, folder, "renderings")
    source = bundled.TinySource(world)
    generate = partial(source.images, steps=section.steps, cfg=section.cfg)
    name = source.name(section.steps, section.cfg)
    progress = partial(working, "images of the source")
    return made(generate, section.images, section.seed, folder, name, progress)


def pairs_of(recipe: Recipe, found: RunData) -> PatchPairs:
    """The patch pairs of the images that a run trains on.

    Raises:
        ValueError: if their making left none, or the file is damaged.
    """
    if isinstance(found.images, ImageSet):
        return tiny_pairs(found.images)
    return in_folder(pairs_place(recipe))


def pairs_place(recipe: Recipe) -> Path:
    """The location of the patch pairs for a run on a data folder: a folder, or the file itself."""
    given = Path(recipe.model.pairs or recipe.data.path)
    # The data may be one table in its folder.
    return given.parent if given.is_file() and not recipe.model.pairs else given


def tiny_pairs(images: ImageSet, world: TinyWorld = SHAPES) -> PatchPairs:
    """The pairs of images of a bundled source's world."""
    autoencoder = world.load_autoencoder()
    pairs = PatchPairs(VARIANTS["1k"].patch_size, autoencoder.channels)
    for part in images.pixels.split(PAIRED):
        pixels = from_uint8(part)
        pairs.add(pixels, autoencoder.encode(pixels))
    return pairs


def image_side(recipe: Recipe, config: PixelConfig) -> int:
    """The side in pixels of a square of the training images' area."""
    if recipe.data.kind != "folder":
        return IMAGE_SIZE
    return recipe.data.size or VARIANTS[config.variant].pixels
