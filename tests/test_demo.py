"""The demo, shortened to seconds: the real source, files, training, scores and figure."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from comfyui_l2p.l2p_core import head_fit, patch_pairs, tiny
from comfyui_l2p.l2p_core.checkpoint import open_checkpoint
from comfyui_l2p.l2p_core.run import find as finder
from comfyui_l2p.l2p_core.run.folder import RunFolder
from comfyui_l2p.l2p_core.run.metrics import read_metrics
from comfyui_l2p.l2p_core.run.recipe import load
from comfyui_l2p.l2p_core.tiny import bundled, image_set
from comfyui_l2p.train import demo, figure
from comfyui_l2p.train.scores import evaluate, score_table

pytestmark = pytest.mark.usefixtures("unflushed")


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "EVALUATED", 8)
    monkeypatch.setattr(demo, "SAMPLING_STEPS", 2)
    monkeypatch.setattr(finder, "BUNDLED", Path(__file__).parent / "recipes")
    monkeypatch.setattr(image_set, "PART", 8)
    monkeypatch.setattr(patch_pairs, "FEW", 64)
    monkeypatch.setattr(head_fit, "WINDOWS", 32)
    monkeypatch.setattr(head_fit, "ROWS", 1)


@pytest.mark.usefixtures("short")
def test_the_demo_goes_from_source_to_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "demo"
    demo.demo(output, steps=2, seed=1)
    folder = RunFolder(output)
    assert len(read_metrics(folder.metrics)) == 2
    known = open_checkpoint(folder.init).metadata
    assert (known["l2p.seed"], known["l2p.init"]) == ("1", "fitted")
    # Train L2P takes the recipe for folders with too few images for a fit.
    assert load(finder.find("demo")).model.init != "fitted"
    assert open_checkpoint(folder.delta).is_delta
    with Image.open(output / "demo.png") as picture:
        assert min(picture.size) > 400
    text = capsys.readouterr().out
    for name in (demo.SOURCE_NAME, demo.INIT_NAME, demo.LIVE_NAME, demo.BUNDLED_NAME):
        assert f"| {name}" in text


def test_the_source_is_as_good_as_it_must_be() -> None:
    source = bundled.TinySource()
    scores = evaluate("source", partial(source.images, steps=8), 40).scores
    assert scores["attributes"] >= 0.95
    assert scores["whole"] >= 0.8


def test_a_table_says_what_is_kept() -> None:
    one = dict.fromkeys(("whole", "shape", "colour", "place", "background", "attributes"), 0.8) | {"patch_grid": 1.5}
    half = {name: value / 2 for name, value in one.items()}
    lines = score_table({"source": one, "pixel": half}, source="source").splitlines()
    assert "100.0%" in lines[2]
    assert "50.0%" in lines[3]
    assert len({len(line) for line in lines}) == 1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("captions", [["one", "two", "three"], ["one"]], ids=len)
def test_a_figure_leaves_no_parts_behind(tmp_path: Path, captions: list[str]) -> None:
    """One image is narrower than the plots below it, for which matplotlib then found no place."""
    rows = [figure.ImageRow("model", torch.zeros(len(captions), 3, 8, 8))]
    curves = [figure.Curves([1, 2], {"sigma": [0.5, 0.4]}, "error")] * 2
    figure.draw(tmp_path / "figure.png", captions, rows, curves, {"model": 0.5})
    assert [path.name for path in tmp_path.iterdir()] == ["figure.png"]


def test_pixels_are_no_latents_of_the_tiny_vae() -> None:
    with pytest.raises(ValueError, match="connect Pixels to Image in place of VAE Decode"):
        tiny.load_autoencoder().decode(torch.zeros(1, 3, 64, 64))
