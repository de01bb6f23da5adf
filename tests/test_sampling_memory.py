"""What a forward pass is said to need, held to what was measured on an H100 in bfloat16 (docs/benchmarks.md)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from comfyui_l2p.l2p_core.config import VARIANTS, ModelConfig
from comfyui_l2p.l2p_core.memory.sampling_memory import _largest_tile, choose_tile, head_bytes, step_bytes
from comfyui_l2p.l2p_core.ops import region
from comfyui_l2p.l2p_core.ops.fused_decoder import GPU_PIXELS
from comfyui_l2p.l2p_core.ops.region import Region, stage_regions

MEGABYTE = 10**6
BF16 = 2


@pytest.mark.parametrize(
    ("variant", "tile", "measured"),
    [
        ("1k", None, 587), ("4k", None, 2298), ("4k", 2048, 703), ("4k", 1024, 318), ("8k", None, 8875),
        ("8k", 2048, 982), ("8k", 1024, 555), ("10k", 2048, 1332), ("10k", 1024, 808),
    ],
)  # fmt: skip
def test_the_head_takes_what_a_gpu_took(variant: str, tile: int | None, measured: int) -> None:
    side = VARIANTS[variant].pixels
    planned = head_bytes(ModelConfig().with_head(variant), side, side, tile, BF16)
    assert planned == pytest.approx(measured * MEGABYTE, rel=0.15)


@pytest.mark.parametrize(
    ("variant", "tile", "measured"),
    [
        ("1k", None, 454), ("4k", None, 1763), ("4k", 2048, 703), ("4k", 1024, 318), ("8k", None, 6325),
        ("8k", 2048, 847), ("8k", 1024, 544), ("10k", None, 9909), ("10k", 2048, 1063), ("10k", 1024, 741),
    ],
)  # fmt: skip
def test_a_fused_head_takes_what_a_gpu_took(variant: str, tile: int | None, measured: int) -> None:
    side = VARIANTS[variant].pixels
    planned = head_bytes(ModelConfig().with_head(variant), side, side, tile, BF16, fused_from=0)
    assert planned == pytest.approx(measured * MEGABYTE, rel=0.08)


@pytest.mark.parametrize(
    ("variant", "gigabytes", "plain", "fused"),
    [
        ("4k", 60, None, None), ("8k", 60, None, None), ("10k", 60, 5120, None), ("4k", 2, 2048, 2048),
        ("8k", 8, 5120, None), ("10k", 8, 5120, 5120), ("10k", 1, 1024, 1024),
    ],
)  # fmt: skip
def test_an_automatic_tile_takes_the_memory_that_is_free(
    variant: str, gigabytes: int, plain: int | None, fused: int | None
) -> None:
    config, side = ModelConfig().with_head(variant), VARIANTS[variant].pixels
    free = gigabytes * 1e9
    assert choose_tile(config, side, side, 128, BF16, free=free) == plain
    assert choose_tile(config, side, side, 128, BF16, free=free, fused_from=GPU_PIXELS) == fused


def test_an_image_that_becomes_float32_at_the_end_is_counted() -> None:
    side = VARIANTS["10k"].pixels
    planned = step_bytes(ModelConfig().with_head("10k"), side, side, 128, BF16, tile=256)
    # What the network reads and returns in bfloat16, and the velocity in float32.
    assert planned >= 3 * side * side * (BF16 + BF16 + 4)


@pytest.mark.parametrize(("height", "width", "tile"), [(96, 640, 64), (640, 16, 33), (208, 336, 96), (48, 80, 128)])
def test_the_largest_tile_is_found_without_looking_at_each(
    height: int, width: int, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = Region(0, height, 0, width)
    expected = max(image.tiles(tile), key=lambda piece: stage_regions(piece, image, 4)[1].pixels)
    assert _largest_tile(image, tile, 4) == expected
    made = 0

    def counted(self: Region, side: int) -> Iterator[Region]:
        nonlocal made
        for piece in tiles(self, side):
            made += 1
            yield piece

    tiles = region.Region.tiles
    monkeypatch.setattr(region.Region, "tiles", counted)
    _largest_tile(Region(0, 65_536, 0, 65_536), 64, 5)
    assert made == 2 * 1024
