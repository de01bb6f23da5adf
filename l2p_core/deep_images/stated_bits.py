"""The bits per channel of files in formats that are read with 8 bits, whatever they hold.

Pillow and its plugins return 8 bits for these formats, or scale to them, without a word; so that a user can be told,
the number is looked up in the file's header.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

_START = 1 << 16
"""Bytes that are searched for a header: boxes of metadata may precede it."""

_PPM = re.compile(rb"P[2356](?:\s|#[^\r\n]*[\r\n])+\d+(?:\s|#[^\r\n]*[\r\n])+\d+(?:\s|#[^\r\n]*[\r\n])+(\d{1,5})\s")
"""Netpbm: the kind, width, height and greatest value, with comments between them."""
_SIZ = b"\xff\x4f\xff\x51"
"""JPEG 2000 (ISO 15444-1, annex A.5.1): the codestream begins with the markers SOC and SIZ."""
_SIZ_CHANNELS = 40  # bytes from SOC to the number of channels, of which each has 3 bytes
_BOXES: dict[bytes, Callable[[bytes], int]] = {
    b"av1C": lambda box: 8 if not box[2] & 0x40 else 12 if box[2] & 0x20 else 10,
    b"hvcC": lambda box: 8 + (box[17] & 7),
}
"""The boxes of AVIF (AV1 in ISO BMFF, 2.3.3) and HEIF (ISO 14496-15, 8.3.3): luma bits from the decoder's settings."""
_BOX_BYTES = 18


def stated_bits(path: Path, format: str | None) -> int:
    """Bits per channel as the file's header states them; 0 where it states none that is known here.

    Args:
        path: the file.
        format: Pillow's name of it.

    Raises:
        OSError: if the file cannot be read.
    """
    find = _FINDERS.get(format or "")
    if find is None:
        return 0
    with path.open("rb") as file:
        return max(find(file.read(_START)), default=0)


def _netpbm(start: bytes) -> Iterator[int]:
    found = _PPM.match(start)
    if found:
        yield int(found[1]).bit_length()


def _jpeg2000(start: bytes) -> Iterator[int]:
    at = start.find(_SIZ)
    if at < 0:
        return
    channels = int.from_bytes(start[at + _SIZ_CHANNELS : at + _SIZ_CHANNELS + 2], "big")
    depths = start[at + _SIZ_CHANNELS + 2 :: 3][:channels]
    yield from ((depth & 0x7F) + 1 for depth in depths)


def _boxes(start: bytes) -> Iterator[int]:
    for name, bits in _BOXES.items():
        at = start.find(name)
        while at >= 0:
            box = start[at + 4 : at + 4 + _BOX_BYTES]
            if len(box) == _BOX_BYTES:
                yield bits(box)
            at = start.find(name, at + 1)


_FINDERS = {"PPM": _netpbm, "JPEG2000": _jpeg2000, "AVIF": _boxes, "HEIF": _boxes}
