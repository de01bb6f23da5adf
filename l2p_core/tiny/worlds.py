"""The tiny worlds behind one interface: their files, captions, renderings and judges."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .. import tiny
from ..model import LatentModel
from . import image_set, judge, scenes, shapes
from .autoencoder import Autoencoder
from .scenes import captions as scene_captions
from .scenes import judge as scene_judge
from .scenes import rendering as scene_rendering
from .scenes.autoencoder import TrainedAutoencoder
from .scenes.content import Scenes, random_scenes
from .scenes.words import PhraseWords
from .words import Words


@dataclass(frozen=True)
class TinyWorld:
    """A world of images with captions.

    Attributes:
        name: in commands and results.
        side: of the images that the source generates, in pixels.
        cfg: guidance of the images that models are scored by.
        files: the source's weights, the autoencoder's and the words'.
        autoencoder, words: the classes of the latter two.
        attributes: what the judge scores beside the whole caption, in the order of tables.
        captions: the first n of the fixed list that models are scored by.
        score: shares in [0, 1] of images (B, 3, H, H) in [-1, 1] that show what their captions say: ``whole`` and each
            of `attributes`.
        caption_of: the caption of a training image, from its number and the set's seed.
        rendered: clean images of captions, one for each seed.
    """

    name: str
    side: int
    cfg: float
    files: tuple[Path, Path, Path]
    autoencoder: type[Autoencoder]
    words: type[Words]
    attributes: tuple[str, ...]
    captions: Callable[[int], list[str]]
    score: Callable[[Tensor, Sequence[str]], dict[str, float]]
    caption_of: Callable[[int, int], str]
    rendered: image_set.Generate

    @property
    def source(self) -> Path:
        """The source's file."""
        return self.files[0]

    def load_source(self) -> LatentModel:
        """The latent model in float32; errors as for `checkpoint.load_latent`."""
        return tiny.load_source(self.source)

    def load_autoencoder(self) -> Autoencoder:
        """The autoencoder in float32; errors as for `Autoencoder.load`."""
        return self.autoencoder.load(self.files[1])

    def load_words(self) -> Words:
        """The caption encoder; errors as for `Words.load`."""
        return self.words.load(self.files[2])

    def identity(self) -> str:
        """Eight characters that change when the source, its autoencoder or its words do."""
        return hashlib.sha256(b"".join(file.read_bytes() for file in self.files)).hexdigest()[:8]


def _scene_caption(number: int, seed: int) -> str:
    generator = torch.Generator().manual_seed(image_set.seed_of(number, seed))
    return scene_captions.caption(scene_captions.contents(random_scenes(1, generator), generator)[0])


def rendered_scenes(texts: Sequence[str], seeds: Sequence[int], side: int = scene_rendering.IMAGE_SIZE) -> Tensor:
    """Clean images (B, 3, side, side) of the second world's captions, one for each seed; see `rendering.render`."""
    parts = [
        random_scenes(1, torch.Generator().manual_seed(seed), [scene_captions.parse(text)])
        for text, seed in zip(texts, seeds, strict=True)
    ]
    return scene_rendering.render(Scenes.joined(parts), side)


SHAPES = TinyWorld(
    "shapes",
    shapes.IMAGE_SIZE,
    2.0,
    (tiny.SOURCE_PATH, tiny.AUTOENCODER_PATH, tiny.WORDS_PATH),
    Autoencoder,
    Words,
    ("shape", "colour", "place", "background"),
    shapes.evaluation_captions,
    lambda images, texts: judge.score(images, texts)._asdict(),
    image_set.caption_of,
    image_set.rendered,
)


def scenes_of(source: Path, autoencoder: Path, words: Path) -> TinyWorld:
    """The second world with these weights."""
    return TinyWorld(
        "scenes",
        scene_rendering.IMAGE_SIZE,
        4.0,
        (source, autoencoder, words),
        TrainedAutoencoder,
        PhraseWords,
        ("kind", "colour", "texture", "relation"),
        scene_captions.evaluation_captions,
        lambda images, texts: scene_judge.score(images, texts)._asdict(),
        _scene_caption,
        rendered_scenes,
    )


SCENES = scenes_of(scenes.SOURCE_PATH, scenes.AUTOENCODER_PATH, scenes.WORDS_PATH)
WORLDS = {world.name: world for world in (SHAPES, SCENES)}
