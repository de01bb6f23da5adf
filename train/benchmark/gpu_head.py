"""The Detailer Head alone, in bfloat16: whole and in tiles, with its decoder fused and not."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...l2p_core.config import VARIANTS
from ...l2p_core.detailer import DetailerHead
from ...l2p_core.memory.room import free_memory
from ...l2p_core.memory.sampling_memory import choose_tile, head_bytes
from ...l2p_core.ops.fused_decoder import fused_from
from ...l2p_core.ops.head_tiles import countable, pixels_at_once
from ...l2p_core.ops.region import Region
from .gpu_measure import Bench, Figures, relative_error, timed
from .gpu_weights import random_weight

HeadScene = tuple[DetailerHead, Tensor, Tensor]


@dataclass(frozen=True)
class Head:
    """The scene: a variant's head, and its inputs."""

    variant: str

    def make(self, bench: Bench) -> HeadScene:
        config = bench.scale.config(self.variant)
        with torch.device("meta"):
            head = DetailerHead(config.head, config.dim)
        weights = {
            key: random_weight(key, tuple(weight.shape), torch.bfloat16, bench.device)
            for key, weight in head.state_dict().items()
        }
        head.load_state_dict(weights, assign=True)
        head.eval().requires_grad_(False)
        side = bench.scale.sides[self.variant]
        grid = side // VARIANTS[self.variant].patch_size
        pixels = torch.randn(1, 3, side, side, dtype=torch.bfloat16, device=bench.device)
        features = torch.randn(1, grid, grid, config.dim, dtype=torch.bfloat16, device=bench.device)
        return head, pixels, features.permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Pass:
    """Measures a forward pass.

    Attributes:
        variant: of the scene.
        tiles: "whole", "auto" (what free memory allows), or one of the scale's.
        fused: whether a decoder stage's convolutions run as one; None is what sampling does.
    """

    variant: str
    tiles: str
    fused: bool | None

    @torch.no_grad()
    def __call__(self, bench: Bench, scene: HeadScene) -> Figures:
        head, pixels, features = scene
        config, side = bench.scale.config(self.variant), pixels.shape[-1]
        fused = {None: fused_from(bench.device), True: 0, False: math.inf}[self.fused]
        tile = bench.scale.tiles.get(self.tiles)
        if self.tiles == "auto":
            free = free_memory(bench.device) if bench.gpu else None
            sizes = side, side, bench.scale.caption
            tile = choose_tile(config, *sizes, itemsize=2, free=free, fused_from=fused)
        image = Region(0, side, 0, side)
        tile = countable(config.head, config.dim, image, 1, tile, fused)
        head.fused = self.fused
        figures = timed(bench, lambda: head(pixels, features, tile))
        output, key = head(pixels, features, tile)[..., ::8, ::8].float().cpu(), f"head {self.variant}"
        expected = bench.outputs.setdefault(key, output)
        return figures | {
            "predicted": head_bytes(config, side, side, tile, 2, fused),
            "error": relative_error(output, expected),
            "note": (f"tiles of {tile}" if tile and tile < side else "whole")
            + (", fused" if pixels_at_once(image, tile) >= fused else ""),
        }
