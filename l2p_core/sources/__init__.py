"""The architectures that pixel models are made of: one file each, one row each in `SOURCES`.

What is true of one architecture alone is in its row, or is code in its file; everything else asks the row.
"""

from __future__ import annotations

from ..config import ModelConfig, PixelConfig, Sampling
from .lumina2 import LUMINA2
from .source import Source
from .z_image import Z_IMAGE

SOURCES: dict[str, Source] = {row.name: row for row in (Z_IMAGE, LUMINA2)}
"""Every source by its name; files that no row recognises are read as the first one's."""


def sampling_of(config: PixelConfig) -> Sampling:
    """Published sampling settings of a pixel model."""
    return source_of(config).sampling[config.variant]


def source_of(config: ModelConfig) -> Source:
    """The row of a model's architecture."""
    return SOURCES[config.source]
