"""PNG with 16 bits per channel, through PyAV."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from . import frames
from .common import BrokenImage, Values, to_levels

FILES = "PNG files with 16 bits per channel"
_START = b"\x89PNG\r\n\x1a\n"
_DEPTH_AT = 24  # in the header, which is always the first chunk
_HEADER_END = 33
_CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}
"""The number of channels by the colour type."""
_PIECE = 1 << 20  # bytes


def is_deep(start: bytes) -> bool:
    """Whether a file that begins with these bytes is a PNG of 16 bits per channel."""
    return start.startswith(_START) and start[_DEPTH_AT : _DEPTH_AT + 1] == b"\x10"


def decode(path: Path) -> Values:
    """The pixels; errors as for `frames.decode`."""
    content = path.read_bytes()
    values = frames.decode("png", content, FILES)
    if not _is_whole(content):
        raise BrokenImage("it is damaged or truncated")
    return Values(values, white=65535.0, alpha=65535.0 if values.shape[2] in (2, 4) else None)


def encode(pixels: Tensor, text: Mapping[str, str]) -> bytes:
    """(3, H, W) in [-1, 1] as a file of 16 bits per channel, rounded, with ASCII texts in its text fields."""
    content = frames.encode("png", to_levels(pixels), {"pred": "paeth"}, FILES)
    chunks = b"".join(_chunk(b"tEXt", f"{key}\0{value}".encode("ascii")) for key, value in text.items())
    return content[:_HEADER_END] + chunks + content[_HEADER_END:]


def _is_whole(content: bytes) -> bool:
    """Whether a file that FFmpeg decodes has all its rows: it leaves those black that are missing."""
    width, height, _, colours, _, _, interlaced = struct.unpack_from(">IIBBBBB", content, len(_START) + 8)
    if interlaced:
        return True  # seven smaller images, whose rows have other lengths
    left = height * (1 + 2 * width * _CHANNELS[colours])
    rows, place = zlib.decompressobj(), _HEADER_END
    while left > 0 and place + 8 <= len(content):
        size, kind = struct.unpack_from(">I4s", content, place)
        data = content[place + 8 : place + 8 + size] if kind == b"IDAT" else b""
        while data and left > 0:
            left -= len(rows.decompress(data, _PIECE))
            data = rows.unconsumed_tail
        place += size + 12
    return left <= 0


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
