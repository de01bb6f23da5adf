"""Recipes: what is read, what is refused and with which words."""

from __future__ import annotations

from pathlib import Path

import pytest

from comfyui_l2p.l2p_core.run import recipe as recipes
from comfyui_l2p.l2p_core.training_config import TrainingConfig
from comfyui_l2p.train.recipe import BUNDLED, find

SMALLEST = {"model": {"base": "tiny"}}


def test_a_base_is_enough_and_the_rest_is_the_published_recipe() -> None:
    recipe = recipes.parse(SMALLEST)
    assert recipe.training == TrainingConfig()
    assert recipe.model.variant == "1k"


def test_values_arrive() -> None:
    recipe = recipes.parse({**SMALLEST, "training": {"lr": 1, "steps": 7, "decay": "cosine"}, "watch": {"cfg": 2}})
    assert recipe.training.lr == 1.0
    assert isinstance(recipe.training.lr, float)
    assert recipe.training.steps == 7
    assert recipe.watch.cfg == 2.0
    assert recipe.watch.steps is None


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({**SMALLEST, "training": {"learnign_rate_warmup": 1}}, "has no key 'learnign_rate_warmup'"),
        ({**SMALLEST, "training": {"warmup_step": 1}}, "did you mean 'warmup_steps'?"),
        ({**SMALLEST, "trainin": {}}, "did you mean 'training'?"),
        ({**SMALLEST, "training": {"steps": 1.5}}, "steps must be a whole number, not 1.5"),
        ({**SMALLEST, "training": {"steps": True}}, "steps must be a whole number, not True"),
        ({**SMALLEST, "training": {"steps": 0}}, "steps must be 1 or more"),
        ({**SMALLEST, "training": {"decay": "linear"}}, "decay must be one of constant, cosine"),
        ({**SMALLEST, "watch": {"prompts": "a circle"}}, "prompts must be a list of texts"),
        ({**SMALLEST, "watch": {"save_every": 0}}, "save_every"),
        ({**SMALLEST, "data": {"kind": "zip"}}, "kind must be folder, tiny or renderings"),
        ({**SMALLEST, "data": {"kind": "folder"}}, "needs the key 'path'"),
        ({**SMALLEST, "captions": {"encode": "x"}}, "did you mean 'encoder'?"),
        ({**SMALLEST, "watch": {"divergence_factor": 1}}, "divergence_factor must be above 1"),
        ({**SMALLEST, "data": 3}, "must be a section"),
        ({"model": {}}, "needs the key 'base'"),
        ({}, "no section [model]"),
    ],
)
def test_mistakes_are_named(values: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError) as error:
        recipes.parse(values)
    assert words in str(error.value)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.toml"
    path.write_text("[model\n", encoding="utf-8")
    with pytest.raises(ValueError, match="broken.toml"):
        recipes.load(path)


@pytest.mark.parametrize("path", sorted(BUNDLED.glob("*.toml")), ids=lambda path: path.stem)
def test_bundled_recipes_are_right_and_survive_writing(path: Path, tmp_path: Path) -> None:
    recipe = recipes.load(find(path.stem))
    rewritten = tmp_path / "rewritten.toml"
    rewritten.write_text(recipes.to_toml(recipe), encoding="utf-8")
    assert recipes.load(rewritten) == recipe
