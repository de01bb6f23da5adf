"""Sides of the tiles in which the Detailer Head is evaluated, and the largest allowed feature map."""

from __future__ import annotations

from ..config import PIXEL_CHANNELS, HeadConfig
from ..patch import padded_size
from .region import Region, stage_regions

TILES = (4096, 2048, 1024, 512, 256)
"""Sides that an automatic tile can have."""

LEAST_TILE = 64
"""The smallest side that users can request: smaller tiles would compute almost nothing but their overlap."""

MOST_ELEMENTS = 2**31 - 1
"""Of one tensor: GPU convolutions index with 32 bits, and refuse larger tensors or become slow."""

CHANNEL_MULTIPLE = 8
"""GPUs copy a tensor to pad its channels to a multiple of this, for their tensor cores."""


def largest_map(head: HeadConfig, dim: int, wanted: Region, image: Region) -> int:
    """Elements of the largest tensor of one image while `wanted` is computed, copies inside convolutions included.

    Args:
        dim: the backbone's width.
    """
    regions, bottleneck = stage_regions(wanted, image, len(head.stages))
    coarser = [stage.dec for stage in head.stages[1:]] + [head.bottleneck]
    inside = head.stages[-1].enc if head.stages else PIXEL_CHANNELS
    sizes = [(inside + dim) * bottleneck.pixels]
    for stage, at, below in zip(head.stages, regions, coarser, strict=True):
        doubled = max(below, stage.up) * at.upsampled.halved().doubled().pixels
        merged = max(padded_size(stage.up + stage.enc, CHANNEL_MULTIPLE), stage.dec) * at.merged.pixels
        sizes += [stage.enc * at.encoder_reads.pixels, doubled, merged]
    return max(sizes)


def countable(head: HeadConfig, dim: int, image: Region, batch: int, tile: int | None) -> int | None:
    """`tile`, or the largest smaller automatic tile with which no tensor exceeds `MOST_ELEMENTS`."""
    side = max(image.bottom, image.right)
    for choice in (tile, *(t for t in TILES if t < min(side, tile or side))):
        pieces = [image] if choice is None or choice >= side else image.tiles(choice)
        if batch * max(largest_map(head, dim, piece, image) for piece in pieces) <= MOST_ELEMENTS:
            return choice
    return TILES[-1]
