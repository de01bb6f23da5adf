"""Sides of the tiles in which the Detailer Head is evaluated, and the largest allowed feature map."""

from __future__ import annotations

import math

from ..config import PIXEL_CHANNELS, HeadConfig
from ..patch import padded_size
from .region import Region, stage_regions

TILES = (5120, 4096, 2048, 1024, 512, 256)
"""Sides that an automatic tile can have; 5120 is half of the largest published size."""

LEAST_TILE = 64
"""The smallest side that users can request: smaller tiles would compute almost nothing but their overlap."""

MOST_ELEMENTS = 2**31 - 1
"""Elements of one tensor: GPU convolutions index with 32 bits, and refuse larger tensors or become slow."""

CHANNEL_MULTIPLE = 8
"""GPUs copy a tensor to pad its channels to a multiple of this, for their tensor cores."""


def largest_map(head: HeadConfig, dim: int, wanted: Region, image: Region, fused: bool = False) -> int:
    """Elements of the largest tensor of one image while `wanted` is computed, copies inside convolutions included.

    Args:
        dim: the backbone's width.
        fused: whether decoder stages run as one convolution (`fused_decoder`).
    """
    regions, bottleneck = stage_regions(wanted, image, len(head.stages))
    coarser = [stage.dec for stage in head.stages[1:]] + [head.bottleneck]
    inside = head.stages[-1].enc if head.stages else PIXEL_CHANNELS
    sizes = [(inside + dim) * bottleneck.pixels]
    for stage, at, below in zip(head.stages, regions, coarser, strict=True):
        coarse = at.upsampled.halved()
        made = max(below, 4 * stage.dec) if fused else 4 * max(below, stage.up)
        read = padded_size(stage.enc if fused else stage.up + stage.enc, CHANNEL_MULTIPLE)
        sizes += [stage.enc * at.encoder_reads.pixels, made * coarse.pixels, max(read, stage.dec) * at.merged.pixels]
    return max(sizes)


def pixels_at_once(image: Region, tile: int | None) -> int:
    """Pixels of a tile, or of the whole image."""
    return image.pixels if tile is None or tile >= max(image.bottom, image.right) else tile * tile


def countable(
    head: HeadConfig, dim: int, image: Region, batch: int, tile: int | None, fused_from: float = math.inf
) -> int | None:
    """`tile`, or the largest smaller automatic tile with which no tensor exceeds `MOST_ELEMENTS`.

    Args:
        dim: the backbone's width.
        fused_from: pixels of a tile or image from which its decoder is fused.
    """
    side = max(image.bottom, image.right)
    for choice in (tile, *(t for t in TILES if t < min(side, tile or side))):
        fused = pixels_at_once(image, choice) >= fused_from
        pieces = [image] if choice is None or choice >= side else image.tiles(choice)
        if batch * max(largest_map(head, dim, piece, image, fused) for piece in pieces) <= MOST_ELEMENTS:
            return choice
    return TILES[-1]
