"""A training run in its folder: what it leaves, how it goes on, what it refuses."""

from __future__ import annotations

import dataclasses
import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from comfyui_l2p.l2p_core import delta, patch_pairs
from comfyui_l2p.l2p_core.checkpoint import load_tensors, save
from comfyui_l2p.l2p_core.config import ModelConfig
from comfyui_l2p.l2p_core.model import LatentModel
from comfyui_l2p.l2p_core.run import recipe as recipes
from comfyui_l2p.l2p_core.run.data import tiny_images, tiny_pairs
from comfyui_l2p.l2p_core.run.folder import RunFolder
from comfyui_l2p.l2p_core.run.metrics import loss_by_sigma, read_metrics
from comfyui_l2p.l2p_core.tiny import image_set
from comfyui_l2p.l2p_core.training.prepared import Prepared
from comfyui_l2p.l2p_core.training.trainer import Trainer
from comfyui_l2p.train import run
from comfyui_l2p.train.cli import main

pytestmark = pytest.mark.usefixtures("unflushed")

SOURCE = ModelConfig(
    dim=32, head_dim=16, n_layers=3, n_refiner_layers=1, caption_dim=64, ffn_dim=32, t_freq_dim=16, t_hidden_dim=16,
    t_dim=16,
)  # fmt: skip
RECIPE = """
[model]
base = "source.safetensors"
head_width = 0.125

[data]
kind = "renderings"
images = 4
batch_size = 2

[training]
steps = {steps}
lr = {lr}
blocks = 1
precision = "fp32"
ema_decay = 0.9
caption_dropout = 0.2
gradient_checkpointing = false

[watch]
save_every = 2
montage_every = 4
prompts = ["a red circle in the centre on a white background"]
steps = 1
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a small latent source in it, and recipes beside."""
    monkeypatch.setattr(image_set, "PART", 4)
    torch.manual_seed(0)
    save(LatentModel(SOURCE).state_dict(), tmp_path / "source.safetensors")
    return tmp_path


def test_a_runs_delta_says_what_its_recipe_states_in_half_the_bytes(folder: Path) -> None:
    words = """[delta]\ndtype = "bf16"\nlicense = "Apache-2.0"\ntrigger_words = "tiny shapes"\n"""
    recipe = folder / "recipe.toml"
    recipe.write_text(RECIPE.format(steps=2, lr=1e-3) + words, encoding="utf-8")
    run.train(str(recipe), folder / "run")
    tensors, about = load_tensors(RunFolder(folder / "run").delta)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert about["modelspec.license"] == "Apache-2.0" and about["trained_words"] == "tiny shapes"
    state, _ = load_tensors(RunFolder(folder / "run").state)
    assert torch.float32 in {tensor.dtype for tensor in state.values()}, "a run resumes from what it had"


def train(folder: Path, output: str, steps: int = 4, lr: float = 1e-3, restart: bool = False) -> RunFolder:
    recipe = folder / "recipe.toml"
    recipe.write_text(RECIPE.format(steps=steps, lr=lr), encoding="utf-8")
    run.train(str(recipe), folder / output, restart=restart)
    return RunFolder(folder / output)


def test_a_run_leaves_everything_in_its_folder(folder: Path) -> None:
    made = train(folder, "run")
    assert [line["step"] for line in read_metrics(made.metrics)] == [1, 2, 3, 4]
    assert recipes.load(made.recipe).training.steps == 4
    assert made.montage(4).exists()
    model = delta.load_model(made.delta, made.init)
    state, _ = load_tensors(made.state)
    assert torch.equal(model.x_embedder.weight, state["average.x_embedder.weight"])


