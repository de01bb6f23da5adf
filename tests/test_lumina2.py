"""Lumina-2: parity with diffusers' network, its published keys, conversion, training and sampling."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import lumina2_vectors as vectors
import pytest
import torch
from tiny_checkpoints import same, weights, write
from tiny_models import RandomBatches, captions
from torch import Tensor

from comfyui_l2p.l2p_core import flow
from comfyui_l2p.l2p_core.checkpoint import load_latent, load_model
from comfyui_l2p.l2p_core.config import ModelConfig
from comfyui_l2p.l2p_core.convert import convert
from comfyui_l2p.l2p_core.files.recognise import other_kind
from comfyui_l2p.l2p_core.layouts import to_comfy, to_diffusers
from comfyui_l2p.l2p_core.memory.activations import Workload
from comfyui_l2p.l2p_core.memory.plan import plan
from comfyui_l2p.l2p_core.model import L2PModel, LatentModel, key_shapes
from comfyui_l2p.l2p_core.sources.lumina2 import Lumina2, Lumina2Config
from comfyui_l2p.l2p_core.training.trainer import Trainer
from comfyui_l2p.l2p_core.training_config import TrainingConfig

PARITY = 1e-5

SMALL = Lumina2Config(
    dim=192, head_dim=48, n_layers=3, n_refiner_layers=1, caption_dim=24, ffn_dim=96, t_freq_dim=32, t_hidden_dim=64,
    t_dim=64, n_kv_heads=2,
)  # fmt: skip


def relative_error(value: Tensor, expected: Tensor) -> float:
    return float((value.double() - expected.double()).norm() / expected.double().norm())


def velocity(shapes: dict[str, tuple[int, ...]]) -> Tensor:
    model = LatentModel(ModelConfig.from_shapes(shapes))
    model.load_state_dict(to_comfy(vectors.weights(shapes)))
    with torch.no_grad():
        return model(vectors.latents(), torch.tensor(vectors.SIGMAS), vectors.captions())


def test_velocity_is_that_of_the_golden_vectors() -> None:
    shapes, expected = vectors.stored()
    assert relative_error(velocity(shapes), expected) < PARITY


@pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="diffusers is not installed")
def test_velocity_is_that_of_diffusers() -> None:
    model = vectors.diffusers_model()
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert shapes == vectors.stored()[0]
    expected = vectors.diffusers_velocity(model)
    assert relative_error(velocity(shapes), expected) < PARITY
    assert relative_error(vectors.stored()[1], expected) < PARITY


def test_sizes_and_keys_are_read_from_both_layouts() -> None:
    shapes, _ = vectors.stored()
    config = ModelConfig.from_shapes(shapes)
    assert isinstance(config, Lumina2Config)
    assert (config.n_heads, config.n_kv_heads, config.rope_dims) == (4, 2, (16, 16, 16))
    published = vectors.weights(shapes)
    comfy = to_comfy(published)
    assert {key: tuple(tensor.shape) for key, tensor in comfy.items()} == key_shapes(config)
    assert same(to_diffusers(comfy), published)
    assert ModelConfig.from_shapes(key_shapes(config)) == config


def test_the_published_model_has_the_published_sizes() -> None:
    config = Lumina2Config()
    assert (config.n_heads, config.rope_dims) == (24, (32, 32, 32))
    assert key_shapes(config)["layers.25.attention.qkv.weight"] == ((24 + 2 * 8) * 96, 2304)
    assert ModelConfig.from_shapes(key_shapes(config)) == config


def test_an_all_in_one_file_is_not_taken_for_a_vae() -> None:
    assert other_kind(key_shapes(SMALL), ["vae.decoder.conv_in.weight"]) is None
    assert other_kind([*key_shapes(SMALL), "clip_text_pooled_proj.0.weight"]) == "a NewBie model"


def test_each_sample_equals_running_it_alone() -> None:
    torch.manual_seed(0)
    model = L2PModel(SMALL.with_head("1k", 0.125))
    assert isinstance(model, Lumina2)
    pixels, sigma, text = torch.randn(3, 3, 40, 56), torch.tensor([0.1, 0.5, 0.9]), captions(5, 40, 1)
    with torch.no_grad():
        together = model(pixels, sigma, text)
        alone = [model(pixels[i : i + 1], sigma[i : i + 1], text[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("policy", ["shallow", "lora"])
def test_it_converts_trains_and_samples(policy: str, tmp_path: Path, unflushed: None) -> None:
    source, target = write(to_diffusers(weights(SMALL)), tmp_path / "source.safetensors"), tmp_path / "l2p.safetensors"
    report = convert(source, target, head_width=0.125)
    model = load_model(target, torch.float32)
    latent = load_latent(source).state_dict()
    assert set(report.keys("copied")) == latent.keys() & {
        key for key in model.state_dict() if not key.startswith("x_embedder.")
    }
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.1)  # weights of unit variance would not train
    config = TrainingConfig(steps=3, lr=1e-3, blocks=1, policy=policy, caption_dropout=0.0, gradient_checkpointing=True)
    trainer = Trainer(model, config)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    losses = [metrics.loss for metrics in trainer.run(RandomBatches())]
    assert len(losses) == 3 and torch.tensor(losses).isfinite().all()
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == set(trainer.parameters)
    with trainer.averaged() as averaged, torch.no_grad():
        image = flow.sample(averaged, torch.randn(1, 3, 48, 32), captions(9), sigmas=flow.sigmas(2))
    assert image.shape == (1, 3, 48, 32)


def test_its_memory_is_planned() -> None:
    config = Lumina2Config().with_head("1k")
    small, large = (plan(config, TrainingConfig(), Workload(1, size, size, 256)) for size in (512, 1024))
    assert small.device["frozen weights"] == large.device["frozen weights"] > 0
    assert 1 < large.device["activations"] / small.device["activations"] < 6
    narrow = dataclasses.replace(config, n_layers=13)
    assert plan(narrow, TrainingConfig(), Workload(1, 512, 512, 256)).device_bytes < small.device_bytes
