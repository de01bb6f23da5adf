"""The tiny image set: captions name what is drawn, pixels are clean and reproducible."""

from __future__ import annotations

import random

import pytest
import torch

from comfyui_l2p.l2p_core.tiny import shapes
from comfyui_l2p.l2p_core.tiny.shapes import Attributes, Scene


def test_every_caption_names_its_attributes() -> None:
    for attributes in shapes.all_attributes():
        for phrasing in range(len(shapes.PHRASINGS)):
            assert shapes.parse_caption(shapes.caption(attributes, phrasing)) == attributes


def test_captions_are_all_different() -> None:
    captions = shapes.all_captions()
    assert len(captions) == len(set(captions)) == 4 * 6 * 5 * 4 * len(shapes.PHRASINGS)


def test_a_caption_reads_naturally() -> None:
    attributes = Attributes("circle", "red", "top left", "white")
    assert shapes.caption(attributes) == "a red circle at the top left on a white background"
    assert shapes.parse_caption("White background, at the TOP LEFT: one red circle!") == attributes


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("a circle in the centre on a white background", "0 colours"),
        ("a red blue circle in the centre on a white background", "2 colours"),
        ("a red circle at the left on a white background", "0 rows"),
        ("", "0 shapes"),
    ],
)
def test_an_incomplete_caption_is_refused(text: str, missing: str) -> None:
    with pytest.raises(ValueError, match=missing):
        shapes.parse_caption(text)


def test_pixels_follow_the_scene() -> None:
    attributes = Attributes("square", "red", "top left", "black")
    image = shapes.render([Scene(attributes, dx=1.0, dy=0.0, size=10.0)])[0]
    red, black = torch.tensor(shapes.COLOURS["red"]), torch.tensor(shapes.BACKGROUNDS["black"])
    assert image.shape == (3, 64, 64)
    assert torch.allclose((image[:, 19, 20] + 1) * 127.5, red.float(), atol=1e-3)
    assert torch.allclose((image[:, 60, 60] + 1) * 127.5, black.float(), atol=1e-3)
    assert image.abs().max() <= 1


def test_edges_are_anti_aliased_and_areas_right() -> None:
    scene = Scene(Attributes("circle", "red", "centre", "white"), size=12.0)
    mask = shapes.masks([scene])[0]
    assert ((mask > 0) & (mask < 1)).any()
    assert mask.sum().item() == pytest.approx(3.14159 * 12**2, rel=0.01)


def test_a_batch_equals_its_scenes_alone() -> None:
    rng = random.Random(0)
    scenes = [shapes.random_scene(rng) for _ in range(8)]
    alone = torch.cat([shapes.render([scene]) for scene in scenes])
    assert torch.equal(shapes.render(scenes), alone)


def test_scenes_and_evaluation_captions_are_seeded() -> None:
    assert shapes.random_scene(random.Random(3)) == shapes.random_scene(random.Random(3))
    first = shapes.evaluation_captions(300)
    assert first == shapes.evaluation_captions(600)[:300]
    assert first != shapes.evaluation_captions(300, seed=1)
    attributes = [shapes.parse_caption(text) for text in shapes.evaluation_captions(480)]
    assert set(attributes) == set(shapes.all_attributes())
