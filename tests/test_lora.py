"""The policy "lora": adapters that begin as nothing, train, resume, and come back from a delta."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import tiny_models
import torch
from tiny_models import RandomBatches, pixel_model

from comfyui_l2p.l2p_core import delta
from comfyui_l2p.l2p_core.checkpoint import CheckpointError, load_model, load_tensors, open_checkpoint, save
from comfyui_l2p.l2p_core.deltas import low_rank as lora
from comfyui_l2p.l2p_core.freeze import trainable_names
from comfyui_l2p.l2p_core.model import L2PModel
from comfyui_l2p.l2p_core.sources.next_dit import LAYERS
from comfyui_l2p.l2p_core.training.trainer import Trainer
from comfyui_l2p.l2p_core.training_config import TrainingConfig

pytestmark = pytest.mark.usefixtures("unflushed")

CONFIG = TrainingConfig(
    steps=4, lr=1e-2, policy="lora", blocks=1, lora_rank=3, lora_alpha=6.0, precision="fp32", ema_decay=0.5
)


def trainer(config: TrainingConfig = CONFIG) -> Trainer:
    return Trainer(pixel_model(), config)


def run(trained: Trainer, until: int) -> Trainer:
    for metrics in trained.run(RandomBatches()):
        if metrics.step == until:
            break
    return trained


def velocity(model: L2PModel) -> torch.Tensor:
    batch = RandomBatches().batch(0)
    with torch.no_grad():
        return model(batch.pixels, torch.tensor([0.3, 0.9]), batch.captions)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_before_the_first_step_the_model_is_its_base(precision: str) -> None:
    config = dataclasses.replace(CONFIG, precision=precision)
    shallow = Trainer(pixel_model(), dataclasses.replace(config, policy="shallow"))
    adapted = trainer(config)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        assert torch.equal(velocity(adapted.model), velocity(shallow.model))


def test_adapters_are_on_every_linear_of_the_frozen_blocks_and_nothing_else_is_new() -> None:
    trained = trainer()
    full = trainable_names(trained.model.config, blocks=1)
    adapters = {name for name in trained.parameters if lora.is_adapter(name)}
    layers = [f"layers.{block}.{linear}" for block in (1, 2) for linear in LAYERS.linears]
    assert lora.adapted_layers(trained.model.config, full) == layers
    shapes = lora.adapter_shapes(trained.model.config, layers, rank=3)
    assert {name: tuple(trained.parameters[name].shape) for name in adapters} == shapes
    assert set(trained.parameters) == full | adapters
    linears = {
        name for name, module in trained.model.layers[1].named_modules()
        if isinstance(module, torch.nn.Linear) and "lora_" not in name and "adaLN" not in name
    }  # fmt: skip
    assert linears == set(LAYERS.linears)


def test_training_moves_shallow_layers_and_adapters_only() -> None:
    trained, start = run(trainer(), 2), trainer()
    before = start.model.state_dict()
    changed = {name for name, value in trained.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == set(trained.parameters)


def test_resuming_continues_bit_for_bit(tmp_path: Path) -> None:
    run(trainer(), 2).save(tmp_path / "state.safetensors")
    resumed, straight = trainer(), run(trainer(), 4)
    resumed.resume(tmp_path / "state.safetensors")
    run(resumed, 4)
    for name, value in straight._weights.state().items():
        assert torch.equal(value, resumed._weights.state()[name]), name
    with pytest.raises(ValueError, match="lora_alpha = 6.0"):
        trainer(dataclasses.replace(CONFIG, lora_alpha=3.0)).resume(tmp_path / "state.safetensors")


def files(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Trainer, Path, Path]:
    """A run's trainer, its base and its delta on disk."""
    base = folder / "base.safetensors"
    save({name: value.to(dtype) for name, value in pixel_model().state_dict().items()}, base)
    trained = run(Trainer(load_model(base, dtype=torch.float32), CONFIG), 3)
    delta.save(trained.trained(), base, folder / "delta.safetensors")
    return trained, base, folder / "delta.safetensors"


