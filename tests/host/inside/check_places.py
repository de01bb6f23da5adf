"""The host's folders as the nodes see them: links, shards, many files, and results that are not as they were left."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import data_folders
import folder_paths
import pytest
import torch
from safetensors.torch import save_file
from tiny_checkpoints import pixel_config, weights, write_shards

from comfyui_l2p.l2p_core.checkpoint import open_checkpoint
from comfyui_l2p.l2p_core.files import paths
from comfyui_l2p.nodes.folders import datasets, files, kinds, results, run_files
from comfyui_l2p.nodes.model.loading import read_state

LINKS = pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base directory of the host's with its folders for models, data sets, input and output."""
    for name in ("models/diffusion_models", "datasets", "input", "output"):
        (tmp_path / name).mkdir(parents=True)
    models = [str(tmp_path / "models" / "diffusion_models")]
    known = {"diffusion_models": (models, {".safetensors"}), "datasets": ([str(tmp_path / "datasets")], set())}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", folder_paths.folder_names_and_paths | known)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path / "input"))
    return tmp_path


def check_a_request_looks_at_each_model_once(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = base / "models" / "diffusion_models"
    for name in ("a", "b"):
        save_file(weights(pixel_config()), folder / f"{name}.safetensors")
    looked, clock = list[str](), 100.0
    fingerprint = files.fingerprint

    def look(name: str) -> object:
        looked.append(name)
        return fingerprint(name)

    monkeypatch.setattr(files, "fingerprint", look)
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    for _ in range(40):
        assert kinds.whole_files() == ["a.safetensors", "b.safetensors"] and kinds.deltas() == []
        assert kinds.first(kinds.PIXEL) == "a.safetensors"
    assert looked == ["a.safetensors", "b.safetensors"]
    save_file({"x": torch.zeros(1)}, folder / "a.safetensors", {"l2p.kind": "delta"})
    clock += 2
    assert kinds.deltas() == ["a.safetensors"], "a file that was replaced since"


@LINKS
def check_links_of_the_owner_are_followed(base: Path) -> None:
    elsewhere = base / "other disk"
    data_folders.numbered(elsewhere / "photos", 2)
    (elsewhere / "prompts").write_text("a fox", encoding="utf-8")
    for link, leads_to in {
        "datasets/linked": "photos",
        "output/l2p_runs": "runs",
        "input/prompts.txt": "prompts",
        "models/diffusion_models/big": "models",
    }.items():
        if not (elsewhere / leads_to).exists():
            (elsewhere / leads_to).mkdir()
        (base / link).symlink_to(elsewhere / leads_to)
    assert datasets.choices() == ["linked"] and datasets.existing("linked") == base / "datasets" / "linked"
    assert datasets.name_of(datasets.folder("linked")) == "linked"
    assert datasets.input_file("prompts.txt").read_text(encoding="utf-8") == "a fox"
    folder = run_files.run_folder("mine/1")
    montage = folder / "montage-000001.png"
    served = {"filename": montage.name, "subfolder": "l2p_runs/mine/1", "type": "output"}
    assert run_files.served(montage) == served
    target = files.new_file("big/model", overwrite=False)
    assert files.name_of(target) == os.path.join("big", "model.safetensors")
    assert target.parent.resolve() == elsewhere / "models"


@LINKS
@pytest.mark.parametrize("name", ["../out", "linked/../../out", "/etc", "a\\..\\..\\out", "C:\\out", "\\\\host\\x"])
def check_names_of_workflows_cannot_leave_nevertheless(base: Path, name: str) -> None:
    (base / "out").mkdir()
    (base / "out" / "secret.txt").write_text("x", encoding="utf-8")
    for folder in ("datasets", "output", "models/diffusion_models", "input"):
        (base / folder / "linked").symlink_to(base)
    for place in (datasets.folder, run_files.run_folder, files.target):
        with pytest.raises(ValueError, match="leads out of"):
            place(name)
    with pytest.raises(ValueError, match="There is no file"):
        datasets.input_file(f"{name}/secret.txt")
    with pytest.raises(ValueError, match="There is no file"):
        files.existing(name)


def check_shards_are_offered_once_and_loaded(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = base / "models" / "diffusion_models"
    (models / "deep").mkdir()
    write_shards(weights(pixel_config()), models / "deep" / "l2p")
    write_shards(weights(pixel_config()), models, stem="model")
    (models / "one.safetensors").touch()
    folder, index = os.path.join("deep", "l2p"), "model.safetensors.index.json"
    assert sorted(files.choices()) == sorted([folder, index, "one.safetensors"])
    shard = next((models / "deep" / "l2p").glob("*-00001-of-*.safetensors"))
    for name in (folder, index, str(shard.relative_to(models))):
        state = read_state(files.existing(name), None)
        assert state.keys() == dict(open_checkpoint(models / index).tensors).keys()
    before = files.fingerprint(folder)
    os.utime(shard, ns=(1, 1))
    assert files.fingerprint(folder) != before
    (models / "deep" / "l2p" / "diffusion_pytorch_model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match="no single index"):
        read_state(files.existing(folder), None)


@LINKS
def check_a_link_to_a_folder_of_shards_is_loaded_without_a_warning(
    base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The host warns that one "doesn't link anywhere"."""
    snapshot = base / "hub"
    write_shards(weights(pixel_config()), snapshot)
    (base / "models" / "diffusion_models" / "linked").symlink_to(snapshot)
    assert files.choices() == ["linked"]
    state = read_state(files.existing("linked", *files.WHOLE_MODELS), None)
    assert state.keys() == dict(open_checkpoint(snapshot).tensors).keys()
    assert files.fingerprint("linked") and caplog.text == ""


def check_many_images_are_not_looked_at_for_the_list(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(50):
        (base / "datasets" / "set" / f"{number}").mkdir(parents=True)
        (base / "datasets" / "set" / f"{number}.png").touch()
        (base / "input" / f"{number}.png").touch()
    (base / "input" / "prompts.txt").touch()
    asked: list[Any] = []

    def counted(function: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            asked.append(arguments)
            return function(*arguments, **named)

        return call

    monkeypatch.setattr(Path, "stat", counted(Path.stat))
    monkeypatch.setattr(os, "stat", counted(os.stat))
    assert len(datasets.choices()) == 51 and datasets.input_files((".txt",)) == ["prompts.txt"]
    assert len(asked) < 5


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "sub" / "a.txt").write_text("another", encoding="utf-8"),
        lambda folder: (folder / "sub" / "a.txt").unlink(),
        lambda folder: data_folders.grey(folder / "sub" / "deep" / "b.png"),
        lambda folder: data_folders.grey(folder / "000.png", 200, 70, 70),
        lambda folder: (folder / "000.png").rename(folder / "1.png"),
    ],
)
def check_any_change_of_a_data_set_is_noticed(base: Path, change: Any) -> None:
    folder = data_folders.numbered(base / "datasets" / "set", 2)
    (folder / "sub").mkdir()
    (folder / "sub" / "a.txt").write_text("a fox", encoding="utf-8")
    os.utime(folder / "sub" / "a.txt", ns=(1, 1))
    before = datasets.fingerprint("set")
    assert datasets.fingerprint("set") == before
    change(folder)
    assert datasets.fingerprint("set") != before


def check_a_result_is_made_again_only_if_it_is_not_as_it_was_left(tmp_path: Path) -> None:
    """A node's own file does not make it run again; another content, or none, does, however its name came to it."""
    node, other = SimpleNamespace(hidden=SimpleNamespace(unique_id="7")), SimpleNamespace(hidden=None)
    file = tmp_path / "file"
    assert results.fingerprint(node, "file") == 0
    file.write_text("mine", encoding="utf-8")
    results.remember(node, "file", file)
    assert [results.fingerprint(node, name) for name in ("file", None, "another")] == [0, 0, 0]
    file.write_text("somebody else's", encoding="utf-8")
    assert [results.fingerprint(node, name) for name in ("file", None)] == [1, 1]
    results.remember(node, "file", file)
    assert results.fingerprint(node, "file") == 1
    file.unlink()
    assert results.fingerprint(node, "file") == 2 and results.fingerprint(other, "file") == 0
    assert paths.state(file) == paths.state(file)
