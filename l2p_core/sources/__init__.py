"""The architectures that pixel models are made of: one file each, one row each in `SOURCES`.

Facts about one architecture are data in its row or code in its file; the rest of the package asks the row.
"""

from __future__ import annotations

from ..config import ModelConfig, PixelConfig, Sampling
from .lumina2 import LUMINA2
from .source import Source
from .z_image import Z_IMAGE

SOURCES: dict[str, Source] = {row.name: row for row in (Z_IMAGE, LUMINA2)}
"""Every source by its name; files that no row recognises are read as files of the first."""


def sampling_of(config: PixelConfig) -> Sampling:
    """Published sampling settings of a pixel model."""
    return source_of(config).sampling[config.variant]


def source_of(config: ModelConfig) -> Source:
    """The row of a model's architecture."""
    return SOURCES[config.source]
