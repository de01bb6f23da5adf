"""A run's data: opened and prepared first, then streamed in batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from torch import Tensor

from .. import tiny
from ..config import VARIANTS, PixelConfig
from ..dataset.image_folder import ImageFolder, open_folder
from ..dataset.images import from_uint8
from ..dataset.loader import Loader
from ..dataset.problems import Problem
from ..distributed.ranks import Ranks
from ..patch_pairs import PatchPairs, in_folder
from ..sources import source_of
from ..tiny import bundled, image_set
from ..tiny.image_set import ImageSet
from ..tiny.shapes import IMAGE_SIZE
from ..tiny.worlds import SHAPES, TinyWorld
from ..training.batch import BatchShare, BatchSource
from ..training.trainer import Working
from .caption_source import CaptionSource
from .recipe import DataSection, Recipe

Features = Callable[[str], Tensor]
"""A caption's features, (L, caption_dim)."""

PAIRED = 64
"""Images whose patches are paired at a time."""

CheckDisk = Callable[[Path, int], None]
"""Called with a folder and how many bytes will be written there, to refuse them."""


@dataclass(frozen=True)
class RunData:
    """The data that a run trains on, ready to be streamed.

    Attributes:
        images: a data folder, or the tiny set in memory.
        features: of the captions, those of the montages and the empty one included.
        cut: sentences on captions that are too long.
    """

    images: ImageFolder | ImageSet
    features: Features = field(default_factory=lambda: tiny.load_words().encode)
    cut: list[str] = field(default_factory=list)

    @property
    def fingerprint(self) -> str:
        """A fingerprint of the samples and their order, besides the recipe."""
        return self.images.fingerprint if isinstance(self.images, ImageFolder) else ""

    @property
    def notes(self) -> list[str]:
        """Sentences that the user should read before training."""
        return [*self.images.notes, *self.cut] if isinstance(self.images, ImageFolder) else []

    def stream(self, recipe: Recipe, ranks: Ranks) -> Stream:
        """Batches of this process's part."""
        index, parts = ranks.part(recipe.training.accumulate, recipe.data.batch_size)
        if isinstance(self.images, ImageSet):
            whole = image_set.Batches(self.images, self.features, recipe.data.batch_size, recipe.data.seed)
            return Stream(BatchShare(whole, index, parts))
        loader = Loader(
            self.images,
            self.features,
            batch_size=recipe.data.batch_size // parts,
            seed=recipe.data.seed,
            rank=index,
            world_size=parts,
            workers=recipe.data.workers,
            max_bad_share=recipe.data.max_bad_share,
            window=recipe.data.dicom,
        )
        return Stream(loader, loader, lambda: loader.problems)


@dataclass(frozen=True)
class Stream:
    """Batches, the context in which to use them, and the samples skipped so far."""

    batches: BatchSource
    block: AbstractContextManager[object] = field(default_factory=nullcontext)
    problems: Callable[[], list[Problem]] = list


def prepare(
    recipe: Recipe,
    config: PixelConfig,
    images: Path,
    index: Path,
    captions: CaptionSource | None,
    working: Working,
    check_disk: CheckDisk,
) -> RunData:
    """Open or make the images, and encode the captions that have no features yet.

    Args:
        recipe: with absolute paths.
        config: of the pixel model.
        images: folder for the images of the kinds "tiny" and "renderings".
        index: cache file of the sizes of a data folder's images.
        captions: of the kind "folder"; None uses the tiny model's words.
        working: shows the progress.
        check_disk: called before captions are encoded, to check the disk space.

    Raises:
        ValueError: if the data cannot be read, or the captions do not fit the model.
    """
    if recipe.data.kind != "folder":
        found = RunData(tiny_images(recipe.data, images, working))
        _check_width(found.features, config, f"Data of kind {recipe.data.kind!r} has the tiny model's captions")
        for prompt in recipe.watch.prompts:
            found.features(prompt)  # unknown words are reported now, not at the first montage
        return found
    if captions is None:
        raise ValueError(
            f"This model takes captions of {config.caption_dim} values per token: name their text encoder, "
            f"{source_of(config).encoder.title}, under [captions] encoder, as a folder or file."
        )
    folder = open_folder(
        recipe.data.path,
        area=image_side(recipe, config) ** 2,
        multiple=config.size_multiple,
        max_bad_share=recipe.data.max_bad_share,
        index=index,
        progress=partial(working, "looking at images"),
    )
    texts = [*folder.captions, *recipe.watch.prompts]
    check_disk(captions.folder, captions.bytes_to_encode(texts, config.caption_dim))
    cache = captions.fill(texts, partial(working, "encoding captions"))
    _check_width(cache.read, config, f"The text encoder makes captions ({captions.identity})")
    return RunData(folder, cache.read, _of_cut(cache.cut(texts), len(set(texts)), cache.max_tokens))


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


def _of_cut(cut: Mapping[str, int], total: int, max_tokens: int) -> list[str]:
    """A sentence on captions that are too long, if there are any."""
    if not cut:
        return []
    longest = max(cut, key=lambda caption: cut[caption])
    return [
        f"{len(cut)} of {total} captions are longer than the {max_tokens} tokens that the model takes and are cut "
        f"there; the longest, {longest[:60]!r}..., has {cut[longest]}."
    ]


def _check_width(features: Features, config: PixelConfig, whose: str) -> None:
    width = features("").shape[-1]
    if width != config.caption_dim:
        raise ValueError(
            f"{whose}, {width} values per token, but the model takes {config.caption_dim}: use the text encoder that "
            "it was trained with."
        )
