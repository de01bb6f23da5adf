"""The size of an image: as typed, as the model was trained, or in an aspect ratio of that area."""

from __future__ import annotations

import math
from typing import Any

from ..l2p_core.config import VARIANTS, ModelConfig, PixelConfig
from ..l2p_core.sources import sampling_of
from ..l2p_core.tiny.bundled import is_tiny
from ..l2p_core.tiny.shapes import IMAGE_SIZE
from .options import AS_TYPED, ASPECTS, MIN_SIDE, OF_MODEL

_FAR = 2.0
"""Factor from the trained size, by the side of a square of the same area, at which a warning appears."""

_DEFAULT_SIDE = 1024

OWN_SIZE = f"Width and height {OF_MODEL} take the model's own size."
"""Advice in nodes with these inputs."""


def own_side(config: ModelConfig | None) -> int:
    """The side in pixels of the images that a model was trained on; that of the 1k models without a model."""
    if config is None:
        return _DEFAULT_SIDE
    # The bundled source, which has no variant, makes images of the size of its 1k model.
    side = VARIANTS[config.variant if isinstance(config, PixelConfig) else "1k"].pixels
    return IMAGE_SIZE * side // VARIANTS["1k"].pixels if is_tiny(config) else side


def chosen_size(config: PixelConfig | None, width: int, height: int, aspect: str = AS_TYPED) -> tuple[int, int]:
    """Width and height in pixels.

    Args:
        config: of the model; None if none is connected.
        width, height: in pixels, or OF_MODEL for the model's own side.
        aspect: AS_TYPED, or a key of ASPECTS: then the size has that shape and the model's own area, with sides that
            are multiples of the model's patch.

    Raises:
        ValueError: for sides between OF_MODEL and MIN_SIDE.
    """
    side = own_side(config)
    if aspect != AS_TYPED:
        across, down = ASPECTS[aspect]
        multiple = config.patch_size if config else MIN_SIDE
        scale = side / math.sqrt(across * down)
        return _rounded(across * scale, multiple), _rounded(down * scale, multiple)
    check_sides(width, height, "the model's own size")
    return width or side, height or side


def check_sides(width: int, height: int, of_zero: str) -> None:
    """Raises ValueError for sides of a few pixels; `of_zero` is what 0 stands for."""
    for name, value in (("width", width), ("height", height)):
        if value != OF_MODEL and value < MIN_SIDE:
            raise ValueError(f"The {name} is {value}: use {MIN_SIDE} pixels or more, or {OF_MODEL} for {of_zero}.")


def far_from_trained(config: PixelConfig, width: int, height: int) -> str:
    """A warning for sizes at which the model was not trained, otherwise empty."""
    side = own_side(config)
    factor = math.sqrt(width * height) / side
    if 1 / _FAR < factor < _FAR:
        return ""
    what = "larger" if factor > 1 else "smaller"
    return (
        f"{width} x {height} is much {what} than the {side} x {side} pixels that this model was trained at: the image "
        "may come out wrong."
    )


def settings_of(config: PixelConfig) -> str:
    """The loaded model and the KSampler settings for it, in one line."""
    published, side = sampling_of(config), own_side(config)
    name = "Tiny L2P model" if is_tiny(config) else f"L2P {config.variant} model"
    settings = f"{published.steps} steps, cfg {published.cfg:g}, euler, simple"
    return f"{name}, {side} x {side} pixels. In KSampler: {settings}."


def l2p_config(model: Any) -> PixelConfig | None:
    """The sizes of an L2P MODEL, None for any other."""
    return getattr(getattr(model, "model", None), "l2p", None)


def _rounded(side: float, multiple: int) -> int:
    return max(MIN_SIDE, round(side / multiple) * multiple)
