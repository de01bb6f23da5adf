"""The bundled source: it draws what captions say, and its files are small and carry how they were made."""

from __future__ import annotations

import json

import pytest
import torch

from comfyui_l2p.l2p_core import tiny
from comfyui_l2p.l2p_core.checkpoint import load_tensors
from comfyui_l2p.l2p_core.config import ModelConfig
from comfyui_l2p.l2p_core.model import LatentModel
from comfyui_l2p.l2p_core.tiny import judge, shapes
from comfyui_l2p.l2p_core.tiny.autoencoder import Autoencoder
from comfyui_l2p.l2p_core.tiny.words import Words

Parts = tuple[LatentModel, Autoencoder, Words]


@pytest.fixture(scope="module")
def parts() -> Parts:
    return tiny.load_source(), tiny.load_autoencoder(), tiny.load_words()


def test_the_bundled_files_are_small() -> None:
    sizes = [path.stat().st_size for path in (tiny.SOURCE_PATH, tiny.AUTOENCODER_PATH, tiny.WORDS_PATH)]
    assert sum(sizes) < 9e6


def test_the_source_file_says_how_it_was_made() -> None:
    tensors, metadata = load_tensors(tiny.SOURCE_PATH)
    config = ModelConfig.from_shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    assert json.loads(metadata["l2p.config"]) == json.loads(config.to_json())
    assert json.loads(metadata["l2p.recipe"])["steps"] > 0


def test_images_show_what_their_captions_say(parts: Parts) -> None:
    captions = shapes.evaluation_captions(12, seed=7)
    images = tiny.generate(*parts, captions, range(12), steps=12)
    assert images.shape == (12, 3, 64, 64)
    assert images.abs().max() <= 1
    score = judge.score(images, captions)
    assert score.whole >= 0.75, score


def test_an_image_depends_on_its_own_seed_and_caption_alone(parts: Parts) -> None:
    captions = shapes.evaluation_captions(3)
    together = tiny.generate(*parts, captions, [4, 5, 6], steps=2)
    alone = tiny.generate(*parts, captions[1:2], [5], steps=2)
    assert torch.allclose(together[1:2], alone, atol=1e-4)
    other = tiny.generate(*parts, captions[1:2], [9], steps=2)
    assert not torch.allclose(other, alone, atol=0.1)


def test_wrong_inputs_are_refused(parts: Parts) -> None:
    with pytest.raises(ValueError, match="one seed for each caption"):
        tiny.generate(*parts, ["a red circle"], [1, 2])
    with pytest.raises(ValueError, match="'elephant'"):
        tiny.generate(*parts, ["a red elephant"], [1])
