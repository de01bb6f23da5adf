"""Files with more than 8 bits per channel: read to the last bit, written rounded, and refused in one sentence."""

from __future__ import annotations

import importlib.util
import io
import json
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from data_folders import features, write_csv
from PIL import Image
from torch import Tensor

from comfyui_l2p.l2p_core.dataset import images, picture_files
from comfyui_l2p.l2p_core.dataset.image_folder import open_folder
from comfyui_l2p.l2p_core.dataset.loader import Loader
from comfyui_l2p.l2p_core.deep_images import exr, frames, tiff
from comfyui_l2p.l2p_core.deep_images.common import BrokenImage, to_levels
from comfyui_l2p.l2p_core.deep_images.stated_bits import stated_bits
from comfyui_l2p.l2p_core.run import source_images
from comfyui_l2p.l2p_core.run.data import RunData
from comfyui_l2p.train import pictures

SIDE = 256
RAMP = np.arange(SIDE * SIDE, dtype=np.uint16).reshape(SIDE, SIDE)
"""Every level of 16 bits once."""
COLOURS = np.stack([RAMP, RAMP[::-1], RAMP.T], -1)
TEXT = {"l2p": json.dumps({"prompt": "a fox, für dich", "seed": 3})}


def pixels_of(levels: np.ndarray) -> Tensor:
    """Levels (H, W, 3) of 16 bits as (3, H, W) in [-1, 1]."""
    return torch.from_numpy(levels.astype(np.float32) / 32767.5 - 1).permute(2, 0, 1)


def written(path: Path, pixels: Tensor, depth: str) -> Path:
    path.write_bytes(picture_files.writer(path.name, depth).encode(pixels, TEXT))
    return path


def floats(path: Path, values: np.ndarray, **options: Any) -> Path:
    tifffile.imwrite(path, values.astype(np.float32), **{"photometric": "rgb" if values.ndim == 3 else None, **options})
    return path


def png_of(levels: np.ndarray) -> bytes:
    """A 16-bit PNG of 1 to 4 channels as another program writes it: no filter, one chunk."""
    height, width, channels = levels.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def refused(path: Path) -> str:
    """The sentence about a file, from its header or its pixels."""
    with pytest.raises(BrokenImage) as error:
        header = images.look(path)
        images.load(path, header.width, header.height)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(("name", "depth"), [("a.png", "16"), ("a.tif", "16"), ("a.tiff", "float"), ("a.exr", "float")])
def test_every_level_of_16_bits_survives_a_file(tmp_path: Path, name: str, depth: str) -> None:
    path = written(tmp_path / name, pixels_of(COLOURS), depth)
    assert images.look(path)[:2] == (SIDE, SIDE)
    loaded = images.load(path, SIDE, SIDE)
    assert loaded.dtype == torch.float32 and loaded.shape == (3, SIDE, SIDE)
    assert (to_levels(loaded) == COLOURS).all()
    if name != "a.exr":  # whose light is not ours
        assert torch.equal(loaded, pixels_of(COLOURS))


def test_levels_round_to_the_nearest() -> None:
    levels = torch.tensor([0.0, 0.49, 0.51, 65534.4, 65534.6, 65535, -9, 70000])
    found = to_levels((levels / 32767.5 - 1).expand(3, 1, -1))
    assert found[0, :, 0].tolist() == [0, 0, 1, 65534, 65535, 65535, 0, 65535]


def test_floats_keep_what_lies_beyond_white(tmp_path: Path) -> None:
    pixels = torch.linspace(-1.2, 1.3, 64).view(1, 8, 8).expand(3, -1, -1)
    for name in ("a.tif", "a.exr"):
        written(tmp_path / name, pixels, "float")
    assert (images.load(tmp_path / "a.tif", 8, 8) - pixels).abs().max() < 1e-6
    assert (images.load(tmp_path / "a.exr", 8, 8) - pixels.clamp(-1, 1)).abs().max() < 1e-6
    light = frames.decode("exr", (tmp_path / "a.exr").read_bytes(), exr.FILES)
    assert light.max() > 1.3 and light.min() < 0, "the file keeps it"


