"""DICOM images, through pydicom.

Only those elements of a file's header that its pixels need are read: no name, number or date of a patient enters a
message, a cache or anything that is written. Section numbers are those of the standard's part 3 (PS3.3).
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import numpy as np

from .common import BrokenImage, ImageInfo, Values, check_size, library, one_error

FILES = "DICOM files"
SUFFIXES = (".dcm", ".dicom", ".ima")
MAGIC = b"DICM"
"""Follows a preamble of 128 bytes without meaning (part 10, 7.1)."""
WINDOW, FULL = "window", "full"
_TAGS = [
    *("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated"),
    *("BitsStored", "HighBit", "PixelRepresentation", "PlanarConfiguration", "PixelPaddingValue"),
    *("RescaleSlope", "RescaleIntercept", "ModalityLUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction"),
    *("RedPaletteColorLookupTableDescriptor", "RedPaletteColorLookupTableData"),
    *("GreenPaletteColorLookupTableDescriptor", "GreenPaletteColorLookupTableData"),
    *("BluePaletteColorLookupTableDescriptor", "BluePaletteColorLookupTableData"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "BurnedInAnnotation"),
]
_GREY = ("MONOCHROME1", "MONOCHROME2")
_COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
_PALETTE = "PALETTE COLOR"


def check_window(window: str) -> str | tuple[float, float]:
    """How values become grey: WINDOW, FULL, or the (centre, width) in a text such as "40/400".

    Raises:
        ValueError: for any other text.
    """
    if window in (WINDOW, FULL):
        return window
    try:
        centre, width = (float(part) for part in window.split("/"))
    except ValueError:
        centre, width = math.nan, math.nan
    if not (math.isfinite(centre) and math.isfinite(width) and width >= 1):
        raise ValueError(
            f'dicom must be "{WINDOW}", "{FULL}" or a centre and a width of 1 or more such as "40/400", not {window!r}.'
        )
    return centre, width


def _verdict(error: Exception) -> BrokenImage:
    """pydicom's own messages may contain data about the patient."""
    if isinstance(error, OSError):
        return BrokenImage("it is damaged or truncated")
    if type(error).__name__ == "InvalidDicomError":
        return BrokenImage("it is not a DICOM file")
    said = str(error)
    if "missing dependencies" in said:
        return BrokenImage(
            "no installed package decodes its compression: install pylibjpeg with its plugins, or save it uncompressed"
        )
    if "all available plugins" in said and "pylibjpeg" not in said:  # Pillow decodes some files of a compression only
        return BrokenImage(
            "it is damaged, or its compression needs pylibjpeg: install that with its plugins, or save the file "
            "uncompressed"
        )
    return BrokenImage(f"it is damaged or truncated ({type(error).__name__})")


@one_error(_verdict, chained=False)
def look(path: Path) -> ImageInfo:
    """The size and the number of frames.

    Raises:
        BrokenImage: if it is not a DICOM image, has too many pixels or colours of a kind that is not read, or says that
            text is burned into its pixels, which may name the patient.
        OSError: if the file cannot be read.
    """
    header = _header(path)
    _kind(header)
    if _frames(header) * _least_bytes(header) > path.stat().st_size:  # each would become an image of the data set
        raise BrokenImage("it is damaged or truncated")
    return ImageInfo(int(header.Columns), int(header.Rows), _frames(header))


@one_error(_verdict, chained=False)
def decode(path: Path, frame: int, window: str) -> Values:
    """A frame's values after the modality's rescaling, between black and white.

    Args:
        path: the file.
        frame: counted from 0.
        window: see `check_window`. WINDOW is the file's own first window, or FULL if it has none; FULL reaches from the
            least to the greatest value of all its frames. Colours have no window.

    Raises:
        BrokenImage: as for `look`, and if it is damaged or no installed package decodes its compression.
        OSError: if the file cannot be read.
    """
    chosen = check_window(window)
    header = _header(path)
    kind = _kind(header)
    if kind in _COLOUR:
        return Values(_frame(path, header, frame), white=float(2 ** int(header.BitsStored) - 1))
    if kind == _PALETTE:
        palette = library("pydicom.pixels", FILES).apply_color_lut
        values = palette(_frame(path, header, frame), header)
        return Values(values, white=float(np.iinfo(values.dtype).max))
    values = _rescaled(_frame(path, header, frame), header, frame)
    black, white = 0.0, 1.0
    limits = _window_of(header, frame) if chosen == WINDOW else None
    if isinstance(chosen, tuple):
        limits = (*chosen, "LINEAR")
    if limits is None:
        stat = path.stat()
        black, white = _range(path, stat.st_mtime_ns, stat.st_size)
    elif limits[2] == "SIGMOID":
        values = 1 / (1 + np.exp(-4 * (values - limits[0]) / limits[1]))
    else:
        black, white = _edges(*limits)
    return Values(values, *((white, black) if kind == "MONOCHROME1" else (black, white)), clip=True)


def _kind(header: Any) -> str:
    """The photometric interpretation, which must be a supported one."""
    if str(header.get("BurnedInAnnotation", "")).upper() == "YES":
        raise BrokenImage(
            "text is burned into its pixels (Burned In Annotation), which may name the patient: remove it"
        )
    kind = str(header.get("PhotometricInterpretation", ""))
    if kind not in (*_GREY, *_COLOUR, _PALETTE):
        raise BrokenImage("its photometric interpretation is not supported: save it as MONOCHROME2 or RGB")
    return kind


