"""Files that version 0.1 has left open with this version: nobody loses a run, a delta or a recipe to an update."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch

from comfyui_l2p.l2p_core.checkpoint import load_model, load_tensors
from comfyui_l2p.l2p_core.run import recipe as recipes
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
    assert main(["train", str(left / "run")]) == 0
    assert [line["step"] for line in read_metrics(run.metrics)] == [1, 2, 3, 4], "a run that was finished stays so"
    recipe = left / "recipe.toml"
    recipe.write_text(recipe.read_text(encoding="utf-8").replace("steps = 4", "steps = 6"), encoding="utf-8")
    assert main(["train", str(recipe), "--output", str(left / "run")]) == 0
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


@pytest.mark.parametrize("width", [1 / 64, 1 / 32])
def test_a_recipe_of_a_narrow_head_is_trained(left: Path, width: float, tmp_path: Path) -> None:
    recipe = left / "recipe.toml"
    text = recipe.read_text(encoding="utf-8").replace("head_width = 0.0625", f"head_width = {width}")
    recipe.write_text(re.sub(r"^steps = 4$", "steps = 1", text, flags=re.MULTILINE), encoding="utf-8")
    run = RunFolder(tmp_path / "narrow")
    assert main(["train", str(recipe), "--output", str(run.path)]) == 0
    head = load_tensors(run.delta)[0]["local_decoder.out_conv.weight"]
    assert head.shape[1] == round(64 * width)


def test_a_recipe_means_what_it_meant(left: Path) -> None:
    recipe = recipes.load(left / "recipe.toml")
    of_run = recipes.with_paths(recipes.load(left / "run" / "recipe.toml"), left / "run")
    assert recipes.with_paths(recipe, left) == of_run
    assert (recipe.model.init, recipe.data.max_bad_share, recipe.watch.cfg) == ("scaled", 0.1, 1.5)
    assert (recipe.training.decay, recipe.training.lr, recipe.training.blocks) == ("cosine", 1e-3, 0)