def test_a_stopped_run_goes_on_as_if_nothing_had_happened(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    straight = train(folder, "straight")
    one_step = Trainer._train_step

    def interrupted_in_step_three(self: Trainer, batches: Iterator[Prepared]) -> object:
        if self.step == 2:
            signal.raise_signal(signal.SIGINT)
        return one_step(self, batches)

    monkeypatch.setattr(Trainer, "_train_step", interrupted_in_step_three)
    recipe = folder / "recipe.toml"
    assert main(["train", str(recipe), "--output", str(folder / "stopped")]) == 130
    assert capsys.readouterr().err.endswith("l2p: stopped.\n")
    stopped = RunFolder(folder / "stopped")
    assert len(read_metrics(stopped.metrics)) == 3
    monkeypatch.undo()
    monkeypatch.setattr(image_set, "PART", 4)
    train(folder, "stopped")
    assert [line["step"] for line in read_metrics(stopped.metrics)] == [1, 2, 3, 4]
    expected, actual = load_tensors(straight.state)[0], load_tensors(stopped.state)[0]
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def test_a_delta_that_was_deleted_is_written_again_from_the_state(folder: Path) -> None:
    run = train(folder, "run")
    whole = run.delta.read_bytes()
    run.delta.unlink()
    assert train(folder, "run").delta.read_bytes() == whole


def test_another_recipe_does_not_go_on_in_the_same_folder(folder: Path) -> None:
    train(folder, "run", steps=1)
    other = RECIPE.replace("blocks = 1", "blocks = 0").format(steps=1, lr=1e-3)
    (folder / "other.toml").write_text(other, encoding="utf-8")
    with pytest.raises(ValueError, match=r"\[training\] blocks = 1, but the recipe says 0"):
        run.train(str(folder / "other.toml"), folder / "run")
    run.train(str(folder / "other.toml"), folder / "run", restart=True)


def test_the_learning_rate_may_be_lowered_on_the_way(folder: Path) -> None:
    """It is what the sentence of a run that has diverged advises."""
    train(folder, "run", steps=2)
    made = train(folder, "run", steps=3, lr=1e-4)
    assert [line["lr"] for line in read_metrics(made.metrics)] == [1e-3, 1e-3, 1e-4]


def test_another_base_or_data_under_the_same_path_is_refused(folder: Path) -> None:
    made = train(folder, "run", steps=1)
    made.init.unlink()
    torch.manual_seed(1)
    save(LatentModel(SOURCE).state_dict(), folder / "source.safetensors", {}, True)
    with pytest.raises(ValueError, match="other content of \\[model\\] base"):
        train(folder, "run", steps=2)


def test_metrics_after_the_last_save_are_dropped(tmp_path: Path) -> None:
    made = RunFolder(tmp_path)
    lines = [json.dumps({"step": step}) + "\n" for step in (1, 2, 3)]
    made.metrics.write_text("".join(lines) + '{"ste', encoding="utf-8")
    made.rewind(2)
    assert read_metrics(made.metrics) == [{"step": 1}, {"step": 2}]


def test_losses_are_means_over_samples_of_a_range() -> None:
    steps = [
        {"step": 1, "sigma_loss": [2.0, 0, 0, 0, 1.0], "sigma_count": [2, 0, 0, 0, 1]},
        {"step": 2, "sigma_loss": [1.0, 0, 0, 0, 2.0], "sigma_count": [1, 0, 0, 0, 2]},
    ]
    ends, curves = loss_by_sigma(steps, window=2)
    assert ends == [2]
    assert curves["0.0 to 0.2"] == [1.0]
    assert curves["0.2 to 0.4"][0] != curves["0.2 to 0.4"][0]


def test_captions_of_another_width_are_refused(folder: Path) -> None:
    save(LatentModel(dataclasses.replace(SOURCE, caption_dim=24)).state_dict(), folder / "source.safetensors", {}, True)
    with pytest.raises(ValueError, match="64 values per token"):
        train(folder, "run")


def test_a_run_starts_fitted_to_its_images(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patch_pairs, "FEW", 64)
    recipe = folder / "recipe.toml"
    fitted = RECIPE.format(steps=2, lr=1e-3).replace("head_width", 'init = "fitted"\nhead_width')
    recipe.write_text(fitted, encoding="utf-8")
    run.train(str(recipe), folder / "run")
    images = tiny_images(recipes.load(recipe).data, folder / "run" / "images", lambda *_: None)
    source, _ = load_tensors(folder / "source.safetensors")
    found = patch_pairs.fit_embedder(tiny_pairs(images), source["x_embedder.weight"], source["x_embedder.bias"])
    begun, about = load_tensors(RunFolder(folder / "run").init)
    assert torch.equal(begun["x_embedder.weight"], found.weight) and about["l2p.init"] == "fitted"


def test_a_data_folder_without_pairs_is_refused_before_anything_is_made(folder: Path) -> None:
    (folder / "photos").mkdir()
    recipe = folder / "recipe.toml"
    text = RECIPE.format(steps=2, lr=1e-3).replace("head_width", 'init = "fitted"\nhead_width')
    text = text.replace('kind = "renderings"\nimages = 4', 'kind = "folder"\npath = "photos"')
    recipe.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"photos has none: choose a data set that it made, or start without a fit"):
        run.train(str(recipe), folder / "run")
    pairs = patch_pairs.PatchPairs(16, 16)
    pairs.count = patch_pairs.FEW - 1
    pairs.save(folder / "photos" / patch_pairs.FILE)
    with pytest.raises(ValueError, match="too few for a fitted start"):
        run.train(str(recipe), folder / "run")
    assert not RunFolder(folder / "run").init.exists() and not (folder / "run" / "images").exists()
