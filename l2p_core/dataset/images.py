"""Image files as pixels of a requested size.

Headers are read without decoding; an image is decoded once, directly to the requested size. Files with more than 8 bits
a channel are read without rounding by `deep_images`, all others by Pillow. Colour profiles are ignored, as in published
trainers: pixels are treated as sRGB.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..deep_images import reading
from ..deep_images.common import KEEP_DEPTH as KEEP_DEPTH
from ..deep_images.common import BrokenImage as BrokenImage
from ..deep_images.common import ImageInfo, check_size, damaged, one_error, turned
from ..deep_images.dicom import WINDOW
from ..deep_images.stated_bits import stated_bits
from . import formats

_WIDTH_TAG, _HEIGHT_TAG, _BITS_TAG, _ORIENTATION_TAG = 0x0100, 0x0101, 0x0102, 0x0112
_TURNED = (5, 6, 7, 8)
_WORD = 257  # 65535 / 255, from 16 bits to 8
_UNKNOWN = "it is not an image of a known format"
_DRAFT_GAP = 2  # a JPEG is decoded at a smaller scale if that leaves at least this many pixels per output pixel


def look(path: Path) -> ImageInfo:
    """The displayed width and height of an image file, the number of its frames, and whether it is read with fewer bits
    than it has, from its header alone.

    Only frames of DICOM files count; of other formats, the first image is read.

    Raises:
        BrokenImage: if it is not an image, or has more pixels than Pillow's guard against decompression bombs allows
            (179 million; a square of 10240 pixels is 105 million, at which it warns once).
        OSError: if the file cannot be read, for example because a disk fails.
    """
    name = reading.format_of(path, _is_deep_tiff)
    if name is not None:
        reading.require(name)
    if name not in (None, reading.PNG):
        return reading.look(path, name)
    with opened(path) as image:
        width, height = _shown_size(image)
        check_size(width, height)
        bits = stated_bits(path, image.format)
        return ImageInfo(width, height, rounded=bits if bits > 8 else 0)


def load(path: Path, width: int, height: int, frame: int = 0, window: str = WINDOW) -> Tensor:
    """Decode an image, rotate it upright, crop it centrally to the requested shape and resize: (3, height, width),
    uint8; of a file with more than 8 bits per channel float32 in [-1, 1], see `as_pixels`.

    Transparent pixels are composited on white. Resizing averages over the source area of each pixel (Lanczos). Memory:
    4 bytes for each pixel of the file, and the same again if it must be converted or has transparent pixels; with more
    than 8 bits about 20.

    Args:
        path: the file.
        width, height: in pixels.
        frame: of a DICOM file, counted from 0.
        window: how a DICOM file's values become grey, see `deep_images.dicom.check_window`.

    Raises:
        BrokenImage: if the file is not an image, is truncated or damaged, or holds too many pixels.
        OSError: if the file cannot be read, for example because a disk fails.
    """
    name = reading.format_of(path, _is_deep_tiff)
    if name is not None:
        return fitted(reading.load(path, name, _orientation_of(path, name), frame, window), width, height)
    with opened(path) as image:
        # Before decoding, which may add metadata from later in the file that the header's reader did not see.
        orientation = _orientation(image)
        shown = (height, width) if orientation in _TURNED else (width, height)
        _draft(image, shown)
        with decoding():
            pixels = _on_white(_fitted(_plain(image), shown))
    return _upright(pixels, orientation).contiguous()


def load_whole(path: Path, frame: int = 0, window: str = WINDOW) -> tuple[Tensor, Tensor | None]:
    """Decode an image in its own size, upright: colours (3, H, W), float32 from black 0 to white 1, and the alpha
    channel (H, W), 1 where it is opaque, if it has one. Transparent pixels keep their colours.

    Args and errors as for `load`. Memory: about 28 bytes for each pixel.
    """
    name = reading.format_of(path, _is_deep_tiff)
    if name is not None:
        return reading.load_colours(path, name, _orientation_of(path, name), frame, window)
    with opened(path) as image:
        orientation = _orientation(image)
        with decoding():
            channels = _upright(_plain(image), orientation).float().div_(255)
    return channels[:3].contiguous(), channels[3].contiguous() if channels.shape[0] == 4 else None


def fitted(pixels: Tensor, width: int, height: int) -> Tensor:
    """(C, H, W) float32, cropped centrally to a shape and resized to it, (C, height, width), like images of 8 bits.

    At scale 1 pixels are copied, not filtered. No value leaves [-1, 1] unless the image does.
    """
    across, down = pixels.shape[2] - width, pixels.shape[1] - height
    if min(across, down) == 0:
        top, left = down // 2, across // 2
        return pixels[:, top : top + height, left : left + width].contiguous()
    lowest, highest = pixels.aminmax()
    images = (_fitted(Image.fromarray(channel.numpy()), (width, height)) for channel in pixels)
    result = torch.stack([torch.from_numpy(np.array(image)) for image in images])
    return result.clamp_(lowest.clamp(max=-1), highest.clamp(min=1))


def to_uint8(pixels: Tensor) -> Tensor:
    """[-1, 1] to 0..255."""
    return ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def from_uint8(pixels: Tensor) -> Tensor:
    """0..255 to [-1, 1], float32."""
    return pixels.float() / 127.5 - 1


def as_pixels(loaded: Tensor) -> Tensor:
    """Convert the result of `load` to float32 in [-1, 1]."""
    return from_uint8(loaded) if loaded.dtype == torch.uint8 else loaded


def opened(file: Path | IO[bytes], wanted: tuple[str, ...] | None = None) -> Image.Image:
    """An image with its header read, a context manager.

    Args:
        file: its path or content.
        wanted: the formats that it may have, by Pillow's names; None means all supported ones of its suffix
            (`formats`).

    Raises:
        BrokenImage: if it has none of these formats, is damaged, or has too many pixels.
        OSError: if the file cannot be read, for example because a disk fails.
    """
    if wanted is None:
        wanted = formats.of_suffix(file.suffix if isinstance(file, Path) else "")
    with decoding(wanted):
        return Image.open(file, formats=wanted)


def _is_deep_tiff(path: Path) -> bool:
    """Whether a TIFF has more than 8 bits in a channel, from its header; true for kinds that Pillow does not know."""
    try:
        with opened(path, ("TIFF",)) as image:
            bits = image.tag_v2.get(_BITS_TAG, 1)
    except BrokenImage as error:
        return _UNKNOWN in str(error)
    return max(bits if isinstance(bits, tuple) else (bits,)) > 8


def _orientation_of(path: Path, name: str) -> int:
    """The EXIF orientation of a deep PNG, 1 to 8; other deep formats state it themselves."""
    if name != reading.PNG:
        return 1
    with opened(path, ("PNG",)) as image:
        return _orientation(image)


def decoding(wanted: Sequence[str] = ()) -> AbstractContextManager[None]:
    """Turns Pillow's errors within the block into one class, see `one_error`.

    Args:
        wanted: the formats that the image may have, for the message.
    """

    def verdict(error: Exception) -> BrokenImage:
        if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
            return BrokenImage("it has more pixels than are safe to decode: make it smaller")
        if isinstance(error, UnidentifiedImageError):
            return BrokenImage(f"{_UNKNOWN} ({', '.join(wanted)})")
        return damaged(error)

    return one_error(verdict)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation by which pixels must still be rotated, 1 to 8; 1 for a damaged header."""
    if image.format == "TIFF":
        return 1  # Pillow turns these itself when it decodes
    try:
        # The base class's method: that of PNG would decode the whole image to read what follows it.
        value = Image.Image.getexif(image).get(_ORIENTATION_TAG, 1)
    except MemoryError:
        raise
    except Exception:
        return 1
    return value if value in range(1, 9) else 1


