"""Files: safetensors headers, streamed reading, atomic writing, shards, metadata, quantised formats, paths.

`files.quantise` is public; it needs rooms above this one, and is imported from there on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    """`quantise.quantise`."""
    if name == "quantise":
        return import_module("..quantise", __name__).quantise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
