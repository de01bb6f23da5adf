"""A ramp of 4,096 levels as a data folder: an image of one level each, whose caption says which level it is."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...l2p_core.dataset import picture_files
from ...l2p_core.files.atomic import write_bytes
from ..pictures import save_picture

LEVELS = 4096
SIDE = 16
"""Side of an image in pixels: one patch."""
_SPACING = 16
"""Distance between the levels, in the 65,536 levels of a file."""
TOKENS = 4
_HARMONICS = 4
WIDTH = 2 * _HARMONICS
"""Width of a caption's features."""


def values(levels: Sequence[int]) -> Tensor:
    """The values of levels of the ramp, (N,) float64 from 0 to just below 1."""
    return torch.tensor(levels, dtype=torch.float64) * _SPACING / 65535


def images(levels: Sequence[int]) -> Tensor:
    """Levels of the ramp as images, (N, 3, SIDE, SIDE) in [-1, 1]."""
    return (values(levels) * 2 - 1).float()[:, None, None, None].expand(-1, 3, SIDE, SIDE).contiguous()


def caption(level: int) -> str:
    """What the image of a level is called."""
    return f"level {level}"


def file_name(level: int) -> str:
    """The name of a level's image."""
    return f"{level:04}.png"


def write_folder(folder: Path, levels: Sequence[int]) -> None:
    """The data folder of these levels: 16-bit files and a table of captions, which is written last."""
    table = folder / "captions.csv"
    if table.exists():
        return
    write_images(folder, levels, images(levels))
    rows = io.StringIO()
    csv.writer(rows).writerows([("image", "caption"), *((file_name(level), caption(level)) for level in levels)])
    write_bytes(table, rows.getvalue().encode())


def write_images(folder: Path, levels: Sequence[int], pixels: Tensor) -> None:
    """Write images (N, 3, H, W) in [-1, 1] of levels as files of 16 bits.

    Raises:
        ValueError: if the library for such files is missing.
    """
    writer = picture_files.writer("level.png", "16")
    for level, image in zip(levels, pixels, strict=True):
        save_picture(image, folder / file_name(level), writer, {}, overwrite=True)


class LevelEncoder:
    """A text encoder for the captions of a ramp: harmonics of the level, of equal length for all levels.

    The first half period of the first harmonic spans twice the ramp, so no two levels have the same features.
    """

    identity = f"ramp {LEVELS} {_SPACING} {TOKENS} {_HARMONICS}"

    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """Features of each caption, (TOKENS, WIDTH); zeros for the empty one."""
        return [self._features(text) for text in captions]

    def lengths(self, captions: Sequence[str]) -> list[int]:
        return [TOKENS for _ in captions]

    def _features(self, text: str) -> Tensor:
        if not text:
            return torch.zeros(TOKENS, WIDTH)
        away = values([int(text.removeprefix("level "))]) * 2 - 1
        angles = away[:, None] * math.pi / 4 * torch.arange(1, _HARMONICS + 1)
        return torch.cat([angles.sin(), angles.cos()], 1).float().expand(TOKENS, WIDTH).clone()
