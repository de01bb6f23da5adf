"""Recipes changed by fields of a node and by a text: what is taken, what is refused and with which words."""

from __future__ import annotations

import pytest

from comfyui_l2p.l2p_core.run import recipe as recipes
from comfyui_l2p.l2p_core.run.changes import changed, read_changes
from comfyui_l2p.l2p_core.run.find import bundled
from comfyui_l2p.l2p_core.run.recipe import Recipe

FIXED = {"model": ("base",), "data": ("path",)}


@pytest.fixture
def recipe() -> Recipe:
    return recipes.parse({"model": {"base": "a"}, "training": {"lr": 1e-4, "blocks": 3}, "watch": {"cfg": 1.5}})


def test_changes_replace_and_leave_the_rest(recipe: Recipe) -> None:
    other = changed(recipe, {"training": {"lr": 1, "steps": 7}, "data": {"kind": "folder", "path": "images"}})
    assert (other.training.lr, other.training.steps, other.training.blocks) == (1.0, 7, 3)
    assert (other.data.kind, other.data.path, other.watch.cfg, other.model.base) == ("folder", "images", 1.5, "a")
    assert changed(recipe, {}) == recipe


@pytest.mark.parametrize("name", bundled())
def test_every_bundled_recipe_survives_no_change(name: str) -> None:
    recipe = recipes.load(bundled()[name])
    assert changed(recipe, {}) == recipe


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[training]\nwarmup_step = 1", "[training] has no key 'warmup_step': did you mean 'warmup_steps'?"),
        ("[trainin]\nsteps = 1", "has no key 'trainin': did you mean 'training'?"),
        ("[training]\nsteps = 0", "steps must be 1 or more"),
        ("steps = 1", "'steps' must be in a section"),
        ("[training]\nsteps 1", "are not valid TOML"),
        ('[data]\npath = "/"', "[data] path may not be changed here"),
        ('[model]\nbase = "b"', "[model] base may not be changed here"),
    ],
)
def test_wrong_changes_are_named(recipe: Recipe, text: str, words: str) -> None:
    with pytest.raises(ValueError) as error:
        changed(recipe, read_changes(text, FIXED))
    assert words in str(error.value)


def test_a_text_changes_a_recipe(recipe: Recipe) -> None:
    other = changed(recipe, read_changes('[training]\ndecay = "cosine"\n[model]\nhead_width = 0.5', FIXED))
    assert (other.training.decay, other.model.head_width, other.training.lr) == ("cosine", 0.5, 1e-4)
    assert read_changes("", FIXED) == {}


def test_changes_that_an_editor_has_marked_as_utf_8_are_read() -> None:
    assert read_changes("\ufeff[training]\nsteps = 7", {}) == {"training": {"steps": 7}}