def test_merged_equals_trained(tmp_path: Path) -> None:
    """Full tensors bit for bit; adapted weights to float32's rounding, so that velocities agree within 1e-5."""
    trained, base, file = files(tmp_path)
    delta.merge(file, base, tmp_path / "merged.safetensors")
    weights = trained.trained()
    with trained.averaged() as model:
        expected = velocity(model)
    for merged in (load_model(tmp_path / "merged.safetensors"), delta.load_model(file, base)):
        state = merged.state_dict()
        adapted = {f"{layer}.weight" for layer in lora.layers_of(filter(lora.is_adapter, weights))}
        before = load_tensors(base)[0]
        for name, value in state.items():
            if name in weights:
                assert torch.equal(value, weights[name]), name
            elif name in adapted:
                layer = name.removesuffix(".weight")
                change = 2.0 * weights[layer + lora.UP].double() @ weights[layer + lora.DOWN].double()
                assert torch.allclose(value.double(), before[name].double() + change, rtol=0, atol=1e-7)
                assert not torch.equal(value, before[name])
            else:
                assert torch.equal(value, before[name]), name
        assert torch.linalg.norm(velocity(merged) - expected) < 1e-5 * torch.linalg.norm(expected)


def test_merging_keeps_the_precision_of_the_base(tmp_path: Path) -> None:
    trained, base, file = files(tmp_path, torch.bfloat16)
    delta.merge(file, base, tmp_path / "merged.safetensors")
    merged, weights = load_tensors(tmp_path / "merged.safetensors")[0], trained.trained()
    layer = "layers.1.attention.qkv"
    whole = trained.model.get_parameter(f"{layer}.weight") + 2.0 * weights[layer + lora.UP] @ weights[layer + lora.DOWN]
    assert merged[f"{layer}.weight"].dtype == torch.bfloat16
    assert torch.allclose(merged[f"{layer}.weight"].float(), whole, rtol=2**-8, atol=1e-7)
    assert merged["layers.0.attention.qkv.weight"].dtype == torch.float32
    exact = delta.load_model(file, base, dtype=torch.float32).state_dict()[f"{layer}.weight"]
    assert torch.allclose(exact, whole, rtol=0, atol=1e-7)


def test_the_file_has_the_names_that_comfyui_knows(tmp_path: Path) -> None:
    trained, base, file = files(tmp_path)
    stored, _ = load_tensors(file)
    prefix = "diffusion_model.layers.2.feed_forward.w3"
    assert stored[f"{prefix}.lora_up.weight"].shape == (tiny_models.SOURCE.ffn_dim, 3)
    assert stored[f"{prefix}.lora_down.weight"].shape == (3, tiny_models.SOURCE.dim)
    assert stored[f"{prefix}.alpha"].item() == 6.0
    assert {name for name in stored if not name.startswith("diffusion_model.")} == trainable_names(
        trained.model.config, blocks=1
    )


def test_reports_and_metadata_count_adapted_weights_as_trained(tmp_path: Path) -> None:
    _, base, file = files(tmp_path)
    report = delta.merge(file, base, tmp_path / "merged.safetensors")
    assert "layers.1.attention.qkv.weight" in report.trained
    assert "layers.1.attention_norm1.weight" in report.unchanged
    said = open_checkpoint(tmp_path / "merged.safetensors").metadata
    assert "diffusion_model" not in said["l2p.trained"]


def test_damaged_adapters_and_other_bases_are_refused(tmp_path: Path) -> None:
    _, base, file = files(tmp_path)
    tensors, metadata = load_tensors(file)
    prefix = "diffusion_model.layers.1.attention.out"
    wrong = {
        "incomplete": {name: value for name, value in tensors.items() if name != f"{prefix}.alpha"},
        "do not fit each other": tensors | {f"{prefix}.lora_down.weight": torch.zeros(2, 64)},
        "does not fit its weight": tensors | {f"{prefix}.lora_up.weight": torch.zeros(9, 3)},
        "not a layer of its base": {name.replace("layers.1.", "layers.0."): value for name, value in tensors.items()},
    }
    for reason, state in wrong.items():
        save(state, tmp_path / "wrong.safetensors", metadata, overwrite=True)
        with pytest.raises(CheckpointError, match=reason):
            delta.merge(tmp_path / "wrong.safetensors", base, tmp_path / "merged.safetensors")
        assert not (tmp_path / "merged.safetensors").exists()
    other = load_tensors(base)[0]
    other["layers.1.attention.qkv.weight"][0, 0] += 1
    save(other, base, overwrite=True)
    for merge in (
        lambda: delta.merge(file, base, tmp_path / "merged.safetensors"),
        lambda: delta.load_model(file, base),
    ):
        with pytest.raises(CheckpointError, match="'layers.1.attention.qkv.weight' has other values"):
            merge()


def test_a_rank_that_is_too_high_is_explained() -> None:
    with pytest.raises(ValueError, match="lora_rank is 64, but layers.1.attention.qkv has only 64"):
        trainer(dataclasses.replace(CONFIG, lora_rank=64))
    with pytest.raises(ValueError, match="lora_rank must be 1 or more"):
        dataclasses.replace(CONFIG, lora_rank=0)
