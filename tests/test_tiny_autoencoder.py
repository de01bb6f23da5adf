"""The bundled autoencoder keeps what the judge looks for, and its latents are what a diffusion model wants."""

from __future__ import annotations

import random

import pytest
import torch

from comfyui_l2p.l2p_core import tiny
from comfyui_l2p.l2p_core.tiny import judge, shapes
from comfyui_l2p.l2p_core.tiny.autoencoder import Autoencoder, reconstruction_loss


@pytest.fixture(scope="module")
def autoencoder() -> Autoencoder:
    return tiny.load_autoencoder()


@pytest.fixture(scope="module")
def scenes() -> list[shapes.Scene]:
    rng = random.Random(5)
    return [shapes.random_scene(rng) for _ in range(128)]


@torch.no_grad()
def test_reconstructions_keep_every_attribute(autoencoder: Autoencoder, scenes: list[shapes.Scene]) -> None:
    captions = [shapes.caption(scene.attributes) for scene in scenes]
    latents = autoencoder.encode(shapes.render(scenes))
    assert latents.shape == (128, 16, 8, 8)
    assert judge.score(autoencoder.decode(latents), captions).whole >= 0.98
    noise = 0.2 * torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    assert judge.score(autoencoder.decode(latents + noise), captions).whole >= 0.98


@torch.no_grad()
def test_latents_have_zero_mean_and_unit_deviation(autoencoder: Autoencoder, scenes: list[shapes.Scene]) -> None:
    latents = autoencoder.encode(shapes.render(scenes))
    assert latents.mean((0, 2, 3)).abs().max() < 0.2
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 0.2


def test_a_size_that_is_no_multiple_of_8_is_refused(autoencoder: Autoencoder) -> None:
    with pytest.raises(ValueError, match="60x64"):
        autoencoder.encode(torch.zeros(1, 3, 64, 60))


def test_fitting_starts_from_a_good_reconstruction_and_trains_the_decoder_alone(scenes: list[shapes.Scene]) -> None:
    torch.manual_seed(0)
    model = Autoencoder(width=8, deep_width=8)
    pixels = shapes.render(scenes)
    model.fit_components(pixels)
    with torch.no_grad():
        restored = model.decode(model.encode(pixels))
    assert (restored - pixels).square().mean() < 0.01
    reconstruction_loss(model, pixels[:2], torch.zeros(2, 16, 8, 8)).backward()
    without_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without_gradient == {"encoder.weight", "encoder.bias"}


def test_another_file_is_refused() -> None:
    with pytest.raises(ValueError, match="not the tiny autoencoder"):
        Autoencoder.load(tiny.WORDS_PATH)
