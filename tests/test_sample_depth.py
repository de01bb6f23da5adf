"""`l2p sample` with more than 8 bits: a ramp repainted in part, and what does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from test_cli import mistake
from test_deep_images import png_of
from torch import Tensor

from comfyui_l2p.l2p_core import flow
from comfyui_l2p.l2p_core.dataset import images
from comfyui_l2p.l2p_core.deep_images.common import to_levels
from comfyui_l2p.train.cli import main

pytestmark = pytest.mark.usefixtures("unflushed")

RAMP = (np.arange(64 * 64, dtype=np.uint16) * 16).reshape(64, 64)
KEPT = np.ones((64, 64), bool)
KEPT[7:27, 13:33] = False
WORDS = ["sample", "tiny", "--prompt", "a red circle", "--steps", "2", "--cfg", "1"]


@pytest.fixture(scope="module")
def ramp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the ramp as PNG and TIFF, and the mask."""
    folder = tmp_path_factory.mktemp("ramp")
    (folder / "ramp.png").write_bytes(png_of(RAMP[..., None]))
    tifffile.imwrite(folder / "ramp.tif", RAMP)
    Image.fromarray(np.where(KEPT, 0, 255).astype(np.uint8)).save(folder / "mask.png")
    return folder


@pytest.mark.parametrize(
    ("start", "name", "options"),
    [
        ("ramp.png", "a.png", ["--depth", "16"]),
        ("ramp.tif", "a.tif", []),
        ("ramp.tif", "b.tif", ["--depth", "float"]),
        ("ramp.png", "a.exr", []),
    ],
)
def test_a_ramp_comes_out_bit_for_bit_outside_the_mask(
    ramp: Path, tmp_path: Path, start: str, name: str, options: list[str]
) -> None:
    words = [*WORDS, *options, "--init", str(ramp / start), "--mask", str(ramp / "mask.png"), "--seed", "5"]
    assert main([*words, "--output", str(tmp_path / name)]) == 0
    found = to_levels(images.load(tmp_path / name, 64, 64))
    assert (found[KEPT] == RAMP[KEPT][:, None]).all()
    assert (found[~KEPT] != RAMP[~KEPT][:, None]).any(-1).mean() > 0.9
    if name == "a.tif":
        with tifffile.TiffFile(tmp_path / name) as file:
            about = json.loads(file.pages[0].description)["l2p"]
        assert file.pages[0].dtype == np.uint16 and (about["prompt"], about["seed"]) == ("a red circle", 5)
        assert "ramp" not in json.dumps(about)


def test_what_does_not_fit_is_said_before_the_model_is_read(
    ramp: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("L", (64, 64)).save(tmp_path / "black.png")
    Image.new("L", (64, 32), 255).save(tmp_path / "low.png")
    init, mask = ["--init", ramp / "ramp.png"], ["--mask", ramp / "mask.png"]
    for options, expected in [
        (["--output", tmp_path / "a.bmp"], "end it in .png, .tif or .exr"),
        (["--output", tmp_path / "a.png", "--depth", "float"], "8 or 16, not float"),
        (mask, "give the image with --init"),
        ([*init, *mask, "--width", 32], "remove --width and --height"),
        ([*init, "--mask", tmp_path / "black.png"], "black everywhere"),
        ([*init, "--mask", tmp_path / "low.png"], "64 x 32, but the image is 64 x 64"),
        ([*init, "--mask", tmp_path / "none.png"], "cannot be read"),
    ]:
        if "--output" not in options:
            options = [*options, "--output", tmp_path / "a.tif"]
        assert expected in mistake(capsys, *WORDS, *options)
    assert not list(tmp_path.glob("a.*"))


def test_the_known_part_leads_the_masked_one() -> None:
    """Outside the mask the path is that of the image and its noise; inside it is the model's."""
    image, noise = torch.rand(1, 3, 8, 8) * 4 - 2, torch.randn(1, 3, 8, 8)
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 4:] = 1
    mask[..., 3] = 0.5
    seen: list[tuple[Tensor, Tensor]] = []

    def model(x: Tensor, sigma: Tensor, captions: object) -> Tensor:
        seen.append((x, sigma))
        return torch.ones_like(x)

    found = flow.sample(model, noise, [None], sigmas=flow.sigmas(4), init=image, mask=mask)  # type: ignore[list-item]
    for x, sigma in seen:
        expected = flow.add_noise(image, noise, sigma)
        assert (x[..., :3] - expected[..., :3]).abs().max() < 1e-5
    assert torch.equal(found[..., :3], image[..., :3]), "beyond white too"
    assert torch.allclose(found[..., 4:], (noise - 1).clamp(-1, 1)[..., 4:], atol=1e-5)
    with pytest.raises(ValueError, match="needs an image"):
        flow.sample(model, noise, [None], sigmas=flow.sigmas(4), mask=mask)  # type: ignore[list-item]
