"""Sizes as text."""

from __future__ import annotations


def bytes_text(number: int) -> str:
    """A number of bytes, 1 GB being 10^9: 12.3 GB, 8.1 MB, 200 KB."""
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "KB")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number} bytes"
