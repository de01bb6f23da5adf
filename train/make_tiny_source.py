"""Train the bundled tiny source: its autoencoder and its latent diffusion model.

    python -m comfyui_l2p.train.make_tiny_source --out DIR [--stage autoencoder|source|score|all]

writes autoencoder.safetensors, words.safetensors, source.safetensors and one line of JSON per report to
autoencoder_run.jsonl, source_run.jsonl and source_scores.jsonl. Everything is drawn from fixed seeds; on two busy CPU
cores it took about three quarters of an hour.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..l2p_core import flow
from ..l2p_core.config import ModelConfig
from ..l2p_core.files.tensor_file import save
from ..l2p_core.model import LatentModel
from ..l2p_core.tiny import judge, load_source, shapes
from ..l2p_core.tiny.autoencoder import DOWNSCALE, LATENT_CHANNELS, Autoencoder, reconstruction_loss
from ..l2p_core.tiny.generate import CFG, STEPS, generate
from ..l2p_core.tiny.words import CAPTION_DIM, Words
from ..l2p_core.training.step_metrics import SIGMA_EDGES

SOURCE_CONFIG = ModelConfig(
    dim=144,
    head_dim=48,
    n_layers=8,
    n_refiner_layers=1,
    caption_dim=CAPTION_DIM,
    ffn_dim=384,
    t_hidden_dim=256,
    t_dim=144,
)
SCORED_CFG = 4.0
SCORED_CAPTIONS = 480


@dataclass(frozen=True)
class AutoencoderRecipe:
    """How the autoencoder is trained."""

    fit_images: int = 4096  # for the principal components
    steps: int = 2500
    batch: int = 32
    learning_rate: float = 1e-3
    warmup: int = 100
    latent_noise: float = 0.4  # largest standard deviation, drawn per image; latents have 1
    report_every: int = 250
    seed: int = 1


@dataclass(frozen=True)
class SourceRecipe:
    """How the latent model is trained."""

    steps: int = 2600
    batch: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup: int = 100
    ema_decay: float = 0.995
    caption_dropout: float = 0.1
    report_every: int = 260
    report_captions: int = 96
    seed: int = 2


class RunLog:
    """One JSON line per report, in a file and on the terminal, with the seconds since the run began."""

    def __init__(self, path: Path, keep: bool = False):
        self.path = path
        self.started = time.monotonic()
        if not keep:
            path.write_text("", encoding="utf-8")

    def write(self, **values: object) -> None:
        line = json.dumps({**values, "seconds": round(time.monotonic() - self.started, 1)})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)


def learning_rate_factor(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def train_autoencoder(recipe: AutoencoderRecipe, log: RunLog) -> Autoencoder:
    """Fit the encoder, then train the decoder on newly rendered scenes; scored by judging reconstructions."""
    torch.manual_seed(recipe.seed)
    rng = random.Random(recipe.seed)
    model = Autoencoder()
    model.fit_components(shapes.render([shapes.random_scene(rng) for _ in range(recipe.fit_images)]))
    log.write(step=0, **score_reconstructions(model))
    optimiser = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: learning_rate_factor(step, recipe.steps, recipe.warmup)
    )
    for step in range(1, recipe.steps + 1):
        pixels = shapes.render([shapes.random_scene(rng) for _ in range(recipe.batch)])
        cells = shapes.IMAGE_SIZE // DOWNSCALE
        noise = recipe.latent_noise * torch.rand(recipe.batch, 1, 1, 1)
        noise = noise * torch.randn(recipe.batch, LATENT_CHANNELS, cells, cells)
        with torch.autocast("cpu", torch.bfloat16):
            loss = reconstruction_loss(model, pixels, noise)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % recipe.report_every == 0:
            log.write(step=step, loss=round(loss.item(), 5), **score_reconstructions(model))
    return model


@torch.no_grad()
def score_reconstructions(model: Autoencoder, count: int = 512) -> dict[str, float]:
    """The judge's scores of the reconstructions of a fixed set, clean and with some noise on the latents."""
    rng = random.Random("reconstructions")
    scenes = [shapes.random_scene(rng) for _ in range(count)]
    captions = [shapes.caption(scene.attributes) for scene in scenes]
    pixels = shapes.render(scenes)
    latents = model.encode(pixels)
    restored = model.decode(latents)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    noisy = judge.score(model.decode(latents + 0.3 * noise), captions)
    scores = {name: round(value, 4) for name, value in judge.score(restored, captions)._asdict().items()}
    return {**scores, "psnr": round(psnr(restored, pixels), 2), "whole_at_noise_0.3": round(noisy.whole, 4)}


def psnr(images: Tensor, reference: Tensor) -> float:
    """Peak signal to noise ratio in dB, of images in [-1, 1]."""
    return -10 * math.log10((images - reference).square().mean().item() / 4)


