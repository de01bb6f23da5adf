"""A run inside the host leaves the host as it was: its memory, its flags, its folders."""

from __future__ import annotations

import gc
import os
import shutil
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.model_management as manager
import comfy.utils
import data_folders
import folder_paths
import kit
import pytest
import torch
from comfy_execution.graph_utils import ExecutionBlocker

from comfyui_l2p.l2p_core.model import L2PModel
from comfyui_l2p.l2p_core.run import disk, memory_plan
from comfyui_l2p.l2p_core.run.memory_plan import MemoryRanOut
from comfyui_l2p.l2p_core.training.trainer import Trainer, TrainingDiverged
from comfyui_l2p.nodes import training
from comfyui_l2p.nodes.folders import datasets, files, run_files
from comfyui_l2p.nodes.messages import live, sentences
from comfyui_l2p.nodes.messages.errors import plain_errors
from comfyui_l2p.nodes.messages.live import Live
from comfyui_l2p.nodes.model.demo import load_demo
from comfyui_l2p.nodes.train_node import TrainL2P
from comfyui_l2p.nodes.training_choices import AS_RECIPE, Choices

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders of its own, with a data set."""
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path / "output"))
    monkeypatch.setattr(folder_paths, "get_folder_paths", lambda name: [str(tmp_path / name)])
    monkeypatch.setattr(datasets, "root", lambda: tmp_path / "datasets")
    (tmp_path / "diffusion_models").mkdir()
    data_folders.tiny_set(tmp_path / "datasets" / "shapes", 4)
    return tmp_path


def choices(**changed: Any) -> Choices:
    few = '[training]\ndecay = "constant"\n[watch]\nsteps = 1\n'
    values: dict[str, Any] = {
        **{"dataset": "shapes", "model": files.TINY, "recipe": "auto", "run_name": "run", "anew": False},
        **{"steps": 2, "learning_rate": 0.0, "image_size": 0, "batch_size": 1, "accumulate": 0, "seed": 0},
        **{"policy": AS_RECIPE, "blocks": 1, "precision": "fp32", "memory": AS_RECIPE, "prompts": "a red circle"},
        **{"filename": "", "overwrite": False, "save_every": 0, "montage_every": 0, "changes": few},
    }
    return Choices(**values | changed)


def train(**changed: Any) -> training.Trained:
    """As the node does, under inference mode."""
    with torch.inference_mode():
        return training.train(choices(**changed), load_demo()[1], "1")


def is_left_alone() -> bool:
    gc.collect()
    models = [thing for thing in gc.get_objects() if type(thing) is L2PModel]
    return not models and not manager.in_training and not manager.current_loaded_models


def check_memory_is_freed_first_and_given_back(host: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = kit.model(tmp_path)  # kept, or the host forgets it by itself
    manager.load_models_gpu([model])
    assert manager.current_loaded_models
    seen = []
    step = Trainer._train_step

    def noted(trainer: Trainer, batches: Any) -> Any:
        seen.append((list(manager.current_loaded_models), manager.in_training, torch.is_inference_mode_enabled()))
        return step(trainer, batches)

    monkeypatch.setattr(Trainer, "_train_step", noted)
    done = train()
    assert seen == [([], True, False)] * 2 and is_left_alone()
    assert len(done.losses) == 2 and done.montage is not None
    assert done.montage.shape == (1, 128, 128, 3) and 0 <= done.montage.min() <= 1
    assert (host / "diffusion_models" / done.delta).is_file()


def check_a_run_without_montages_ends_well(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes behind the montage are skipped, as the host does with what is blocked."""
    values = vars(choices(changes='[training]\ndecay = "constant"\n[watch]\nprompts = []\n'))
    given = {name: value for name, value in values.items() if name != "anew"}
    monkeypatch.setattr(TrainL2P, "hidden", SimpleNamespace(unique_id="1"), raising=False)
    with torch.inference_mode():
        done = TrainL2P.execute(clip=load_demo()[1], start="go on where it stopped", **given)
    delta, losses, montage = done.result
    assert (host / "diffusion_models" / delta).is_file() and len(losses["loss"]) == 2
    assert isinstance(montage, ExecutionBlocker) and montage.message is None


@pytest.mark.parametrize(
    ("error", "raised", "words"),
    [
        (TrainingDiverged("Training diverged at step 2."), TrainingDiverged, "diverged"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), MemoryRanOut, "RAM ran out"),
        (manager.InterruptProcessingException(), manager.InterruptProcessingException, None),
    ],
)
def check_errors_give_memory_back(
    host: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, raised: Any, words: str | None
) -> None:
    step = Trainer._train_step

    def fails(trainer: Trainer, batches: Any) -> Any:
        if trainer.step == 1:
            raise error
        return step(trainer, batches)

    monkeypatch.setattr(Trainer, "_train_step", fails)
    with pytest.raises(raised, match=words) as caught:
        train()
    assert is_left_alone(), "an error that is still held holds the model"
    del caught
    assert not list((host / "diffusion_models").iterdir())