def _edges(centre: float, width: float, function: str) -> tuple[float, float]:
    """The values of black and white (C.11.2.1.2 and C.11.2.1.3.2)."""
    if function == "LINEAR_EXACT":
        return centre - width / 2, centre + width / 2
    half = max(width - 1, 1e-3) / 2  # a width of 1 is a threshold
    return centre - 0.5 - half, centre - 0.5 + half


@functools.lru_cache(maxsize=256)
def _range(path: Path, modified: int, size: int) -> tuple[float, float]:
    """The least and the greatest rescaled value of all frames, padding (C.7.5.1.1.2) aside."""
    header = _header(path)
    padding = header.get("PixelPaddingValue")
    least, greatest = math.inf, -math.inf
    for frame in range(_frames(header)):
        stored = _frame(path, header, frame)
        values = _rescaled(stored, header, frame)
        if isinstance(padding, int):
            values = values[stored != padding]
        if values.size:
            least, greatest = min(least, float(values.min())), max(greatest, float(values.max()))
    if least > greatest:
        return 0.0, 1.0
    return least, greatest if greatest > least else least + 1


def _rescaled(stored: np.ndarray, header: Any, frame: int) -> np.ndarray:
    """Stored values as the modality's, such as Hounsfield units, float64 (C.11.1)."""
    if "ModalityLUTSequence" in header:
        modality = library("pydicom.pixels", FILES).apply_modality_lut
        return np.asarray(modality(stored, header), np.float64)
    slope, intercept = (_number(header, frame, name) for name in ("RescaleSlope", "RescaleIntercept"))
    return stored.astype(np.float64) * (1.0 if slope is None else slope) + (intercept or 0.0)


def _window_of(header: Any, frame: int) -> tuple[float, float, str] | None:
    centre, width = (_number(header, frame, name) for name in ("WindowCenter", "WindowWidth"))
    if centre is None or width is None or width <= 0:
        return None
    function = _element(header, frame, "VOILUTFunction")
    return centre, width, "LINEAR" if function is None else str(function).upper()


def _number(header: Any, frame: int, name: str) -> float | None:
    """An element's first number, if it has one."""
    value = _element(header, frame, name)
    if value is not None and not isinstance(value, str | float | int):
        value = value[0] if len(value) else None  # several windows: the first is the preferred one
    number = None if value is None else float(value)
    if number is not None and not math.isfinite(number):
        raise BrokenImage("its window or rescaling is not a number")
    return number


def _element(header: Any, frame: int, name: str) -> Any:
    """An element of the image, of a frame's own groups, or of those that all frames share (C.7.6.16)."""
    if header.get(name) is not None:
        return header.get(name)
    of_frames = header.get("PerFrameFunctionalGroupsSequence") or []
    for groups in (of_frames[frame : frame + 1], header.get("SharedFunctionalGroupsSequence") or []):
        for group in groups:
            for of_kind in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
                for item in group.get(of_kind) or []:
                    if item.get(name) is not None:
                        return item.get(name)
    return None


def _frames(header: Any) -> int:
    return max(1, int(header.get("NumberOfFrames") or 1))


def _least_bytes(header: Any) -> int:
    """The minimum bytes of a frame in the file: those of all its pixels, or of an empty item if it is compressed."""
    syntax = getattr(header.file_meta, "TransferSyntaxUID", None)
    if syntax is None or syntax.is_compressed or syntax.is_deflated:
        return 8
    bits = int(header.get("BitsAllocated") or 1) * int(header.get("SamplesPerPixel") or 1)
    pixels = int(header.Rows) * int(header.Columns)
    half = str(header.get("PhotometricInterpretation", "")) == "YBR_FULL_422"  # two pixels share their colours
    return pixels * bits // 8 * 2 // 3 if half else pixels * bits // 8


def _header(path: Path) -> Any:
    config = library("pydicom.config", FILES)
    # pydicom's warnings of unusual values quote them.
    config.settings.reading_validation_mode = config.IGNORE
    header = library("pydicom", FILES).dcmread(path, stop_before_pixels=True, specific_tags=_TAGS)
    if rows := header.get_item("Rows"):  # as read: pydicom notes the encoding of the transfer syntax
        header.set_original_encoding(rows.is_implicit_VR, rows.is_little_endian)
    if header.get("Rows") is None or header.get("Columns") is None:
        raise BrokenImage("it has no pixels")
    check_size(int(header.Columns), int(header.Rows))
    return header


def _frame(path: Path, header: Any, frame: int) -> np.ndarray:
    pixel_array = library("pydicom.pixels", FILES).pixel_array
    source = path
    if not _has_places(header):
        source = library("pydicom", FILES).dcmread(path, specific_tags=[*_TAGS, "PixelData"])
    values: np.ndarray = pixel_array(source, index=frame)
    return values


def _has_places(header: Any) -> bool:
    """Whether pydicom finds a frame by its place in the file. It takes the transfer syntax's word for how elements are
    encoded, which writers have got wrong, and a file that is deflated as a whole has no places."""
    syntax = getattr(header.file_meta, "TransferSyntaxUID", None)
    if syntax is None:
        return True
    encoded = (syntax.is_implicit_VR, syntax.is_little_endian)
    return not syntax.is_deflated and header.original_encoding == encoded
