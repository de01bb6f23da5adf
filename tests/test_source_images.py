"""The run report shows the source's image beside every montage image, and says so where there is none."""

from __future__ import annotations

import base64
import csv
import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_report import Page

from comfyui_l2p.l2p_core.dataset.image_folder import open_folder
from comfyui_l2p.l2p_core.dataset.images import from_uint8, to_uint8
from comfyui_l2p.l2p_core.files.atomic import write_bytes
from comfyui_l2p.l2p_core.run import beside_source, montage, report, source_images
from comfyui_l2p.l2p_core.run.data import RunData
from comfyui_l2p.l2p_core.run.folder import RunFolder
from comfyui_l2p.l2p_core.run.recipe import DataSection, ModelSection, Recipe, WatchSection
from comfyui_l2p.l2p_core.tiny.bundled import TinySource
from comfyui_l2p.l2p_core.tiny.image_set import ImageSet

pytestmark = pytest.mark.usefixtures("unflushed")

KNOWN = ["a red circle", "a blue square", "a red square", "a blue circle"]


def recipe(prompts: list[str], kind: str = "tiny", base: str = "tiny") -> Recipe:
    data = DataSection(kind=kind, path="set" if kind == "folder" else "")
    return Recipe(ModelSection(base), data, watch=WatchSection(prompts=prompts, seed=7, steps=1))


def tiny_data() -> RunData:
    return RunData(ImageSet(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), ["a red circle"], [1]))


def shown(folder: RunFolder, pixels: torch.Tensor, prompts: list[str]) -> tuple[np.ndarray, str]:
    """The picture of step 1 in the report, and the report."""
    write_bytes(folder.montage(1), montage.file_content(pixels))
    report.write(folder, "status", prompts)
    text = folder.report.read_text(encoding="utf-8")
    (address,) = Page(text).loaded
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.split(",")[1]))).convert("RGB")), text


def test_the_sources_image_is_left_of_every_montage_image(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    source_images.write(folder, recipe(KNOWN), tiny_data(), 64)
    pixels = torch.linspace(-1, 1, 4)[:, None, None, None].expand(4, 3, 64, 64)
    picture, text = shown(folder, pixels, KNOWN)
    expected = to_uint8(TinySource().images(KNOWN, [7, 8, 9, 10], 1, 2.0)).permute(0, 2, 3, 1).numpy().astype(int)
    pitch = 2 * 128 + 2 + 12  # tiny images are enlarged twice; three pairs in a row
    for number in range(4):
        x, y = number % 3 * pitch, number // 3 * (128 + 12)
        source = picture[y : y + 128 : 2, x : x + 128 : 2].astype(int)
        assert np.abs(source - expected[number]).max() <= 1
        assert (picture[y : y + 128, x + 130 : x + 258] == to_uint8(pixels[number, 0, 0, 0]).item()).all()
    assert "In each pair the source&#x27;s image is left (sampled from the source" in text


def test_images_of_the_data_set_come_first_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "set"
    data.mkdir()
    for name, value in (("a", 50), ("photo", 200)):
        Image.new("RGB", (48, 32), (value, value, value)).save(data / f"{name}.png")
    with (data / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        rows = [("image", "prompt", "seed"), ("a.png", "a fox", 3), ("photo.png", "a hare", "")]
        csv.writer(file).writerows(rows)
    found = RunData(open_folder(data, area=32 * 32, multiple=16))
    folder, prompts = RunFolder(tmp_path / "run"), ["a fox", "a hare", "a newt"]
    folder.path.mkdir()
    of_folder = recipe(prompts, "folder", base="some.safetensors")
    source_images.write(folder, of_folder, found, 32)
    picture, text = shown(folder, torch.ones(3, 3, 32, 32), prompts)
    assert (picture[:128, :128] == 50).all() and (picture[:128, 130:258] == 255).all()
    # A photograph is not the source's, and shows as grey, as a caption without any image does.
    assert (picture[:128, 270 : 270 + 128] == picture[:128, 540 : 540 + 128]).all()
    assert "taken from the data set" in text and "Grey: 2 captions without an image of the source." in text
    monkeypatch.setattr(source_images, "file_content", None)
    source_images.write(folder, of_folder, found, 32)  # a second montage reads nothing again
    other = dataclasses.replace(of_folder, watch=dataclasses.replace(of_folder.watch, prompts=["a newt"]))
    source_images.write(folder, other, found, 32)
    assert beside_source.beside_source(folder, folder.montage(1)) == ""


def test_without_any_the_report_says_so(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    source_images.write(folder, recipe(["a red circle"], "renderings", base="other.safetensors"), tiny_data(), 64)
    picture, text = shown(folder, torch.ones(1, 3, 64, 64), ["a red circle"])
    assert picture.shape == (128, 128, 3) and "images are missing: the data set has none" in text
    assert not folder.source_images.exists()


def test_large_montages_are_shrunk_and_montages_of_other_prompts_stand_alone(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    source_images.write(folder, recipe(KNOWN[:2]), tiny_data(), 600)
    picture, _ = shown(folder, from_uint8(torch.full((2, 3, 600, 600), 9)), KNOWN[:2])
    assert 700 < picture.shape[1] <= 1536 and abs(int(picture[300, 560, 0]) - 9) <= 2
    picture, _ = shown(folder, torch.ones(1, 3, 600, 600), KNOWN[:1])
    assert picture.shape == (600, 600, 3)
