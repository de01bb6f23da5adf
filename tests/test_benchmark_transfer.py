"""`l2p benchmark transfer`, shortened to seconds: the arms, the stages that resume, the tables and the figures."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from comfyui_l2p.l2p_core import head_fit, patch_pairs
from comfyui_l2p.l2p_core.run import find as finder
from comfyui_l2p.l2p_core.run.folder import RunFolder
from comfyui_l2p.l2p_core.run.recipe import Recipe, load
from comfyui_l2p.l2p_core.tiny import image_set
from comfyui_l2p.l2p_core.tiny.worlds import SCENES, SHAPES
from comfyui_l2p.train import cli, figure
from comfyui_l2p.train.benchmark import transfer
from comfyui_l2p.train.benchmark import transfer_report as report
from comfyui_l2p.train.benchmark.transfer_arms import (
    FULL,
    GROUPS,
    OF_WORLD,
    PASSES,
    REFERENCE,
    compared_arms,
    full_arm,
    in_group,
    world_recipe,
)
from comfyui_l2p.train.scores import Scored

pytestmark = pytest.mark.usefixtures("unflushed")


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    recipe = (Path(__file__).parent / "recipes" / "demo.toml").read_text(encoding="utf-8")
    for name in ("demo", "tiny"):
        (tmp_path_factory.getbasetemp() / f"{name}.toml").write_text(recipe, encoding="utf-8")
    monkeypatch.setattr(finder, "BUNDLED", tmp_path_factory.getbasetemp())
    for name, value in {"EVALUATED": 4, "WATCHED": 4, "SAMPLING_STEPS": 1}.items():
        monkeypatch.setattr(transfer, name, value)
    monkeypatch.setattr(image_set, "PART", 8)
    monkeypatch.setattr(patch_pairs, "FEW", 64)
    monkeypatch.setattr(head_fit, "WINDOWS", 32)
    monkeypatch.setattr(head_fit, "ROWS", 1)


def _differences(one: Recipe, other: Recipe) -> set[str]:
    first, second = dataclasses.asdict(one), dataclasses.asdict(other)
    return {key for section in first for key in first[section] if first[section][key] != second[section][key]}


def test_every_arm_differs_from_the_reference_in_one_thing() -> None:
    arms = compared_arms(load(finder.find("demo")), steps=30)
    reference, *others = arms
    assert reference.name == REFERENCE and reference.recipe.model.init == "fitted"
    assert {arm.steps for arm in arms} == {30}
    changed = {arm.name: _differences(reference.recipe, arm.recipe) for arm in others}
    # Only after a fit is the learning rate another one; from scratch, everything is random and everything trains.
    assert changed.pop("from scratch") == {"init", "lr", "policy"}
    assert changed.pop("scaled") == changed.pop("random") == {"init", "lr"}
    assert all(len(keys) == 1 and "lr" not in keys for keys in changed.values())
    assert len({arm.folder for arm in arms}) == len(arms)
    assert [arm.name for arm in compared_arms(load(finder.find("demo")), ["data"])] == [REFERENCE, "clean renderings"]
    assert [arm.name for arm in in_group(arms, "starts")] == [REFERENCE, "scaled", "random"]


def test_longer_arms_have_more_images() -> None:
    recipe = load(finder.find("demo"))
    images = {steps: compared_arms(recipe, ["starts"], steps)[0].recipe.data.images for steps in (None, 10, 9000)}
    assert images == {None: recipe.data.images, 10: recipe.data.images, 9000: 9000 * recipe.data.batch_size // PASSES}


def test_the_command_offers_every_group(capsys: pytest.CaptureFixture[str]) -> None:
    assert (FULL, *GROUPS) == cli._TRANSFER
    assert cli.main(["benchmark", "transfer", "--only", "shift", "--write-delta", "delta.safetensors"]) == 2
    assert 'add "full" to --only' in capsys.readouterr().err


@pytest.mark.usefixtures("short")
def test_starts_are_compared_and_nothing_is_computed_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def benchmark() -> str:
        transfer.benchmark_transfer(tmp_path, compared_steps=1, seeds=1, groups=["starts"])
        return capsys.readouterr().out

    text = benchmark()
    assert "| 0 images | 2 images |" in " ".join(text.split())
    for start in ("fitted", "scaled", "random"):
        assert f"| {start} " in text
    numbers = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["compared"]
    assert [line["step"] for line in numbers["arms"]["random"][0]] == [0, 1]
    assert (tmp_path / "results.md").read_text(encoding="utf-8").strip() in text
    with Image.open(tmp_path / "compared.png") as picture:
        assert picture.height > 7 * 130  # a row for the source, two for each start

    for module, name in ((transfer, "Run"), (transfer, "evaluate")):
        monkeypatch.setattr(module, name, None)
    monkeypatch.setattr(figure, "draw", lambda *parts: None)
    assert text.endswith(benchmark())


@pytest.mark.usefixtures("short")
def test_the_second_world_has_a_folder_and_tables_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = world_recipe(SCENES, "demo")
    assert (recipe.data.cfg, recipe.data.images) == (4.0, 2048)
    monkeypatch.setitem(OF_WORLD, "scenes", {})  # so many images take minutes
    transfer.benchmark_transfer(tmp_path, compared_steps=1, seeds=1, groups=["data"], world=SCENES)
    (folder,) = tmp_path.iterdir()
    assert folder.name == f"scenes-{SCENES.identity()}"
    text = (folder / "results.md").read_text(encoding="utf-8")
    for word in (*SCENES.attributes, "clean renderings"):
        assert f"| {word} " in text
    with Image.open(folder / "compared.png") as picture:
        assert picture.height > 3 * 130  # rows of the source and of the reference before and after training


@pytest.mark.usefixtures("short")
def test_seeds_that_would_take_longer_are_left_for_another_call(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transfer.benchmark_transfer(tmp_path, compared_steps=1, seeds=3, groups=["data"], minutes=0.001)
    text = capsys.readouterr().out
    assert "Seed 1 and later ones would take longer than --minutes" in text and "one seed" in text
    transfer.benchmark_transfer(tmp_path, compared_steps=1, seeds=2, groups=["data"], minutes=10)
    text = capsys.readouterr().out
    assert "longer than" not in text and "2 seeds" in text


def test_a_start_states_between_which_images_it_reached_most_of_the_source() -> None:
    images = [0, 10, 50, 100]
    assert report._reached(images, [0.1, 0.2, 0.6, 0.5], 0.55) == "10 to 50"
    assert report._reached(images, [0.1, 0.2, 0.3, 0.5], 0.55) == "more than 100"
    assert report._reached(images, [0.6, 0.2, 0.3, 0.5], 0.55) == "0"


def test_seeds_give_means_and_standard_errors() -> None:
    arms = compared_arms(load(finder.find("demo")), ["shift"], steps=10)

    def scores(whole: float) -> dict[str, float]:
        return {"step": 10, "whole": whole, **dict.fromkeys(SHAPES.attributes, 0.5), "patch_grid": 1.0}

    def measured(whole: float) -> report.ArmRun:
        return report.ArmRun([scores(whole)], [{"loss": 9.0}] * 9 + [{"loss": 0.25}], {10: torch.zeros(1, 3, 8, 8)})

    source = Scored(torch.zeros(4, 3, 8, 8), scores(0.9))
    runs = {arm.name: [measured(0.4), measured(0.6)] for arm in arms}
    part = report.compared(arms, source, runs, SHAPES)
    row = next(line for line in part.text.splitlines() if line.startswith("| shift 6"))
    assert [cell.strip() for cell in row.split("|")[2:4]] == ["50.0 ± 10.0%", "50.0 ± 0.0%"]
    assert row.split("|")[-2].strip() == "0.250 ± 0.000"  # the last tenth of the steps
    assert part.errors and part.errors["shift 6"] == pytest.approx(0.1) and part.bars[report.SOURCE] == 0.9
    one = report.compared(arms, source, {name: found[:1] for name, found in runs.items()}, SHAPES)
    assert "one seed" in one.text and "±" not in one.text


@pytest.mark.usefixtures("short")
def test_the_full_run_is_scored_on_its_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transfer.benchmark_transfer(tmp_path, steps=2, groups=[FULL], write_delta=tmp_path / "delta.safetensors")
    arm = full_arm(load(finder.find("tiny")), 2)
    curve = (RunFolder(tmp_path / arm.folder).path / "scores.jsonl").read_text(encoding="utf-8").splitlines()
    assert arm.folder == "full-2"
    assert [json.loads(line)["step"] for line in curve] == [1, 2]
    assert (tmp_path / "delta.safetensors").stat().st_size > 1_000_000
    assert "kept of whole" in capsys.readouterr().out
    assert (tmp_path / "results.png").is_file()
