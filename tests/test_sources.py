"""Sources as data: a row and a file are all that another architecture takes."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from other_source import OTHER, OtherBackbone, OtherConfig
from tiny_checkpoints import same, weights, write
from torch import Tensor

from comfyui_l2p.l2p_core import delta, flow
from comfyui_l2p.l2p_core.backbone import Conditioning
from comfyui_l2p.l2p_core.checkpoint import CheckpointError, load_latent, load_model, load_tensors, open_checkpoint
from comfyui_l2p.l2p_core.config import VARIANTS, ModelConfig, PixelConfig, Sampling
from comfyui_l2p.l2p_core.convert import convert
from comfyui_l2p.l2p_core.deltas.low_rank import adapted_layers
from comfyui_l2p.l2p_core.distributed.ranks import Ranks
from comfyui_l2p.l2p_core.files.metadata import stored_config
from comfyui_l2p.l2p_core.freeze import is_new, trainable_names
from comfyui_l2p.l2p_core.layouts import to_comfy, to_diffusers
from comfyui_l2p.l2p_core.memory.activations import Workload, step_of
from comfyui_l2p.l2p_core.memory.checkpointing import kept_blocks
from comfyui_l2p.l2p_core.memory.plan import plan
from comfyui_l2p.l2p_core.model import L2PModel, LatentModel, key_shapes
from comfyui_l2p.l2p_core.patch import patchify, unpatchify
from comfyui_l2p.l2p_core.run.memory_plan import workload
from comfyui_l2p.l2p_core.run.recipe import parse
from comfyui_l2p.l2p_core.sources import SOURCES, sampling_of
from comfyui_l2p.l2p_core.sources.lumina2 import Lumina2Config
from comfyui_l2p.l2p_core.sources.recognition import recognised
from comfyui_l2p.l2p_core.training import adamw
from comfyui_l2p.l2p_core.training.batch import Batch
from comfyui_l2p.l2p_core.training.trainer import Trainer
from comfyui_l2p.l2p_core.training_config import TrainingConfig

CONFIG = OtherConfig()


@pytest.fixture(autouse=True)
def other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SOURCES, OTHER.name, OTHER)


@pytest.fixture
def source(tmp_path: Path, unflushed: None) -> Path:
    """A latent source in the diffusers layout."""
    return write(to_diffusers(weights(CONFIG, torch.float32)), tmp_path / "source.safetensors")


@pytest.fixture
def pixels(source: Path, tmp_path: Path) -> Path:
    convert(source, tmp_path / "pixels.safetensors", head_width=0.125)
    return tmp_path / "pixels.safetensors"


def captions(*lengths: int) -> list[Conditioning]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return [Conditioning(random(length, CONFIG.caption_dim), random(CONFIG.pooled_dim)) for length in lengths]


class Batches:
    def batch(self, number: int) -> Batch:
        images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(number)) * 2 - 1
        return Batch(images, captions(3, 5), [2 * number, 2 * number + 1], [None, None])


def test_every_row_reads_its_own_configuration_and_keys_alone() -> None:
    for name, row in SOURCES.items():
        config = dataclasses.replace(row.config(), **_small(row.config))
        assert config.source == name and row.backbone in type(LatentModel(config)).__mro__
        for model in (config, config.with_head("1k", 0.125)):
            shapes = key_shapes(model)
            state = {key: torch.zeros(shape) for key, shape in shapes.items()}
            published = to_diffusers(state)
            assert recognised(shapes) is recognised(published) is row
            assert ModelConfig.from_shapes(shapes) == model
            assert ModelConfig.from_shapes({key: tuple(tensor.shape) for key, tensor in published.items()}) == model
            assert stored_config({"l2p.config": model.to_json()}) == model
            assert same(to_comfy(published), state)


def _small(config: type[ModelConfig]) -> dict[str, Any]:
    if config is OtherConfig:
        return {}
    heads = config().n_heads // config().n_kv_heads
    small = {"dim": 96 * heads, "head_dim": 96, "n_layers": 2, "n_refiner_layers": 1, "caption_dim": 24}
    return small | {"ffn_dim": 80, "t_freq_dim": 16, "t_hidden_dim": 32, "t_dim": 32}


def test_every_part_of_a_row_is_a_part_of_its_model() -> None:
    for row in SOURCES.values():
        config = dataclasses.replace(row.config(), **_small(row.config))
        model = LatentModel(config)
        keys = set(key_shapes(config))
        assert list(row.blocks(config)) == [name for name, _ in model.blocks()]
        assert {*row.marks, *row.landmarks, row.embedder_weight, *row.pads} <= keys
        assert {
            f"{block}.{linear}.weight" for block, stack in row.blocks(config).items() for linear in stack.linears
        } <= keys
        parts = (*row.trained, row.output, *(stack.name for stack in row.stacks))
        assert {key for key in keys if not key.startswith(parts)} == set()


def test_models_are_of_both_classes_and_copies_stay_so() -> None:
    model = L2PModel(CONFIG.with_head("1k", 0.125))
    assert isinstance(model, L2PModel) and isinstance(model, OtherBackbone)
    again = copy.deepcopy(model)
    assert type(again) is type(model) and same(again.state_dict(), model.state_dict())


def test_what_trains_is_counted_over_both_stacks() -> None:
    config = CONFIG.with_head("1k", 0.125)
    names = trainable_names(config, blocks=1)
    blocks = {OTHER.block_of(name) for name in names} - {""}
    assert blocks == {"pair.0", "solo.2"}
    assert {layer.split(".mix")[0] for layer in adapted_layers(config, names) if ".mix.qkv" in layer} == {
        *("pair.1", "solo.0", "solo.1"),
    }
    assert kept_blocks(config, TrainingConfig(blocks=1, keep_activations=2)) == {2, 3}


def test_a_training_step_is_planned_from_the_network_alone() -> None:
    config = CONFIG.with_head("1k", 0.125)
    step = step_of(config, TrainingConfig(blocks=1), Workload(1, 64, 64, 10))
    assert [block for block in step.blocks if block] == ["pair.0", "pair.1", "solo.0", "solo.1", "solo.2"]
    shapes = key_shapes(config)
    assert step.moments[-1].gradients == sum(math.prod(shapes[name]) for name in trainable_names(config, blocks=1))


def test_the_latent_source_is_read_in_its_own_order_and_sign(source: Path) -> None:
    # Random weights amplify the rounding of float32, which differs from batch to batch.
    model = load_latent(source).double()
    latents, sigma = torch.randn(2, 4, 8, 12).double(), torch.tensor([0.2, 0.9]).double()
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    text = [Conditioning(random(length, CONFIG.caption_dim), random(CONFIG.pooled_dim)) for length in (4, 7)]
    with torch.no_grad():
        velocity = model(latents, sigma, text)
        hidden, t = model.hidden_states(patchify(latents, 2, "c p q"), (4, 6), sigma, text)
        expected = unpatchify(model.img_out(hidden, t), 2, (4, 6), "c p q")
        alone = model(latents[1:], sigma[1:], text[1:])
    torch.testing.assert_close(velocity, expected)
    torch.testing.assert_close(velocity[1:], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["comfy", "diffusers"])
def test_conversion_copies_all_but_embedder_and_output(source: Path, tmp_path: Path, layout: str) -> None:
    report = convert(source, tmp_path / "pixels.safetensors", head_width=0.125, layout=layout)
    assert {key.partition(".")[0] for key in report.keys("initialised")} == {"img_in", "local_decoder"}
    assert {key.partition(".")[0] for key in report.keys("dropped")} == {"img_out"}
    stored, _ = load_tensors(tmp_path / "pixels.safetensors")
    model = load_model(tmp_path / "pixels.safetensors")
    assert isinstance(model, OtherBackbone)
    assert ("patches_of_16.weight" in stored) == (layout == "diffusers")
    assert same(to_comfy(stored), model.state_dict())
    latent = load_latent(source).state_dict()
    assert same(
        {key: latent[key] for key in report.keys("copied")},
        {key: stored_comfy[key] for key in report.keys("copied")} if (stored_comfy := to_comfy(stored)) else {},
    )


@pytest.mark.parametrize("policy", ["shallow", "lora", "all"])
def test_it_trains_samples_and_round_trips_as_a_delta(pixels: Path, tmp_path: Path, policy: str) -> None:
    config = TrainingConfig(
        steps=3, lr=1e-2, policy=policy, blocks=1, caption_dropout=0.5, precision="fp32", lora_rank=2
    )
    trainer = Trainer(load_model(pixels), config, empty_caption=captions(1)[0])
    losses = [metrics.loss for metrics in trainer.run(Batches())]
    assert len(losses) == 3 and all(torch.isfinite(torch.tensor(losses)))
    delta.save(trainer.trained(), pixels, tmp_path / "delta.safetensors")
    delta.merge(tmp_path / "delta.safetensors", pixels, tmp_path / "merged.safetensors", layout="diffusers")
    merged = load_model(tmp_path / "merged.safetensors")
    noise, text = torch.randn(1, 3, 40, 56, generator=torch.Generator().manual_seed(0)), captions(6)
    with trainer.averaged() as averaged, torch.no_grad():
        images = [
            flow.sample(model, noise, text, sigmas=flow.sigmas(2), cfg=2.0, negative=captions(1))
            for model in (averaged, merged)
        ]
    torch.testing.assert_close(*images, rtol=1e-3, atol=1e-3)


def test_frozen_blocks_are_stored_in_8_bits_as_the_row_says(pixels: Path) -> None:
    config = TrainingConfig(steps=1, blocks=1, frozen="fp8", caption_dropout=0.0, precision="fp32")
    trainer = Trainer(load_model(pixels), config)
    assert all(torch.isfinite(torch.tensor(metrics.loss)) for metrics in trainer.run(Batches()))
    kept = {name for name, module in trainer.model.named_modules() if type(module).__name__ == "FrozenLinear"}
    assert "pair.1.tune" in kept and "solo.0.up" in kept and "pair.0.up" not in kept


def test_captions_without_their_pooled_vector_are_refused(pixels: Path) -> None:
    model, noise = load_model(pixels), torch.randn(1, 3, 32, 32)
    with pytest.raises(ValueError, match=r"pooled vector has the shape None, but this model takes \(6,\)"):
        model(noise, torch.tensor([0.5]), [torch.randn(4, CONFIG.caption_dim)])
    with pytest.raises(ValueError, match="takes none"):
        z_image = _tiny_z_image()
        features = torch.randn(4, z_image.config.caption_dim)
        z_image(noise, torch.tensor([0.5]), [Conditioning(features, torch.randn(6))])


def _tiny_z_image() -> L2PModel:
    config = dataclasses.replace(ModelConfig(), **_small(ModelConfig))
    return L2PModel(config.with_head("1k", 0.125))


def test_features_in_conditioning_are_those_alone() -> None:
    model = _tiny_z_image()
    noise, sigma = torch.randn(1, 3, 32, 32), torch.tensor([0.5])
    features = torch.randn(4, model.config.caption_dim)
    with torch.no_grad():
        assert torch.equal(model(noise, sigma, [features]), model(noise, sigma, [Conditioning(features)]))


def test_a_delta_of_one_source_is_refused_on_another(pixels: Path, tmp_path: Path) -> None:
    other = write(weights(), tmp_path / "z_image.safetensors")
    state = {"img_in.bias": torch.zeros(CONFIG.dim)}
    delta.save(state, pixels, tmp_path / "delta.safetensors")
    with pytest.raises(CheckpointError, match="made for another base"):
        delta.merge(tmp_path / "delta.safetensors", other, tmp_path / "merged.safetensors")
    assert open_checkpoint(pixels).config().source == "other"


def test_new_layers_are_those_of_its_own_source() -> None:
    """What another source calls its patch embedder is a layer like all others here."""
    new = {name for name in key_shapes(CONFIG.with_head("1k", 0.125)) if is_new(name, OTHER)}
    assert {name.partition(".")[0] for name in new} == {"img_in", "local_decoder"}
    assert not is_new("x_embedder.weight", OTHER)
    masters = {"x_embedder.weight": torch.zeros(2), "img_in.weight": torch.zeros(3)}
    optimiser = adamw.make(masters, TrainingConfig(backbone_lr_scale=0.5), OTHER)
    scales = {parameter.numel(): group["scale"] for group in optimiser.param_groups for parameter in group["params"]}
    assert scales == {2: 0.5, 3: 1.0}


def test_a_pixel_model_has_a_variant_and_a_head_by_its_type() -> None:
    for row in SOURCES.values():
        latent = row.config()
        pixels = latent.with_head("1k", 0.125)
        assert isinstance(pixels, PixelConfig) and isinstance(pixels, row.config)
        assert not isinstance(latent, PixelConfig)
        assert type(pixels) is type(row.config().with_head("4k")) is type(pixels.with_head("4k"))
        assert pixels.with_head("4k") == latent.with_head("4k")
        assert stored_config({"l2p.config": latent.to_json()}) == latent
        assert (pixels.n_kv_heads, pixels.rope_dims) == (latent.n_kv_heads, latent.rope_dims)
        for half in ("head", "variant"):
            stated = json.loads(pixels.to_json()) | {half: None}
            assert stored_config({"l2p.config": json.dumps(stated)}) is None


def test_captions_are_planned_and_sampled_as_the_row_says() -> None:
    config = CONFIG.with_head("1k", 0.125)
    recipe = parse({"model": {"base": "m"}, "data": {"kind": "folder", "path": "d", "size": 64}})
    assert workload(recipe, config, Ranks()).caption_tokens == OTHER.encoder.max_tokens == 7
    assert workload(recipe, Lumina2Config().with_head("1k"), Ranks()).caption_tokens == 256
    assert workload(recipe, ModelConfig().with_head("1k"), Ranks()).caption_tokens == 512
    assert sampling_of(config) == Sampling(steps=3, cfg=1.5, shift=2.0)
    assert sampling_of(ModelConfig().with_head("4k")) == VARIANTS["4k"]
    assert sampling_of(Lumina2Config().with_head("4k")).shift == 6.0
    assert OTHER.encoder.text("a fox") == "say a fox" and OTHER.encoder.text("") == "say "


def test_memory_is_planned_from_a_pass_of_its_network() -> None:
    """Nothing is asked of a source but `hidden_states` and `blocks`."""
    config = CONFIG.with_head("1k", 0.125)
    training, work = TrainingConfig(blocks=1, precision="fp32"), Workload(1, 64, 64, OTHER.encoder.max_tokens)
    small = plan(config, training, work)
    sizes = {name: 4 * math.prod(shape) for name, shape in key_shapes(config).items()}
    trained = trainable_names(config, blocks=1)
    assert small.device["trained weights"] == sum(sizes[name] for name in trained)
    assert small.device["frozen weights"] == sum(size for name, size in sizes.items() if name not in trained)
    one = small.device["activations"]
    assert plan(config, training, work._replace(height=128)).device["activations"] == pytest.approx(2 * one, rel=0.1)
    assert plan(config, training, work._replace(batch=2)).device["activations"] == pytest.approx(2 * one, rel=0.1)
    kept = plan(config, dataclasses.replace(training, gradient_checkpointing=False), work)
    assert kept.device["activations"] > 1.2 * one
