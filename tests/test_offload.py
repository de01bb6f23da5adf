"""Trained weights stepped early or in CPU memory, and optimiser states in 8 bits, against what they stand in for."""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import weakref
from collections.abc import Iterable
from pathlib import Path

import pytest
import tiny_models
import torch
from tiny_models import RandomBatches, pixel_model

from comfyui_l2p.l2p_core.checkpoint import load_tensors, save
from comfyui_l2p.l2p_core.distributed.ranks import Ranks
from comfyui_l2p.l2p_core.memory import exchange
from comfyui_l2p.l2p_core.model import L2PModel
from comfyui_l2p.l2p_core.sources import SOURCES
from comfyui_l2p.l2p_core.training import adamw
from comfyui_l2p.l2p_core.training import loading as training_model
from comfyui_l2p.l2p_core.training.batch import Batch
from comfyui_l2p.l2p_core.training.in_backward import InBackward
from comfyui_l2p.l2p_core.training.trainer import Trainer, TrainingDiverged
from comfyui_l2p.l2p_core.training_config import TrainingConfig

pytestmark = pytest.mark.usefixtures("unflushed")
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)

CPU = torch.device("cpu")
UNCLIPPED = 1e9
CONFIG = TrainingConfig(
    steps=4, lr=1e-3, blocks=1, ema_decay=0.5, caption_dropout=0.3, warmup_steps=2, precision="fp32",
    clip_norm=UNCLIPPED, backbone_lr_scale=0.5, offload=True,
)  # fmt: skip
EMPTY = tiny_models.captions(1)[0]


def config(**changes: object) -> TrainingConfig:
    return dataclasses.replace(CONFIG, **changes)  # type: ignore[arg-type]


def run(chosen: TrainingConfig, until: int = 3, model: L2PModel | None = None) -> Trainer:
    return go_on(Trainer(model or pixel_model(), chosen, EMPTY), until)[0]


def go_on(trained: Trainer, until: int) -> tuple[Trainer, list[float]]:
    said = []
    for metrics in trained.run(RandomBatches()):
        said += [metrics.loss, metrics.grad_norm]
        if metrics.step == until:
            break
    return trained, said


def same(one: Trainer, other: Trainer) -> bool:
    ours, theirs = one._weights.state(), other._weights.state()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("changes", [
    {}, {"accumulate": 2, "clip_norm": 0.1}, {"policy": "lora", "lora_rank": 3, "gradient_checkpointing": False},
    {"policy": "all"},
], ids=["stepped early", "summed and clipped", "adapters", "all layers"])  # fmt: skip
def test_in_float32_offloading_changes_no_bit(changes: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "PIECE", 256)  # several pieces a weight, the last one shorter
    plain, offloaded, streamed = (
        go_on(Trainer(pixel_model(), config(**changes, **way), EMPTY), 3)
        for way in ({"offload": False}, {}, {"stream": True})
    )
    for trained, said in (offloaded, streamed):
        assert same(plain[0], trained)
        assert plain[1] == pytest.approx(said, rel=1e-6)
        for name, parameter in trained.parameters.items():
            assert parameter.grad is None and torch.equal(parameter, trained._weights.masters[name])


def test_early_steps_change_no_bit() -> None:
    plain, early = (
        go_on(Trainer(pixel_model(), config(offload=False, step_early=early), EMPTY), 3) for early in (False, True)
    )
    assert same(plain[0], early[0])
    assert plain[1] == pytest.approx(early[1], rel=1e-6)
    assert all(parameter.grad is None for parameter in early[0].parameters.values())


