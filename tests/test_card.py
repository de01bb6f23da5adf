"""The model card beside every published delta."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image
from test_cli import pixel, source, trained  # noqa: F401 (fixtures)
from test_run import folder, train  # noqa: F401 (a fixture)

from comfyui_l2p.l2p_core.checkpoint import load_tensors, save
from comfyui_l2p.l2p_core.config import ModelConfig
from comfyui_l2p.l2p_core.files import metadata
from comfyui_l2p.l2p_core.run import card
from comfyui_l2p.l2p_core.run import recipe as recipes
from comfyui_l2p.l2p_core.run.toml_text import read_toml
from comfyui_l2p.l2p_core.sources.lumina2 import Lumina2Config
from comfyui_l2p.l2p_core.tiny.bundled import DELTA
from comfyui_l2p.train.cli import main

pytestmark = pytest.mark.usefixtures("unflushed")


def test_a_run_describes_its_delta(folder: Path) -> None:  # noqa: F811
    made = train(folder, "run", steps=2)
    text = made.card.read_text(encoding="utf-8")
    front, body = text.split("---\n")[1:3]
    assert 'license: "other"' in front and "pipeline_tag: text-to-image" in front
    assert "# delta" in body and "Trained for 2 of 2 steps." in body
    assert "![Montage of step 2](<delta-montage.png>)" in body
    with Image.open(made.card_picture) as shown, Image.open(made.montage(2)) as montage:
        assert shown.tobytes() == montage.tobytes()
    toml = body.split("```toml\n")[1].split("```")[0]
    stated = recipes.parse(read_toml(toml))
    assert stated.training.steps == 2 and stated.model.base == "source.safetensors"
    assert str(folder) not in text, "the card tells where this machine keeps its files"
    assert "The file states none. The terms of the tiny source" in body


def test_an_extracted_delta_is_described_from_its_header(
    trained: Path,  # noqa: F811
    pixel: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target = tmp_path / "my.delta.safetensors"
    assert main(["delta", str(trained), str(pixel), str(target)]) == 0
    made = tmp_path / "my.delta.md"
    assert f"{made} written." in capsys.readouterr().out
    text = made.read_text(encoding="utf-8")
    assert "2 trained tensors here" in text and "neither recipe nor montage" in text and "SHA-256" in text
    made.write_text("# My own words\n", encoding="utf-8")
    assert main(["delta", str(trained), str(pixel), str(target), "--overwrite"]) == 0
    assert "your own model card and was kept" in capsys.readouterr().out
    assert made.read_text(encoding="utf-8") == "# My own words\n"


def test_a_delta_of_the_tiny_source_is_not_one_of_z_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    delta = Path(shutil.copy(DELTA, tmp_path))
    text = (card.write(delta) or delta).read_text(encoding="utf-8")
    assert "Z-Image" not in text and "1024" not in text
    assert "makes the tiny source of ComfyUI-L2P a pixel model" in text and "for images of 64 x 64 pixels" in text
    monkeypatch.setattr(card, "is_tiny", lambda config: False)
    text = (card.write(delta) or delta).read_text(encoding="utf-8")
    small = "a model of Z-Image's architecture with 8 blocks of width 144"
    assert f"makes {small} a pixel model" in text and "Variant 1k." in text


@pytest.mark.parametrize(
    ("config", "base", "architecture"),
    [
        (ModelConfig(), "Z-Image", "z-image"),
        (Lumina2Config(), "Lumina-2", "lumina2"),
        (
            ModelConfig(dim=192, n_layers=3),
            "a model of Z-Image's architecture with 3 blocks of width 192",
            "z-image-width-192",
        ),
    ],
)
def test_the_base_is_the_published_model_only_at_its_sizes(config: ModelConfig, base: str, architecture: str) -> None:
    for of, suffix in ((config, ""), (config.with_head("4k"), "-l2p-4k")):
        known = metadata.modelspec(of)
        assert (known["modelspec.base_model"], known["modelspec.architecture"]) == (base, architecture + suffix)


def test_licence_and_trigger_words_are_the_files_own(trained: Path, pixel: Path, tmp_path: Path) -> None:  # noqa: F811
    target = tmp_path / "delta.safetensors"
    assert main(["delta", str(trained), str(pixel), str(target)]) == 0
    tensors, metadata = load_tensors(target)
    words = {"modelspec.license": "Apache-2.0", "modelspec.trigger_phrase": "in *my* style", "author": "A <b>"}
    assert "\n# delta\n" in card.path_of(target).read_text(encoding="utf-8")
    words |= {"modelspec.title": "Paper cuts"}
    save(tensors, target, metadata | words, overwrite=True)
    made = card.write(target)
    assert made is not None
    text = made.read_text(encoding="utf-8")
    assert 'license: "apache-2.0"' in text and "Apache-2.0, as the file's metadata states" in text
    assert "\n# Paper cuts\n" in text and "`delta.safetensors`" in text
    assert "Trigger words: in \\*my\\* style" in text and "Author: A \\<b\\>" in text
