"""Sizes and counts as text."""

from __future__ import annotations


def bytes_text(number: int) -> str:
    """A number of bytes, 1 GB being 10^9: 12.3 GB, 8.1 MB, 200 KB."""
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "KB")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number} bytes"


def counted(count: int, noun: str) -> str:
    """A number with its noun: 1 image, 2 images."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
