"""The supported image formats: raster formats, by their names in Pillow and its plugins; and EXR and DICOM."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

from PIL import Image

from ..deep_images.dicom import SUFFIXES as DICOM_SUFFIXES
from ..deep_images.reading import DICOM, EXR, PACKAGES

_SUFFIXES = {
    "PNG": (".png", ".apng"),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "DIB": (".dib",),
    "TIFF": (".tif", ".tiff"),
    "GIF": (".gif",),
    "AVIF": (".avif",),
    "JPEG2000": (".jp2", ".j2k", ".jpx"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "QOI": (".qoi",),
    "TGA": (".tga",),
    "HEIF": (".heic", ".heif", ".hif"),
    "JXL": (".jxl",),
    EXR: (".exr",),
    DICOM: DICOM_SUFFIXES,
}
SUFFIXES = {suffix: name for name, suffixes in _SUFFIXES.items() for suffix in suffixes}
"""A file's suffix and its format; of animations, the first image is read."""

FORMATS = tuple(_SUFFIXES)
"""No other formats are opened: some that Pillow knows run programs (EPS) or contain no pixels."""

UNMARKED = "TGA"
"""A format without a signature, accepted only for files with its suffix."""

FROM_MACHINES = ("PNG", "JPEG", "WEBP")
"""The formats of images that a host sends."""


class Plugin(NamedTuple):
    """A package that adds a format to Pillow: its name, its module, and the function that registers it."""

    package: str
    module: str
    register: Callable[[Any], object]


PLUGINS = {
    "HEIF": Plugin("pillow-heif", "pillow_heif", lambda module: module.register_heif_opener()),
    "JXL": Plugin("pillow-jxl-plugin", "pillow_jxl", lambda module: None),
    "AVIF": Plugin("pillow-avif-plugin", "pillow_avif", lambda module: None),
}
"""Used if they are installed and Pillow does not support the format itself."""


@functools.cache
def known() -> frozenset[str]:
    """The formats of FORMATS that can be read here."""
    Image.init()
    for name, plugin in PLUGINS.items():
        if name not in Image.OPEN:
            try:
                plugin.register(importlib.import_module(plugin.module))
            except ImportError:
                continue
    return frozenset(name for name in FORMATS if name in Image.OPEN)


def of_suffix(suffix: str) -> tuple[str, ...]:
    """The possible formats of a file with this suffix, as the argument `formats` of Pillow's open."""
    return tuple(
        name for name in FORMATS if name in known() and (name != UNMARKED or SUFFIXES.get(suffix.lower()) == UNMARKED)
    )


_INSTALL = "install it into the Python that runs this"


def unreadable(suffix: str) -> str | None:
    """Why files of this suffix cannot be read here, and what to do; None if they can."""
    name = SUFFIXES.get(suffix.lower())
    package = PACKAGES.get(name or "")
    if name in known() or (package and importlib.util.find_spec(package)):
        return None
    if package:
        return f"{suffix} files need the package {package}: {_INSTALL}"
    advice = "save it as PNG or JPEG"
    if name in PLUGINS:
        return f"{suffix} files need the package {PLUGINS[name].package}: {_INSTALL}, or {advice}"
    if name:
        return f"{suffix} files cannot be read by this version of Pillow: {advice}"
    if not suffix:
        return "files without a suffix are not read: add the format's suffix, such as .png, or .dcm for DICOM"
    return f"{suffix} files are not read: {advice}"