def check_a_run_that_does_not_fit_says_what_frees_the_hosts_memory(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_plan, "free_memory_and_swap", lambda: 0)
    with pytest.raises(ValueError, match=r"Needs about .* Unload Models and Execution Cache, in its Edit menu, frees"):
        train()
    assert is_left_alone()


def check_errors_of_the_core_are_sentences_without_the_name_of_a_class() -> None:
    """The host shows a class with its module, which is where this pack lies."""
    with pytest.raises(ValueError, match="It diverged") as caught, plain_errors():
        raise TrainingDiverged("It diverged.")
    assert type(caught.value) is ValueError


def check_an_interruption_is_acted_on_after_the_save(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's progress bars raise it wherever one is updated."""
    monkeypatch.setattr(
        comfy.utils, "PROGRESS_BAR_HOOK", lambda *_, **__: manager.throw_exception_if_processing_interrupted()
    )
    step = Trainer._train_step

    def interrupted(trainer: Trainer, batches: Any) -> Any:
        if trainer.step == 1:
            manager.interrupt_current_processing()
        return step(trainer, batches)

    monkeypatch.setattr(Trainer, "_train_step", interrupted)
    with pytest.raises(manager.InterruptProcessingException):
        train(steps=3)
    assert live.last_states()[-1]["text"] == "Stopped after 2 of 3 steps; all is saved."
    assert not manager.processing_interrupted() and (run_files.root() / "run" / "state.safetensors").is_file()


def check_a_full_disk_is_named_and_nothing_half_written(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train()
    for path in (host / "diffusion_models").iterdir():  # the delta, its card and its montage
        path.unlink()
    publish = run_files.publish
    full = Usage(1, 1, 0)

    def published(delta: Path, target: Path) -> None:
        """The disk has filled up since it was planned with."""
        monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
        publish(delta, target)

    monkeypatch.setattr(run_files, "publish", published)
    with pytest.raises(
        ValueError, match="models/diffusion_models/other.safetensors needs .* free some space"
    ) as caught:
        train(filename="other")
    assert str(host) not in str(caught.value)
    assert is_left_alone() and not list((host / "diffusion_models").iterdir())


def check_a_disk_that_is_full_beforehand_is_named_as_the_user_knows_it(
    host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run's own, and the one of the models where it is another; no path of the machine is said."""
    usage, disks = shutil.disk_usage, disk._disk
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1, 1, 0) if "output" in str(path) else usage(path))
    with pytest.raises(ValueError, match="The disk of output/l2p_runs/run has only 0 GB free") as caught:
        train()
    assert str(host) not in str(caught.value) and is_left_alone()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1, 1, 0) if "models" in str(path) else usage(path))
    monkeypatch.setattr(disk, "_disk", lambda path: 1 if "models" in str(path) else disks(path))
    with pytest.raises(ValueError, match="The disk of models/diffusion_models, where the delta is copied") as caught:
        train()
    assert str(host) not in str(caught.value)


def check_sentences_name_the_hosts_folders_as_its_user_knows_them(
    host: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is moved aside says where to; folders that are links are known by either of their paths."""
    train()
    notes: list[str] = []
    monkeypatch.setattr(Live, "note", lambda live, text: notes.append(text))
    train(anew=True, overwrite=True)
    assert any("was moved to output/l2p_runs/run/earlier-1" in note for note in notes), notes
    assert not [note for note in notes if str(tmp_path) in note]
    said = sentences.by_folders(f"{host / 'output' / 'l2p_runs' / 'run'}, {host / 'datasets' / 'shapes' / '0.png'}")
    assert said.replace(os.sep, "/") == "output/l2p_runs/run, datasets/shapes/0.png"
    elsewhere = tmp_path / "elsewhere"
    (host / "output" / "l2p_runs").rename(elsewhere)
    (host / "output" / "l2p_runs").symlink_to(elsewhere, target_is_directory=True)
    assert sentences.by_folders(f"The disk of {elsewhere} is full.") == "The disk of output/l2p_runs is full."


@pytest.mark.parametrize("policy", ["shallow", "all"])
def check_offloaded_training_leaves_a_delta_too(host: Path, policy: str) -> None:
    train(memory="offloaded", policy=policy)
    assert (host / "diffusion_models" / "run.safetensors").is_file() and is_left_alone()


def check_the_recipe_follows_the_model(host: Path) -> None:
    recipe = training.recipe_of(choices(blocks=-1, batch_size=0, steps=0, changes="[training]\nlr = 0.5"))
    assert (recipe.training.blocks, recipe.training.steps, recipe.training.lr) == (2, 4800, 0.5)
    assert (recipe.data.kind, recipe.data.size, recipe.data.batch_size) == ("folder", 64, 32)
    published = training.recipe_of(choices(recipe="z-image-1k", learning_rate=1e-5, precision=AS_RECIPE))
    assert (published.data.size, published.training.lr, published.training.precision) == (1024, 1e-5, "bf16")
    small = training.recipe_of(choices(memory="offloaded")).training
    assert (small.frozen, small.stream, small.offload) == ("fp8", True, True)
    whole = training.recipe_of(choices(memory="offloaded", policy="all")).training
    assert (whole.frozen, whole.stream, whole.offload) == ("full", True, True)
    assert published.captions.encoder == "" and published.model.base == "tiny"