def test_metadata_lies_where_other_programs_look(tmp_path: Path) -> None:
    for name, depth in (("a.png", "8"), ("b.png", "16"), ("c.tif", "16"), ("d.exr", "float")):
        written(tmp_path / name, pixels_of(COLOURS)[:, :16, :16], depth)
    for name in ("a.png", "b.png"):
        with Image.open(tmp_path / name) as image:
            assert image.info["l2p"] == TEXT["l2p"] and image.size == (16, 16)
    with tifffile.TiffFile(tmp_path / "c.tif") as file:
        assert json.loads(file.pages[0].description)["l2p"] == json.loads(TEXT["l2p"])
        assert file.pages[0].photometric == tifffile.PHOTOMETRIC.RGB
    raw = (tmp_path / "d.exr").read_bytes()
    assert b"l2p\0string\0" + struct.pack("<i", len(TEXT["l2p"])) + TEXT["l2p"].encode() in raw


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_png_of_other_programs(tmp_path: Path, channels: int) -> None:
    """Grey becomes three equal channels; what is transparent lies on white."""
    levels = COLOURS[:16, :32].repeat(2, -1)[..., :channels].copy()
    if channels in (2, 4):
        levels[..., -1] = 65535
        levels[4:, :, -1] = 0
    (tmp_path / "a.png").write_bytes(png_of(levels))
    found = to_levels(images.load(tmp_path / "a.png", 32, 16))
    opaque = 4 if channels in (2, 4) else 16
    colours = levels[..., :3] if channels > 2 else levels[..., :1]
    assert (found[:opaque] == colours[:opaque]).all()
    assert (found[opaque:] == 65535).all()


@pytest.mark.parametrize(
    ("values", "options", "expected"),
    [
        (RAMP, {}, RAMP),
        (RAMP, {"byteorder": ">"}, RAMP),
        (RAMP, {"photometric": "miniswhite"}, 65535 - RAMP),
        (RAMP, {"tile": (64, 64), "compression": "zlib"}, RAMP),
        (RAMP, {"bigtiff": True}, RAMP),
        (RAMP.astype(np.uint32) * 65537, {}, RAMP),
        (RAMP / np.float64(65535), {}, RAMP),
        (np.stack([RAMP] * 3), {"photometric": "rgb", "planarconfig": "separate"}, RAMP),
    ],
    ids=["plain", "big-endian", "white is 0", "tiles", "BigTIFF", "32 bits", "doubles", "planes"],
)
def test_tiff_of_other_programs(
    tmp_path: Path, values: np.ndarray, options: dict[str, Any], expected: np.ndarray
) -> None:
    tifffile.imwrite(tmp_path / "a.tif", values, **options)
    assert images.look(tmp_path / "a.tif")[:2] == (SIDE, SIDE)
    assert (to_levels(images.load(tmp_path / "a.tif", SIDE, SIDE)) == expected[..., None]).all()


def test_tiff_with_alpha_lies_on_white(tmp_path: Path) -> None:
    half = np.full((4, 4, 4), 32768, np.uint16)
    for kind, expected in (("unassalpha", 0.5 * 0.5 + 0.5), ("assocalpha", 0.5 + 0.5)):
        tifffile.imwrite(tmp_path / f"{kind}.tif", half, photometric="rgb", extrasamples=[kind])
        loaded = images.load(tmp_path / f"{kind}.tif", 4, 4)
        assert ((loaded + 1) / 2 - expected).abs().max() < 1e-4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_deep_tiff_is_turned_upright_as_a_shallow_one(tmp_path: Path, orientation: int) -> None:
    values = np.zeros((16, 32, 3), np.uint8)
    values[:8, :16, 0], values[:8, 16:, 1], values[8:, :16, 2] = 255, 255, 255
    tag = [(274, "H", 1, orientation, True)]
    tifffile.imwrite(tmp_path / "8.tif", values, photometric="rgb", extratags=tag)
    tifffile.imwrite(tmp_path / "16.tif", values.astype(np.uint16) * 257, photometric="rgb", extratags=tag)
    assert images.look(tmp_path / "16.tif")[:2] == images.look(tmp_path / "8.tif")[:2]
    size = images.look(tmp_path / "8.tif")[:2]
    shallow, deep = (images.load(tmp_path / name, *size) for name in ("8.tif", "16.tif"))
    assert deep.dtype == torch.float32 and torch.equal(images.as_pixels(shallow), deep)


