"""The Detailer Head: a small U-Net from noisy pixels and backbone features to pixels (arXiv 2605.12013 section 3.2).

The head is evaluated whole, or tile by tile with the same result. A tile has no fixed margin: `region.stage_regions`
walks the network backwards from the wanted output, so that deep stages compute a few extra cells and the costly
full-resolution stages only a single extra pixel.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import PIXEL_CHANNELS, HeadConfig, HeadStage, variant_row
from .ops.fused_decoder import ComposedWeights, Fusion, fused_from, fused_stage
from .ops.head_tiles import countable, pixels_at_once
from .ops.memory_saving import Recomputing
from .ops.precision import unwidened
from .ops.region import Region, StageRegions, stage_regions


class DetailerHead(Recomputing):
    """Predicts x0 - noise from the noisy pixels and the backbone's last hidden states.

    Args:
        variant: a row of `config.VARIANTS` by name, or a HeadConfig read off a checkpoint.
        dim: the backbone's width.
        operations: the namespace of Conv2d; a host passes its own, whose layers cast and offload.
        factory: keyword arguments of those layers, such as dtype and device.
    """

    def __init__(self, variant: str | HeadConfig, dim: int, operations: Any = nn, **factory: Any):
        super().__init__()
        config = variant_row(variant).head if isinstance(variant, str) else variant
        self.stages, self._config, self._dim = config.stages, config, dim
        # A host's layers cast, offload or patch their weights when called.
        self.plain = operations is nn
        self.compiled: Callable[[Tensor, Tensor], Tensor] | None = None  # `whole`, by `compile_blocks`
        self.fused: bool | None = None  # decoder stages; None fuses where measurements show a gain
        self._composed = ComposedWeights()

        def conv(inside: int, outside: int, kernel: int = 3) -> nn.Module:
            return operations.Conv2d(inside, outside, kernel, padding=kernel // 2, **factory)

        # Published keys number each convolution inside a Sequential: 0 before a SiLU, 1 after an upsampling.
        inside = PIXEL_CHANNELS
        for stage in self.stages:
            self.add_module(f"enc{stage.name}", nn.Sequential(conv(inside, stage.enc), nn.SiLU()))
            inside = stage.enc
        self.bottleneck = nn.Sequential(conv(inside + dim, config.bottleneck, 1), nn.SiLU())
        inside = config.bottleneck
        for stage in reversed(self.stages):
            self.add_module(f"up{stage.name}", nn.Sequential(nn.Upsample(scale_factor=2), conv(inside, stage.up)))
            self.add_module(f"dec{stage.name}", nn.Sequential(conv(stage.up + stage.enc, stage.dec), nn.SiLU()))
            inside = stage.dec
        self.out_conv = conv(inside, PIXEL_CHANNELS, 1)

    def forward(self, pixels: Tensor, features: Tensor, tile: int | None = None) -> Tensor:
        """Run the head.

        Args:
            pixels: (B, 3, H, W), the noisy image; H and W multiples of 2^stages.
            features: (B, dim, rows, columns), the backbone's map of any grid (nearest-resized to the bottleneck).
            tile: side in pixels of the squares that are evaluated one by one, None for the whole image at once. It
                determines the memory beyond input and output, not the result. A smaller tile is used if a feature map
                would otherwise exceed the number of elements that GPU kernels can index.

        Returns:
            x0 - noise, (B, 3, H, W).

        Raises:
            ValueError: if a side is not a multiple of 2^stages, or `tile` is below 1.
        """
        height, width = pixels.shape[-2:]
        stride = 2 ** len(self.stages)
        if height % stride or width % stride:
            raise ValueError(f"The Detailer Head needs sides that are multiples of {stride}, not {width}x{height}.")
        if tile is not None and tile < 1:
            raise ValueError(f"A tile of {tile} pixels is not valid: give 1 or more, or none for the whole image.")
        image = Region(0, height, 0, width)
        fusing = self._fused_from(pixels.device)
        tile = countable(self._config, self._dim, image, len(pixels), tile, fusing)
        at_once = pixels_at_once(image, tile)
        if tile is None or tile >= max(height, width):
            # A compiler does not find what fusing by hand saves in large images.
            compiled = None if torch.is_grad_enabled() or at_once >= fusing else self.compiled
            return (compiled or self.whole)(pixels, features)
        output = torch.empty_like(pixels)
        fusion = Fusion(self.fused, at_once, self._composed)
        for region in image.tiles(tile):
            output[region.index] = self.on_region(pixels, features, region, image, fusion)
        return output

    def whole(self, pixels: Tensor, features: Tensor) -> Tensor:
        """The head on the whole image at once; see `forward`."""
        image = Region(0, pixels.shape[-2], 0, pixels.shape[-1])
        return self.on_region(pixels, features, image, image, Fusion(self.fused, image.pixels, self._composed))

    def on_region(self, pixels: Tensor, features: Tensor, wanted: Region, image: Region, fusion: Fusion) -> Tensor:
        """The output over `wanted`; each stage computes only the region that this output depends on."""
        regions, bottleneck = stage_regions(wanted, image, len(self.stages))
        x = pixels[regions[0].encoder_reads.index]
        # Convolutions run fastest in channels-last order; `l2p benchmark head` measures it.
        x = x.contiguous(memory_format=torch.channels_last)
        skips = []
        for stage, at in zip(self.stages, regions, strict=True):
            skip, x = self._run(self._encode, stage, at, x)
            skips.append(skip)
        grid = image.bottom >> len(self.stages), image.right >> len(self.stages)
        x = self._run(self._with_features, x, nearest_resized(features, grid, bottleneck))
        for stage, at in zip(reversed(self.stages), reversed(regions), strict=True):
            x = self._run(self._decode, stage, at, x, skips.pop(), fusion)
        return self.out_conv(x)

    def _fused_from(self, device: torch.device) -> float:
        """Pixels at once from which all decoder stages are fused."""
        if not self.plain or torch.is_grad_enabled() or self.fused is False:
            return math.inf
        return 0 if self.fused else fused_from(device)

    def _encode(self, stage: HeadStage, at: StageRegions, x: Tensor) -> tuple[Tensor, Tensor]:
        skip = _silu(_cropped(self.layer("enc", stage)(x), at.encoder_reads, at.encoded))
        return skip, F.max_pool2d(skip, 2)

    def _with_features(self, x: Tensor, features: Tensor) -> Tensor:
        return _silu(self.bottleneck[0](torch.cat([x, features.to(x.dtype)], dim=1)))

    def _decode(self, stage: HeadStage, at: StageRegions, x: Tensor, skip: Tensor, fusion: Fusion) -> Tensor:
        if self.plain and not torch.is_grad_enabled() and fusion.pays(x.device, at.decoded.pixels):
            return _silu(self._fused(stage, at, x, skip, fusion))
        return _silu(self._unfused(stage, at, x, skip))

    def _unfused(self, stage: HeadStage, at: StageRegions, x: Tensor, skip: Tensor) -> Tensor:
        """The stage as published, before its SiLU; `x` covers what `at.upsampled` touches."""
        with unwidened(x):
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        x = _cropped(x, at.upsampled.halved().doubled(), at.upsampled)
        x = _cropped(self.layer("up", stage)(x), at.upsampled, at.merged)
        x = torch.cat([x, _cropped(skip, at.encoded, at.merged)], dim=1)
        return _cropped(self.layer("dec", stage)(x), at.merged, at.decoded)

    def _fused(self, stage: HeadStage, at: StageRegions, x: Tensor, skip: Tensor, fusion: Fusion) -> Tensor:
        """The same with both convolutions fused, except the image's outermost pixels."""
        coarse = at.upsampled.halved()
        through, output = fused_stage(
            x, _cropped(skip, at.encoded, at.merged), self.layer("up", stage), self.layer("dec", stage), fusion
        )
        output = _cropped(output, at.merged, at.decoded)
        output += _cropped(through, coarse.doubled(), at.decoded)
        for edge in at.image_edges():
            strip = dataclasses.replace(at, decoded=edge)
            part = _cropped(x, coarse, strip.upsampled.halved())
            output[edge.within(at.decoded).index] = self._unfused(stage, strip, part, skip)
        return output

    def layer(self, part: str, stage: HeadStage) -> nn.Conv2d:
        """A stage's convolution "enc", "up" or "dec"."""
        layer = self.get_submodule(f"{part}{stage.name}.{1 if part == 'up' else 0}")
        assert isinstance(layer, nn.Conv2d)
        return layer


