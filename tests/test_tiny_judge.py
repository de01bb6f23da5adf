"""The rule-based judge and the patch-grid ratio: right on what is known, low on what is wrong."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from comfyui_l2p.l2p_core.tiny import judge, shapes
from comfyui_l2p.l2p_core.tiny.shapes import Attributes, Scene
from comfyui_l2p.train.patch_grid import patch_grid_ratio


@pytest.fixture(scope="module")
def renderings() -> tuple[torch.Tensor, list[str]]:
    rng = random.Random(11)
    scenes = [shapes.random_scene(rng) for _ in range(96)]
    return shapes.render(scenes), [shapes.caption(scene.attributes) for scene in scenes]


def test_renderings_are_all_right(renderings: tuple[torch.Tensor, list[str]]) -> None:
    images, captions = renderings
    score = judge.score(images, captions)
    assert score.whole == 1.0
    assert score.residual < 0.08


def test_rough_images_are_recognised_and_told_from_clean_ones(renderings: tuple[torch.Tensor, list[str]]) -> None:
    images, captions = renderings
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    score = judge.score(images + 0.3 * noise, captions)
    assert score.whole > 0.98
    assert score.residual == pytest.approx(0.3, abs=0.02)


def test_noise_scores_as_chance(renderings: tuple[torch.Tensor, list[str]]) -> None:
    images, captions = renderings
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    assert judge.score(noise.clamp(-1, 1), captions).whole < 0.1


def test_other_captions_score_low(renderings: tuple[torch.Tensor, list[str]]) -> None:
    images, captions = renderings
    score = judge.score(images, captions[1:] + captions[:1])
    assert score.whole < 0.1
    assert max(score.shape, score.colour, score.place, score.background) < 0.5


def test_one_wrong_attribute_costs_that_attribute_alone() -> None:
    attributes = Attributes("cross", "cyan", "bottom left", "brown")
    images = shapes.render([Scene(attributes), Scene(replace(attributes, colour="green"))])
    score = judge.score(images, [shapes.caption(attributes)] * 2)
    assert (score.shape, score.colour, score.place, score.background, score.whole) == (1.0, 0.5, 1.0, 1.0, 0.5)


def test_the_residual_is_the_distance_to_the_nearest_rendering() -> None:
    scene = Scene(Attributes("square", "blue", "centre", "grey"), dx=1.5, dy=-3.0, size=13.0)
    image = shapes.render([scene])
    names, residual = judge.recognise(image)
    assert names == [scene.attributes]
    assert residual.item() < 2e-3
    assert judge.recognise(image + 0.1)[1].item() == pytest.approx(0.1, rel=0.05)


def test_wrong_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="shape"):
        judge.recognise(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="caption"):
        judge.score(torch.zeros(2, 3, 64, 64), ["a red circle"])


def test_the_grid_ratio_is_one_without_and_above_with_a_grid() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, 64, 64, generator=generator)
    assert patch_grid_ratio(images, 16) == pytest.approx(1.0, abs=0.05)
    offsets = torch.randn(4, 3, 4, 4, generator=generator)
    stepped = images + offsets.repeat_interleave(16, -1).repeat_interleave(16, -2)
    assert patch_grid_ratio(stepped, 16) > 1.5
    assert patch_grid_ratio(stepped.roll((8, 8), dims=(-2, -1)), 16) < 1.0


def test_the_grid_ratio_needs_borders_and_insides() -> None:
    for patch_size in (1, 64):
        with pytest.raises(ValueError, match="only one of them"):
            patch_grid_ratio(torch.zeros(1, 3, 64, 64), patch_size)
