"""Image files as pixels: upright, on white, cropped and resized; broken ones named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_folders import truncate
from PIL import Image, PngImagePlugin
from torch import Tensor

from comfyui_l2p.l2p_core.dataset import images


def saved(path: Path, pixels: np.ndarray, **options: Any) -> Path:
    Image.fromarray(pixels).save(path, **options)
    return path


def quadrants(width: int = 32, height: int = 16) -> np.ndarray:
    """Red, green, blue and white quarters, from the top left on."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2, 0] = 255
    pixels[: height // 2, width // 2 :, 1] = 255
    pixels[height // 2 :, : width // 2, 2] = 255
    pixels[height // 2 :, width // 2 :] = 255
    return pixels


def corners(pixels: Tensor) -> list[tuple[int, ...]]:
    """The colours of the corners, from the top left on."""
    return [tuple(pixels[:, row, column].tolist()) for row in (0, -1) for column in (0, -1)]


def test_pixels_pass_unchanged_at_their_own_size(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (48, 32, 3), np.uint8)
    path = saved(tmp_path / "a.png", pixels)
    assert images.look(path)[:2] == (32, 48)
    loaded = images.load(path, 32, 48)
    assert loaded.dtype == torch.uint8
    assert loaded.is_contiguous()
    assert torch.equal(loaded, torch.from_numpy(pixels).permute(2, 0, 1))


def test_shrinking_averages_over_areas(tmp_path: Path) -> None:
    """Stripes of one pixel become grey: without averaging they would alias to black, white or broad stripes."""
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    loaded = images.load(saved(tmp_path / "a.png", stripes), 13, 13)
    assert (loaded[:, :, 2:-2].float() - 127.5).abs().max() < 8


def test_the_middle_is_kept(tmp_path: Path) -> None:
    ramp = np.repeat(np.arange(60, dtype=np.uint8)[None, :, None], 20, 0).repeat(3, 2)
    expected = torch.arange(20.5, 40, 2)
    wide = images.load(saved(tmp_path / "a.png", ramp), 10, 10)
    assert (wide[0] - expected).abs().max() <= 0.6
    tall = images.load(saved(tmp_path / "b.png", ramp.transpose(1, 0, 2)), 10, 10)
    assert torch.equal(tall, wide.mT)


def test_cropping_leaves_shapes_alone(tmp_path: Path) -> None:
    """A circle stays a circle."""
    rows, columns = np.mgrid[:100, :160]
    inside = (rows - 49.5) ** 2 + (columns - 79.5) ** 2 < 30**2
    circle = np.repeat(inside[..., None], 3, 2).astype(np.uint8) * 255
    loaded = images.load(saved(tmp_path / "a.png", circle), 48, 64)[0] > 127
    assert abs(int(loaded.any(0).sum()) - int(loaded.any(1).sum())) <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_exif_orientation_as_pillow_applies_it(tmp_path: Path, orientation: int, suffix: str) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100, "lossless": True} if suffix == "webp" else {"quality": 100}
    path = saved(tmp_path / f"a.{suffix}", quadrants(), exif=exif.tobytes(), **options)
    with Image.open(path) as image:
        expected = torch.from_numpy(np.array(ImageOps.exif_transpose(image).convert("RGB"))).permute(2, 0, 1)
    width, height = images.look(path)[:2]
    assert (height, width) == tuple(expected.shape[1:])
    loaded = images.load(path, width, height)
    assert torch.equal(loaded, expected)
    small = images.load(path, width // 2, height // 2)
    for found, wanted in zip(corners(small), corners(expected), strict=True):
        assert np.abs(np.subtract(found, wanted)).max() < 40


def test_sizes_come_from_headers_alone(tmp_path: Path) -> None:
    """A file that ends after its header still tells its size, turned ones included."""
    exif = Image.Exif()
    exif[0x0112] = 6
    path = saved(tmp_path / "a.png", np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8), exif=exif)
    raw = path.read_bytes()
    path.write_bytes(raw[: raw.index(b"IDAT") + 40])
    assert images.look(path)[:2] == (64, 96)
    with pytest.raises(images.BrokenImage, match="damaged or truncated"):
        images.load(path, 64, 96)


def test_orientation_behind_the_pixels_counts_nowhere(tmp_path: Path) -> None:
    """Size and pixels must agree, and a header's reader does not see what follows the pixels."""
    exif = Image.Exif()
    exif[0x0112] = 6
    raw = saved(tmp_path / "a.png", quadrants(), exif=exif).read_bytes()
    start = raw.index(b"eXIf") - 4
    stop = start + 12 + int.from_bytes(raw[start : start + 4], "big")
    end = raw.index(b"IEND") - 4
    (tmp_path / "a.png").write_bytes(raw[:start] + raw[stop:end] + raw[start:stop] + raw[end:])
    assert images.look(tmp_path / "a.png")[:2] == (32, 16)
    assert torch.equal(images.load(tmp_path / "a.png", 32, 16), torch.from_numpy(quadrants()).permute(2, 0, 1))


def test_transparency_lies_on_white(tmp_path: Path) -> None:
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[..., 0] = 200
    pixels[:, :4, 3] = 255
    pixels[:, 4:6, 3] = 128
    loaded = images.load(saved(tmp_path / "a.png", pixels), 8, 8)
    assert loaded[:, 0, 0].tolist() == [200, 0, 0]
    assert np.abs(np.subtract(loaded[:, 0, 5].tolist(), [227, 127, 127])).max() <= 1
    assert loaded[:, 0, 7].tolist() == [255, 255, 255]


def test_hidden_colours_do_not_bleed_into_edges(tmp_path: Path) -> None:
    """Behind full transparency files keep any colour; resizing must not mix it in."""
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[:, :32] = (255, 255, 255, 255)
    pixels[:, 32:] = (0, 0, 0, 0)
    loaded = images.load(saved(tmp_path / "a.png", pixels), 17, 17)
    assert (loaded >= 254).all()


def test_every_kind_of_pixel_becomes_rgb(tmp_path: Path) -> None:
    found = {}
    plain = Image.fromarray(np.full((8, 8, 3), 100, np.uint8))
    for mode, suffix in [("L", "png"), ("P", "png"), ("CMYK", "tif"), ("LA", "png"), ("YCbCr", "jpg")]:
        plain.convert(mode, palette=Image.Palette.ADAPTIVE).save(tmp_path / f"{mode}.{suffix}")
        found[mode] = images.load(tmp_path / f"{mode}.{suffix}", 8, 8)
    for mode, pixels in found.items():
        assert (pixels.int() - 100).abs().max() <= 1, mode
    plain.convert("1", dither=Image.Dither.NONE).save(tmp_path / "bits.png")
    assert (images.load(tmp_path / "bits.png", 8, 8) == 0).all()


def test_a_transparent_colour_of_a_palette_is_white(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[0, 1]] * 2, np.uint8), "L").convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.save(tmp_path / "a.png", transparency=1)
    assert images.load(tmp_path / "a.png", 2, 2)[:, 0].T.tolist() == [[10, 20, 30], [255, 255, 255]]


