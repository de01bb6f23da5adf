"""Runs that are killed, moved, or meet a full disk: they resume bit for bit."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import data_folders
import pytest
import torch
from test_run import SOURCE

from comfyui_l2p.l2p_core.checkpoint import load_tensors, open_checkpoint, save
from comfyui_l2p.l2p_core.files.tensor_io import TensorWriter
from comfyui_l2p.l2p_core.model import LatentModel
from comfyui_l2p.l2p_core.run import base
from comfyui_l2p.l2p_core.run.folder import RunFolder
from comfyui_l2p.l2p_core.run.metrics import read_metrics
from comfyui_l2p.l2p_core.run.recipe import ModelSection
from comfyui_l2p.train.cli import main

KILLS = 4
NEVER = 1_000_000
RECIPE = """
[model]
base = "source.safetensors"
head_width = 0.125

[data]
kind = "folder"
path = "images"
size = 64
batch_size = 2
workers = 2

[training]
steps = 6
lr = 1e-3
blocks = 1
precision = "fp32"
ema_decay = 0.9
caption_dropout = 0.2
gradient_checkpointing = false

[watch]
save_every = 2
montage_every = 3
prompts = ["a red circle"]
size = 32
steps = 1
"""
KILLED = """
import os, signal, sys
from comfyui_l2p.l2p_core.run.recipe import ModelSection
from comfyui_l2p.l2p_core.files.tensor_io import TensorWriter
from comfyui_l2p.l2p_core.training.trainer import Trainer
from comfyui_l2p.train.cli import main

left = int(sys.argv[1])

def counted(function):
    def call(*arguments, **named):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **named)
    return call

