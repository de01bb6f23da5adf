"""Shallow training: what changes, what is reported, and resuming bit for bit."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_models
import torch
from tiny_models import RandomBatches, pixel_model

from comfyui_l2p.l2p_core import flow
from comfyui_l2p.l2p_core.freeze import trainable_names
from comfyui_l2p.l2p_core.ops.sample_randomness import draw, mixed
from comfyui_l2p.l2p_core.training.batch import Batch
from comfyui_l2p.l2p_core.training.step_metrics import SIGMA_EDGES
from comfyui_l2p.l2p_core.training.trainer import Trainer, TrainingDiverged
from comfyui_l2p.l2p_core.training_config import TrainingConfig

CONFIG = TrainingConfig(
    steps=6, lr=1e-3, blocks=1, precision="fp32", ema_decay=0.9, caption_dropout=0.3, warmup_steps=2, accumulate=2
)
EMPTY = tiny_models.captions(1)[0]


def trainer(config: TrainingConfig = CONFIG) -> Trainer:
    return Trainer(pixel_model(), config, EMPTY)


def run(trained: Trainer, until: int) -> list[float]:
    losses = []
    for metrics in trained.run(RandomBatches()):
        losses.append(metrics.loss)
        if metrics.step == until:
            break
    return losses


def test_training_changes_exactly_the_shallow_part() -> None:
    before = {name: value.clone() for name, value in pixel_model().state_dict().items()}
    trained = trainer()
    run(trained, 6)
    changed = {name for name, value in trained.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == trainable_names(trained.model.config, blocks=1)
    assert set(trained.trained()) == changed


def test_training_on_a_few_images_learns_them() -> None:
    config = dataclasses.replace(CONFIG, steps=60, lr=3e-3, ema_decay=0.0, accumulate=1, caption_dropout=0.0)
    trained = trainer(config)
    batch = RandomBatches(batch_size=6).batch(0)
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(batch.pixels.shape, generator=generator)

    def loss() -> float:
        with torch.no_grad():
            return float(flow.velocity_loss(trained.model, batch.pixels, noise, torch.full((6,), 0.7), batch.captions))

    before = loss()
    for _ in trained.run(RandomBatches(batch_size=6)):
        pass
    assert loss() < 0.75 * before


def test_every_step_is_reported_by_range_of_sigma() -> None:
    for metrics in trainer().run(RandomBatches()):
        assert metrics.images == sum(metrics.sigma_count) == 4
        assert len(metrics.sigma_loss) == len(SIGMA_EDGES) - 1
        assert sum(metrics.sigma_loss) / 4 == pytest.approx(metrics.loss, rel=1e-5)
        high_count = sum(metrics.sigma_count[3:])
        if high_count:
            assert metrics.high_sigma_loss == pytest.approx(sum(metrics.sigma_loss[3:]) / high_count, rel=1e-5)
        else:
            assert metrics.high_sigma_loss is None


def test_resuming_continues_bit_for_bit(tmp_path: Path) -> None:
    straight = trainer()
    expected = run(straight, 6)
    first = trainer()
    losses = run(first, 3)
    first.save(tmp_path / "state.safetensors")
    second = trainer()
    second.resume(tmp_path / "state.safetensors")
    assert second.step == 3
    assert losses + run(second, 6) == expected
    for name, value in straight._weights.state().items():
        assert torch.equal(value, second._weights.state()[name]), name


KILLED_RUN = """
import sys
sys.path.insert(0, sys.argv[2])
from test_trainer import CONFIG, trainer
from tiny_models import RandomBatches
import dataclasses, pathlib
trained = trainer(dataclasses.replace(CONFIG, steps=100000))
if pathlib.Path(sys.argv[1]).exists():
    trained.resume(sys.argv[1])
for metrics in trained.run(RandomBatches()):
    trained.save(sys.argv[1])
    print(metrics.step, flush=True)
