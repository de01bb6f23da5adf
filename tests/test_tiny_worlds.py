"""The tiny worlds behind their common interface."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from comfyui_l2p.l2p_core.config import VARIANTS
from comfyui_l2p.l2p_core.run.data import tiny_images, tiny_pairs
from comfyui_l2p.l2p_core.run.recipe import DataSection
from comfyui_l2p.l2p_core.tiny import image_set
from comfyui_l2p.l2p_core.tiny.bundled import TinySource
from comfyui_l2p.l2p_core.tiny.worlds import WORLDS, TinyWorld

SEEDS = [image_set.seed_of(number) for number in range(6)]


@pytest.fixture(params=list(WORLDS))
def world(request: pytest.FixtureRequest) -> TinyWorld:
    return WORLDS[request.param]


def test_clean_renderings_show_their_captions_and_no_others(world: TinyWorld) -> None:
    texts = [world.caption_of(number, 0) for number in range(6)]
    images = world.rendered(texts, SEEDS)
    assert images.shape == (6, 3, world.side, world.side)
    assert torch.equal(images[:2], world.rendered(texts[:2], SEEDS[:2]))
    assert world.score(images, texts)["whole"] == 1
    assert set(world.attributes) < set(world.score(images, texts))
    assert world.score(images, texts[1:] + texts[:1])["whole"] < 0.5


def test_training_captions_depend_on_their_number_and_seed_alone(world: TinyWorld) -> None:
    texts = [world.caption_of(number, 0) for number in range(20)]
    assert texts == [world.caption_of(number, 0) for number in range(20)]
    assert texts != [world.caption_of(number, 1) for number in range(20)]
    assert len(set(texts)) > 10


def test_a_source_has_its_name_and_generates_images_of_its_world(world: TinyWorld) -> None:
    source = TinySource(world)
    others = {TinySource(other).name() for other in WORLDS.values() if other is not world}
    assert source.name() not in others
    images = source.images(world.captions(1), [3], steps=1)
    assert images.shape == (1, 3, world.side, world.side)


def test_training_images_pair_with_their_latents(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_set, "PART", 4)
    images = tiny_images(DataSection(kind="renderings", images=4), tmp_path, lambda *_: None, world)
    assert images.captions == [world.caption_of(number, 0) for number in range(4)]
    pairs = tiny_pairs(images, world)
    assert pairs.channels == world.load_autoencoder().channels
    assert pairs.side == VARIANTS["1k"].patch_size
    assert pairs.count == 4 * (world.side // pairs.side) ** 2
