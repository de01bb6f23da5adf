"""Selects the reader for a file's content."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from . import dicom, exr, png, tiff
from .common import ImageInfo, Values, library, to_colours, to_pixels, turned

PNG, TIFF, EXR, DICOM = "PNG", "TIFF", "EXR", "DICOM"
PACKAGES = {EXR: "av", DICOM: "pydicom"}
"""The package without which no file of a format can be read."""

_START = 132  # bytes that tell a format and a PNG's depth
_FILES = {PNG: ("av", png.FILES), EXR: ("av", exr.FILES)}
"""Formats whose headers are read without the package that decodes them."""
_LOOKS: dict[str, Callable[[Path], ImageInfo]] = {TIFF: tiff.look, EXR: exr.look, DICOM: dicom.look}


def format_of(path: Path, is_deep_tiff: Callable[[Path], bool]) -> str | None:
    """The format of a file with more than 8 bits per channel; None for every other file.

    Args:
        path: the file.
        is_deep_tiff: called for a TIFF, most of which have 8 bits.

    Raises:
        OSError: if the file cannot be read.
    """
    if path.suffix.lower() in dicom.SUFFIXES:
        return DICOM
    with path.open("rb") as file:
        start = file.read(_START)
    if start.endswith(dicom.MAGIC):  # scanners name files without a suffix, and a table may name them so
        return DICOM
    if png.is_deep(start):
        return PNG
    if start.startswith(exr.MAGIC):
        return EXR
    return TIFF if tiff.is_tiff(start) and is_deep_tiff(path) else None


def require(name: str) -> None:
    """Raises BrokenImage if the package that decodes a format is missing: to be known before a run begins."""
    if name in _FILES:
        library(*_FILES[name])


def look(path: Path, name: str) -> ImageInfo:
    """The header of a file of the format `name`, which is not PNG.

    Raises:
        BrokenImage: if it is damaged or of a kind that is not read, has too many pixels, or needs a missing package.
        OSError: if the file cannot be read.
    """
    return _LOOKS[name](path)


def load(path: Path, name: str, orientation: int, frame: int, window: str) -> Tensor:
    """A file of the format `name` as (3, H, W) float32 in [-1, 1], upright. Errors as for `look`.

    Memory: 12 bytes for each pixel of the file beside the file's own numbers.

    Args:
        path: the file.
        name: see `format_of`.
        orientation: of PNG, 1 to 8; other formats say it themselves.
        frame: of DICOM, counted from 0.
        window: of DICOM, see `dicom.check_window`.
    """
    values, orientation = _decoded(path, name, orientation, frame, window, on_white=True)
    return turned(to_pixels(values), orientation)


def load_colours(path: Path, name: str, orientation: int, frame: int, window: str) -> tuple[Tensor, Tensor | None]:
    """A file as colours (3, H, W) and alpha (H, W), see `to_colours`, upright. Arguments and errors as for `load`."""
    values, orientation = _decoded(path, name, orientation, frame, window, on_white=False)
    colours, alpha = to_colours(values)
    return turned(colours, orientation), None if alpha is None else turned(alpha[None], orientation)[0]


def _decoded(path: Path, name: str, orientation: int, frame: int, window: str, on_white: bool) -> tuple[Values, int]:
    """The values of a file and the orientation by which they must be turned."""
    if name == TIFF:
        return tiff.decode(path)
    if name == DICOM:
        return dicom.decode(path, frame, window), orientation
    return png.decode(path) if name == PNG else exr.decode(path, on_white), orientation