@pytest.mark.parametrize("size", [(48, 64), (320, 200), (37, 23), (100, 100), (161, 100)])
def test_resizing_is_pillows(tmp_path: Path, size: tuple[int, int]) -> None:
    """Within what Pillow rounds between its two passes."""
    rows, columns = np.mgrid[:100, :160]
    waves = (np.stack([np.sin(rows / 6), np.cos(columns / 4), np.sin((rows + columns) / 8)], -1) * 90 + 128).astype(
        np.uint8
    )
    Image.fromarray(waves).save(tmp_path / "8.png")
    (tmp_path / "16.png").write_bytes(png_of(waves.astype(np.uint16) * 257))
    shallow, deep = (images.as_pixels(images.load(tmp_path / f"{bits}.png", *size)) for bits in (8, 16))
    assert ((shallow - deep) * 127.5).abs().max() < 1.3


def test_a_crop_without_scaling_copies() -> None:
    pixels = pixels_of(COLOURS)
    assert torch.equal(images.fitted(pixels, SIDE, 63), pixels[:, 96:159])
    assert torch.equal(images.fitted(pixels, 33, SIDE), pixels[:, :, 111:144])


def test_a_large_deep_image_is_reduced_in_bounded_time(tmp_path: Path) -> None:
    """The long side of the largest variant."""
    tifffile.imwrite(tmp_path / "a.tif", np.tile(np.arange(10240, dtype=np.uint16), (64, 1)))
    assert images.look(tmp_path / "a.tif")[:2] == (10240, 64)
    loaded = images.load(tmp_path / "a.tif", 1600, 10)
    middle = (loaded[0, 5, 20:-20] + 1) * 32767.5
    assert (middle - (torch.arange(1600) * 6.4 + 2.7)[20:-20]).abs().max() < 0.5


def cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-40])
    return path


def flipped(path: Path) -> Path:
    raw = bytearray(path.read_bytes())
    raw[len(raw) * 3 // 4] ^= 0x55
    path.write_bytes(raw)
    return path


NOISE = np.random.default_rng(0).integers(0, 65536, (64, 64, 3)).astype(np.uint16)


@pytest.mark.parametrize(
    ("name", "damage"),
    [("a.png", cut), ("a.png", flipped), ("a.tif", cut), ("a.exr", cut), ("a.exr", flipped)],
)
def test_damage_is_noticed(tmp_path: Path, name: str, damage: Callable[[Path], Path]) -> None:
    path = written(tmp_path / name, pixels_of(NOISE), "float" if name == "a.exr" else "16")
    if name == "a.exr" and damage is flipped:  # what compresses has a checksum
        path = written(path, pixels_of(COLOURS), "float")
    assert "damaged or truncated" in refused(damage(path))


def test_a_png_with_too_few_rows_is_noticed(tmp_path: Path) -> None:
    whole, half = png_of(NOISE), png_of(NOISE[:20])
    tail = half[half.index(b"IDAT") - 4 :]
    (tmp_path / "a.png").write_bytes(whole[: whole.index(b"IDAT") - 4] + tail)
    assert "damaged or truncated" in refused(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda path: floats(path, np.full((4, 4, 3), np.nan)), "not finite"),
        (lambda path: floats(path, np.full((4, 4, 3), np.inf)), "not finite"),
        (lambda path: floats(path, np.arange(48.0).reshape(4, 4, 3)), "range from 0 to 47"),
        (
            lambda path: tifffile.imwrite(path, np.zeros((3, 64, 64), np.uint16), photometric="minisblack"),
            "has 3 pages",
        ),
        (lambda path: tifffile.imwrite(path, np.zeros((3, 64, 64), np.uint16), imagej=True), "has 3 pages"),
        (lambda path: tifffile.imwrite(path, np.zeros((4, 4), np.int16)), "unsigned integers or as floats"),
        (lambda path: tifffile.imwrite(path, np.zeros((4, 4), np.complex64)), "unsigned integers or as floats"),
        (lambda path: tifffile.imwrite(path, np.zeros((4, 4, 4), np.uint16), photometric="separated"), "SEPARATED"),
        (
            lambda path: tifffile.imwrite(path, NOISE.repeat(2, -1)[..., :4], photometric="rgb", extrasamples=[0]),
            "not all of them colours",
        ),
        (lambda path: path.write_bytes(b"II*\0" + bytes(range(64))), "damaged or truncated"),
        (lambda path: path.write_bytes(b"v/1\x01" + bytes(range(64))), "damaged or truncated"),
        (lambda path: path.write_bytes(b"v/1\x01\x02\x10\0\0" + bytes(64)), "several parts"),
    ],
)
def test_hostile_files_end_in_a_sentence(tmp_path: Path, make: Callable[[Path], Any], expected: str) -> None:
    make(tmp_path / "a.tif")
    assert expected in refused(tmp_path / "a.tif")


