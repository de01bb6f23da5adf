"""A run states its plan before anything is loaded, and is refused where it cannot fit."""

from __future__ import annotations

import dataclasses
import re
import statistics
from pathlib import Path

import pytest
from test_run_hooks import recipe_in
from test_run_resume import folder  # noqa: F401 (a fixture)

from comfyui_l2p.l2p_core.run import loop, memory_plan, pace
from comfyui_l2p.l2p_core.run.folder import RunFolder
from comfyui_l2p.l2p_core.run.hooks import Hooks
from comfyui_l2p.l2p_core.run.metrics import duration, read_metrics
from comfyui_l2p.l2p_core.training import loading as training_model
from comfyui_l2p.train.cli import main

pytestmark = pytest.mark.usefixtures("unflushed")


class Loaded(Exception):
    """The model is about to be loaded."""


def not_yet(*_: object) -> None:
    raise Loaded


def test_the_plan_is_stated_and_kept_before_the_model_is_loaded(
    folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(training_model, "load", not_yet)
    recipe = recipe_in(folder)
    notes: list[str] = []
    training = dataclasses.replace(recipe.training, frozen="fp8", offload=True)
    with pytest.raises(Loaded):
        loop.train(dataclasses.replace(recipe, training=training), folder / "run", hooks=Hooks(note=notes.append))
    assert notes[0].startswith("Needs about ") and "trained weights" in notes[0]
    assert RunFolder(folder / "run").plan.read_text(encoding="utf-8") == f"{notes[0]}\n"


def test_the_plan_says_what_is_not_computed_twice(
    folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(training_model, "load", not_yet)
    recipe = recipe_in(folder)
    training = dataclasses.replace(recipe.training, gradient_checkpointing=True, keep_activations=-1)
    for available, nothing in ((10**12, True), (1000, False)):
        monkeypatch.setattr(memory_plan, "available_memory", lambda size=available: size)
        notes: list[str] = []
        with pytest.raises(Loaded):
            loop.train(dataclasses.replace(recipe, training=training), folder / "run", hooks=Hooks(note=notes.append))
        assert ("Nothing is checkpointed." in notes[0]) == nothing and "blocks keep" not in notes[0]


def test_a_run_that_cannot_fit_is_refused_before_anything_is_made(
    folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory_plan, "free_memory", lambda device: 1000)
    worked: list[str] = []
    with pytest.raises(ValueError, match="There are"):
        loop.train(recipe_in(folder), folder / "run", hooks=Hooks(working=lambda text, *_: worked.append(text)))
    assert not worked and not RunFolder(folder / "run").init.exists()


def test_without_a_gpu_the_computers_memory_is_the_limit(
    folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory_plan, "free_memory_and_swap", lambda: 1000)
    with pytest.raises(ValueError, match="There are"):
        loop.train(recipe_in(folder), folder / "run")


def test_time_is_stated_from_measured_steps_alone(
    folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = recipe_in(folder)

    def stated(output: str, device: str = "", **training: object) -> str:
        """What a run says of its time before its model is loaded."""
        notes: list[str] = []
        changed = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, **training))  # type: ignore[arg-type]
        with monkeypatch.context() as patched, pytest.raises(Loaded):
            patched.setattr(training_model, "load", not_yet)
            if device:
                patched.setattr(pace, "name_of", lambda _: device)
            loop.train(changed, folder / output, hooks=Hooks(forecast=notes.append))
        (forecast,) = notes
        return forecast

    unknown = "The training time is known after the first steps."
    assert unknown in stated("run")
    assert loop.train(recipe, folder / "run").finished
    lines = read_metrics(RunFolder(folder / "run").metrics)
    seconds = statistics.median(line["seconds"] for line in lines[1:])
    total = f"take about {duration(94 * seconds)}, without saves and montages"
    measured = rf"a step took {seconds:.3g} seconds in {{}} \(median of 5, CPU with \d+ threads\)\."
    # Of the run itself, and of one beside it, whatever its learning rate.
    assert re.search(f"The remaining 94 steps {total}: {measured.format('this run')}", stated("run", steps=100))
    assert re.search(f"The remaining 94 steps .*{measured.format('the run run')}", stated("other", steps=94, lr=1e-5))
    for changed in ({"blocks": 0}, {"precision": "bf16"}, {"device": "another GPU"}):
        assert unknown in stated("other", **changed)
    capsys.readouterr()
    recipes_file = folder / "run" / "recipe.toml"
    recipes_file.write_text(recipes_file.read_text("utf-8").replace("steps = 100", "steps = 1000"), encoding="utf-8")
    assert main(["plan", str(folder / "run")]) == 0
    assert re.search(f"The remaining 994 steps .*{measured.format('this run')}", capsys.readouterr().out)


def test_a_run_with_all_that_saves_memory_goes_on_to_the_same_end(folder: Path) -> None:  # noqa: F811
    recipe = recipe_in(folder)
    training = dataclasses.replace(recipe.training, frozen="fp8", stream=True, offload=True, precision="bf16")
    recipe = dataclasses.replace(recipe, training=training)
    asked: list[int] = []

    def should_stop() -> bool:
        asked.append(1)
        return len(asked) == 3

    assert not loop.train(recipe, folder / "run", hooks=Hooks(should_stop=should_stop)).finished
    assert loop.train(recipe, folder / "run").finished and loop.train(recipe, folder / "straight").finished
    for name in ("state", "delta"):
        one, other = (getattr(RunFolder(folder / run), name).read_bytes() for run in ("run", "straight"))
        assert one == other, name