def train_source(recipe: SourceRecipe, autoencoder: Autoencoder, words: Words, log: RunLog, path: Path) -> LatentModel:
    """Train the latent model on newly rendered scenes and write its averaged weights to `path` at every report."""
    torch.manual_seed(recipe.seed)
    rng = random.Random(recipe.seed)
    model = LatentModel(SOURCE_CONFIG)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(recipe.ema_decay)
    )
    averaged = average.module
    assert isinstance(averaged, LatentModel)
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, betas=(0.9, 0.99)
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: learning_rate_factor(step, recipe.steps, recipe.warmup)
    )
    losses = SigmaLosses()
    for step in range(1, recipe.steps + 1):
        latents, captions = source_batch(recipe, autoencoder, words, rng)
        sigma = flow.training_sigmas()[torch.randint(flow.TRAINING_GRID_STEPS, (recipe.batch,))]
        with torch.autocast("cpu", torch.bfloat16):
            errors = flow.velocity_errors(model, latents, torch.randn_like(latents), sigma, captions)
        optimiser.zero_grad()
        errors.mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        average.update_parameters(model)
        losses.add(errors.detach(), sigma)
        if step % recipe.report_every == 0:
            scores = score_source(averaged, autoencoder, words, recipe.report_captions, STEPS, CFG)
            log.write(step=step, **losses.take(), **scores)
            save_source(averaged, path, recipe)
    return averaged


@torch.no_grad()
def source_batch(
    recipe: SourceRecipe, autoencoder: Autoencoder, words: Words, rng: random.Random
) -> tuple[Tensor, list[Tensor]]:
    """Latents (B, 16, 8, 8) of new scenes with their caption features, some of them the empty caption's."""
    scenes = [shapes.random_scene(rng) for _ in range(recipe.batch)]
    texts = [
        "" if rng.random() < recipe.caption_dropout else shapes.random_caption(rng, scene.attributes)
        for scene in scenes
    ]
    return autoencoder.encode(shapes.render(scenes)), [words.encode(text) for text in texts]


class SigmaLosses:
    """The mean velocity error in each range of sigma since the last call of `take`."""

    def __init__(self) -> None:
        self.edges = torch.tensor(SIGMA_EDGES)
        self.sums = torch.zeros(2, len(SIGMA_EDGES) - 1)

    def add(self, errors: Tensor, sigma: Tensor) -> None:
        ranges = torch.bucketize(sigma, self.edges[1:-1])
        self.sums[0].index_add_(0, ranges, errors)
        self.sums[1].index_add_(0, ranges, torch.ones_like(errors))

    def take(self) -> dict[str, float | list[float]]:
        total, count = self.sums
        by_range = (total / count.clamp(min=1)).tolist()
        mean = (total.sum() / count.sum()).item()
        self.sums = torch.zeros_like(self.sums)
        return {"loss": round(mean, 4), "loss_by_sigma": [round(value, 4) for value in by_range]}


def score_source(
    model: LatentModel, autoencoder: Autoencoder, words: Words, count: int, steps: int, cfg: float
) -> dict[str, float]:
    """The judge's scores of images for a fixed list of captions, each with its index as the seed."""
    captions = shapes.evaluation_captions(count)
    with torch.autocast("cpu", torch.bfloat16):
        images = generate(model, autoencoder, words, captions, range(count), steps=steps, cfg=cfg)
    return {name: round(value, 4) for name, value in judge.score(images, captions)._asdict().items()}


def save_source(model: LatentModel, path: Path, recipe: SourceRecipe) -> None:
    """Write the weights in bfloat16, with the sizes and the recipe in the metadata."""
    weights = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    metadata = {
        "l2p.kind": "source",
        "l2p.config": SOURCE_CONFIG.to_json(),
        "l2p.recipe": json.dumps(dataclasses.asdict(recipe)),
    }
    save(weights, path, metadata, overwrite=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the bundled tiny source.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights and logs")
    parser.add_argument(
        "--stage", choices=("autoencoder", "source", "score", "all"), default="all", help="what to train"
    )
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)

    if arguments.stage in ("autoencoder", "all"):
        log = RunLog(out / "autoencoder_run.jsonl")
        train_autoencoder(AutoencoderRecipe(), log).save(out / "autoencoder.safetensors")
        Words.make().save(out / "words.safetensors")
    # Read back, so that the source is trained and scored with the weights as they are distributed.
    autoencoder = Autoencoder.load(out / "autoencoder.safetensors")
    words = Words.load(out / "words.safetensors")
    path = out / "source.safetensors"
    if arguments.stage in ("source", "all"):
        train_source(SourceRecipe(), autoencoder, words, RunLog(out / "source_run.jsonl"), path)
    if arguments.stage in ("score", "all"):
        source, log = load_source(path), RunLog(out / "source_scores.jsonl")
        scores = score_source(source, autoencoder, words, SCORED_CAPTIONS, STEPS, SCORED_CFG)
        log.write(captions=SCORED_CAPTIONS, sampling_steps=STEPS, cfg=SCORED_CFG, **scores)


if __name__ == "__main__":
    main()
