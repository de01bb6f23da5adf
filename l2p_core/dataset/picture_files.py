"""Pixels as image files of 8, 16 or float depth, by the names of the files."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import NamedTuple

from torch import Tensor

from ..deep_images import exr, png, tiff
from ..deep_images.common import to_floats, to_levels
from . import pictures

Encode = Callable[[Tensor, Mapping[str, str]], bytes]
"""Encodes (3, H, W) in [-1, 1] on the CPU, with ASCII texts (JSON) for the file's metadata, as the file's content."""


class PictureWriter(NamedTuple):
    """A format at a depth: 8 or 16 bits, or floats."""

    suffixes: tuple[str, ...]
    depth: str
    package: str
    encode: Encode


WRITERS = (
    PictureWriter((".png",), "8", "PIL", lambda pixels, text: pictures.png(pictures.picture(pixels), text)),
    PictureWriter((".png",), "16", "av", png.encode),
    PictureWriter((".tif", ".tiff"), "16", "tifffile", lambda pixels, text: tiff.encode(to_levels(pixels), text)),
    PictureWriter((".tif", ".tiff"), "float", "tifffile", lambda pixels, text: tiff.encode(to_floats(pixels), text)),
    PictureWriter((".exr",), "float", "av", exr.encode),
)
"""The first row of a suffix is its default."""


def writer(name: str, depth: str | None = None) -> PictureWriter:
    """The writer of a file.

    Args:
        name: of the file.
        depth: "8", "16" or "float"; None is the default of the format.

    Raises:
        ValueError: if files of this name are not written, or not at this depth, or a package is missing.
    """
    suffix = PurePath(name).suffix.lower()
    of_format = [writer for writer in WRITERS if suffix in writer.suffixes]
    if not of_format:
        raise ValueError(f"{name} is not the name of an image that is written: end it in .png, .tif or .exr.")
    found = next((writer for writer in of_format if depth in (None, writer.depth)), None)
    if found is None:
        depths = " or ".join(writer.depth for writer in of_format)
        raise ValueError(f"{suffix} files have a depth of {depths}, not {depth}: choose that, or another format.")
    if importlib.util.find_spec(found.package) is None:
        raise ValueError(
            f"{found.suffixes[0]} files of this depth need the package {found.package}: install it, or choose another "
            "format."
        )
    return found
