"""Which image files are read: raster formats, by the names that Pillow and its plugins give them."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

SUFFIXES = {
    ".png": "PNG",
    ".apng": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".jpe": "JPEG",
    ".jfif": "JPEG",
    ".mpo": "JPEG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".dib": "DIB",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".gif": "GIF",
    ".avif": "AVIF",
    ".jp2": "JPEG2000",
    ".j2k": "JPEG2000",
    ".jpx": "JPEG2000",
    ".ppm": "PPM",
    ".pgm": "PPM",
    ".pbm": "PPM",
    ".pnm": "PPM",
    ".qoi": "QOI",
    ".tga": "TGA",
    ".heic": "HEIF",
    ".heif": "HEIF",
    ".hif": "HEIF",
    ".jxl": "JXL",
}
"""A file's suffix and its format; of animations, the first image is read."""

FORMATS = tuple(dict.fromkeys(SUFFIXES.values()))
"""No others: some that Pillow knows run programs (EPS) or hold no pixels."""

UNMARKED = "TGA"
"""The format that has no mark at its beginning, so that only a file of that suffix is taken for it."""

FROM_MACHINES = ("PNG", "JPEG", "WEBP")
"""What a host sends of the images that it makes."""


class Plugin(NamedTuple):
    """A package that teaches Pillow a format: its name for people and for Python, and what registers it."""

    package: str
    module: str
    register: Callable[[Any], object]


PLUGINS = {
    "HEIF": Plugin("pillow-heif", "pillow_heif", lambda module: module.register_heif_opener()),
    "JXL": Plugin("pillow-jxl-plugin", "pillow_jxl", lambda module: None),
    "AVIF": Plugin("pillow-avif-plugin", "pillow_avif", lambda module: None),
}
"""Taken where they are installed, and where Pillow does not know the format by itself."""


def pillow() -> ModuleType:
    """Pillow's module of images.

    Raises:
        ValueError: if it is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ValueError("Reading images needs Pillow: install it with 'pip install pillow'.") from error
    return Image


@functools.cache
def known() -> frozenset[str]:
    """Those of FORMATS that can be read here."""
    module = pillow()
    module.init()
    for name, plugin in PLUGINS.items():
        if name not in module.OPEN:
            try:
                plugin.register(importlib.import_module(plugin.module))
            except ImportError:
                continue
    return frozenset(name for name in FORMATS if name in module.OPEN)


def of_suffix(suffix: str) -> tuple[str, ...]:
    """The formats that a file of this suffix may have here, as `formats` of Pillow's open."""
    return tuple(
        name for name in FORMATS if name in known() and (name != UNMARKED or SUFFIXES.get(suffix.lower()) == UNMARKED)
    )


def unreadable(suffix: str) -> str | None:
    """Why files of this suffix cannot be read here, and what to do; None if they can."""
    name = SUFFIXES.get(suffix.lower())
    if name in known():
        return None
    advice = "save it as PNG or JPEG"
    if name in PLUGINS:
        return f"{suffix} files need the package {PLUGINS[name].package}: install it, or {advice}"
    if name:
        return f"{suffix} files cannot be read by this version of Pillow: {advice}"
    return f"{suffix or 'its kind of'} files are not read: {advice}"
