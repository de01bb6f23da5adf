"""What transfer keeps: statistics of images whose answers are known, pairs of folders, the report."""

from __future__ import annotations

import io
import json
import re
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from test_cli import mistake
from test_report import Page

from comfyui_l2p.l2p_core.dataset.images import BrokenImage
from comfyui_l2p.l2p_core.evaluate import report
from comfyui_l2p.l2p_core.evaluate.compare import compare
from comfyui_l2p.l2p_core.evaluate.duplicates import near_duplicates
from comfyui_l2p.l2p_core.evaluate.measure import ImageStatistics, grid_ratio, measure, radial_frequencies, window_for
from comfyui_l2p.l2p_core.evaluate.pairs import of_folders
from comfyui_l2p.train.cli import main

pytestmark = pytest.mark.usefixtures("unflushed")


def noise(side: int = 64, seed: int = 0, low: int = 60, high: int = 190) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, (side, side, 3), dtype=np.uint8)


def smooth(side: int = 64, seed: int = 0) -> np.ndarray:
    """Large soft shapes that differ by seed."""
    coarse = Image.fromarray(noise(5, seed))
    return np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC))


def gridded(pixels: np.ndarray, patch: int = 16, depth: int = 12) -> np.ndarray:
    """The image with every second patch a little lighter, as a head leaves that sees patches one by one."""
    rows, columns = (np.arange(size) // patch % 2 for size in pixels.shape[:2])
    return (pixels + depth * (rows[:, None] ^ columns[None])[..., None]).clip(0, 255).astype(np.uint8)


def measured(pixels: np.ndarray, **more: Any) -> ImageStatistics:
    return measure(Image.fromarray(pixels), **{"window": 32, **more})


def save(path: Path, pixels: np.ndarray, **about: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = PngInfo()
    if about:
        fields.add_text("l2p", json.dumps(about))
    Image.fromarray(pixels).save(path, pnginfo=fields)


def test_a_grid_of_patches_is_seen_and_only_at_its_own_size() -> None:
    plain, marked = smooth(), gridded(smooth())
    assert grid_ratio(measured(plain).grid) == pytest.approx(1, abs=0.3)
    assert grid_ratio(measured(marked).grid) > 20
    assert grid_ratio(measured(gridded(noise()), patch=16).grid) > grid_ratio(measured(noise(), patch=16).grid) * 1.005
    assert grid_ratio(measured(marked, patch=15).grid) < 3  # the same borders, but not the grid that was asked about
    assert np.argmax(measured(gridded(smooth(), patch=8), patch=16).grid) in (0, 8)


def test_the_grids_ratio_is_its_definition() -> None:
    pixels = noise()
    luma = pixels.astype(np.float64) / 255 @ [0.299, 0.587, 0.114]
    across, down = np.diff(luma, axis=1) ** 2, np.diff(luma, axis=0) ** 2
    place = np.arange(1, 64) % 16
    energy = [np.mean([*across[:, place == at].ravel(), *down[place == at].ravel()]) for at in range(16)]
    assert measured(pixels).grid == pytest.approx(energy, rel=1e-4)
    assert grid_ratio(measured(pixels).grid) == pytest.approx(energy[0] / np.mean(energy[1:]), rel=1e-4)


def test_a_spectrum_peaks_at_the_images_frequency() -> None:
    waves = 127.5 + 100 * np.sin(2 * np.pi * np.arange(128) * 8 / 32)  # a quarter cycle per pixel
    pixels = np.broadcast_to(waves[None, :, None], (128, 128, 3)).round().astype(np.uint8)
    spectrum = measured(pixels).spectrum
    assert radial_frequencies(32)[np.argmax(spectrum)] == pytest.approx(0.25, abs=1 / 32)
    flat = measured(noise(256)).spectrum[2:]
    assert flat.max() < 1.5 * flat.min(), "white noise has the same power at every frequency"
    soft = measured(smooth(256)).spectrum
    assert soft[-1] < 1e-3 * soft[1]


def test_colour_contrast_sharpness_and_limits() -> None:
    pixels = np.zeros((64, 64, 3), dtype=np.uint8)
    pixels[:, :32] = (255, 0, 51)
    pixels[:, 32:] = (255, 102, 51)
    found = measured(pixels)
    assert found.colour == pytest.approx((1.0, 0.2, 0.2)) and found.spread == pytest.approx((0, 0.2, 0), abs=1e-3)
    assert found.chroma == pytest.approx((1.0 + 0.8) / 2)
    assert found.white == pytest.approx(1 / 3) and found.black == pytest.approx(1 / 6)
    assert found.contrast == pytest.approx(0.587 * 0.2, abs=1e-4)
    blurred = Image.fromarray(noise()).resize((32, 32)).resize((64, 64))
    assert measured(np.asarray(blurred)).sharpness < 0.5 * measured(noise()).sharpness
    assert measured(np.full((64, 64, 3), 7, dtype=np.uint8)).sharpness == 0


def test_bands_give_what_the_whole_image_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = noise(200)[:, :97]
    whole = measured(pixels)
    monkeypatch.setattr("comfyui_l2p.l2p_core.evaluate.measure.WINDOW", 32)
    banded = measured(pixels)
    for name in vars(whole):
        assert getattr(banded, name) == pytest.approx(getattr(whole, name), rel=1e-5), name


def test_a_large_image_takes_little_memory() -> None:
    """Beyond the image's own pixels: bands of it, whatever its height."""
    image = Image.new("RGB", (2048, 4096), (9, 99, 200))
    tracemalloc.start()
    try:
        measure(image)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 48 * 256 * 2048 < 2048 * 4096 * 3 * 1.1


def test_near_duplicates_are_found_among_many() -> None:
    thumbnails = np.random.default_rng(0).random((3000, 768), dtype=np.float32)
    thumbnails[2500] = thumbnails[7] + 0.01
    thumbnails[2501] = thumbnails[8] + 0.03
    assert near_duplicates(thumbnails) == [(7, 2500)]


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_an_image_of_more_than_8_bits_is_refused(mode: str) -> None:
    with pytest.raises(BrokenImage, match="8 bits"):
        measure(Image.new(mode, (64, 64)), window=32)


def test_windows_fit_the_smallest_image() -> None:
    assert [window_for([side, 5000]) for side in (33, 64, 255, 256, 10240)] == [32, 64, 128, 256, 256]


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Six pairs: the pixel model's images have a grid, and two of them are alike."""
    source, pixel = tmp_path / "source", tmp_path / "pixel"
    for i in range(6):
        about = {"prompt": f"a <b> {i}", "seed": i}
        save(source / f"deep/{i}.png", smooth(seed=i), **about)
        save(pixel / f"deep/{i}.png", gridded(smooth(seed=min(i, 4))), **about)
    return source, pixel


def test_two_folders_become_one_page(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "made" / "kept.html"
    assert main(["evaluate", "images", *map(str, folders), "--output", str(target)]) == 0
    out = capsys.readouterr().out
    assert "6 pairs of images of 64 x 64 pixels" in out and str(target) in out
    row = next(line for line in out.splitlines() if "Grid of 16 pixels" in line)
    source, pixel = (float(cell) for cell in row.split("|")[2:4])
    assert source == pytest.approx(1, abs=0.3) and pixel > 20
    text = target.read_text(encoding="utf-8")
    page = Page(text)
    assert all(link.startswith("data:image/jpeg;base64,") for link in page.loaded)
    assert len(page.loaded) == 2 * 6 + 3 * report.FARTHEST + 2
    assert page.tags.count("svg") == 2 and not {"script", "link"} & set(page.tags)
    assert "a &lt;b&gt; 3" in text and "prefers-color-scheme: dark" in text and 'name="viewport"' in text
    assert re.search(r"Near-duplicates of the pixel model</h2><p>Images that look like an earlier one: 1\.", text)
    assert "already exists" in mistake(capsys, "evaluate", "images", *folders, "--output", target)
    assert main(["evaluate", "images", *map(str, folders), "--output", str(target), "--overwrite"]) == 0


def test_pages_do_not_grow_with_the_images(tmp_path: Path) -> None:
    for i in range(2):
        for side in ("a", "b"):
            save(tmp_path / side / f"{i}.png", noise(1200, seed=i))
    found = compare(of_folders(tmp_path / "a", tmp_path / "b")[0])
    report.write(tmp_path / "page.html", found, "t")
    assert (tmp_path / "page.html").stat().st_size < 2_000_000
    assert found.difference.tolist() == [0, 0]
    assert all(row.kept in (None, 1) for row in found.rows)


def test_names_in_common_are_not_needed(folders: tuple[Path, Path]) -> None:
    for path in sorted((folders[1] / "deep").iterdir()):
        path.rename(path.with_name(f"ComfyUI_{path.name}"))
    pairs, said = of_folders(*folders)
    assert "order of their names" in said
    assert [pair.prompt for pair in pairs] == [f"a <b> {i}" for i in range(6)]


def test_mistakes_are_one_line(folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, pixel = folders
    target = tmp_path / "page.html"

    def said(a: Path = source, b: Path = pixel, *more: str) -> str:
        return mistake(capsys, "evaluate", "images", a, b, "--output", target, *more)

    assert "no folder" in said(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "holds no images" in said(tmp_path / "empty")
    assert "given twice" in said(source, source)
    assert "end it in .html" in mistake(capsys, "evaluate", "images", source, pixel, "--output", tmp_path / "a.png")
    assert "at most 1024" in said(source, pixel, "--patch", "99999")
    assert "65 are the least" in said(source, pixel, "--patch", "64")
    (pixel / "deep/3.png").rename(tmp_path / "3.png")
    assert f"{pixel} lacks 1 of the 6 images of {source} (deep/3)" in said()
    save(pixel / "deep/3.png", smooth(80))
    assert "deep/3 is 64 x 64 pixels from the source and 80 x 80" in said()
    save(pixel / "deep/3.png", smooth(), prompt="a <b> 3", seed=4)
    assert "states the seed '3'" in said() and "same prompts and seeds" in said()
    content = io.BytesIO()
    Image.fromarray(noise()).save(content, format="PNG")
    (pixel / "deep/3.png").write_bytes(content.getvalue()[:3000])
    assert "3.png cannot be compared: it is damaged or truncated" in said()
    (pixel / "deep/3.png").write_bytes(b"no image")
    assert "3.png cannot be compared: it is not an image" in said()
    save(pixel / "deep/3.png", smooth())
    save(pixel / "deep/3.jpg", smooth())
    assert "keep one of the two" in said()
    assert not target.exists()
