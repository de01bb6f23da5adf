"""The Detailer Head in tiles equals the whole head, and computes no more than it must."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from golden_vectors import relative_error

from comfyui_l2p.l2p_core.config import VARIANTS
from comfyui_l2p.l2p_core.detailer import DetailerHead, nearest_resized
from comfyui_l2p.l2p_core.ops import head_tiles
from comfyui_l2p.l2p_core.ops.head_tiles import MOST_ELEMENTS, countable, largest_map
from comfyui_l2p.l2p_core.ops.region import Region, stage_regions

DIM = 8


def head_and_inputs(variant: str, height: int, width: int) -> tuple[DetailerHead, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    row = VARIANTS[variant]
    head = DetailerHead(row.head.scaled(0.1), DIM)
    features = torch.randn(2, DIM, height // row.patch_size, width // row.patch_size)
    return head, torch.randn(2, 3, height, width), features


@pytest.mark.parametrize(
    ("variant", "height", "width", "tiles"),
    [
        ("1k", 96, 160, (16, 40, 64, 77, 100)),
        ("4k", 192, 320, (64, 100, 150)),
        ("8k", 256, 384, (128, 200)),
        ("10k", 640, 320, (100, 320)),
    ],
)
def test_tiles_equal_the_whole(variant: str, height: int, width: int, tiles: tuple[int, ...]) -> None:
    head, pixels, features = head_and_inputs(variant, height, width)
    with torch.no_grad():
        whole = head(pixels, features)
        for tile in tiles:
            assert relative_error(head(pixels, features, tile), whole) < 1e-5


def test_a_tile_of_one_pixel_and_one_larger_than_the_image() -> None:
    head, pixels, features = head_and_inputs("1k", 16, 32)
    with torch.no_grad():
        whole = head(pixels, features)
        assert relative_error(head(pixels, features, 1), whole) < 1e-5
        assert torch.equal(head(pixels, features, 1000), whole)


def test_gradients_flow_through_tiles() -> None:
    head, pixels, features = head_and_inputs("1k", 64, 64)
    gradients = []
    for tile in (None, 40):
        head.zero_grad()
        head(pixels, features, tile).square().sum().backward()
        gradient = head.get_parameter("enc1.0.weight").grad
        assert gradient is not None
        gradients.append(gradient)
    assert relative_error(gradients[1], gradients[0]) < 1e-4


def test_halo_is_the_receptive_field_and_not_more() -> None:
    """Changing a pixel outside what a tile reads changes nothing in it; changing the outermost pixel it reads does."""
    head, pixels, features = head_and_inputs("1k", 256, 16)
    head, pixels, features = head.double(), pixels.double(), features.double()
    image, wanted = Region(0, 256, 0, 16), Region(128, 144, 0, 16)
    reads = stage_regions(wanted, image, 4)[0][0].encoder_reads
    assert 0 < reads.top < wanted.top
    with torch.no_grad():
        before = head(pixels, features)[wanted.index]
        outside, edge = pixels.clone(), pixels.clone()
        outside[:, :, : reads.top] += 100
        outside[:, :, reads.bottom :] += 100
        # Max pooling passes one pixel of four on, so make the edge row win.
        edge[:, :, reads.top] += 1e4
        assert torch.equal(head(outside, features)[wanted.index], before)
        assert not torch.equal(head(edge, features)[wanted.index], before)


@pytest.mark.parametrize("rows", [2, 4, 26, 64])
def test_nearest_is_the_published_resize(rows: int) -> None:
    """At 10k the backbone's grid is H/160 and the bottleneck's H/64."""
    grid = 5 * rows // 2
    features = torch.randn(1, 2, rows, rows)
    resized = F.interpolate(features, size=(grid, grid), mode="nearest")
    assert torch.equal(nearest_resized(features, (grid, grid), Region(0, grid, 0, grid)), resized)
    part = Region(1, grid - 1, 2, grid)
    assert torch.equal(nearest_resized(features, (grid, grid), part), resized[part.index])


def test_sides_and_tiles_that_cannot_be_are_explained() -> None:
    head, pixels, features = head_and_inputs("1k", 32, 32)
    with pytest.raises(ValueError, match="multiples of 16"):
        head(pixels[..., :30], features)
    with pytest.raises(ValueError, match="1 or more"):
        head(pixels, features, 0)


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("side", [1024, 4096, 10240, 20480])
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_map_has_more_elements_than_a_gpu_counts(variant: str, side: int, batch: int) -> None:
    head, dim = VARIANTS[variant].head, 3840
    image = Region(0, side, 0, side)
    for fused in (False, True):
        tile = countable(head, dim, image, batch, None, 0 if fused else math.inf)
        pieces = [image] if tile is None else image.tiles(tile)
        assert batch * max(largest_map(head, dim, piece, image, fused) for piece in pieces) <= MOST_ELEMENTS
        assert (tile is None) == (batch * largest_map(head, dim, image, image, fused) <= MOST_ELEMENTS)
        # Of the published sizes, one image of 10k alone is cut up for it, and only where the decoder is not fused: its
        # last stage has 19 channels, widened to 24.
        published = batch == 1 and side <= VARIANTS[variant].pixels
        assert tile is None or not published or (variant, tile, fused) == ("10k", 5120, False)


def test_a_whole_image_with_too_large_maps_is_evaluated_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    head, pixels, features = head_and_inputs("1k", 320, 576)
    sizes: list[int] = []
    for module in head.modules():
        module.register_forward_hook(lambda module, given, made: sizes.append(made.numel()))
    with torch.no_grad():
        whole = head(pixels, features)
        most = max(sizes)
        image = Region(0, 320, 0, 576)
        assert largest_map(head._config, DIM, image, image) * 2 >= most
        monkeypatch.setattr(head_tiles, "MOST_ELEMENTS", most - 1)
        sizes.clear()
        tiled = head(pixels, features)
    assert max(sizes) < most
    assert relative_error(tiled, whole) < 1e-5
