"""Recipes: what is read, what is refused and with which words."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import test_run
from tiny_checkpoints import write_shards

from comfyui_l2p.l2p_core.config import VARIANTS
from comfyui_l2p.l2p_core.model import LatentModel
from comfyui_l2p.l2p_core.run import base
from comfyui_l2p.l2p_core.run import recipe as recipes
from comfyui_l2p.l2p_core.run.find import BUNDLED, find
from comfyui_l2p.l2p_core.run.toml_text import read_toml
from comfyui_l2p.l2p_core.training_config import TrainingConfig
from comfyui_l2p.train.run import PathOverrides, read_recipe

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
        ({**SMALLEST, "training": {"batch_size": 1}}, "[training] has no key 'batch_size': it belongs in [data]."),
        ({**SMALLEST, "lr": 1e-4}, "the recipe has no key 'lr': it belongs in [training]."),
        ({**SMALLEST, "training": {"warmup_step": 1}}, "did you mean 'warmup_steps'?"),
        ({**SMALLEST, "trainin": {}}, "did you mean 'training'?"),
        ({**SMALLEST, "training": {"steps": 1.5}}, "steps must be a whole number, not 1.5"),
        ({**SMALLEST, "training": {"steps": True}}, "steps must be a whole number, not True"),
        ({**SMALLEST, "training": {"steps": 0}}, "steps must be 1 or more"),
        ({**SMALLEST, "training": {"decay": "linear"}}, "decay must be one of constant, cosine"),
        ({**SMALLEST, "watch": {"prompts": "a circle"}}, "prompts must be a list of texts"),
        ({**SMALLEST, "watch": {"save_every": 0}}, "save_every"),
        ({**SMALLEST, "data": {"kind": "zip"}}, "kind must be one of folder, tiny, renderings"),
        ({**SMALLEST, "data": {"path": "my_images"}}, 'set kind = "folder"'),
        ({**SMALLEST, "data": {"kind": "folder"}}, "needs the key 'path'"),
        ({**SMALLEST, "captions": {"encode": "x"}}, "did you mean 'encoder'?"),
        ({**SMALLEST, "watch": {"divergence_factor": 1}}, "divergence_factor must be above 1"),
        ({**SMALLEST, "data": 3}, "must be a section"),
        ({**SMALLEST, "delta": {"dtype": "fp8"}}, "dtype must be one of trained, bf16"),
        ({**SMALLEST, "delta": {"licence": "MIT"}}, "did you mean 'license'?"),
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
    with pytest.raises(ValueError, match=r"broken\.toml: not valid TOML: .*line 1"):
        recipes.load(path)
    path.write_text(f"steps = {'[' * 100_000}", encoding="utf-8")
    with pytest.raises(ValueError, match="not valid TOML"):
        recipes.load(path)
    path.write_bytes(b"\x89PNG\r\n")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        recipes.load(path)


def test_the_recipes_for_z_image_are_the_published_one() -> None:
    for variant in ("1k", "4k", "8k", "10k"):
        recipe = recipes.load(find(f"z-image-{variant}"))
        training = recipe.training
        assert recipe.model.variant == variant and recipe.data.size == VARIANTS[variant].pixels
        assert (training.lr, training.weight_decay, training.blocks) == (5e-5, 0.01, 5)
        assert recipe.data.batch_size * training.accumulate == 8
        assert training.gradient_checkpointing and training.policy == "shallow"
    # Checkpointing does not change results.
    published = dataclasses.replace(TrainingConfig(), accumulate=8, keep_activations=-1)
    assert recipes.load(find("z-image-1k")).training == published


def test_paths_start_where_they_are_said_to(tmp_path: Path) -> None:
    values = {"model": {"base": "a.safetensors"}, "data": {"kind": "folder", "path": "../images"}}
    recipe = recipes.with_paths(recipes.parse(values), tmp_path / "recipes")
    assert recipe.model.base == str(tmp_path / "recipes" / "a.safetensors")
    assert recipe.data.path == str(tmp_path / "images")
    assert recipe.captions.encoder == ""
    assert recipes.with_paths(recipe, Path("elsewhere")) == recipe
    assert recipes.with_paths(recipes.parse(SMALLEST), tmp_path).model.base == "tiny"


def test_a_link_in_a_recipe_keeps_its_name_and_its_neighbours(tmp_path: Path) -> None:
    """As those of a hub's snapshot, links into ../blobs: only beside the link does an index find its shards."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    index = "model.safetensors.index.json"
    shards = write_shards(LatentModel(test_run.SOURCE).state_dict(), tmp_path / "real", stem="model")
    for number, file in enumerate(sorted(shards.iterdir())):
        file.rename(blobs / f"{number:040x}")
        try:
            (snapshot / file.name).symlink_to(Path("../blobs") / f"{number:040x}")
        except OSError:
            pytest.skip("this system makes no links for everyone")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'[model]\nbase = "snapshot/{index}"\n', encoding="utf-8")
    read = read_recipe(str(recipe), None, PathOverrides())[0]
    given = read_recipe(str(recipe), None, PathOverrides(base=str(snapshot / ".." / "snapshot" / index)))[0]
    for found in (read, given):
        assert found.model.base == str(snapshot / index)
        assert base.bytes_to_convert(found.model) > 0