def test_large_jpegs_are_decoded_smaller_and_look_the_same(tmp_path: Path) -> None:
    rows, columns = np.mgrid[:1024, :1024]
    waves = np.stack([np.sin(rows / 60), np.cos(columns / 45), np.sin((rows + columns) / 80)], -1)
    path = saved(tmp_path / "a.jpg", (waves * 100 + 128).astype(np.uint8), quality=95)
    with Image.open(path) as image:
        whole = np.array(image.resize((64, 64), Image.Resampling.LANCZOS))
    difference = (images.load(path, 64, 64).permute(1, 2, 0).int() - torch.from_numpy(whole).int()).abs()
    assert difference.max() <= 3


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_of_10240_pixels_passes(tmp_path: Path) -> None:
    """One bit a pixel, so that the test is quick."""
    image = Image.new("1", (10240, 10240), 0)
    image.paste(1, (0, 0, 5120, 10240))
    image.save(tmp_path / "large.png")
    assert images.look(tmp_path / "large.png")[:2] == (10240, 10240)
    loaded = images.load(tmp_path / "large.png", 160, 160)
    assert (loaded[:, :, :76] == 255).all()
    assert (loaded[:, :, 84:] == 0).all()


def test_a_decompression_bomb_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    Image.new("1", (14000, 14000)).save(path)
    with pytest.raises(images.BrokenImage, match="more pixels than are safe"):
        images.look(path)
    with pytest.raises(images.BrokenImage, match="more pixels than are safe"):
        images.load(path, 64, 64)


def test_broken_files_say_what_is_wrong(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    for suffix in ("png", "jpg", "webp"):
        path = saved(tmp_path / f"cut.{suffix}", noise)
        truncate(path)
        with pytest.raises(images.BrokenImage, match="damaged or truncated"):
            images.load(path, 64, 64)
    (tmp_path / "text.png").write_text("no image", encoding="utf-8")
    (tmp_path / "empty.png").touch()
    for name in ("text.png", "empty.png"):
        with pytest.raises(images.BrokenImage, match="not an image of a known format"):
            images.look(tmp_path / name)


def test_a_flipped_bit_in_a_png_is_noticed(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0x10
    path.write_bytes(raw)
    with pytest.raises(images.BrokenImage, match="damaged or truncated"):
        images.load(path, 64, 64)


def test_programs_in_disguise_are_no_images(tmp_path: Path) -> None:
    """Pillow would hand PostScript to another program."""
    path = tmp_path / "a.png"
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(path, format="EPS")
    with pytest.raises(images.BrokenImage, match="not an image of a known format"):
        images.look(path)


def test_a_bomb_in_a_text_chunk_is_refused(tmp_path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * 80_000_000, zip=True)
    path = saved(tmp_path / "a.png", np.zeros((4, 4, 3), np.uint8), pnginfo=info)
    with pytest.raises(images.BrokenImage):
        images.load(path, 4, 4)


def test_a_failing_disk_is_no_verdict_about_the_image(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        images.load(tmp_path / "gone.png", 8, 8)


def test_pixels_survive_eight_bits() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(images.to_uint8(images.from_uint8(values)), values)
    assert images.from_uint8(values).aminmax() == (-1, 1)
    assert images.to_uint8(torch.tensor([-2.0, 2.0])).tolist() == [0, 255]