def test_keeping_activations_changes_no_bit() -> None:
    plain, kept, nothing_twice = (
        go_on(Trainer(pixel_model(), config(offload=False, **changes), EMPTY), 3)
        for changes in ({}, {"keep_activations": 3}, {"gradient_checkpointing": False})
    )
    assert same(plain[0], kept[0]) and same(plain[0], nothing_twice[0])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_in_bfloat16_the_losses_stay_within_rounding(accumulate: int) -> None:
    changes = {"precision": "bf16", "accumulate": accumulate, "steps": 8, "lr": 3e-3}
    losses = [
        go_on(Trainer(pixel_model(), config(**changes, offload=offload), EMPTY), 8)[1][::2] for offload in (False, True)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


def test_working_copies_are_bfloat16_and_what_is_kept_is_float32() -> None:
    trained = run(config(precision="bf16"), 1)
    assert all(parameter.dtype == torch.bfloat16 for parameter in trained.parameters.values())
    assert all(tensor.dtype == torch.float32 for tensor in trained._weights.state().values())
    assert all(tensor.dtype == torch.float32 for tensor in trained.trained(averaged=False).values())
    for name, parameter in trained.parameters.items():
        assert torch.equal(parameter, trained._weights.masters[name].bfloat16())


@pytest.mark.parametrize(
    "changes",
    [{}, {"stream": True}, {"offload": False, "step_early": True}],
    ids=["offloaded", "streamed", "on the device"],
)
def test_gradients_never_pile_up(changes: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever one is taken, no other weight has one, but for vectors; and the last to come finds the first stepped."""
    trained = Trainer(pixel_model(), config(**changes), EMPTY)
    weights, stepping, seen = trained._weights, trained._stepping, []
    first = weights.masters["local_decoder.out_conv.weight"].clone()
    assert isinstance(stepping, InBackward)
    step = stepping._stepped

    def watched(name: str, gradients: list[torch.Tensor]) -> exchange.Renewed:
        assert all(parameter.grad is None for parameter in trained.parameters.values() if parameter.ndim > 1)
        seen.append((name, torch.equal(weights.masters["local_decoder.out_conv.weight"], first)))
        return step(name, gradients)

    monkeypatch.setattr(stepping, "_stepped", watched)
    go_on(trained, 1)
    assert len(seen) > 40 and seen[-1] not in seen[:-1]
    assert seen[0][1] and not seen[-1][1]


def test_each_gradient_is_clipped_by_itself_when_stepped_early(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = Trainer(pixel_model(), config(clip_norm=1e-3), EMPTY)
    norms: list[float] = []

    def step() -> None:
        norms.extend(float(p.grad.norm()) for p in trained._weights.masters.values() if p.grad is not None)

    def step_pieces(_: object, parameter: torch.Tensor, gradient: Iterable[torch.Tensor]) -> None:
        pieces = [piece.clone() for piece in gradient]
        assert sum(map(len, pieces)) == parameter.numel()
        norms.append(float(torch.cat(pieces).norm()))

    monkeypatch.setattr(adamw, "step_pieces", step_pieces)
    for optimiser in trained._weights.optimisers:
        monkeypatch.setattr(optimiser, "step", step)
    total = go_on(trained, 1)[1][1]
    assert max(norms) == pytest.approx(1e-3, rel=1e-2) and total > 1e-3 and len(norms) > 40


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_goes_on_bit_for_bit_with_and_without_offloading(accumulate: int, tmp_path: Path) -> None:
    chosen, path = config(accumulate=accumulate), tmp_path / "state.safetensors"
    straight = run(chosen, 4)
    run(chosen, 2).save(path)
    ways = [{"offload": True}, {"stream": True}, {"offload": False}, {"offload": False, "step_early": True}]
    for changes in ways[: 4 if accumulate == 1 else 3]:
        rest = Trainer(pixel_model(), config(accumulate=accumulate, **changes), EMPTY)
        rest.resume(path)
        assert rest.step == 2 and same(straight, go_on(rest, 4)[0])


def test_a_pad_token_that_some_steps_did_not_need_goes_on_as_it_was(tmp_path: Path) -> None:
    """How often it was stepped is not saved: it counts as often as the others."""

    class Sometimes:
        """Images that need padding in every second batch only."""

        def batch(self, number: int) -> Batch:
            generator = torch.Generator().manual_seed(number)
            pixels = torch.rand(1, 3, 64, 128 if number % 2 else 64, generator=generator) * 2 - 1
            return Batch(pixels, tiny_models.captions(5, seed=number), [number], [None])

    def steps(trained: Trainer, until: int) -> Trainer:
        for metrics in trained.run(Sometimes()):
            if metrics.step == until:
                break
        return trained

    for offload in (False, True):
        chosen, path = config(offload=offload), tmp_path / f"{offload}.safetensors"
        straight, half = (Trainer(pixel_model(), chosen, EMPTY) for _ in range(2))
        steps(half, 2).save(path)
        rest = Trainer(pixel_model(), chosen, EMPTY)
        rest.resume(path)
        assert same(steps(straight, 4), steps(rest, 4))


def test_averages_come_and_go() -> None:
    trained = run(config(precision="bf16"))
    before = {name: parameter.detach().clone() for name, parameter in trained.parameters.items()}
    with trained.averaged() as model:
        assert torch.equal(model.x_embedder.weight, trained.trained()["x_embedder.weight"].bfloat16())
        assert not torch.equal(model.x_embedder.weight, before["x_embedder.weight"])
    assert all(torch.equal(parameter, before[name]) for name, parameter in trained.parameters.items())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_streamed_averages_come_and_go(accumulate: int) -> None:
    """What the model computes with is looked at, for the working copies lie in two places."""
    plain, streamed = (run(config(accumulate=accumulate, **way)) for way in ({"offload": False}, {"stream": True}))

    def computed(model: L2PModel) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.ones(1, 3, 32, 32), torch.tensor([0.5]), [EMPTY])

    before = computed(plain.model)
    assert torch.equal(before, computed(streamed.model))
    with plain.averaged() as averaged, streamed.averaged() as streams:
        assert torch.equal(computed(averaged), computed(streams))
        assert not torch.equal(computed(averaged), before)
    assert torch.equal(computed(streamed.model), before)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loss_that_is_no_number_changes_nothing(accumulate: int) -> None:
    class Broken:
        def batch(self, number: int) -> Batch:
            batch = RandomBatches().batch(number)
            batch.pixels[0, 0, 0, 0] = float("nan")
            return batch

    trained = run(config(accumulate=accumulate), 1)
    before = {name: value.clone() for name, value in trained._weights.state().items()}
    with pytest.raises(TrainingDiverged, match="step 2"):
        next(iter(trained.run(Broken())))
    assert trained.step == 1
    assert all(torch.equal(value, before[name]) for name, value in trained._weights.state().items())


@pytest.mark.parametrize("changes", [{}, {"offload": False, "step_early": True}], ids=["offloaded", "on the device"])
def test_a_gradient_that_is_no_number_stops_the_run_and_spares_what_follows(changes: dict[str, object]) -> None:
    trained = run(config(**changes), 1)
    parameter = trained.parameters["layers.3.attention.out.weight"]
    parameter.register_hook(lambda gradient: gradient * float("nan"))
    before = {name: master.clone() for name, master in trained._weights.masters.items()}
    with pytest.raises(TrainingDiverged, match="step 2"):
        go_on(trained, 2)
    masters = trained._weights.masters
    assert all(bool(master.isfinite().all()) for master in masters.values())
    assert torch.equal(masters["layers.0.attention.out.weight"], before["layers.0.attention.out.weight"])


@pytest.mark.parametrize("changes", [
    {}, {"accumulate": 2}, {"stream": True, "frozen": "fp8"}, {"offload": False, "step_early": True},
    {"offload": False},
], ids=["offloaded", "two batches", "streamed", "stepped early", "stepped at the end"])  # fmt: skip
def test_a_run_that_is_over_gives_all_of_its_memory_back(changes: dict[str, object]) -> None:
    """A host goes on after a run: what torch holds of it would stay on the user's GPU until ComfyUI is closed."""
    trained = run(config(**changes), 2)
    left = weakref.WeakSet([trained._weights, trained._stepping, trained.model])
    del trained
    gc.collect()
    assert not left


def test_weights_are_loaded_to_where_they_stay(tmp_path: Path) -> None:
    path, chosen = tmp_path / "model.safetensors", config(precision="bf16", frozen="fp8", stream=True)
    save(pixel_model().state_dict(), path)
    loaded = training_model.load(path, chosen, Ranks(device=CPU))
    assert same(run(chosen, model=loaded), run(chosen))


def test_what_does_not_go_together_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    two = Ranks(0, 2, CPU)
    with pytest.raises(ValueError, match="offload = true keeps"):
        Trainer(pixel_model(), CONFIG, EMPTY, two)
    with pytest.raises(ValueError, match="step_early = true steps a weight before"):
        Trainer(pixel_model(), config(offload=False, step_early=True), EMPTY, two)
    with pytest.raises(ValueError, match="does not work with accumulate = 2"):
        config(step_early=True, accumulate=2)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="bitsandbytes, which is not installed"):
        Trainer(pixel_model(), config(optimiser_bits=8), EMPTY)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(ValueError, match="shards optimiser states"):
        Trainer(pixel_model(), config(offload=False, optimiser_bits=8, parallel="fsdp"), EMPTY, two)
    with pytest.raises(ValueError, match="optimiser_bits must be one of 32, 8"):
        config(optimiser_bits=16)


@needs_bitsandbytes
@pytest.mark.parametrize("offload", [False, True])
def test_eight_bit_states_train_as_well_and_go_on_bit_for_bit(offload: bool, tmp_path: Path) -> None:
    changes = {"offload": offload, "steps": 8, "lr": 3e-3}
    exact = go_on(Trainer(pixel_model(), config(**changes), EMPTY), 8)[1][::2]
    straight, said = go_on(Trainer(pixel_model(), config(**changes, optimiser_bits=8), EMPTY), 8)
    assert said[::2] == pytest.approx(exact, rel=0.03)
    path = tmp_path / "state.safetensors"
    go_on(Trainer(pixel_model(), config(**changes, optimiser_bits=8), EMPTY), 3)[0].save(path)
    saved, _ = load_tensors(path)
    name = "layers.0.feed_forward.w1.weight"
    assert saved[f"exp_avg.{name}"].dtype == torch.uint8 and f"exp_avg_sq_scale.{name}" in saved
    assert saved["exp_avg.layers.0.attention.q_norm.weight"].dtype == torch.float32
    rest = Trainer(pixel_model(), config(**changes, optimiser_bits=8), EMPTY)
    rest.resume(path)
    assert same(straight, go_on(rest, 8)[0])


@needs_bitsandbytes
def test_eight_bit_states_take_a_quarter() -> None:
    weights = {"layers.0.attention.out.weight": torch.zeros(512, 512)}
    sizes = []
    for bits in (32, 8):
        optimiser = adamw.make(weights, config(optimiser_bits=bits), SOURCES["z-image"])
        moments = adamw.moments(optimiser, weights["layers.0.attention.out.weight"])
        sizes.append(sum(tensor.numel() * tensor.element_size() for tensor in moments.values()))
    assert sizes[0] / sizes[1] == pytest.approx(4 / (1 + 4 / 256))