os.replace = counted(os.replace)
TensorWriter.write = counted(TensorWriter.write)
Trainer._train_step = counted(Trainer._train_step)
before = left
code = main(sys.argv[2:])
print("moments:", before - left)
sys.exit(code)
"""
"""`l2p train`, killed before a file is put in place, between two tensors of one, or before a step."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A recipe, a small latent source and a data folder of three buckets."""
    torch.manual_seed(0)
    save(LatentModel(SOURCE).state_dict(), tmp_path / "source.safetensors")
    colours = ("red", "green", "blue", "white", "black")
    for number in range(5):
        data_folders.grey(tmp_path / "images" / f"{number}.png", 40 * number, *data_folders.SIZES[number % 3])
    rows = [(f"{number}.png", f"a {colour} circle", number) for number, colour in enumerate(colours)]
    data_folders.write_csv(tmp_path / "images" / "metadata.csv", rows)
    (tmp_path / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    return tmp_path


def arguments(folder: Path, output: str) -> list[str]:
    return ["train", str(folder / "recipe.toml"), "--output", str(folder / output)]


def assert_same(one: RunFolder, other: RunFolder) -> None:
    """That two runs ended alike: every number of state and delta, every step's loss, every montage."""
    for expected, actual in ((one.state, other.state), (one.delta, other.delta)):
        numbers, others = load_tensors(expected)[0], load_tensors(actual)[0]
        assert numbers.keys() == others.keys()
        assert all(torch.equal(numbers[name], others[name]) for name in numbers)
    losses = [[(line["step"], line["loss"]) for line in read_metrics(run.metrics)] for run in (one, other)]
    assert losses[0] == losses[1] and [step for step, _ in losses[0]] == list(range(1, 7))
    shown = [{path.name: path.read_bytes() for path in run.montages()} for run in (one, other)]
    assert shown[0] == shown[1] and list(shown[0]) == ["montage-000003.png", "montage-000006.png"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no kill -9")
@pytest.mark.usefixtures("unflushed")
def test_a_run_killed_at_random_moments_ends_as_if_nothing_had_happened(folder: Path) -> None:
    straight = run_killed(NEVER, arguments(folder, "straight"))
    count = int(straight.stdout.split("moments:")[1])
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"moments drawn with seed {seed}")  # pytest shows it when the test fails
    moments = random.Random(seed)
    for _ in range(KILLS):
        # Each run after a kill has less to do.
        done = run_killed(moments.randrange(count // 2), arguments(folder, "killed"))
        assert done.returncode in (0, -9), done.stderr
    assert count > 100, "there is hardly a moment to be killed at"
    # In a process like the others: sums over another number of threads are rounded differently.
    last = run_killed(NEVER, arguments(folder, "killed"))
    assert last.returncode == 0, last.stderr
    assert_same(RunFolder(folder / "straight"), RunFolder(folder / "killed"))
    assert not list((folder / "killed").rglob("*.part")), "a killed process's part was left"


def run_killed(moment: int, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """`l2p` with these arguments, killed at this one of its writes, renames and steps, counted from 0."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", KILLED, str(moment), *command], capture_output=True, text=True, env=environment
    )


@pytest.mark.usefixtures("unflushed")
def test_a_full_disk_is_one_line_and_the_run_goes_on_from_its_last_save(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(folder, "straight")) == 0
    usual, full = TensorWriter.write, RunFolder(folder / "full")

    def write(self: TensorWriter, *arguments: object) -> None:
        if full.metrics.exists() and len(read_metrics(full.metrics)) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        usual(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(TensorWriter, "write", write)
    assert main(arguments(folder, "full")) == 2
    assert "is full" in capsys.readouterr().err.splitlines()[-1]
    assert load_tensors(full.state)[1]["l2p.step"] == "2"
    monkeypatch.undo()
    assert main(arguments(folder, "full")) == 0
    assert_same(RunFolder(folder / "straight"), full)


@pytest.mark.usefixtures("unflushed")
def test_a_run_moved_with_its_data_goes_on_without_its_source(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(folder, "straight")) == 0
    (folder / "recipe.toml").write_text(RECIPE.replace("steps = 6", "steps = 4"), encoding="utf-8")
    assert main(arguments(folder, "moved")) == 0
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    for name in ("moved", "images"):
        shutil.move(folder / name, elsewhere / name)
    shutil.rmtree(folder / "captions")
    (elsewhere / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    assert main(arguments(elsewhere, "moved")) == 0
    # Of four steps the last one was the end, where a montage is made too.
    (elsewhere / "moved" / "montage-000004.png").unlink()
    assert_same(RunFolder(folder / "straight"), RunFolder(elsewhere / "moved"))
    data_folders.grey(elsewhere / "images" / "0.png", 0, 128, 64)
    assert main(arguments(elsewhere, "moved")) == 2
    assert "other content of [data] path" in capsys.readouterr().err


@pytest.mark.usefixtures("unflushed")
def test_what_is_left_out_is_counted_and_listed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "recipe.toml").write_text(RECIPE.replace("workers", "max_bad_share = 0.5\nworkers"), encoding="utf-8")
    data_folders.truncate(folder / "images" / "1.png")
    assert main(arguments(folder, "run")) == 0
    assert "1 samples were skipped" in capsys.readouterr().err
    assert RunFolder(folder / "run").problems.read_text(encoding="utf-8").startswith("1.png: ")


@pytest.mark.usefixtures("unflushed")
def test_captions_without_an_encoder_are_explained(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import dataclasses

    wide = dataclasses.replace(SOURCE, caption_dim=24)
    save(LatentModel(wide).state_dict(), folder / "source.safetensors", {}, True)
    assert main(arguments(folder, "run")) == 2
    assert "[captions] encoder" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.usefixtures("unflushed")
def test_captions_are_cached_beforehand_and_places_given_on_the_command_line(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    shutil.move(folder / "images", folder / "photos")
    assert main(["cache", "recipe.toml", "--output", "run", "--data", "photos"]) == 0
    said = capsys.readouterr().out
    assert "5 images (2 of 64x64" in said and "5 captions are encoded" in said
    cached = {path: path.stat().st_mtime_ns for path in (folder / "captions").rglob("*.safetensors")}
    assert len(cached) == 6, "five captions, and the empty one"
    assert not RunFolder(folder / "run").init.exists()
    assert main(["train", "recipe.toml", "--output", "run", "--data", "photos"]) == 0
    assert {path: path.stat().st_mtime_ns for path in (folder / "captions").rglob("*.safetensors")} == cached
    # The run folder alone says where everything is.
    assert main(["train", "run"]) == 0
    assert [line["step"] for line in read_metrics(RunFolder(folder / "run").metrics)] == list(range(1, 7))
    assert main(["cache", "tiny"]) == 2
    assert main(["train", "recipe.toml", "--encoder", "nowhere", "--data", "photos"]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.usefixtures("unflushed")
def test_captions_that_are_cut_are_reported(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in (folder / "images").glob("*.txt"):
        text.unlink()
    image = next((folder / "images").rglob("*.png"))
    rows = [(image.relative_to(folder / "images"), "red circle " * 300, 1)]
    data_folders.write_csv(folder / "images" / "metadata.csv", rows)
    assert main(["cache", str(folder / "recipe.toml"), "--output", str(folder / "run")]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "1 of 2 captions are longer than the 512 tokens that the model takes and are cut there" in said
    assert "'red circle red circle" in said and ", has 601." in said


@pytest.mark.usefixtures("unflushed")
def test_the_home_folder_may_be_written_as_a_tilde(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a recipe and on the command line, which no shell expands after --base= and on Windows."""
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(folder))
    text = RECIPE.replace('"images"', '"~/images"').replace('"source.safetensors"', "'~/source.safetensors'")
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "recipe.toml").write_text(f'{text}\n[captions]\ncache = "~/features"\n', encoding="utf-8")
    monkeypatch.chdir(elsewhere)
    assert main(["cache", "~/elsewhere/recipe.toml", "--output=~/run", "--data=~/images"]) == 0
    assert (folder / "run").is_dir() and (folder / "features").is_dir()
    assert main(["inspect", "~/source.safetensors"]) == 0
    assert main(["cache", "recipe.toml", "--data=~/nowhere"]) == 2
    assert str(folder / "nowhere") in capsys.readouterr().err
    assert not list(elsewhere.rglob("~*")) and not (elsewhere / "runs").exists()


@pytest.mark.usefixtures("unflushed")
def test_a_smaller_variant_is_converted_and_one_of_the_same_is_not(folder: Path) -> None:
    source = folder / "source.safetensors"
    smaller = base.initialisation(ModelSection(str(source), "1k", 0.125), folder / "1k.safetensors")
    larger = base.initialisation(ModelSection(str(smaller), "4k", 0.125), folder / "4k.safetensors")
    assert larger == folder / "4k.safetensors" and open_checkpoint(larger).pixel_config().variant == "4k"
    for variant in ("1k", "4k"):
        section = ModelSection(str(larger), variant)
        assert base.initialisation(section, folder / "unused.safetensors") == larger
        assert base.pixel_config(section, folder / "unused.safetensors").variant == "4k"
    expected = open_checkpoint(larger).config()
    assert base.pixel_config(ModelSection(str(source), "4k", 0.125), folder / "unused.safetensors") == expected
