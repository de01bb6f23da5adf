"""OpenEXR in floats, through PyAV. Its values are scene-linear light, ours are sRGB (IEC 61966-2-1)."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from . import frames
from .common import NOT_FINITE, BrokenImage, ImageInfo, Values, check_size, to_floats

FILES = "EXR files"
MAGIC = b"v/1\x01"
_HEAD = 1 << 16  # bytes read for a header; the text of a workflow may make it longer
_TILED, _UNREAD = 0x200, 0x800 | 0x1000  # flags of the version; deep data and several parts are not read
_LINES = {0: 1, 1: 1, 2: 1, 3: 16, 4: 32, 5: 16, 6: 32, 7: 32, 8: 32, 9: 256}
"""Compression: lines of a chunk."""
_ZLIB = (2, 3)
_BYTES = {0: 4, 1: 2, 2: 4}
"""Bytes of a channel's number by its type: whole, half, float."""


class _Layout(NamedTuple):
    """The parts of a header that are needed: windows as left, top, right and bottom pixels, both ends included; bytes
    of a pixel; and `end`, the header's closing zero, behind which the table of the chunks' places begins."""

    display: tuple[int, int, int, int]
    data: tuple[int, int, int, int]
    pixel: int
    compression: int
    tile: tuple[int, int] | None
    end: int

    @property
    def width(self) -> int:
        return self.data[2] - self.data[0] + 1

    @property
    def height(self) -> int:
        return self.data[3] - self.data[1] + 1

    @property
    def chunks(self) -> int:
        if self.tile:
            return -(-self.width // self.tile[0]) * -(-self.height // self.tile[1])
        return -(-self.height // _LINES[self.compression])

    def bytes_of(self, chunk: int) -> int:
        """The size of a chunk of lines before compression."""
        lines = _LINES[self.compression]
        return min(lines, self.height - chunk * lines) * self.width * self.pixel


def look(path: Path) -> ImageInfo:
    """The size.

    Raises:
        BrokenImage: if it is damaged, of a kind that is not read, or has too many pixels.
        OSError: if the file cannot be read.
    """
    with path.open("rb") as file:
        start = file.read(_HEAD)
        try:
            layout = _layout(start)
        except BrokenImage:
            layout = _layout(start + file.read())
    return _info(layout)


def decode(path: Path, on_white: bool = True) -> Values:
    """The pixels as sRGB from black to white; brighter light is clipped, as a screen does. Errors as for `look`.

    Args:
        path: the file.
        on_white: transparent pixels lie on white, mixed as light; otherwise the image keeps its alpha channel.
    """
    content = path.read_bytes()
    layout = _layout(content)
    _info(layout)
    # FFmpeg leaves black what it cannot decode.
    for chunk, (size, start) in enumerate(_chunks(content, layout)):
        data = content[start : start + size]
        if len(data) < size or not (layout.tile or _is_sound(data, layout, chunk)):
            raise BrokenImage("it is damaged or truncated")
    light = frames.decode("exr", content, FILES)
    if not np.isfinite(light).all():
        raise BrokenImage(NOT_FINITE)
    colours = light.shape[2] - (light.shape[2] in (2, 4))
    if light.shape[2] == colours:
        return Values(to_srgb(light.clip(0, 1)))
    colour, alpha = light[..., :colours], light[..., colours:]  # colours are multiplied by alpha
    if on_white:
        return Values(to_srgb((colour + (1 - alpha)).clip(0, 1)))
    straight = np.divide(colour, alpha, out=colour.copy(), where=alpha > 0)
    return Values(np.concatenate([to_srgb(straight.clip(0, 1)), alpha], -1), alpha=1.0)


def encode(pixels: Tensor, text: Mapping[str, str]) -> bytes:
    """(3, H, W) in [-1, 1] as float32 light, unclamped, with the texts as attributes of its header."""
    content = frames.encode("exr", to_light(to_floats(pixels)), {"compression": "zip16"}, FILES)
    new = b"".join(_attribute(key, value.encode()) for key, value in text.items())
    layout = _layout(content)
    table, pixels_at = layout.end + 1, layout.end + 1 + 8 * layout.chunks
    places = np.frombuffer(content[table:pixels_at], "<u8") + len(new)
    return content[: layout.end] + new + b"\0" + places.astype("<u8").tobytes() + content[pixels_at:]


def to_srgb(light: np.ndarray) -> np.ndarray:
    """Linear light to sRGB, beyond white by the same curve."""
    curve = 1.055 * np.maximum(light, 0.0031308) ** (1 / 2.4) - 0.055
    return np.where(light <= 0.0031308, light * 12.92, curve).astype(np.float32)


def to_light(srgb: np.ndarray) -> np.ndarray:
    """The inverse of `to_srgb`."""
    curve = ((np.maximum(srgb, 0.04045) + 0.055) / 1.055) ** 2.4
    return np.where(srgb <= 0.04045, srgb / 12.92, curve).astype(np.float32)


def _info(layout: _Layout) -> ImageInfo:
    check_size(layout.width, layout.height)
    left, top, right, bottom = layout.display
    check_size(right - left + 1, bottom - top + 1)
    return ImageInfo(right - left + 1, bottom - top + 1)


def _layout(content: bytes) -> _Layout:
    try:
        (version,) = struct.unpack_from("<i", content, len(MAGIC))
        if version & _UNREAD:
            raise BrokenImage("it has several parts or deep data: save it as one flat image")
        found: dict[str, bytes] = {}
        place = 8
        while content[place]:
            name, kind_at = _word(content, place)
            _, size_at = _word(content, kind_at)
            (size,) = struct.unpack_from("<i", content, size_at)
            if size < 0 or size_at + 4 + size >= len(content):
                raise BrokenImage("it is damaged or truncated")
            found[name] = content[size_at + 4 : size_at + 4 + size]
            place = size_at + 4 + size
        windows = [struct.unpack("<4i", found[name]) for name in ("displayWindow", "dataWindow")]
        tile = struct.unpack_from("<2I", found["tiles"]) if version & _TILED else None
        if tile and min(tile) < 1:
            raise BrokenImage("it is damaged or truncated")
        pixel = _pixel_bytes(found["channels"])
        layout = _Layout(windows[0], windows[1], pixel, found["compression"][0], tile, place)
    except (struct.error, IndexError, KeyError, ValueError) as error:
        if isinstance(error, BrokenImage):
            raise
        raise BrokenImage("it is damaged or truncated") from error
    if layout.compression not in _LINES:
        raise BrokenImage("its compression is not supported: save it with another")
    return layout


def _word(content: bytes, place: int) -> tuple[str, int]:
    """A zero-terminated text, and the position after it."""
    end = content.index(b"\0", place)
    return content[place:end].decode("latin-1"), end + 1


def _chunks(content: bytes, layout: _Layout) -> Iterator[tuple[int, int]]:
    """The size and position of each chunk's data."""
    numbers = 5 if layout.tile else 2  # before the data: its place in the image, and its size
    try:
        for place in struct.unpack_from(f"<{layout.chunks}Q", content, layout.end + 1):
            (size,) = struct.unpack_from("<I", content, place + 4 * (numbers - 1))
            yield size, place + 4 * numbers
    except (struct.error, OverflowError) as error:
        raise BrokenImage("it is damaged or truncated") from error


def _is_sound(data: bytes, layout: _Layout, chunk: int) -> bool:
    """Whether a chunk of lines has all its bytes; of other compressions than zlib's only FFmpeg knows."""
    expected = layout.bytes_of(chunk)
    if layout.compression not in _ZLIB or len(data) == expected:  # what does not shrink is stored as it is
        return layout.compression != 0 or len(data) == expected
    try:
        return len(zlib.decompress(data)) == expected
    except zlib.error:
        return False


def _pixel_bytes(channels: bytes) -> int:
    """The bytes of a pixel, from the list of channels: a name, a type and three more numbers each."""
    total, place = 0, 0
    while channels[place]:
        _, place = _word(channels, place)
        kind, _, across, down = struct.unpack_from("<4i", channels, place)
        if kind not in _BYTES or (across, down) != (1, 1):
            raise BrokenImage("its channels are not supported: save it as RGB")
        total, place = total + _BYTES[kind], place + 16
    return total


def _attribute(name: str, value: bytes) -> bytes:
    return name.encode() + b"\0string\0" + struct.pack("<i", len(value)) + value
