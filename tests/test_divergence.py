"""Runs whose loss goes up for good stop, with what they had before."""

from __future__ import annotations

import math
import random
import signal
from pathlib import Path

import pytest
import test_run
from test_run import folder, train  # noqa: F401 (a fixture)
from torch import Tensor

from comfyui_l2p.l2p_core.checkpoint import load_tensors
from comfyui_l2p.l2p_core.files.tensor_file import save
from comfyui_l2p.l2p_core.run import divergence
from comfyui_l2p.l2p_core.run.divergence import DivergenceWatch
from comfyui_l2p.l2p_core.run.folder import RunFolder
from comfyui_l2p.l2p_core.training.prepared import Prepared
from comfyui_l2p.l2p_core.training.trainer import Trainer, TrainingDiverged
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
    assert capsys.readouterr().err.count("the save of step 4 remains the last") == 1
    assert load_tensors(folder / "run" / "state.safetensors")[1]["l2p.step"] == "4"


def test_a_loss_that_is_no_number_is_said_and_the_last_save_stays(
    folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    one_step = Trainer._backward

    def backward(self: Trainer, batch: Prepared, micro_batches: int) -> Tensor:
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


def last_line(folder: Path, capsys: pytest.CaptureFixture[str], steps: int, **watch: int) -> str:  # noqa: F811
    """What `l2p train` with a learning rate of 1 says last, having failed."""
    text = test_run.RECIPE.format(steps=steps, lr=1.0).replace("ema_decay = 0.9", "ema_decay = 0.0")
    (folder / "recipe.toml").write_text(text.replace("save_every = 2", f"save_every = {watch['save_every']}"))
    assert main(["train", str(folder / "recipe.toml"), "--output", str(folder / "run")]) == 1
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_weights_that_one_step_has_ruined_are_not_saved(
    folder: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The loss of a step is that of the weights before it, so that it says nothing of what would be saved."""
    made = RunFolder(folder / "run")
    for steps in (1, 6):
        said = last_line(folder, capsys, steps, save_every=1)
        assert "diverged" in said
        assert "Nothing was saved before that: begin the run anew with a lower learning rate" in said
        assert not made.state.exists() and not made.delta.exists()


@pytest.mark.parametrize("place", ["weight", "average", "moment"])
def test_numbers_that_are_none_replace_no_good_save(
    folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    one_step = Trainer._train_step

    def step(self: Trainer, batches: object) -> object:
        metrics = one_step(self, batches)  # type: ignore[arg-type]
        if metrics.step == 4:
            prefix = {"weight": "parameter.", "average": "average.", "moment": "exp_avg."}[place]
            self.state()[prefix + "local_decoder.out_conv.weight"].view(-1)[0] = math.nan
        return metrics

    monkeypatch.setattr(Trainer, "_train_step", step)
    with pytest.raises(TrainingDiverged, match="The last save, of step 2, precedes that and its weights are"):
        train(folder, "run", steps=4)
    made = RunFolder(folder / "run")
    assert load_tensors(made.state)[1]["l2p.step"] == "2"
    for tensors, _ in (load_tensors(made.state), load_tensors(made.delta)):
        assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())


def test_a_save_that_every_further_step_diverges_from_is_called_that(
    folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backward = Trainer._backward

    def broken(self: Trainer, batch: Prepared, micro_batches: int) -> Tensor:
        if self.step == 2:
            batch.pixels.fill_(float("inf"))
        return backward(self, batch, micro_batches)

    monkeypatch.setattr(Trainer, "_backward", broken)
    with pytest.raises(TrainingDiverged, match="The last save, of step 2, is where this step started"):
        train(folder, "run", steps=4)


def test_a_first_step_that_diverges_is_not_blamed_on_training(
    folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backward = Trainer._backward

    def broken(self: Trainer, batch: Prepared, micro_batches: int) -> Tensor:
        batch.pixels.fill_(float("nan"))
        return backward(self, batch, micro_batches)

    monkeypatch.setattr(Trainer, "_backward", broken)
    with pytest.raises(TrainingDiverged, match="It was the first step, so training is not to blame"):
        train(folder, "run", steps=4)


def test_a_state_that_an_earlier_version_saved_unseen_is_not_published(folder: Path) -> None:  # noqa: F811
    made = train(folder, "run", steps=1)
    state, about = load_tensors(made.state)
    state["parameter.x_pad_token"].view(-1)[0] = math.inf
    save(state, made.state, about, overwrite=True)
    with pytest.raises(ValueError, match="holds weights that are not finite numbers"):
        train(folder, "run", steps=1)
