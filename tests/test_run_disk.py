"""Disks that are too small, real ones: a file system in memory that the test mounts."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import data_folders
import pytest
import test_run
from test_run import folder  # noqa: F401 (a fixture)

from comfyui_l2p.l2p_core.checkpoint import load_tensors
from comfyui_l2p.l2p_core.config import ModelConfig
from comfyui_l2p.l2p_core.memory.plan import GB, saved_sizes
from comfyui_l2p.l2p_core.run import disk, loop, preparation
from comfyui_l2p.l2p_core.run import recipe as recipes
from comfyui_l2p.l2p_core.run.base import pixel_config
from comfyui_l2p.l2p_core.run.caption_source import of_words
from comfyui_l2p.l2p_core.run.folder import RunFolder
from comfyui_l2p.l2p_core.run.hooks import Hooks
from comfyui_l2p.l2p_core.tiny import image_set
from comfyui_l2p.l2p_core.training.trainer import Trainer
from comfyui_l2p.l2p_core.training_config import TrainingConfig
from comfyui_l2p.train.cli import main

pytestmark = pytest.mark.usefixtures("unflushed")

ROOM = 16 << 20
Z_IMAGE = ModelConfig().with_head("1k")


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A disk of 16 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if sys.platform != "linux":
        pytest.skip("mounting a file system in memory is Linux's")
    command = ["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "l2p-test", str(place)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def fill(place: Path, left: int) -> Path:
    """A file that leaves so many bytes."""
    path = place / "somebody's"
    path.write_bytes(b"\0" * max(0, shutil.disk_usage(place).free - left))
    return path


def arguments(folder: Path, output: Path, text: str = "", steps: int = 4) -> list[str]:  # noqa: F811
    recipe = folder / "recipe.toml"
    recipe.write_text(text or test_run.RECIPE.format(steps=steps, lr=1e-3), encoding="utf-8")
    return ["train", str(recipe), "--output", str(output)]


def needed(folder: Path, output: Path) -> disk.DiskPlan:  # noqa: F811
    recipe = recipes.with_paths(recipes.load(folder / "recipe.toml"), folder)
    run = RunFolder(output)
    return disk.planned(recipe, pixel_config(recipe.model, run.init), recipe.training, run)


def test_what_is_planned_is_what_is_written(folder: Path) -> None:  # noqa: F811
    command = arguments(folder, folder / "run", steps=2)
    plan = needed(folder, folder / "run")
    assert main(command) == 0
    made = RunFolder(folder / "run")
    sizes = {name: getattr(made, name).stat().st_size for name in ("state", "delta", "init")}
    state, delta = saved_sizes(plan.config, plan.training)
    for planned, size in (
        (state, sizes["state"]),
        (delta, sizes["delta"]),
        (plan.parts["initialisation"], sizes["init"]),
    ):
        assert 0.8 * size < planned < 1.5 * size, (planned, size)
    assert plan.bytes > 2 * sizes["state"] + sizes["delta"] + 0.9 * sizes["init"]
    # A run that is resumed writes one more state beside the one that is there.
    again = needed(folder, folder / "run")
    extras = sum(path.stat().st_size for path in beside(made))
    assert again.present == sum(sizes.values()) + extras and again.resumed
    assert 0.8 * sizes["state"] < again.missing < 2.5 * sizes["state"]


def beside(made: RunFolder) -> list[Path]:
    """Files of a run that are no weights and are counted."""
    pictures = [path for path in (*made.montages(), made.source_images, made.card_picture) if path.is_file()]
    return [*pictures, made.metrics, made.report, *made.events.glob("*"), *made.images.iterdir()]


def test_montages_records_and_images_are_counted(folder: Path) -> None:  # noqa: F811
    text = test_run.RECIPE.format(steps=14, lr=1e-3).replace("montage_every = 4", "montage_every = 3\nsize = 40")
    command = arguments(folder, folder / "run", text.replace("images = 4", "images = 17"))
    plan = needed(folder, folder / "run")
    assert main(command) == 0
    made = RunFolder(folder / "run")
    pictures, images = made.montages(), list(made.images.iterdir())
    records = [made.metrics, made.report, *made.events.glob("*")]
    assert len(pictures) == 5 and len(images) == 5
    for what, files, least in (
        # A PNG file may be as large as its pixels, and these compress well; where TensorBoard is there, it has a copy.
        ("montages", pictures, 0.05),
        ("metrics and report", records, 0.02),
        ("images to train on", images, 0.9),
    ):
        size = sum(path.stat().st_size for path in files)
        assert least * plan.parts[what] < size <= plan.parts[what], (what, size, plan.parts[what])
    assert all(word in plan.sentence() for word in ("metrics and report", "images to train on"))


def test_montages_decide_where_they_are_what_has_no_room(small: Path, folder: Path) -> None:  # noqa: F811
    text = test_run.RECIPE.format(steps=400, lr=1e-3).replace("montage_every = 4", "montage_every = 1\nsize = 200")
    arguments(folder, small / "run", text)
    plan = needed(folder, small / "run")
    assert plan.parts["montages"] >= 400 * 3 * 200**2 and "montages 0.0" in plan.sentence()
    assert "fewer or smaller montages ([watch] montage_every, size)" in plan.complaint()


@pytest.mark.parametrize("own", [True, False], ids=["its own disk", "another disk"])
def test_captions_that_a_disk_has_no_room_for_are_not_encoded(own: bool, small: Path, folder: Path) -> None:  # noqa: F811
    captions = [image_set.caption_of(number) for number in range(40)]
    for number in range(len(captions)):
        data_folders.grey(folder / "data" / f"{number}.png", number, 32, 32)
    data_folders.write_csv(folder / "data" / "metadata.csv", [(f"{n}.png", text, n) for n, text in enumerate(captions)])
    text = test_run.RECIPE.format(steps=2, lr=1e-3).replace('kind = "renderings"', 'kind = "folder"\nsize = 32')
    arguments(folder, folder / "run", text.replace("images = 4", f"path = '{folder / 'data'}'"))
    recipe = recipes.with_paths(recipes.load(folder / "recipe.toml"), folder)
    made, cache = RunFolder((small if own else folder) / "run"), small / "captions"
    plan = disk.planned(recipe, pixel_config(recipe.model, made.init), recipe.training, made)
    filler = fill(small, (plan.bytes if own else 0) + len(captions) * 4096)
    notes: list[str] = []
    sentence = f"The disk of {made.path} has only" if own else "name a folder on another disk under .captions. cache"
    with pytest.raises(ValueError, match=sentence):
        loop.train(recipe, made.path, captions=of_words(cache), hooks=Hooks(note=notes.append))
    with pytest.raises(ValueError, match="caption features still to be encoded need"):
        # As `l2p cache` does, whatever the run needs; the disk is all but full.
        filler.unlink()
        fill(small, 4096)
        preparation.prepare_data(recipe, made, plan.config, of_words(cache), Hooks())
    assert not cache.exists() and not made.state.exists()
    filler.unlink()
    loop.train(recipe, made.path, captions=of_words(cache), hooks=Hooks(note=notes.append))
    written = sum(-(-path.stat().st_size // 4096) * 4096 for path in cache.rglob("*.safetensors"))
    planned = of_words(folder / "none").bytes_to_encode(captions, plan.config.caption_dim)
    assert written <= planned < 5 * written
    assert any("Caption features still to be encoded need about" in note for note in notes)


def test_the_published_run_needs_what_the_issue_of_disks_is_about() -> None:
    """By shapes: two states of 4 + 4 + 8 bytes for each of 2.5 billion trained parameters."""
    state, delta = saved_sizes(Z_IMAGE, TrainingConfig(ema_decay=0.999))
    assert 40 * GB < state < 41 * GB and 10 * GB < delta < 10.3 * GB
    assert saved_sizes(Z_IMAGE, TrainingConfig(optimiser_bits=8))[0] < 16 * GB


def test_a_run_is_refused_before_anything_is_made_where_the_disk_is_too_small(
    small: Path,
    folder: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = arguments(folder, small / "run")
    whole = needed(folder, small / "run")
    filler = fill(small, whole.bytes // 2)
    assert main(command) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "GB of disk space: " in said and f"The disk of {small / 'run'} has only" in said
    assert not RunFolder(small / "run").recipe.exists() and not RunFolder(small / "run").init.exists()
    filler.unlink()
    assert main(command) == 0


def test_the_change_that_makes_it_fit_is_named_and_does(
    small: Path,
    folder: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = arguments(folder, small / "run")
    whole = needed(folder, small / "run")
    sizes = dict(whole._smaller(1))
    assert list(sizes)[:3] == ["optimiser_bits = 8", "ema_decay = 0", "optimiser_bits = 8 and ema_decay = 0"]
    fill(small, whole.bytes - 4096)
    assert main(command) == 2
    assert "It would fit with optimiser_bits = 8: then about" in capsys.readouterr().err
    (small / "somebody's").unlink()
    fill(small, sizes["optimiser_bits = 8"] - 4096)
    assert main(command) == 2
    assert "It would fit with ema_decay = 0: then about" in capsys.readouterr().err or (
        sizes["ema_decay = 0"] > sizes["optimiser_bits = 8"]
    )
    text = test_run.RECIPE.format(steps=2, lr=1e-3).replace("ema_decay = 0.9", "ema_decay = 0")
    (small / "somebody's").unlink()
    fill(small, sizes["ema_decay = 0"] + (1 << 18))
    assert main(arguments(folder, small / "run", text)) == 0


def test_a_disk_that_fills_up_while_training_costs_nothing_that_was_saved(
    small: Path,
    folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = RunFolder(small / "run")
    one_step = Trainer._train_step

    def step(self: Trainer, batches: object) -> object:
        metrics = one_step(self, batches)  # type: ignore[arg-type]
        if metrics.step == 4:
            fill(small, made.delta.stat().st_size + made.state.stat().st_size // 2)
        return metrics

    monkeypatch.setattr(Trainer, "_train_step", step)
    assert main(arguments(folder, made.path)) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "state.safetensors needs" in said and "free some space" in said
    assert said.endswith("The save of step 2 remains the last.")
    assert load_tensors(made.state)[1]["l2p.step"] == "2" and not list(small.rglob("*.part"))
    load_tensors(made.delta)
    monkeypatch.undo()
    monkeypatch.setattr(image_set, "PART", 4)
    (small / "somebody's").unlink()
    assert main(arguments(folder, made.path)) == 0
    assert load_tensors(made.state)[1]["l2p.step"] == "4"


def test_room_that_vanishes_in_the_middle_of_a_write_leaves_the_old_file(small: Path) -> None:
    """The disk itself refuses, not the look at it beforehand."""
    from comfyui_l2p.l2p_core.files.atomic import atomic_file, write_bytes
    from comfyui_l2p.l2p_core.files.safetensors_header import CheckpointError

    write_bytes(small / "file", b"old")
    with pytest.raises(CheckpointError, match="disk of .* is full"), atomic_file(small / "file", 1, True) as file:
        for _ in range(ROOM >> 20):
            left = memoryview(b"\1" * (1 << 20))
            while left:
                left = left[file.write(left) :]
    assert (small / "file").read_bytes() == b"old" and [path.name for path in small.iterdir()] == ["file"]


def test_the_copy_that_is_published_is_part_of_the_plan(
    small: Path,
    folder: Path,  # noqa: F811
) -> None:
    arguments(folder, folder / "run")
    recipe = recipes.with_paths(recipes.load(folder / "recipe.toml"), folder)
    run = RunFolder(folder / "run")
    config = pixel_config(recipe.model, run.init)
    alone, beside, elsewhere = (
        disk.planned(recipe, config, recipe.training, run, published=target)
        for target in (None, folder / "models" / "delta.safetensors", small / "delta.safetensors")
    )
    assert beside.bytes == alone.bytes + saved_sizes(config, recipe.training)[1]
    assert elsewhere.bytes == alone.bytes and not elsewhere.complaint()
    fill(small, 1000)
    assert f"The disk of {small}, where the delta is copied" in elsewhere.complaint()


def test_the_plan_states_the_disk(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    arguments(folder, folder / "run")
    assert main(["plan", str(folder / "recipe.toml")]) == 0
    assert "GB of disk space: " in capsys.readouterr().out
    assert main(["plan", "tiny"]) == 0
    assert main(["plan", "z-image-1k-16gb"]) == 0 and "the state before it" in capsys.readouterr().out
