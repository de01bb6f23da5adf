"""The memory of a forward pass beside the weights, from shapes alone; the host plans its memory by this.

The estimate for the backbone counts the tensors that the host's NextDiT holds at once; that for the Detailer Head runs
it on shapes (`live_memory`). A test measures both.
"""

from __future__ import annotations

import dataclasses
import math
from functools import lru_cache

import torch

from ..config import PIXEL_CHANNELS, PixelConfig
from ..detailer import DetailerHead
from ..ops.fused_decoder import Fusion
from ..ops.head_tiles import TILES, countable, pixels_at_once
from ..ops.region import Region, stage_regions
from ..patch import padded_size
from ..sources import source_of
from .live_memory import LiveMemory

ATTENTION_WIDTHS = 13.0
"""(tokens, dim) tensors alive at the peak of a block's attention: the stream, its norm, q, k, v and their copies."""

FEED_FORWARD_WIDTHS = 3.0
"""(tokens, dim) tensors alive in a block's feed-forward, beside three of (tokens, ffn_dim)."""

_DTYPES = {2: torch.bfloat16, 4: torch.float32}

SCORED_QUERIES = 512
"""Queries at a time in the host's sub-quadratic attention, which it uses if torch's fused attention is off."""

MIN_HEAD_BUDGET = 5 * 1024**3 // 4
"""The head may always use this many bytes, or as many as the backbone if that is more: the host reserves them."""

USED_OF_FREE = 0.8
"""The share of free memory that an automatic tile fills; the rest is for workspaces and fragmentation."""


def step_bytes(
    config: PixelConfig,
    height: int,
    width: int,
    caption: int,
    itemsize: int,
    batch: int = 1,
    tile: int | None = None,
    fused_attention: bool = True,
    fused_from: float = math.inf,
) -> int:
    """Peak activations of one forward pass of `batch` images, over the backbone and the head.

    Args:
        caption: tokens of the longest caption.
        itemsize: bytes of an element in the compute dtype.
        tile: side of the head's tiles, None for whole.
        fused_attention: whether attention scores are never materialised (torch's fused kernels, flash, xformers).
        fused_from: as for `choose_tile`.
    """
    backbone = backbone_bytes(config, height, width, caption, itemsize, fused_attention)
    features = 2 * tokens_of(config, height, width, caption) * config.dim * itemsize
    head = features + head_bytes(config, height, width, tile, itemsize, fused_from)
    if itemsize == 4:
        return batch * max(backbone, head)
    # The sampler's images are float32: the network reads a converted copy, and its output is converted back.
    image = PIXEL_CHANNELS * height * width
    return batch * (image * itemsize + max(backbone, head, image * (itemsize + 4)))


def tokens_of(config: PixelConfig, height: int, width: int, caption: int) -> int:
    """Tokens of an image and its caption, each padded."""
    multiple, patch = config.size_multiple, config.patch_size
    grid = padded_size(height, multiple) // patch * (padded_size(width, multiple) // patch)
    padded = source_of(config).token_multiple
    return padded_size(grid, padded) + padded_size(max(1, caption), padded)


def backbone_bytes(
    config: PixelConfig, height: int, width: int, caption: int, itemsize: int, fused_attention: bool = True
) -> int:
    """Peak activations of the backbone for one image."""
    tokens = tokens_of(config, height, width, caption)
    stream = tokens * config.dim * itemsize
    attention = ATTENTION_WIDTHS * stream
    if not fused_attention:
        # Scores, their exponentials and the tensor that the maximum is subtracted from, in float32.
        attention += 3 * config.n_heads * min(tokens, SCORED_QUERIES) * tokens * 4
    feed_forward = FEED_FORWARD_WIDTHS * stream + 3 * tokens * config.ffn_dim * itemsize
    patches = PIXEL_CHANNELS * padded_size(height, config.size_multiple) * padded_size(width, config.size_multiple)
    return round(max(attention, feed_forward, patches * itemsize + stream))


@lru_cache(maxsize=256)
def head_bytes(
    config: PixelConfig, height: int, width: int, tile: int | None, itemsize: int, fused_from: float = math.inf
) -> int:
    """Peak activations of the Detailer Head for one image, evaluated whole or in tiles of `tile` pixels: those of the
    largest piece of the image, run without data. `fused_from` as for `choose_tile`."""
    multiple, dtype = config.size_multiple, _DTYPES[itemsize]
    image = Region(0, padded_size(height, multiple), 0, padded_size(width, multiple))
    whole = tile is None or tile >= max(image.bottom, image.right)
    with torch.device("meta"):
        head = DetailerHead(config.head, config.dim, dtype=dtype)
        head.fused = pixels_at_once(image, tile) >= fused_from
        pixels = torch.empty(1, PIXEL_CHANNELS, image.bottom, image.right, dtype=dtype)
        stages = len(head.stages)
        features = torch.empty(1, config.dim, image.bottom >> stages, image.right >> stages, dtype=dtype)
    largest = image if whole or tile is None else _largest_tile(image, tile, stages)
    live = LiveMemory([pixels, features, *head.parameters()])
    with torch.no_grad(), live:
        head.on_region(pixels, features, largest, image, Fusion(head.fused))
    return live.peak + (0 if whole else pixels.nbytes)


def _largest_tile(image: Region, side: int, stages: int) -> Region:
    """The first tile of those whose bottleneck is largest. Rows and columns do not depend on each other, so a row and a
    column of tiles are looked at, not each of the million tiles of a large image."""

    def bottleneck(tile: Region) -> int:
        return stage_regions(tile, image, stages)[1].pixels

    row = max(dataclasses.replace(image, bottom=min(side, image.bottom)).tiles(side), key=bottleneck)
    column = max(dataclasses.replace(image, right=min(side, image.right)).tiles(side), key=bottleneck)
    return dataclasses.replace(column, left=row.left, right=row.right)


def choose_tile(
    config: PixelConfig,
    height: int,
    width: int,
    caption: int,
    itemsize: int,
    batch: int = 1,
    free: float | None = None,
    spare: float | None = None,
    fused_from: float = math.inf,
) -> int | None:
    """The side of the head's tiles: None (whole) if that fits the head's budget, else the largest that does.

    Args:
        free: bytes of the device that the step can use in total; None if unknown.
        spare: bytes of them that nothing else needs, such as offloadable weights; all by default. If the head has to
            displace weights, its budget is no more than the backbone's memory.
        fused_from: pixels of a tile or image from which its decoder is fused (`fused_decoder.fused_from`); never where
            the head's layers are a host's.
    """
    budget = float(max(MIN_HEAD_BUDGET, batch * backbone_bytes(config, height, width, caption, itemsize)))
    if free is not None:
        budget = min(budget, free * USED_OF_FREE)
        budget = max(budget, (free if spare is None else min(spare, free)) * USED_OF_FREE)
    multiple = config.size_multiple
    image = Region(0, padded_size(height, multiple), 0, padded_size(width, multiple))
    for tile in (None, *TILES):
        fits = batch * head_bytes(config, height, width, tile, itemsize, fused_from) <= budget
        if fits and countable(config.head, config.dim, image, batch, tile, fused_from) == tile:
            return tile
    return TILES[-1]