def _shown_size(image: Image.Image) -> tuple[int, int]:
    if image.format == "TIFF":
        # Whether an undecoded image's size is that of the rotated one depends on Pillow's version.
        tags = image.tag_v2  # type: ignore[attr-defined]
        width, height, orientation = tags[_WIDTH_TAG], tags[_HEIGHT_TAG], tags.get(_ORIENTATION_TAG, 1)
    else:
        width, height, orientation = *image.size, _orientation(image)
    return (height, width) if orientation in _TURNED else (width, height)


def _draft(image: Image.Image, wanted: tuple[int, int]) -> None:
    """Make a JPEG much larger than requested decode at 1/2, 1/4 or 1/8."""
    scale = min(image.width / wanted[0], image.height / wanted[1]) / _DRAFT_GAP
    if scale >= 2:
        image.draft(image.mode, (int(image.width / scale), int(image.height / scale)))


def _plain(image: Image.Image) -> Image.Image:
    """The decoded image as RGB, or as RGBA if it has transparent pixels."""
    image.load()
    if image.mode == "F":
        raise BrokenImage("it holds floating point numbers: save it with 8 bits per channel")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).clip(0, 65535).astype(np.uint16) // _WORD
        return Image.fromarray(values.astype(np.uint8)).convert("RGB")
    transparent = image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info
    wanted = "RGBA" if transparent else "RGB"
    return image if image.mode == wanted else image.convert(wanted)


def _fitted(image: Image.Image, wanted: tuple[int, int]) -> Image.Image:
    return ImageOps.fit(image, wanted, Image.Resampling.LANCZOS)


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode != "RGBA":
        return image
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def _upright(image: Image.Image, orientation: int) -> Tensor:
    """The values of an image, (C, H, W), turned from its EXIF orientation."""
    return turned(torch.from_numpy(np.array(image)).permute(2, 0, 1), orientation)
