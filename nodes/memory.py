"""What a forward pass needs beside the weights, from shapes alone: the host plans its memory by this."""

from __future__ import annotations

from functools import lru_cache

from ..l2p_core.config import TOKEN_MULTIPLE, HeadConfig, ModelConfig
from ..l2p_core.patch import padded_size
from ..l2p_core.region import Region, stage_regions

BLOCK_WIDTHS = 11.0
"""Peak number of live (tokens, dim) tensors in a backbone block, its input and the residual included."""

MIN_HEAD_BUDGET = 1024**3
"""The head may use this many bytes, or as many as the backbone if that is more, before it is cut into tiles."""

TILES = (4096, 2048, 1024, 512, 256)
"""Sides that an automatic tile can have."""


def backbone_bytes(config: ModelConfig, height: int, width: int, caption: int, itemsize: int) -> int:
    """Peak activations of the backbone for one image of height x width pixels and `caption` tokens."""
    multiple, patch = config.size_multiple, config.patch_size
    grid = padded_size(height, multiple) // patch * (padded_size(width, multiple) // patch)
    tokens = padded_size(grid, TOKEN_MULTIPLE) + padded_size(max(1, caption), TOKEN_MULTIPLE)
    widths = max(BLOCK_WIDTHS, 3.0 + 3.0 * config.ffn_dim / config.dim)
    return round(tokens * config.dim * widths * itemsize)


@lru_cache(maxsize=256)
def head_bytes(config: ModelConfig, height: int, width: int, tile: int | None, itemsize: int) -> int:
    """Peak activations of the Detailer Head for one image, evaluated whole or in tiles of `tile` pixels.

    Follows `DetailerHead._region` tensor by tensor, for the piece of the image that needs most.
    """
    assert config.head is not None
    multiple = config.size_multiple
    image = Region(0, padded_size(height, multiple), 0, padded_size(width, multiple))
    pieces = [image] if tile is None else image.tiles(tile)
    values = max(_head_values(config.head, config.dim, piece, image) for piece in pieces)
    return (values + 6 * _area(image)) * itemsize


def step_bytes(
    config: ModelConfig, height: int, width: int, caption: int, itemsize: int, batch: int, tile: int | None
) -> int:
    """Peak activations of one forward pass of `batch` images: the backbone's, then the head's."""
    multiple = config.size_multiple
    image = 3 * padded_size(height, multiple) * padded_size(width, multiple) * itemsize
    backbone = backbone_bytes(config, height, width, caption, itemsize)
    hidden = backbone / BLOCK_WIDTHS
    return round(batch * (image + max(backbone, hidden + head_bytes(config, height, width, tile, itemsize))))


def choose_tile(
    config: ModelConfig,
    height: int,
    width: int,
    caption: int,
    itemsize: int,
    batch: int = 1,
    free: float | None = None,
) -> int | None:
    """The side of the head's tiles: None (whole) if it fits the head's budget, else the largest that does.

    The budget is what the backbone takes anyway, so that the head does not decide how much memory a step needs.
    `free` bytes on the device lower it further.
    """
    budget = max(MIN_HEAD_BUDGET, batch * backbone_bytes(config, height, width, caption, itemsize))
    if free is not None:
        budget = min(budget, free * 0.8)
    for tile in (None, *TILES):
        if batch * head_bytes(config, height, width, tile, itemsize) <= budget:
            return tile
    return TILES[-1]


def _area(region: Region) -> int:
    return (region.bottom - region.top) * (region.right - region.left)


def _head_values(head: HeadConfig, dim: int, wanted: Region, image: Region) -> int:
    """The largest number of values alive at once while `wanted` is computed."""
    regions, bottleneck = stage_regions(wanted, image, len(head.stages))
    skips: list[int] = []
    x = 3 * _area(regions[0].encoder_reads)
    peak = x
    inside = 3
    for stage, at in zip(head.stages, regions, strict=True):
        skip = stage.enc * _area(at.encoder_reads)
        pooled = stage.enc * _area(at.encoded) // 4
        peak = max(peak, sum(skips) + x + skip + pooled)
        skips.append(skip)
        x, inside = pooled, stage.enc
    fused = head.bottleneck * _area(bottleneck)
    peak = max(peak, sum(skips) + x + (inside + dim) * _area(bottleneck) + fused)
    x, inside = fused, head.bottleneck
    for stage, at in zip(reversed(head.stages), reversed(regions), strict=True):
        doubled = _area(at.upsampled.halved().doubled())
        up = stage.up * _area(at.upsampled)
        merged = (stage.up + stage.enc) * _area(at.merged)
        out = stage.dec * _area(at.merged)
        peak = max(peak, sum(skips) + x + max(inside * doubled + up, up + merged, merged + out))
        skips.pop()
        x, inside = out, stage.dec
    return peak
