"""Training the second tiny world's source on newly rendered scenes: it stops and resumes at any time.

The state, with the optimisers', is in `state.safetensors`; the averaged weights in bfloat16, which are what is shipped,
in `source.safetensors`. Step i draws everything from the seed and i, so a resumed run is the run that was stopped.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...l2p_core import flow
from ...l2p_core.backbone import RefinedCaptions
from ...l2p_core.config import ModelConfig
from ...l2p_core.files.tensor_file import load_tensors, save
from ...l2p_core.model import LatentModel
from ...l2p_core.ops.rope import caption_rope
from ...l2p_core.tiny.autoencoder import DOWNSCALE
from ...l2p_core.tiny.generate import generate
from ...l2p_core.tiny.scenes import captions, judge
from ...l2p_core.tiny.scenes.autoencoder import CHANNELS, TrainedAutoencoder
from ...l2p_core.tiny.scenes.content import Scenes, random_scenes
from ...l2p_core.tiny.scenes.rendering import IMAGE_SIZE, render
from ...l2p_core.tiny.scenes.words import PhraseWords
from ...l2p_core.tiny.words import CAPTION_DIM
from ..make_tiny_source import RunLog, SigmaLosses
from .gradients import gradients_of
from .muon import Muon
from .probe import Probe, what_is_shown

SOURCE_CONFIG = ModelConfig(
    in_channels=CHANNELS,
    dim=128,
    head_dim=64,
    n_layers=8,
    n_refiner_layers=1,
    caption_dim=CAPTION_DIM,
    ffn_dim=352,
    t_hidden_dim=128,
    t_dim=64,
)

ENCODER = "l2p.encoder"

CAPTION_TOKENS = 32
"""The padded length of every caption: all are shorter than the multiple that the source pads to."""
IMAGE_CELLS = 8
"""Tokens along a side of the image."""


@dataclass(frozen=True)
class SceneSourceRecipe:
    """How the source is trained, but for how long."""

    images: int = 700_000
    """Maximum number, over all sessions."""
    batch: int = 16
    learning_rate: float = 2.3e-3
    muon_learning_rate: float = 6.5e-3
    weight_decay: float = 0.01
    warmup: int = 100
    """Steps, also after resuming from averaged weights alone."""
    ema_decay: float = 0.999
    probe_weight: float = 1.0
    """Weight of the probe's loss relative to the velocity's."""
    caption_dropout: float = 0.1
    report_steps: int = 128
    save_minutes: float = 4.0
    score_minutes: float = 15.0
    scored_captions: int = 64
    scored_steps: int = 15
    cfg: float = 4.0
    seed: int = 2


class SourceTraining:
    """A run in a folder: new, from its own state, or from averaged weights with fresh optimisers.

    Args:
        recipe: how to train.
        out: the folder of state, weights and log.
        device: where to train.
        encoder: the autoencoder's `encoder_identity`.
        start: averaged weights to begin from where the folder has no state; None for random ones.
        config: the model's sizes.
        ahead: steps whose images are rendered and encoded at once; a GPU renders few slowly.
        compiled: compile the step on a CPU, which needs a C++ compiler.

    Raises:
        ValueError: if the state or the averaged weights were trained on another encoder's latents.
    """

    def __init__(
        self,
        recipe: SceneSourceRecipe,
        out: Path,
        device: torch.device,
        encoder: str,
        start: Path | None = None,
        config: ModelConfig = SOURCE_CONFIG,
        ahead: int = 1,
        compiled: bool = False,
    ):
        self.recipe, self.out, self.device, self.encoder = recipe, out, device, encoder
        self._ahead, self._drawn = ahead, list[Drawn]()
        torch.manual_seed(recipe.seed)
        self.model = LatentModel(config).to(device)
        self.average = LatentModel(config).to(device).eval().requires_grad_(False)
        self.probe = Probe(self.model).to(device)
        self.step = self.since = 0  # steps in all, and of these optimisers
        self.images = 0
        self.optimisers = self._optimisers()
        trained = [*self.model.parameters(), *self.probe.parameters()]
        self._gradients = gradients_of(self._losses, trained, device, compiled)
        if (out / "state.safetensors").exists():
            self._resume(out / "state.safetensors")
        elif start is not None:
            self._start(start)
        else:
            self.average.load_state_dict(self.model.state_dict())

    def _optimisers(self) -> list[torch.optim.Optimizer]:
        """Muon for the blocks' matrices, AdamW for everything else."""
        named = list(self.model.named_parameters())
        hidden = [p for name, p in named if p.ndim == 2 and (".attention." in name or ".feed_forward." in name)]
        known = {id(parameter) for parameter in hidden}
        others = [p for _, p in named if id(p) not in known] + list(self.probe.parameters())
        decay = self.recipe.weight_decay
        return [
            Muon(hidden, lr=self.recipe.muon_learning_rate, weight_decay=decay),
            torch.optim.AdamW(others, lr=self.recipe.learning_rate, weight_decay=decay, betas=(0.9, 0.99)),
        ]

    def train(self, autoencoder: TrainedAutoencoder, words: PhraseWords, minutes: float, finish: bool) -> None:
        """Train for some minutes, or until the recipe's images are seen.

        Args:
            autoencoder, words: of this world; the autoencoder on the training's device.
            minutes: by the clock, from now.
            finish: let the learning rates fall to 0 over the second half of these minutes or images.
        """
        log = RunLog(self.out / "source_run.jsonl", keep=True)
        losses = SigmaLosses()
        waiting: list[tuple[Tensor, Tensor]] = []  # on the device, which need not be waited for in each step
        started = saved = scored = time.monotonic()
        first = self.images
        while self.images < self.recipe.images and (now := time.monotonic()) - started < 60 * minutes:
            share = max((now - started) / (60 * minutes), (self.images - first) / (self.recipe.images - first))
            self._set_learning_rates(min(1.0, 2 * (1 - share)) if finish else 1.0)
            waiting.append(self.advance(autoencoder, words))
            if self.step % self.recipe.report_steps == 0:
                for errors, sigma in waiting:
                    losses.add(errors.cpu(), sigma.cpu())
                waiting.clear()
                log.write(step=self.step, images=self.images, **losses.take())
            if now - saved > 60 * self.recipe.save_minutes:
                saved = now
                self.save()
            if now - scored > 60 * self.recipe.score_minutes:
                scored = now
                log.write(step=self.step, images=self.images, **self.score(autoencoder, words))
        self.save()

    def _set_learning_rates(self, factor: float) -> None:
        factor *= min(1.0, (self.since + 1) / self.recipe.warmup)
        for optimiser, base in zip(
            self.optimisers, (self.recipe.muon_learning_rate, self.recipe.learning_rate), strict=True
        ):
            for group in optimiser.param_groups:
                group["lr"] = base * factor

    def advance(self, autoencoder: TrainedAutoencoder, words: PhraseWords) -> tuple[Tensor, Tensor]:
        """One step; each image's error and noise level, on the device."""
        if not self._drawn:
            self._drawn = drawn(self.recipe, autoencoder, words, range(self.step, self.step + self._ahead), self.device)
        inputs = self._drawn.pop(0)
        errors = self._gradients(inputs)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
        self.step, self.since, self.images = self.step + 1, self.since + 1, self.images + self.recipe.batch
        self._average()
        return errors, inputs.sigma

    def _losses(self, inputs: Drawn) -> tuple[Tensor, Tensor]:
        """Each image's error, and the loss; with fixed shapes and nothing read back, as a CUDA graph needs."""
        captions = padded_captions(self.model, inputs.features, inputs.exists)
        errors = flow.velocity_errors(self.model, inputs.latents, inputs.noise, inputs.sigma, captions)
        return errors, errors.mean() + self.recipe.probe_weight * self.probe.loss(inputs.shown)

    @torch.no_grad()
    def _average(self) -> None:
        decay = min(self.recipe.ema_decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)

    def score(self, autoencoder: TrainedAutoencoder, words: PhraseWords) -> dict[str, float]:
        """The judge's scores of the averaged model, for watching."""
        recipe = self.recipe
        return score_source(self.average, autoencoder, words, recipe.scored_captions, recipe.scored_steps, recipe.cfg)

    def save(self) -> None:
        """Write the state and the averaged weights; a file is replaced only when the new one is complete."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"probe.{name}": tensor for name, tensor in self.probe.state_dict().items()}
        tensors |= {f"average.{name}": tensor for name, tensor in self.average.state_dict().items()}
        for number, optimiser in enumerate(self.optimisers):
            for index, state in optimiser.state_dict()["state"].items():
                tensors |= {f"optimiser.{number}.{index}.{name}": tensor for name, tensor in state.items()}
        about = {"step": str(self.step), "since": str(self.since), "images": str(self.images), ENCODER: self.encoder}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save(tensors, self.out / "state.safetensors", {"l2p.kind": "scenes training", **about}, overwrite=True)
        weights = {name: tensor.cpu().bfloat16() for name, tensor in self.average.state_dict().items()}
        metadata = {
            "l2p.kind": "source",
            "l2p.config": self.model.config.to_json(),
            "l2p.recipe": json.dumps(dataclasses.asdict(self.recipe)),
            "l2p.images": str(self.images),
            "l2p.steps": str(self.step),
            ENCODER: self.encoder,
        }
        save(weights, self.out / "source.safetensors", metadata, overwrite=True)

    def _read(self, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
        tensors, about = load_tensors(path)
        if about.get(ENCODER) != self.encoder:
            raise ValueError(
                f"{path} was trained on the latents of another autoencoder: use that one, or train in an empty folder "
                "with --anew."
            )
        return tensors, about

    def _resume(self, path: Path) -> None:
        tensors, about = self._read(path)
        self.model.load_state_dict(_part(tensors, "model."))
        self.probe.load_state_dict(_part(tensors, "probe."))
        self.average.load_state_dict(_part(tensors, "average."))
        for number, optimiser in enumerate(self.optimisers):
            state: dict[int, dict[str, Tensor]] = {}
            for name, tensor in _part(tensors, f"optimiser.{number}.").items():
                index, _, key = name.partition(".")
                state.setdefault(int(index), {})[key] = tensor
            optimiser.load_state_dict({**optimiser.state_dict(), "state": state})
        self.step, self.since, self.images = (int(about[name]) for name in ("step", "since", "images"))

    def _start(self, path: Path) -> None:
        weights, about = self._read(path)
        weights = {name: tensor.float() for name, tensor in weights.items()}
        self.model.load_state_dict(weights)
        self.average.load_state_dict(weights)
        self.images, self.step = int(about["l2p.images"]), int(about["l2p.steps"])


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


class Drawn(NamedTuple):
    """What a step trains on, all of it on the device.

    Attributes:
        latents, noise: (B, 8, 16, 16).
        sigma: (B,) noise levels.
        features, exists: (B, tokens, 64) and (B, tokens, 1), of captions and whether a token is one.
        shown: (B, tokens of the image, features), what the probe should read.
    """

    latents: Tensor
    noise: Tensor
    sigma: Tensor
    features: Tensor
    exists: Tensor
    shown: Tensor


@torch.no_grad()
def drawn(
    recipe: SceneSourceRecipe,
    autoencoder: TrainedAutoencoder,
    words: PhraseWords,
    steps: Sequence[int],
    device: torch.device,
) -> list[Drawn]:
    """What each step trains on, from the seed and its number alone; all images are rendered and encoded at once."""
    scenes, sigmas, noise, features = [], [], [], []
    side = IMAGE_SIZE // DOWNSCALE
    for step in steps:
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        scenes.append(random_scenes(recipe.batch, generator))
        texts = [captions.caption(content) for content in captions.contents(scenes[-1], generator)]
        dropped = (torch.rand(recipe.batch, generator=generator) < recipe.caption_dropout).tolist()
        features += [words.encode("" if drop else text) for text, drop in zip(texts, dropped, strict=True)]
        sigmas.append(stratified_sigmas(recipe.batch, generator))
        noise.append(torch.randn(recipe.batch, CHANNELS, side, side, generator=generator))
    every = Scenes.joined(scenes).to(device)
    rows = nn.utils.rnn.pad_sequence([F.pad(feature, (0, 1), value=1.0) for feature in features], batch_first=True)
    rows = F.pad(rows, (0, 0, 0, CAPTION_TOKENS - rows.shape[1])).to(device)
    parts = (
        autoencoder.encode(render(every)),
        torch.cat(noise).to(device),
        torch.cat(sigmas).to(device),
        rows[..., :-1],
        rows[..., -1:] > 0,
        what_is_shown(every, IMAGE_CELLS),
    )
    return [Drawn(*step) for step in zip(*(part.split(recipe.batch) for part in parts), strict=True)]


def padded_captions(model: LatentModel, features: Tensor, exists: Tensor) -> RefinedCaptions:
    """What `model.refined` makes of captions that are all padded to one length with anything, (B, tokens, 64)."""
    tokens = torch.where(exists, model.cap_embedder(features), model.cap_pad_token)
    rope = caption_rope(model.positions, tokens.shape[1], tokens.device)
    for block in model.context_refiner:
        tokens = block(tokens, rope)
    return RefinedCaptions(tokens, (tokens.shape[1],) * len(tokens))


def stratified_sigmas(count: int, generator: torch.Generator) -> Tensor:
    """Noise levels (count,) of the training grid, one from each of as many equal parts of it, in random order."""
    parts = torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)
    return flow.training_sigmas()[(parts / count * flow.TRAINING_GRID_STEPS).long().clamp(max=499)]


def source_images(
    model: LatentModel, autoencoder: TrainedAutoencoder, words: PhraseWords, count: int, steps: int, cfg: float
) -> Tensor:
    """Images (count, 3, 128, 128) of the first evaluation captions, each with its index as the seed."""
    texts = captions.evaluation_captions(count)
    return generate(model, autoencoder, words, texts, range(count), steps=steps, cfg=cfg, size=IMAGE_SIZE)


def score_source(
    model: LatentModel, autoencoder: TrainedAutoencoder, words: PhraseWords, count: int, steps: int, cfg: float
) -> dict[str, float]:
    """The judge's scores of those images."""
    images = source_images(model, autoencoder, words, count, steps, cfg)
    scores = judge.score(images, captions.evaluation_captions(count))._asdict()
    return {name: round(value, 4) for name, value in scores.items()}