def header_of(content: bytes, width: int, height: int) -> bytes:
    """An EXR's header with other sizes."""
    for name in (b"dataWindow", b"displayWindow"):
        at = content.index(name + b"\0box2i\0") + len(name) + 11
        content = content[:at] + struct.pack("<4i", 0, 0, width - 1, height - 1) + content[at + 16 :]
    return content


def test_bombs_and_empty_images_are_refused_from_their_headers(tmp_path: Path) -> None:
    png = bytearray(png_of(NOISE))
    png[16:24] = struct.pack(">II", 60_000, 60_000)
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    small = written(tmp_path / "small.exr", pixels_of(NOISE), "float").read_bytes()
    (tmp_path / "bomb.png").write_bytes(png)
    (tmp_path / "bomb.exr").write_bytes(header_of(small, 60_000, 60_000))
    (tmp_path / "zero.exr").write_bytes(header_of(small, 0, 8))
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, NOISE[..., 0], rowsperstrip=64)
    raw = bytearray(buffer.getvalue())
    with tifffile.TiffFile(io.BytesIO(bytes(raw))) as file:
        for name in ("ImageWidth", "ImageLength"):
            tag = file.pages[0].tags[name]
            raw[tag.valueoffset : tag.valueoffset + 2] = struct.pack("<H", 60_000)
    (tmp_path / "bomb.tif").write_bytes(raw)
    for name in ("bomb.png", "bomb.exr", "bomb.tif"):
        with pytest.raises(BrokenImage, match="more pixels than are safe"):
            images.look(tmp_path / name)
    with pytest.raises(BrokenImage, match="no pixels"):
        images.look(tmp_path / "zero.exr")


@pytest.mark.parametrize(("name", "package"), [("a.png", "av"), ("a.tif", "tifffile"), ("a.exr", "av")])
def test_a_missing_package_is_named(tmp_path: Path, name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / name, pixels_of(NOISE), "float" if name == "a.exr" else "16")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(BrokenImage, match=f"need the package {package}: install it into the Python"):
        images.look(tmp_path / name)


@pytest.mark.skipif(importlib.util.find_spec("imagecodecs") is not None, reason="imagecodecs decodes it")
def test_compressed_tiff_names_its_package(tmp_path: Path) -> None:
    """From its header; here a file that says that it is compressed with LZW."""
    tifffile.imwrite(tmp_path / "a.tif", RAMP)
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+") as file:
        file.pages[0].tags["Compression"].overwrite(5)
    with pytest.raises(BrokenImage, match="needs the package imagecodecs"):
        images.look(tmp_path / "a.tif")


def test_shallow_tiff_needs_no_further_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(NOISE.astype(np.uint8)).save(tmp_path / "a.tif")
    monkeypatch.setitem(sys.modules, "tifffile", None)
    assert images.load(tmp_path / "a.tif", 64, 64).dtype == torch.uint8