def velocity_of(output: Tensor) -> Tensor:
    """The velocity noise - x0 from the head's x0 - noise; in place without gradients, because a copy at 10K takes 0.6
    GB."""
    return -output if torch.is_grad_enabled() else output.neg_()


def nearest_resized(features: Tensor, grid: tuple[int, int], wanted: Region) -> Tensor:
    """The part `wanted` of `features` nearest-resized to `grid`, without computing the rest.

    Integer arithmetic makes a tile read the same cells as the whole image at any size.
    """
    rows, columns = features.shape[-2:]
    if (rows, columns) == grid:
        return features[wanted.index]
    row = torch.arange(wanted.top, wanted.bottom, device=features.device) * rows // grid[0]
    column = torch.arange(wanted.left, wanted.right, device=features.device) * columns // grid[1]
    return features.index_select(-2, row).index_select(-1, column)


def _cropped(x: Tensor, covered: Region, wanted: Region) -> Tensor:
    """The part `wanted` of a tensor that covers `covered`.

    Every convolution pads with zeros. That is correct at the image's border; elsewhere the input is one cell larger
    than the wanted output, and this crop removes the incorrect margin.
    """
    return x if covered == wanted else x[wanted.within(covered).index]


def _silu(x: Tensor) -> Tensor:
    return F.silu(x, inplace=not torch.is_grad_enabled())
