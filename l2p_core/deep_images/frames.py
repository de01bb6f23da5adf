"""PyAV's frames as arrays, plane by plane: of some formats it makes none, and its conversions between formats round."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np

from .common import BrokenImage, library

_PACKED = {
    "gray16be": (1, ">u2"),
    "gray16le": (1, "<u2"),
    "ya16be": (2, ">u2"),
    "ya16le": (2, "<u2"),
    "rgb48be": (3, ">u2"),
    "rgb48le": (3, "<u2"),
    "rgba64be": (4, ">u2"),
    "rgba64le": (4, "<u2"),
    "grayf32le": (1, "<f4"),
}
"""Pixel format: channels and number type of its one plane."""
_PLANAR = {"gbrpf32le": "<f4", "gbrapf32le": "<f4", "gbrpf16le": "<f2", "gbrapf16le": "<f2"}
"""Pixel format: number type of its planes, which are green, blue, red and alpha."""
_ORDER = (2, 0, 1, 3)


def decode(codec: str, content: bytes, files: str) -> np.ndarray:
    """The first image of a file's content, (H, W, C) in the file's own numbers.

    Args:
        codec: FFmpeg's name of the format.
        content: the whole file.
        files: what needs the library, see `library`.

    Raises:
        BrokenImage: if it is damaged, or of a kind that is not read.
    """
    av = library("av", files)
    try:
        context = av.CodecContext.create(codec, "r")
        # An image has no next frame to decode beside it, and threads would hand on no errors.
        context.thread_count = 1
        found = [*context.decode(av.Packet(content)), *context.decode(None)]
    except av.error.FFmpegError as error:
        raise BrokenImage("it is damaged or truncated") from error
    if not found:
        raise BrokenImage("it is damaged or truncated")
    return _array(found[0])


def encode(codec: str, pixels: np.ndarray, settings: dict[str, str], files: str) -> bytes:
    """An RGB image (H, W, 3), uint16 or float32, as a file's content."""
    av = library("av", files)
    frame = av.VideoFrame.from_ndarray(pixels, format="rgb48be" if pixels.dtype == np.uint16 else "gbrpf32le")
    context = av.CodecContext.create(codec, "w")
    context.width, context.height, context.pix_fmt = frame.width, frame.height, frame.format.name
    context.time_base = context.sample_aspect_ratio = Fraction(1, 1)
    context.options = settings
    frame.pts, frame.time_base = 0, context.time_base
    return b"".join(bytes(packet) for packet in [*context.encode(frame), *context.encode(None)])


def _array(frame: Any) -> np.ndarray:
    name, height, width = frame.format.name, frame.height, frame.width
    if name in _PACKED:
        channels, kind = _PACKED[name]
        return _rows(frame.planes[0], kind, height, width * channels).reshape(height, width, channels)
    if name in _PLANAR:
        planes = [_rows(plane, _PLANAR[name], height, width) for plane in frame.planes]
        return np.stack([planes[place] for place in _ORDER[: len(planes)]], -1)
    raise BrokenImage(f"its pixel format ({name}) is not supported: save it as RGB")


def _rows(plane: Any, kind: str, height: int, count: int) -> np.ndarray:
    """A plane's numbers (height, count), without the padding at the ends of its rows."""
    number = np.dtype(kind)
    rows = np.frombuffer(plane, np.uint8, height * plane.line_size).reshape(height, plane.line_size)
    values = np.ascontiguousarray(rows[:, : count * number.itemsize]).view(number)
    return values.astype(number.newbyteorder("="))