def test_a_ramp_goes_through_a_data_set_into_a_batch(tmp_path: Path) -> None:
    """In every format, beside images of 8 bits."""
    small = COLOURS[:64, :64]
    for name, depth in (("0.png", "16"), ("1.tif", "16"), ("2.tiff", "float"), ("3.exr", "float")):
        written(tmp_path / name, pixels_of(small), depth)
    tifffile.imwrite(tmp_path / "4.tif", small[..., 0])
    Image.fromarray(np.full((64, 64, 3), 7, np.uint8)).save(tmp_path / "5.png")
    names = ["0.png", "1.tif", "2.tiff", "3.exr", "4.tif", "5.png"]
    write_csv(tmp_path / "metadata.csv", [(name, f"image {name[0]}", n) for n, name in enumerate(names)])
    data = open_folder(tmp_path, area=64 * 64, multiple=16)
    assert not data.problems
    with Loader(data, features, batch_size=6, seed=0) as source:
        batch = source.batch(0)
    assert batch.pixels.dtype == torch.float32
    beside = source_images._of_data_set(RunData(data), "image 0", 64)
    assert beside is not None and torch.equal(beside, pixels_of(small)), "the report's images take the same way"
    for caption, pixels in zip(batch.captions, batch.pixels, strict=True):
        expected = {4: small[..., :1], 5: np.full((64, 64, 1), 7 * 257)}.get(int(caption), small)
        assert (to_levels(pixels) == expected).all(), caption


def _avif(path: Path) -> None:
    """Of 10 bits, as its header says; Pillow writes 8."""
    Image.fromarray(NOISE.astype(np.uint8)).save(path)
    content = bytearray(path.read_bytes())
    content[content.index(b"av1C") + 4 + 2] |= 0x40
    channels = content.index(b"pixi") + 4 + 4
    content[channels + 1 : channels + 4] = b"\x0a" * 3
    path.write_bytes(content)


ROUNDED: dict[str, tuple[int, Callable[[Path], object]]] = {
    "grey.pgm": (16, lambda path: Image.fromarray(RAMP).save(path)),
    "colours.ppm": (12, lambda path: path.write_bytes(b"P6\n# made by hand\n4 4\n# c\n4095\n" + bytes(96))),
    "grey.jp2": (16, lambda path: Image.fromarray(RAMP).save(path)),
    "photo.avif": (10, _avif),
    "small.ppm": (0, lambda path: Image.fromarray(NOISE.astype(np.uint8)).save(path)),
    "small.jp2": (0, lambda path: Image.fromarray(NOISE.astype(np.uint8)).save(path)),
    "small.avif": (0, lambda path: Image.fromarray(NOISE.astype(np.uint8)).save(path)),
}


def test_levels_that_are_lost_are_said(tmp_path: Path) -> None:
    """Of formats that are read with 8 bits; also when the sizes come from the index."""
    for name, (bits, write) in ROUNDED.items():
        write(tmp_path / name)
        (tmp_path / f"{name}.txt").write_text("an image")
        assert images.look(tmp_path / name).rounded == bits, name
        notes = pictures.reading_notes(tmp_path / name)
        assert [f"{name} has {bits} bits" in note for note in notes] == [True] * bool(bits), name
    for _ in range(2):
        data = open_folder(tmp_path, area=64 * 64, multiple=16, index=tmp_path / "index.json")
        (said,) = [note for note in data.notes if "more than 8 bits" in note]
        assert said.startswith("4 images") and "colours.ppm (12 bits)" in said and "small" not in said


@pytest.mark.parametrize(("box", "bits"), [(b"hvcC" + bytes(17) + b"\xfa", 10), (b"av1C\x81\x04\x60" + bytes(20), 12)])
def test_bits_of_photographs(tmp_path: Path, box: bytes, bits: int) -> None:
    (tmp_path / "a").write_bytes(bytes(100) + box)
    assert stated_bits(tmp_path / "a", "HEIF") == bits
    (tmp_path / "a").write_bytes(box[:-20])
    assert stated_bits(tmp_path / "a", "HEIF") == 0


def test_writers_say_what_they_write() -> None:
    for name, depth, expected in [
        ("a.bmp", None, "end it in"),
        ("a.exr", "16", "float"),
        ("a.tif", "8", "16 or float"),
    ]:
        with pytest.raises(ValueError, match=expected):
            picture_files.writer(name, depth)
    assert [picture_files.writer(name).depth for name in ("a.PNG", "a.tif", "a.exr")] == ["8", "16", "float"]


