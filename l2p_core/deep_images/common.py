"""The common part of the readers of deep images: errors, libraries, and conversion of values to pixels."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

MAX_PIXELS = 178_956_970
"""Pillow's guard against decompression bombs, which holds for its formats; a square of 10240 pixels is 105 million."""
FARTHEST = (-1.0, 2.0)
"""If black is 0 and white is 1, values beyond these limits are not overshoot but another unit."""
NOT_FINITE = "it holds values that are not finite (NaN or infinity): replace them"


KEEP_DEPTH = "save it as PNG or TIFF with 16 bits to keep them"


class BrokenImage(ValueError):
    """An image file whose content cannot be decoded; the message describes the problem without the file's name."""


class ImageInfo(NamedTuple):
    """The facts about a file that need no decoding.

    Attributes:
        width, height: in pixels, upright.
        frames: the number of images in it.
        rounded: bits per channel of a file that is read with 8 all the same; 0 of every other.
    """

    width: int
    height: int
    frames: int = 1
    rounded: int = 0


@contextmanager
def one_error(verdict: Callable[[Exception], BrokenImage], chained: bool = True) -> Iterator[None]:
    """Turns a library's various errors within the block into one class, except those of the disk and of memory, which
    say nothing about the image.

    Args:
        verdict: the error to raise for another one.
        chained: whether the traceback shows that one as well.

    Raises:
        BrokenImage: for all others.
    """
    try:
        yield
    except (BrokenImage, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise verdict(error) from (error if chained else None)


def damaged(error: Exception) -> BrokenImage:
    """The verdict on a file that a library cannot decode, with the library's words."""
    return BrokenImage(f"it is damaged or truncated ({str(error)[:100] or type(error).__name__})")


def library(package: str, files: str) -> ModuleType:
    """A module of an optional package.

    Args:
        package: its name; a dotted one is a module in it.
        files: what needs it, such as "DICOM files".

    Raises:
        BrokenImage: if it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        name = package.partition(".")[0]
        raise BrokenImage(f"{files} need the package {name}: install it into the Python that runs this") from error


def check_size(width: int, height: int) -> None:
    """Raises BrokenImage for an image without pixels, or with more than are safe to decode."""
    if min(width, height) < 1:
        raise BrokenImage("it has no pixels")
    if width * height > MAX_PIXELS:
        raise BrokenImage("it has more pixels than are safe to decode: make it smaller")


class Values(NamedTuple):
    """An image as stored in its file.

    Attributes:
        values: (H, W) or (H, W, C) with 1 or 3 channels, or 2 or 4 with alpha; integers or floats.
        black, white: the values of black and of white; white may be the smaller one.
        alpha: the alpha channel's value of an opaque pixel; None without one.
        associated: whether colours are already multiplied by alpha.
        clip: whether values beyond black and white are clipped to them.
    """

    values: np.ndarray
    black: float = 0.0
    white: float = 1.0
    alpha: float | None = None
    associated: bool = False
    clip: bool = False


def to_pixels(image: Values) -> Tensor:
    """The image as (3, H, W) float32, black -1 and white 1, transparent pixels on white; grey in all three channels.

    A channel of 16 bits is exact: `to_levels` returns the same integers.

    Raises:
        BrokenImage: if a value is not finite, or far from black and white.
    """
    colours, alpha = _channels(image)
    if alpha is not None:
        rest = 1 - alpha
        colours = colours.add_(rest) if image.associated else colours.mul_(alpha).add_(rest)
    return _in_three(colours.mul_(2).sub_(1))


def to_colours(image: Values) -> tuple[Tensor, Tensor | None]:
    """The image as (3, H, W) float32, black 0 and white 1, and its alpha channel (H, W), 1 where it is opaque, if it
    has one. Colours are not multiplied by alpha, so that transparent pixels keep theirs. Errors as for `to_pixels`.

    Floats are the file's own numbers, which a shift to [-1, 1] would round near black.
    """
    colours, alpha = _channels(image)
    if alpha is not None and image.associated:
        colours = torch.where(alpha > 0, colours / alpha, colours)
    return _in_three(colours), alpha


def to_levels(pixels: Tensor) -> np.ndarray:
    """(3, H, W) in [-1, 1] as integers (H, W, 3) from 0 to 65535, rounded to the nearest and clamped."""
    levels = ((pixels.float() + 1) * 32767.5).round_().clamp_(0, 65535)
    return np.ascontiguousarray(levels.permute(1, 2, 0).numpy(), np.uint16)


def to_floats(pixels: Tensor) -> np.ndarray:
    """(3, H, W) in [-1, 1] as float32 (H, W, 3) in [0, 1]; values beyond stay beyond."""
    return np.ascontiguousarray(((pixels.float() + 1) / 2).permute(1, 2, 0).numpy())


def turned(pixels: Tensor, orientation: int) -> Tensor:
    """(C, H, W) rotated upright from an EXIF or TIFF orientation, 1 to 8."""
    turn = {
        2: lambda x: x.flip(2),
        3: lambda x: x.flip(1, 2),
        4: lambda x: x.flip(1),
        5: lambda x: x.mT,
        6: lambda x: x.rot90(-1, (1, 2)),
        7: lambda x: x.flip(1, 2).mT,
        8: lambda x: x.rot90(1, (1, 2)),
    }.get(orientation)
    return pixels if turn is None else turn(pixels).contiguous()


def _channels(image: Values) -> tuple[Tensor, Tensor | None]:
    """The colours (1 or 3, H, W) as the file has them, from black 0 to white 1, and alpha (H, W)."""
    values = image.values if image.values.ndim == 3 else image.values[..., None]
    count = values.shape[2] - (image.alpha is not None)
    if count not in (1, 3):
        raise BrokenImage(f"it has {count} colour channels: save it as grey or RGB")
    colours = torch.empty(count, *values.shape[:2])
    for channel in range(count):
        colours[channel] = torch.from_numpy(_scaled(values[..., channel], image.black, image.white))
    if image.clip:
        colours.clamp_(0, 1)
    _check_values(colours, values)
    if image.alpha is None:
        return colours, None
    alpha = torch.from_numpy(_scaled(values[..., -1], 0.0, image.alpha)).clamp_(0, 1)
    if not alpha.isfinite().all():
        raise BrokenImage(NOT_FINITE)
    return colours, alpha


def _in_three(colours: Tensor) -> Tensor:
    return colours if colours.shape[0] == 3 else colours.expand(3, -1, -1).contiguous()


def _scaled(values: np.ndarray, black: float, white: float) -> np.ndarray:
    """Black as 0 and white as 1, float32; 32-bit integers and doubles are rounded only at the end."""
    exact = np.result_type(values.dtype, np.float32)
    scaled = values.astype(exact)
    if black:
        scaled -= exact.type(black)
    scaled /= exact.type(white - black)
    return np.ascontiguousarray(scaled, np.float32)


def _check_values(colours: Tensor, values: np.ndarray) -> None:
    if not np.issubdtype(values.dtype, np.floating):
        return
    lowest, highest = (float(value) for value in colours.aminmax())
    if not np.isfinite([lowest, highest]).all():
        raise BrokenImage(NOT_FINITE)
    least, most = FARTHEST
    if lowest < least or highest > most:
        raise BrokenImage(
            f"its values range from {lowest:.4g} to {highest:.4g}, but float images have 0 for black and 1 for white: "
            "divide them by their range"
        )
