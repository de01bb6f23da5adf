"""L2P's network in the host agrees with the published code's golden vectors and with the core."""

from __future__ import annotations

from pathlib import Path

import golden_vectors as golden
import kit
import pytest
import torch

from comfyui_l2p.l2p_core import flow
from comfyui_l2p.l2p_core.checkpoint import load_model
from comfyui_l2p.nodes.options import FROM_MODEL, PUBLISHED
from comfyui_l2p.nodes.sampling import SamplerSettings, denoise_pixels, published_settings, schedule_of

PARITY = 1e-5


@pytest.mark.parametrize("layout", ["comfy", "diffusers"])
@pytest.mark.parametrize("name", ["dit_16", "dit_64", "dit_128", "dit_160"])
def check_velocity_of_every_variant_and_layout(tmp_path: Path, name: str, layout: str) -> None:
    config, stored = golden.load(name)
    model = kit.load_model(kit.write(tmp_path, name, layout), weight_dtype="fp32")
    stride = config["output_stride"]
    for i, case in enumerate(config["cases"]):
        x = golden.array(f"case{i}.x", (3, case["height"], case["width"]), config["seed"])
        features = golden.array(f"case{i}.cap_feats", (case["caption_tokens"], config["cap_feat_dim"]), config["seed"])
        velocity = kit.velocity(model, x[None], case["sigma"], features[None])[0]
        assert golden.relative_error(velocity[:, ::stride, ::stride], stored[f"case{i}.velocity"]) < PARITY


@pytest.mark.parametrize("size", [(64, 48), (50, 70), (832 // 8, 1216 // 8), (16, 16)])
@pytest.mark.parametrize("name", ["dit_16", "dit_64"])
def check_host_and_core_agree_at_any_size(tmp_path: Path, name: str, size: tuple[int, int]) -> None:
    path = kit.write(tmp_path, name)
    x = golden.array("x", (1, 3, *size), 0)
    features = golden.array("caption", (1, 9, kit.CAPTION_DIM), 0)
    host = kit.velocity(kit.load_model(path, weight_dtype="fp32"), x, 0.7, features)
    with torch.no_grad():
        core = load_model(path)(x, torch.tensor([0.7]), [features[0]])
    assert host.shape == x.shape
    assert golden.relative_error(host, core) < PARITY


def check_pixel_sampler_reproduces_published_sampling(tmp_path: Path) -> None:
    config, stored = golden.load("sample_euler_cfg")
    seed = config["seed"]
    model = kit.load_model(kit.write(tmp_path, seed=seed), weight_dtype="fp32")
    noise = golden.array("noise", (3, config["height"], config["width"]), seed)[None]
    positive, negative = (
        [[golden.array(name, (config[f"{name}_tokens"], config["cap_feat_dim"]), seed)[None], {}]]
        for name in ("pos", "neg")
    )
    settings = SamplerSettings(0, config["steps"], config["cfg"], "euler", PUBLISHED, config["denoise"])
    with torch.inference_mode():
        pixels = denoise_pixels(
            model, positive, negative, noise, {"samples": torch.zeros_like(noise)}, settings, published_settings(model)
        )
    assert golden.relative_error(pixels[0], stored["final"]) < PARITY
    assert golden.relative_error(flow.to_image(pixels)[0], stored["image"]) < PARITY


@pytest.mark.parametrize(("name", "steps"), [("dit_16", 30), ("dit_64", 50), ("dit_128", 50), ("dit_160", 50)])
def check_settings_left_to_the_model_are_the_published_ones(tmp_path: Path, name: str, steps: int) -> None:
    model = kit.model(tmp_path, name)
    settings = SamplerSettings(0, FROM_MODEL, FROM_MODEL, "euler", PUBLISHED)
    schedule = schedule_of(model, settings, published_settings(model))
    assert torch.equal(schedule, flow.sigmas(steps, 3.0))
    assert published_settings(model).cfg == (2.0 if name == "dit_16" else 4.0)


def check_simple_scheduler_is_close_to_the_published_one(tmp_path: Path) -> None:
    model = kit.model(tmp_path)
    for steps, tolerance in ((50, 1e-6), (30, 2e-3)):
        simple = schedule_of(model, SamplerSettings(0, steps, 1.0, "euler", "simple"), published_settings(model))
        assert (simple - flow.sigmas(steps, 3.0)).abs().max() < tolerance