def test_tiff_pages_that_are_small_copies_do_not_count(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(RAMP)
        file.write(RAMP[::4, ::4], subfiletype=1)
    assert tiff.look(tmp_path / "a.tif")[:3] == (SIDE, SIDE, 1)
    assert (to_levels(images.load(tmp_path / "a.tif", SIDE, SIDE)) == RAMP[..., None]).all()


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_a_whole_png_keeps_the_colours_of_transparent_pixels(tmp_path: Path, channels: int) -> None:
    levels = np.stack([RAMP, RAMP[::-1], RAMP.T, RAMP[:, ::-1]], -1)[..., -channels:]
    (tmp_path / "a.png").write_bytes(png_of(levels))
    colours, alpha = images.load_whole(tmp_path / "a.png")
    count = channels - 1 + channels % 2
    assert colours.shape == (3, SIDE, SIDE) and colours.is_contiguous()
    assert ((colours * 65535).round().numpy() == np.moveaxis(levels[..., :count], -1, 0)).all()
    assert (alpha is None) == bool(channels % 2)
    assert alpha is None or ((alpha * 65535).round().numpy() == levels[..., -1]).all()


@pytest.mark.parametrize("meaning", ["assocalpha", "unassalpha"])
def test_a_whole_float_tiff_has_the_files_own_numbers(tmp_path: Path, meaning: str) -> None:
    values = np.random.default_rng(0).random((6, 5, 4)).astype(np.float32) * np.float32(1e-3)
    values[..., 3] = np.array([0.25, 0.5, 1, 0, 0.5], np.float32)
    stored = values.copy()
    if meaning == "assocalpha":
        stored[..., :3] *= np.where(values[..., 3:], values[..., 3:], 1)
    colours, alpha = images.load_whole(floats(tmp_path / "a.tif", stored, extrasamples=[meaning]))
    assert alpha is not None and (alpha.numpy() == values[..., 3]).all()
    assert (np.moveaxis(colours.numpy(), 0, -1) == values[..., :3]).all()


def test_a_whole_image_is_upright_and_of_any_depth(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (5, 9, 4), np.uint8)
    turn = Image.Exif()
    turn[0x0112] = 6
    Image.fromarray(values).save(tmp_path / "a.png", exif=turn)
    colours, alpha = images.load_whole(tmp_path / "a.png")
    expected = np.rot90(values, -1).astype(np.float32) / 255
    assert alpha is not None and (alpha.numpy() == expected[..., 3]).all()
    assert (np.moveaxis(colours.numpy(), 0, -1) == expected[..., :3]).all()
    deep = np.rot90(values, -1).astype(np.uint16) * 257
    options: dict[str, Any] = {
        "photometric": "rgb",
        "extrasamples": ["unassalpha"],
        "extratags": [(274, 3, 1, 8, True)],
    }
    tifffile.imwrite(tmp_path / "a.tif", deep, **options)
    colours, alpha = images.load_whole(tmp_path / "a.tif")
    assert alpha is not None and (alpha.numpy() == values[..., 3].astype(np.float32) / 255).all()
    assert (np.moveaxis(colours.numpy(), 0, -1) == values[..., :3].astype(np.float32) / 255).all()


def test_a_whole_exr_is_srgb_with_its_alpha(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    light = np.random.default_rng(0).random((4, 6, 4)).astype(np.float32)
    light[..., :3] *= light[..., 3:]
    path = written(tmp_path / "a.exr", pixels_of(COLOURS[:4, :6]), "float")
    monkeypatch.setattr(frames, "decode", lambda *given: light)
    colours, alpha = images.load_whole(path)
    assert alpha is not None and (alpha.numpy() == light[..., 3]).all()
    expected = exr.to_srgb(light[..., :3] / light[..., 3:])
    assert np.allclose(np.moveaxis(colours.numpy(), 0, -1), expected, atol=1e-6)


def test_alpha_must_be_finite_too(tmp_path: Path) -> None:
    values = np.full((4, 4, 4), 0.5, np.float32)
    values[1, 1, 3] = np.nan
    assert "not finite" in refused(floats(tmp_path / "a.tif", values, extrasamples=["unassalpha"]))
