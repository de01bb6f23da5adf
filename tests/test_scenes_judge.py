"""The second tiny world: its scenes, its captions, and the judge that reads the scenes back from pixels."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from comfyui_l2p.l2p_core.model import LatentModel
from comfyui_l2p.l2p_core.tiny.scenes import AUTOENCODER_PATH, captions, judge
from comfyui_l2p.l2p_core.tiny.scenes.autoencoder import TrainedAutoencoder
from comfyui_l2p.l2p_core.tiny.scenes.content import (
    CANVAS,
    CLARITY,
    FIGURES,
    KINDS,
    REACH,
    RELATIONS,
    TEXTURES,
    Content,
    Object,
    Scenes,
    random_scenes,
    relation_of,
)
from comfyui_l2p.l2p_core.tiny.scenes.rendering import render
from comfyui_l2p.train.scenes.autoencoder_training import fine_detail
from comfyui_l2p.train.scenes.source_training import SOURCE_CONFIG

COUNT = 64


@pytest.fixture(scope="module")
def drawn() -> tuple[Scenes, list[Content], list[str], Tensor]:
    generator = torch.Generator().manual_seed(11)
    scenes = random_scenes(COUNT, generator)
    said = captions.contents(scenes, generator)
    images = torch.cat([render(rows(scenes, slice(i, i + 32))) for i in range(0, COUNT, 32)])
    return scenes, said, [captions.caption(content) for content in said], images


def rows(scenes: Scenes, which: slice) -> Scenes:
    return Scenes(*(getattr(scenes, field.name)[which] for field in fields(scenes)))


def test_objects_are_inside_apart_and_in_a_clear_relation(
    drawn: tuple[Scenes, list[Content], list[str], Tensor],
) -> None:
    scenes = drawn[0]
    reach = REACH * scenes.radius
    assert (scenes.centre >= reach[:, :, None]).all()
    assert (scenes.centre <= CANVAS - reach[:, :, None]).all()
    apart = scenes.centre[:, 0] - scenes.centre[:, 1]
    assert (apart.norm(dim=1) > reach.sum(1)).all()
    shorter, longer = apart.abs().sort(1).values.unbind(1)
    assert (longer > CLARITY * shorter).all()
    assert (scenes.colour[:, 0] != scenes.colour[:, 1]).all()
    letters = scenes.kind >= len(FIGURES)
    assert (scenes.texture[letters] == TEXTURES.index("plain")).all()
    assert all((scenes.kind == kind).any() for kind in range(len(KINDS)))


def test_a_wanted_content_is_drawn_and_the_rest_is_free() -> None:
    wanted = [
        Content(Object("circle", "red", "striped"), relation, Object("T", None)) for relation in RELATIONS for _ in "ab"
    ]
    scenes = random_scenes(len(wanted), torch.Generator().manual_seed(5), wanted)
    assert [RELATIONS[i] for i in relation_of(scenes.centre).tolist()] == [content.relation for content in wanted]
    assert scenes.centre.flatten(1).unique(dim=0).shape[0] == len(wanted)
    assert (scenes.colour[:, 1] != 0).all() and len(scenes.colour[:, 1].unique()) > 1
    judged = judge.score(render(scenes), [captions.caption(content) for content in wanted])
    assert judged.whole == 1.0


def test_captions_are_read_back(drawn: tuple[Scenes, list[Content], list[str], Tensor]) -> None:
    _, said, texts, _ = drawn
    assert [captions.parse(text) for text in texts] == said
    objects = [told for content in said for told in (content.first, content.second)]
    assert any(told.colour is None for told in objects)
    assert any(told.colour is not None for told in objects)


def test_other_captions_are_refused() -> None:
    for text in ("", "a red circle", "a red circle above a blue horse", "a red striped letter T near a circle"):
        with pytest.raises(ValueError, match="not a caption of this world"):
            captions.parse(text)


def test_evaluation_captions_are_fixed() -> None:
    assert captions.evaluation_captions(6) == captions.evaluation_captions(9)[:6]
    assert captions.evaluation_captions(6, seed=1) != captions.evaluation_captions(6)


def test_renderings_are_right_at_every_size(drawn: tuple[Scenes, list[Content], list[str], Tensor]) -> None:
    scenes, _, texts, images = drawn
    assert images.shape == (COUNT, 3, 128, 128)
    assert images.abs().max() <= 1
    assert judge.score(images, texts).whole >= 0.99
    small, few = render(rows(scenes, slice(32)), 64), render(rows(scenes, slice(12)), 256)
    assert judge.score(small, texts[:32]).whole >= 0.96
    assert judge.score(few, texts[:12]).whole == 1.0
    assert torch.allclose(small, F.avg_pool2d(images[:32], 2), atol=1e-6)


def test_reconstructions_are_right_and_lose_the_weave(
    drawn: tuple[Scenes, list[Content], list[str], Tensor],
) -> None:
    _, _, texts, images = drawn
    autoencoder = TrainedAutoencoder.load(AUTOENCODER_PATH)
    restored = autoencoder.decode(autoencoder.encode(images[:32])).detach()
    assert judge.score(restored, texts[:32]).whole >= 0.95
    assert fine_detail(restored) < 0.6 * fine_detail(images[:32])


def test_the_world_has_the_tokens_of_both_variants() -> None:
    for variant, size, tokens in (("1k", 64, 16), ("1k", 128, 64), ("4k", 256, 16)):
        assert (size // SOURCE_CONFIG.with_head(variant, 0.25).patch_size) ** 2 == tokens
    assert (128 // 8 // SOURCE_CONFIG.patch_size) ** 2 == 64
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in LatentModel(SOURCE_CONFIG).parameters()) <= 4_000_000


def test_other_captions_score_as_chance(drawn: tuple[Scenes, list[Content], list[str], Tensor]) -> None:
    _, _, texts, images = drawn
    assert judge.score(images, texts[1:] + texts[:1]).whole <= 0.03


def test_one_wrong_attribute_costs_that_attribute_and_the_whole(
    drawn: tuple[Scenes, list[Content], list[str], Tensor],
) -> None:
    said = Content(Object("square", "red", "striped"), "above", Object("L", "blue"))
    text = captions.caption(said)
    changes = {
        "kind": replace(said, first=replace(said.first, kind="cross")),
        "colour": replace(said, second=replace(said.second, colour="green")),
        "texture": replace(said, first=replace(said.first, texture="spotted")),
        "relation": replace(said, relation="left of"),
    }
    scenes = random_scenes(len(changes), torch.Generator().manual_seed(2), list(changes.values()))
    for row, wrong in enumerate(changes):
        scores = judge.score(render(rows(scenes, slice(row, row + 1))), [text])._asdict()
        assert {name for name, value in scores.items() if not value} == {wrong, "whole"}


def test_blurred_empty_and_crowded_images_show_nothing(
    drawn: tuple[Scenes, list[Content], list[str], Tensor],
) -> None:
    scenes, said, texts, images = drawn
    few = slice(16)
    blurred = F.interpolate(F.avg_pool2d(images[few], 16), scale_factor=16.0)
    assert judge.score(blurred, texts[few]).whole <= 0.1
    assert judge.recognise(torch.zeros(1, 3, 128, 128))[0].objects == []
    third = render(
        random_scenes(1, torch.Generator().manual_seed(1), [Content(Object("H", "cyan"), "above", Object("L", "red"))])
    )
    other = render(
        random_scenes(
            1, torch.Generator().manual_seed(1), [Content(Object("H", "blue"), "below", Object("L", "green"))]
        )
    )
    assert judge.recognise(torch.minimum(third, other))[0].objects == []


def test_wrong_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="64, 128 or 256"):
        judge.recognise(torch.zeros(1, 3, 100, 100))
    with pytest.raises(ValueError, match="one caption per image"):
        judge.score(torch.zeros(2, 3, 128, 128), ["a circle above a square"])
    with pytest.raises(ValueError, match="divisor"):
        render(random_scenes(1, torch.Generator().manual_seed(0)), 60)
