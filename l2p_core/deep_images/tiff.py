"""TIFF with more than 8 bits per channel, integers and floats, through tifffile."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..version import __version__
from .common import BrokenImage, ImageInfo, Values, check_size, damaged, library, one_error

FILES = "TIFF files with more than 8 bits per channel"
_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_ORIENTATION_TAG = 274
_TURNED = (5, 6, 7, 8)
_NOT_AN_IMAGE = 0b101  # subfile types: a smaller copy, or a mask
_WHITE, _BLACK, _RGB = 0, 1, 2  # photometric interpretations; the first two name what 0 is
_ASSOCIATED, _STRAIGHT = 1, 2  # meanings of an extra channel that is alpha


def is_tiff(start: bytes) -> bool:
    """Whether a file that begins with these bytes is a TIFF, of any depth."""
    return start.startswith(_STARTS)


def look(path: Path) -> ImageInfo:
    """The size, upright.

    Raises:
        BrokenImage: if it is damaged, has several pages, or too many pixels.
        OSError: if the file cannot be read.
    """
    with _page(path) as page:
        width, height = page.imagewidth, page.imagelength
        return ImageInfo(height, width) if _orientation(page) in _TURNED else ImageInfo(width, height)


def decode(path: Path) -> tuple[Values, int]:
    """The pixels, and the orientation by which they must be turned; errors as for `look`, or for kinds not read."""
    with _page(path) as page:
        colours = _colours(page)
        extra = page.samplesperpixel - colours
        if extra and (not page.extrasamples or page.extrasamples[0] not in (_ASSOCIATED, _STRAIGHT)):
            raise BrokenImage(
                f"it has {page.samplesperpixel} channels, not all of them colours: save it as grey or RGB"
            )
        values = page.asarray(maxworkers=1)
        if page.planarconfig == 2 and values.ndim == 3:
            values = np.moveaxis(values, 0, -1)
        values = values.reshape(page.imagelength, page.imagewidth, -1)[..., : colours + bool(extra)]
        top = _top(page)
        black, white = (top, 0.0) if page.photometric == _WHITE else (0.0, top)
        associated = bool(extra) and page.extrasamples[0] == _ASSOCIATED
        return Values(values, black, white, top if extra else None, associated), _orientation(page)


def encode(image: np.ndarray, text: Mapping[str, str]) -> bytes:
    """(H, W, 3), uint16 or float32 with 0 for black and 1 for white, as a file without compression.

    Args:
        image: its values, written as they are.
        text: ASCII texts, each of them JSON; they become one JSON object in the file's description.

    Raises:
        BrokenImage: if tifffile is not installed.
    """
    tifffile = library("tifffile", "TIFF files")
    content = io.BytesIO()
    tifffile.imwrite(
        content,
        image,
        photometric="rgb",
        metadata=None,
        description=json.dumps({key: json.loads(value) for key, value in text.items()}) if text else None,
        software=f"comfyui_l2p {__version__}",
    )
    return content.getvalue()


@contextmanager
def _page(path: Path) -> Iterator[Any]:
    """The one page of a file, checked."""
    tifffile = library("tifffile", FILES)
    with one_error(_verdict), tifffile.TiffFile(path) as file:
        pages = [page for page in file.pages if not int(page.subfiletype) & _NOT_AN_IMAGE]
        count = max(len(pages), int((file.imagej_metadata or {}).get("images", 1)))
        if count != 1:
            raise BrokenImage(f"it has {count} pages: save each in its own file" if count else "it has no pixels")
        page = pages[0].aspage()
        check_size(page.imagewidth, page.imagelength)
        _check_whole(page, path)
        # Raises KeyError where a package is missing, which is to be known before a run begins.
        _ = tifffile.TIFF.DECOMPRESSORS[page.compression], tifffile.TIFF.UNPREDICTORS[page.predictor]
        yield page


def _verdict(error: Exception) -> BrokenImage:
    if "imagecodecs" in str(error):
        return BrokenImage(
            "its compression needs the package imagecodecs: install it into the Python that runs this, or save the "
            "file uncompressed"
        )
    return damaged(error)


def _check_whole(page: Any, path: Path) -> None:
    """tifffile reads what lies behind the end of a file as black."""
    size = path.stat().st_size
    for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
        if offset + count > size:
            raise BrokenImage("it is damaged or truncated")


def _orientation(page: Any) -> int:
    tag = page.tags.get(_ORIENTATION_TAG)
    return int(tag.value) if tag is not None else 1


def _colours(page: Any) -> int:
    if page.photometric in (_WHITE, _BLACK):
        return 1
    if page.photometric == _RGB:
        return 3
    name = getattr(page.photometric, "name", "of an unknown kind")
    raise BrokenImage(f"its colours are {name}: save it as grey or RGB")


def _top(page: Any) -> float:
    """The value of white where black is 0."""
    kind = page.dtype
    if kind is None or kind.kind not in "uf":
        raise BrokenImage(f"its values are {kind or 'of an unknown type'}: save it as unsigned integers or as floats")
    return 1.0 if kind.kind == "f" else float(2**page.bitspersample - 1)
