"""Runs whose loss goes up for good stop, with what they had before."""

from __future__ import annotations

import math
import random
import signal
from pathlib import Path

import pytest
import test_run
from test_run import folder, train  # noqa: F401 (a fixture)

from comfyui_l2p.l2p_core.batch import Batch
from comfyui_l2p.l2p_core.checkpoint import load_tensors
from comfyui_l2p.l2p_core.run import divergence
from comfyui_l2p.l2p_core.run.divergence import DivergenceWatch
from comfyui_l2p.l2p_core.run.folder import RunFolder
from comfyui_l2p.l2p_core.trainer import Trainer, TrainingDiverged
from comfyui_l2p.train.cli import main

pytestmark = pytest.mark.usefixtures("unflushed")


def stopped(losses: list[float], factor: float = 2.0, patience: int = 200) -> int | None:
    """The step at which the rule stops a run with these losses."""
    watch = DivergenceWatch(factor, patience)
    for step, loss in enumerate(losses, start=1):
        watch.add(loss)
        if watch.diverged:
            return step
    return None


def noisy(mean: float, steps: int, seed: int = 0) -> list[float]:
    """Losses as they scatter with the noise levels drawn, over a factor of ten and more."""
    rng = random.Random(seed)
    return [mean * 3 * rng.random() ** 2 for _ in range(steps)]


def test_a_loss_that_scatters_or_falls_is_let_alone() -> None:
    assert stopped(noisy(0.2, 3000)) is None
    assert stopped([1.3 * math.exp(-step / 300) + 0.1 for step in range(2000)]) is None


def test_a_loss_that_rises_for_good_stops_the_run() -> None:
    step = stopped(noisy(0.2, 500) + noisy(1.3, 500, seed=1))
    assert step is not None and 700 <= step <= 800


def test_a_hump_is_forgiven() -> None:
    assert stopped(noisy(0.2, 500) + [3.0] * 20 + noisy(0.2, 1000, seed=2)) is None


def test_the_rule_can_be_turned_off() -> None:
    assert stopped([0.1] * 300 + [9.0] * 900, patience=0) is None


def test_the_last_good_save_survives_a_rising_loss(
    folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From step 5 on the reported loss is tenfold; step 8 stops, and the saves of 6 and 8 are not made."""
    monkeypatch.setattr(divergence, "YOUNG", 2)
    monkeypatch.setattr(divergence, "MEMORY", 0.1)
    one_step = Trainer._train_step

    def step(self: Trainer, batches: object) -> object:
        metrics = one_step(self, batches)  # type: ignore[arg-type]
        metrics.loss = 1.0 if metrics.step < 5 else 10.0
        return metrics

    monkeypatch.setattr(Trainer, "_train_step", step)
    monkeypatch.setattr(test_run, "RECIPE", test_run.RECIPE + "divergence_steps = 4\n")
    with pytest.raises(TrainingDiverged, match="at step 8 .* for 4 steps. The last save, of step 4,"):
        train(folder, "run", steps=20)
    assert load_tensors(folder / "run" / "state.safetensors")[1]["l2p.step"] == "4"
    # Going on from there, the watch knows what the losses were.
    with pytest.raises(TrainingDiverged, match="at step 8 .* The last save, of step 4,"):
        train(folder, "run", steps=20)


@pytest.mark.parametrize("last", [7, 8], ids=["between", "where saves and montages are due"])
def test_a_run_stopped_while_its_loss_rises_keeps_the_last_good_save(
    folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    last: int,
) -> None:
    monkeypatch.setattr(divergence, "YOUNG", 2)
    monkeypatch.setattr(divergence, "MEMORY", 0.1)
    one_step = Trainer._train_step

    def step(self: Trainer, batches: object) -> object:
        metrics = one_step(self, batches)  # type: ignore[arg-type]
        metrics.loss = 1.0 if metrics.step < 5 else 10.0
        if metrics.step == last:
            signal.raise_signal(signal.SIGINT)
        return metrics

    monkeypatch.setattr(Trainer, "_train_step", step)
    with pytest.raises(KeyboardInterrupt):
        train(folder, "run", steps=20)
    assert capsys.readouterr().err.count("the save of step 4 stays the last") == 1
    assert load_tensors(folder / "run" / "state.safetensors")[1]["l2p.step"] == "4"


def test_a_loss_that_is_no_number_is_said_and_the_last_save_stays(
    folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    one_step = Trainer._backward

    def backward(self: Trainer, batch: Batch, micro_batches: int) -> tuple[list[float], list[float]]:
        if self.step == 3:
            batch.pixels.fill_(float("inf"))
        return one_step(self, batch, micro_batches)

    monkeypatch.setattr(Trainer, "_backward", backward)
    (folder / "recipe.toml").write_text(test_run.RECIPE.format(steps=6, lr=1e-3), encoding="utf-8")
    assert main(["train", str(folder / "recipe.toml"), "--output", str(folder / "run")]) == 1
    assert "diverged at step 4" in capsys.readouterr().err.splitlines()[-1]
    made = RunFolder(folder / "run")
    assert "Training diverged at step 4" in made.report.read_text(encoding="utf-8")
    assert load_tensors(made.state)[1]["l2p.step"] == "2"
    weights, _ = load_tensors(made.delta)
    assert all(bool(weight.isfinite().all()) for weight in weights.values())