@pytest.mark.parametrize("path", sorted(BUNDLED.glob("*.toml")), ids=lambda path: path.stem)
def test_bundled_recipes_are_right_and_survive_writing(path: Path, tmp_path: Path) -> None:
    recipe = recipes.load(find(path.stem))
    rewritten = tmp_path / "rewritten.toml"
    rewritten.write_text(recipes.to_toml(recipe), encoding="utf-8")
    assert recipes.load(rewritten) == recipe


@pytest.mark.parametrize("text", ["a cat 😀", "𠮷野家", "a\x7fb", "\u2028", "\\ud83d\\ude00", "\"'#"], ids=ascii)
def test_every_character_of_a_recipe_survives_writing(text: str, tmp_path: Path) -> None:
    """Or a run could not be resumed from its folder."""
    values = {"model": {"base": f"/{text}"}, "watch": {"prompts": [text, f"{text}\n\t"]}, "delta": {"author": text}}
    recipe, written = recipes.parse(values), tmp_path / "recipe.toml"
    written.write_text(recipes.to_toml(recipe), encoding="utf-8", newline="")
    assert recipes.load(written) == recipe


def test_a_recipe_of_version_0_1_with_an_emoji_is_read() -> None:
    text = '[model]\nbase = "tiny"\n[watch]\nprompts = ["a cat \\ud83d\\ude00"]\n'
    assert recipes.parse(read_toml(text)).watch.prompts == ["a cat 😀"]


@pytest.mark.parametrize("values", [
    {"model": {"base": "caf\udce9"}}, {"watch": {"prompts": ["a", "\ud83d"]}}, {"delta": {"author": "\ude00"}},
], ids=str)  # fmt: skip
def test_half_a_character_is_refused_before_a_run_begins(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"(base|prompts|author) contains half a character .*rename the file"):
        recipes.parse(SMALLEST | values)


def test_a_folder_whose_name_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="The path .*caf.udce9.* contains half a character"):
        recipes.with_paths(recipes.parse({"model": {"base": "base.safetensors"}}), tmp_path / "caf\udce9")


def test_what_windows_editors_write_is_read_or_explained(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('[model]\nbase = "tiny"\n', encoding="utf-8-sig")
    assert recipes.load(path) == recipes.parse(SMALLEST)
    path.write_text('[model]\nbase = "C:\\Users\\me\\base.safetensors"\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"recipe\.toml: .* line 2.* single quotes"):
        recipes.load(path)
    path.write_text('[model]\nbase = "C:\\new\\train.safetensors"\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"base holds a control character.* single quotes"):
        recipes.load(path)
