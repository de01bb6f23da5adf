"""The tiny model that comes with the package, and how a command names it."""

from __future__ import annotations

from pathlib import Path

from ..l2p_core import tiny

NAME = "tiny"
FOLDER = Path(tiny.__file__).parent
SOURCE = FOLDER / "source.safetensors"
DELTA = FOLDER / "delta.safetensors"
HEAD_WIDTH = 0.25
"""Factor on the Detailer Head's widths that suits the tiny model: 16, 32, 64 and 128 channels."""


def resolve(path: Path | str) -> Path:
    """The path itself; the bundled source for the word "tiny", unless there is a file of that name."""
    path = Path(path)
    return SOURCE if str(path) == NAME and not path.exists() else path