"""


def test_a_killed_run_goes_on_from_a_whole_save(tmp_path: Path) -> None:
    """Killed at a random moment, saves included, the file is always one that resumes to the undisturbed weights."""
    state = tmp_path / "state.safetensors"
    for moment in (0.05, 0.13):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED_RUN, str(state), str(Path(__file__).parent)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(moment)
        process.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))
        process.wait()
        process.stdout.close()
    config = dataclasses.replace(CONFIG, steps=100000)
    resumed, straight = trainer(config), trainer(config)
    resumed.resume(state)
    assert resumed.step >= 2
    run(straight, resumed.step)
    for name, value in straight._weights.state().items():
        assert torch.equal(value, resumed._weights.state()[name]), name


def test_a_failed_save_leaves_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.safetensors"
    trained = trainer()
    run(trained, 1)
    trained.save(path)
    before = path.read_bytes()
    run(trained, 2)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match="disk"):
        trained.save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["state.safetensors"]


def test_resuming_another_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    trainer().save(path)
    with pytest.raises(ValueError, match="weight_decay = 0.01"):
        trainer(dataclasses.replace(CONFIG, weight_decay=0.1)).resume(path)
    with pytest.raises(ValueError, match="another model"):
        Trainer(pixel_model("4k"), CONFIG, EMPTY).resume(path)
    trainer(dataclasses.replace(CONFIG, steps=50)).resume(path)


def test_averaged_weights_come_and_go() -> None:
    trained = trainer()
    run(trained, 4)
    own = trained.trained(averaged=False)["x_embedder.weight"].clone()
    average = trained.trained()["x_embedder.weight"].clone()
    assert not torch.equal(own, average)
    with trained.averaged() as model:
        assert torch.equal(model.x_embedder.weight, average)
    assert torch.equal(trained.model.x_embedder.weight, own)


def test_warm_up_then_cosine_to_a_tenth() -> None:
    config = dataclasses.replace(CONFIG, steps=40, decay="cosine", warmup_steps=4, backbone_lr_scale=0.12)
    trained = trainer(config)
    rates = []
    for step in range(40):
        trained.step = step
        rates.append(trained._learning_rate())
        trained._weights.begin(step, rates[-1])
        new, known = (group["lr"] for group in trained._weights.optimisers[0].param_groups)
        assert known == pytest.approx(0.12 * new)
    assert rates[:4] == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3])
    assert rates[4] == pytest.approx(1e-3)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] == pytest.approx(1e-4, rel=0.1)


def test_accumulation_equals_one_large_batch() -> None:
    config = dataclasses.replace(CONFIG, ema_decay=0.0)
    in_two = trainer(config)
    next(iter(in_two.run(RandomBatches(batch_size=2))))
    in_one = trainer(dataclasses.replace(config, accumulate=1))
    next(iter(in_one.run(RandomBatches(batch_size=4))))
    for name, value in in_one.trained().items():
        assert torch.allclose(value, in_two.trained()[name], atol=2e-4), name


def test_clipping_bounds_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the optimiser is handed has the clip norm, though the reported norm is larger."""
    trained = trainer(dataclasses.replace(CONFIG, clip_norm=1e-3))
    handed = []

    def step(*_: object) -> None:
        gradients = [p.grad for p in trained.parameters.values() if p.grad is not None]
        handed.append(float(torch.stack([g.norm() for g in gradients]).norm()))

    monkeypatch.setattr(trained._weights.optimisers[0], "step", step)
    metrics = next(iter(trained.run(RandomBatches())))
    assert metrics.grad_norm > 1e-3
    assert handed == [pytest.approx(1e-3, rel=1e-2)]


def test_divergence_stops_before_a_weight_changes() -> None:
    trained = trainer()
    run(trained, 1)
    before = {name: value.clone() for name, value in trained.trained(averaged=False).items()}

    class Broken:
        def batch(self, number: int) -> Batch:
            batch = RandomBatches().batch(number)
            batch.pixels[0, 0, 0, 0] = float("nan")
            return batch

    with pytest.raises(TrainingDiverged, match="step 2"):
        next(iter(trained.run(Broken())))
    assert trained.step == 1
    for name, value in trained.trained(averaged=False).items():
        assert torch.equal(value, before[name])


def test_bfloat16_keeps_float32_masters_and_bfloat16_frozen_weights() -> None:
    trained = trainer(dataclasses.replace(CONFIG, precision="bf16"))
    assert all(value.dtype == torch.float32 for value in trained.trained(averaged=False).values())
    frozen = [p for p in trained.model.parameters() if not p.requires_grad]
    assert frozen and all(p.dtype == torch.bfloat16 for p in frozen)
    reference = run(trainer(), 2)
    assert run(trained, 2) == pytest.approx(reference, rel=0.05)


def test_own_seed_gives_the_noise_of_the_source() -> None:
    shape = torch.Size((3, 8, 8))
    chosen = draw(0, 5, shape, levels=500, dropout=0.0, own_seed=1234)
    assert torch.equal(chosen.noise, torch.randn(shape, generator=torch.Generator().manual_seed(1234)))
    assert chosen.sigma_index == draw(0, 5, shape, levels=500, dropout=0.0, own_seed=None).sigma_index


def test_randomness_of_a_sample_depends_on_its_number_alone() -> None:
    shape = torch.Size((3, 4, 4))
    draws = [draw(1, n, shape, levels=500, dropout=0.25, own_seed=None) for n in range(2000)]
    again = draw(1, 77, shape, levels=500, dropout=0.25, own_seed=None)
    assert torch.equal(again.noise, draws[77].noise) and again.sigma_index == draws[77].sigma_index
    levels = torch.tensor([float(d.sigma_index) for d in draws])
    assert levels.min() < 5 and levels.max() > 494 and abs(float(levels.mean()) - 249.5) < 12
    assert abs(sum(d.drop_caption for d in draws) / 2000 - 0.25) < 0.04
    noise = torch.stack([d.noise for d in draws])
    assert abs(float(noise.mean())) < 0.02 and abs(float(noise.std()) - 1) < 0.02
    assert len({mixed(seed, n) & 0xFFFFFFFF for seed in range(30) for n in range(30)}) == 900


@pytest.mark.parametrize(
    "wrong", [{"decay": "linear"}, {"steps": 0}, {"lr": 0.0}, {"ema_decay": 1.0}, {"precision": "fp8"}, {"blocks": -1}]
)
def test_impossible_settings_are_explained(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TrainingConfig(**wrong)  # type: ignore[arg-type]


def test_dropping_captions_needs_an_empty_one() -> None:
    with pytest.raises(ValueError, match="empty caption"):
        Trainer(pixel_model(), CONFIG)
