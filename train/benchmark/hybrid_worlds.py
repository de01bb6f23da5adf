"""The tiny worlds that `l2p benchmark hybrid` measures in: their models, their captions and their judges."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ...l2p_core import delta
from ...l2p_core.checkpoint import load_model, open_checkpoint
from ...l2p_core.hybrid import resized
from ...l2p_core.model import L2PModel, LatentModel
from ...l2p_core.tiny import bundled, judge, shapes
from ...l2p_core.tiny.autoencoder import Autoencoder
from ...l2p_core.tiny.scenes import judge as scene_judge
from ...l2p_core.tiny.scenes import rendering
from ...l2p_core.tiny.scenes.content import RELATIONS, relation_of
from ...l2p_core.tiny.words import Words
from ...l2p_core.tiny.worlds import WORLDS, rendered_scenes
from .patch_distance import patch_distance


@dataclass(frozen=True)
class Judged:
    """Images as judged: whole captions right, in [0, 1], the distance to clean renderings, each image's attributes by
    name, and those that make its layout.

    In the first world the distance is the mean over images to the nearest rendering; in the second, whose captions
    leave images open, it is `patch_distance` to renderings of the same captions and size. The layout is what is where,
    without the details of form: colour, place and background in the first world, both objects' colours and their
    relation in the second.
    """

    whole: float
    distance: float
    attributes: Sequence[tuple[str, ...]]
    layout: Sequence[tuple[str, ...]]


@dataclass(frozen=True)
class World:
    """Models of one world in float32, and how its images are judged.

    Attributes:
        large: a pixel model for larger images, made from `pixels`, or None.
        side: of the images that `latent` and `pixels` were trained at, in pixels.
        cfg: guidance of all methods.
        identity: changes whenever a model does.
        captions: the first n of a fixed list.
        judged: of square images (B, 3, H, H) in [-1, 1] of any size.
    """

    latent: LatentModel
    codec: Autoencoder
    words: Words
    pixels: L2PModel
    large: L2PModel | None
    side: int
    cfg: float
    identity: str
    captions: Callable[[int], list[str]]
    judged: Callable[[Tensor, Sequence[str]], Judged]

    @property
    def large_side(self) -> int:
        """The side of the images that `large` makes, of 16 tokens in either world."""
        assert self.large is not None
        return 4 * self.large.config.patch_size


def open_world(name: str, pixels: Path | None = None, large: Path | None = None) -> World:
    """A world with its bundled models, or with pixel models of yours.

    Args:
        name: a key of `tiny.worlds.WORLDS`.
        pixels: a delta on the world's source, or a whole L2P model; None for the bundled one.
        large: the same for larger images, of a variant with larger patches.

    Raises:
        ValueError: if no pixel model comes with the world and none is given, or the models do not fit each other.
        CheckpointError: for files that are not pixel models of this source.
    """
    tiny = WORLDS[name]
    pixels = pixels or _BUNDLED.get(name)
    if pixels is None:
        raise ValueError(
            f"No pixel model comes with the world {name}: train one from its source, and name the file with --pixels."
        )
    files = [pixels, *([large] if large else [])]
    models = [_pixel_model(file, tiny.source) for file in files]
    return World(
        tiny.load_source(),
        tiny.load_autoencoder(),
        tiny.load_words(),
        models[0],
        _larger(models),
        tiny.side,
        tiny.cfg,
        _identity(name, [tiny.source, *files]),
        tiny.captions,
        _JUDGED[name],
    )


def _pixel_model(file: Path, source: Path) -> L2PModel:
    opened = open_checkpoint(file)
    if opened.is_delta:
        return delta.load_model(file, source, dtype=torch.float32).eval()
    return load_model(opened, dtype=torch.float32).eval()


def _larger(models: Sequence[L2PModel]) -> L2PModel | None:
    if len(models) == 1:
        return None
    small, large = (model.config.patch_size for model in models)
    if large <= small or large % small:
        raise ValueError(
            f"The model for large images has patches of {large} pixels and the other of {small}: give one of a larger "
            "variant, such as 4k."
        )
    return models[1]


def _identity(name: str, files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return f"{name}-{digest.hexdigest()[:8]}"


def _judged_shapes(images: Tensor, captions: Sequence[str]) -> Judged:
    images = _at(images, shapes.IMAGE_SIZE)
    score = judge.score(images, captions)
    seen, _ = judge.recognise(images)
    attributes: list[tuple[str, ...]] = [(one.shape, one.colour, one.place, one.background) for one in seen]
    return Judged(score.whole, score.residual, attributes, [names[1:] for names in attributes])


def _judged_scenes(images: Tensor, captions: Sequence[str]) -> Judged:
    clean = rendered_scenes(captions, range(len(captions)), images.shape[-1])
    distance = patch_distance(images, clean)
    images = _at(images, rendering.IMAGE_SIZE)
    attributes = [_scene_attributes(found) for found in scene_judge.recognise(images)]
    layout = [(names[1], names[4], names[6]) for names in attributes]
    return Judged(scene_judge.score(images, captions).whole, distance, attributes, layout)


def _scene_attributes(found: scene_judge.Found) -> tuple[str, ...]:
    """The attributes of both objects in the order of their names, and their relation."""
    if len(found.objects) != 2:
        return ("",) * 7
    order = sorted((0, 1), key=lambda i: (found.objects[i].colour, found.objects[i].kind))
    relation = RELATIONS[int(relation_of(found.centre[order][None]))]
    told = [found.objects[i] for i in order]
    return (*(str(name) for one in told for name in (one.kind, one.colour, one.texture)), relation)


def _at(images: Tensor, side: int) -> Tensor:
    """Images (B, 3, H, H) at the size that a judge reads: averaged down where they are a multiple of it."""
    if images.shape[-1] % side == 0:
        return F.avg_pool2d(images, images.shape[-1] // side)
    return resized(images, (side, side))


_BUNDLED = {"shapes": bundled.DELTA}
"""The pixel model that comes with a world."""
_JUDGED: dict[str, Callable[[Tensor, Sequence[str]], Judged]] = {"shapes": _judged_shapes, "scenes": _judged_scenes}
