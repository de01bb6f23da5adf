"""Files that version 0.1 has left open with this version: nobody loses a run, a delta or a recipe to an update."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from comfyui_l2p.l2p_core.checkpoint import load_model, load_tensors
from comfyui_l2p.l2p_core.run import loop
from comfyui_l2p.l2p_core.run import recipe as recipes
from comfyui_l2p.l2p_core.run.captions import of_words
from comfyui_l2p.l2p_core.run.folder import RunFolder
from comfyui_l2p.l2p_core.run.metrics import read_metrics
from comfyui_l2p.train.cli import main

pytestmark = pytest.mark.usefixtures("unflushed")

FIXTURES = Path(__file__).parent / "fixtures"
VERSIONS = sorted(path.name for path in FIXTURES.iterdir() if path.is_dir())


@pytest.fixture(params=VERSIONS)
def left(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of what a version has left."""
    return Path(shutil.copytree(FIXTURES / request.param, tmp_path / "left"))


def test_a_run_is_resumed(left: Path) -> None:
    run = RunFolder(left / "run")
    before = load_tensors(run.delta)[0]
    # The source is narrower than the tiny one, whose captions it takes: that has to be said.
    words, recipe = of_words(left / "captions"), recipes.with_paths(recipes.load(left / "recipe.toml"), left)
    loop.train(recipe, run.path, captions=words)
    assert [line["step"] for line in read_metrics(run.metrics)] == [1, 2, 3, 4], "a run that was finished stays so"
    longer = replace(recipe, training=replace(recipe.training, steps=6))
    loop.train(longer, run.path, captions=words)
    assert [line["step"] for line in read_metrics(run.metrics)] == [1, 2, 3, 4, 5, 6]
    assert load_tensors(run.state)[1]["l2p.step"] == "6"
    after = load_tensors(run.delta)[0]
    assert after.keys() == before.keys() and not all(torch.equal(after[name], before[name]) for name in before)


def test_a_delta_is_merged_and_the_result_is_loaded(left: Path) -> None:
    delta, target = left / "run" / "delta.safetensors", left / "merged.safetensors"
    assert main(["merge", str(delta), str(left / "source.safetensors"), str(target)]) == 0
    weights = load_model(target).state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in load_tensors(delta)[0].items())
    assert main(["inspect", str(delta)]) == 0


def test_a_recipe_means_what_it_meant(left: Path) -> None:
    recipe = recipes.load(left / "recipe.toml")
    of_run = recipes.with_paths(recipes.load(left / "run" / "recipe.toml"), left / "run")
    assert recipes.with_paths(recipe, left) == of_run
    assert (recipe.model.init, recipe.data.max_bad_share, recipe.watch.cfg) == ("scaled", 0.1, 1.5)
    assert (recipe.training.decay, recipe.training.lr, recipe.training.blocks) == ("cosine", 1e-3, 0)
