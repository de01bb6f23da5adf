"""Training the second tiny world's autoencoder on newly rendered scenes, and judging what it keeps."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...l2p_core.tiny.autoencoder import DOWNSCALE, reconstruction_loss
from ...l2p_core.tiny.scenes import captions, judge
from ...l2p_core.tiny.scenes.autoencoder import CHANNELS, TrainedAutoencoder
from ...l2p_core.tiny.scenes.content import Content, random_scenes
from ...l2p_core.tiny.scenes.rendering import IMAGE_SIZE, render
from ..make_tiny_source import RunLog, psnr


@dataclass(frozen=True)
class SceneAutoencoderRecipe:
    """How the autoencoder is trained, but for how long."""

    fit_images: int = 512  # for the principal components
    batch: int = 16
    small_every: int = 4  # every so many steps, twice as many images of half the size
    learning_rate: float = 1e-3
    warmup: int = 100
    latent_noise: float = 0.4  # largest standard deviation, drawn per image; latents have 1
    report_seconds: float = 120.0
    seed: int = 1


def train_autoencoder(
    recipe: SceneAutoencoderRecipe, minutes: float, device: torch.device, log: RunLog
) -> TrainedAutoencoder:
    """Train for some minutes; the learning rate falls to 0 along half a cosine over that time."""
    torch.manual_seed(recipe.seed)
    generator = torch.Generator().manual_seed(recipe.seed)
    model = TrainedAutoencoder()
    model.fit_components(rendered(recipe.fit_images, generator, torch.device("cpu")))
    model.to(device).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=1e-4)
    started = reported = time.monotonic()
    images = step = 0
    while (share := (time.monotonic() - started) / (60 * minutes)) < 1:
        small = step % recipe.small_every == recipe.small_every - 1
        pixels = rendered(recipe.batch * (2 if small else 1), generator, device)
        if small:
            pixels = F.avg_pool2d(pixels, 2)
        cells = pixels.shape[-1] // DOWNSCALE
        noise = recipe.latent_noise * torch.rand(len(pixels), 1, 1, 1, device=device)
        noise = noise * torch.randn(len(pixels), CHANNELS, cells, cells, device=device)
        factor = min((step + 1) / recipe.warmup, (1 + torch.cos(torch.tensor(share * torch.pi)).item()) / 2)
        for group in optimiser.param_groups:
            group["lr"] = recipe.learning_rate * factor
        loss = reconstruction_loss(model, pixels, noise)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        step, images = step + 1, images + len(pixels)
        if time.monotonic() - reported > recipe.report_seconds:
            reported = time.monotonic()
            log.write(step=step, images=images, loss=round(loss.item(), 5), **score_reconstructions(model, 128))
    log.write(step=step, images=images, **score_reconstructions(model, 1024))
    return model.eval()


def rendered(count: int, generator: torch.Generator, device: torch.device, size: int = IMAGE_SIZE) -> Tensor:
    """New images (count, 3, size, size) in [-1, 1] on the device."""
    return render(random_scenes(count, generator).to(device), size)


@torch.no_grad()
def score_reconstructions(model: TrainedAutoencoder, count: int) -> dict[str, float]:
    """The judge's scores of the reconstructions of a fixed set at 128 pixels, and of what they lack."""
    device = model.encoder.weight.device
    training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(0x5CE4E5)
    right: list[tuple[bool, ...]] = []
    small, noisy = [], []
    errors, details = [], []
    for first in range(0, count, 64):
        scenes = random_scenes(min(64, count - first), generator)
        said = captions.contents(scenes, generator)
        pixels = render(scenes.to(device))
        latents = model.encode(pixels)
        restored = model.decode(latents)
        half = F.avg_pool2d(pixels, 2)
        right += judged(restored, said)
        small += judged(model.decode(model.encode(half)), said)
        noisy += judged(model.decode(latents + 0.3 * torch.randn(latents.shape, generator=generator).to(device)), said)
        errors.append(psnr(restored, pixels))
        details.append(fine_detail(restored) / fine_detail(pixels))
    scores = judge.SceneScore(*torch.tensor(right).double().mean(0).tolist())._asdict()
    model.train(training)
    return {
        **{name: round(value, 4) for name, value in scores.items()},
        "whole_at_64": round(sum(row[-1] for row in small) / count, 4),
        "whole_at_noise_0.3": round(sum(row[-1] for row in noisy) / count, 4),
        "psnr": round(sum(errors) / len(errors), 2),
        "fine_detail_kept": round(sum(details) / len(details), 4),
    }


def judged(images: Tensor, said: list[Content]) -> list[tuple[bool, ...]]:
    """What of each content the images show."""
    return [judge.fits(found, content) for found, content in zip(judge.recognise(images), said, strict=True)]


def fine_detail(images: Tensor) -> float:
    """The energy of what a blur of 3 pixels removes."""
    return (images - F.avg_pool2d(images, 3, stride=1, padding=1))[..., 1:-1, 1:-1].square().mean().item()
