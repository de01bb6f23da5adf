"""The training loop: takes batches, yields metrics (arXiv 2605.12013 sections 3.2 and 4.1).

It knows no files but its own saves, and no display. Randomness depends on the step alone (`sample_randomness`), so the
step counter is the whole random state and the whole position in the data, and a run that was killed goes on bit for bit
from its last save.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from . import flow, lora, training_state
from .freeze import freeze_all_but, is_new, trainable_names
from .model import L2PModel
from .sample_randomness import draw
from .training_config import TrainingConfig

SIGMA_EDGES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Losses are reported by range of sigma, for their mean hides failure: at low sigma the head's skips copy the input."""
HIGH_SIGMA = 0.6
COSINE_FLOOR = 0.1


@dataclass
class Batch:
    """Samples of one micro-batch.

    Attributes:
        pixels: (B, 3, H, W) in [-1, 1].
        captions: B tensors (L_i, caption_dim).
        numbers: each sample's number in the run, counted over all epochs; its randomness depends on it.
        seeds: the seed that the source drew each image's noise from, None where it is not known.
    """

    pixels: Tensor
    captions: list[Tensor]
    numbers: list[int]
    seeds: list[int | None]


class BatchSource(Protocol):
    """Data as the loop sees it: a pure function of the micro-batch's number, shuffling included."""

    def batch(self, number: int) -> Batch:
        """The micro-batch `number`, counted from 0 over the whole run."""
        ...


@dataclass
class StepMetrics:
    """What one optimiser step reports.

    Attributes:
        step: optimiser steps done, this one included.
        loss: mean velocity error of the step's samples.
        high_sigma_loss: the same over those with sigma above 0.6; None where there were none.
        lr: peak group's learning rate in this step.
        grad_norm: total norm before clipping.
        images: samples of the step.
        seconds: how long it took.
        sigma_loss: sum of the errors in each range of SIGMA_EDGES.
        sigma_count: samples in each range.
    """

    step: int
    loss: float
    high_sigma_loss: float | None
    lr: float
    grad_norm: float
    images: int
    seconds: float
    sigma_loss: list[float] = field(default_factory=list)
    sigma_count: list[int] = field(default_factory=list)


class TrainingDiverged(RuntimeError):
    """The loss or a gradient is no longer a finite number; the weights are those before that step."""


class Trainer:
    """Shallow-layer training of one L2PModel, in place.

    Args:
        model: on the device to train on. Weights that train become float32; under "bf16" the others bfloat16.
        config: how to train.
        empty_caption: (L, caption_dim) features of the empty text, needed for caption dropout.

    Raises:
        ValueError: if captions are to be dropped and there is no empty one.
    """

    def __init__(self, model: L2PModel, config: TrainingConfig, empty_caption: Tensor | None = None):
        if config.caption_dropout and empty_caption is None:
            raise ValueError("Caption dropout needs the features of the empty caption.")
        self.model = model
        self.config = config
        self.step = 0
        self.device = model.x_pad_token.device
        self._empty_caption = empty_caption
        self._sigmas = flow.training_sigmas(config.shift)
        self.parameters = self._prepare_parameters()
        self._optimiser = self._make_optimiser()
        averaged = self.parameters if config.ema_decay else {}
        self._averages = {name: parameter.detach().clone() for name, parameter in averaged.items()}

    def run(self, batches: BatchSource) -> Iterator[StepMetrics]:
        """Train from the current step to the last, yielding after each.

        Stop by leaving the loop; `save` then keeps everything needed to go on.

        Raises:
            TrainingDiverged: when the loss or the gradient stops being finite, before any weight changes.
        """
        self.model.train()
        self.model.gradient_checkpointing = self.config.gradient_checkpointing
        while self.step < self.config.steps:
            yield self._train_step(batches)

    def save(self, path: Path | str) -> None:
        """Write weights, averages, optimiser state and step to a safetensors file, whole or not at all."""
        training_state.save(path, self._state(), step=self.step, config=self.config)

    def resume(self, path: Path | str) -> None:
        """Go on from a file that `save` wrote, bit for bit.

        Raises:
            ValueError: if the file is no saved run, or one of another model or with other settings than these.
        """
        self.step = training_state.load(path, self._state(), config=self.config)
        for group in self._optimiser.param_groups:
            for parameter in group["params"]:
                self._optimiser.state[parameter]["step"].fill_(float(self.step))

    def trained(self, averaged: bool = True) -> dict[str, Tensor]:
        """The trained weights by name, averaged ones where there are any and they are wanted; as `delta.save` takes."""
        if averaged and self._averages:
            return lora.with_alphas(self._averages, self.config.lora_alpha)
        weights = {name: parameter.detach() for name, parameter in self.parameters.items()}
        return lora.with_alphas(weights, self.config.lora_alpha)

    @contextmanager
    def averaged(self) -> Iterator[L2PModel]:
        """The model with the averaged weights in place, in evaluation mode; training weights return afterwards."""
        own = {name: parameter.data for name, parameter in self.parameters.items()}
        for name, average in self._averages.items():
            self.parameters[name].data = average
        self.model.eval()
        try:
            yield self.model
        finally:
            for name, data in own.items():
                self.parameters[name].data = data
            self.model.train()

    def _prepare_parameters(self) -> dict[str, Tensor]:
        """Freeze what does not train, add what the policy adds; master weights in float32."""
        config = self.config
        names = trainable_names(self.model.config, config.blocks, config.policy)
        if config.policy == "lora":
            layers = lora.adapted_layers(self.model.config, names)
            names |= lora.attach(self.model, layers, rank=config.lora_rank, alpha=config.lora_alpha, seed=config.seed)
        freeze_all_but(self.model, names)
        frozen_dtype = torch.bfloat16 if self.config.precision == "bf16" else torch.float32
        for name, parameter in self.model.named_parameters():
            parameter.data = parameter.data.to(torch.float32 if name in names else frozen_dtype)
        return {name: parameter for name, parameter in self.model.named_parameters() if name in names}

    def _make_optimiser(self) -> torch.optim.AdamW:
        """AdamW over two groups: what conversion initialised, and what the source already knew."""
        config = self.config
        new = [p for name, p in self.parameters.items() if is_new(name)]
        known = [p for name, p in self.parameters.items() if not is_new(name)]
        assert len(new) + len(known) == len(self.parameters)
        groups = [{"params": new, "scale": 1.0}, {"params": known, "scale": config.backbone_lr_scale}]
        optimiser = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=config.lr, weight_decay=config.weight_decay, fused=True
        )
        for parameter in self.parameters.values():
            optimiser.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
            }
        return optimiser

    def _state(self) -> dict[str, Tensor]:
        """Everything a save holds, by name; loading fills these very tensors."""
        state = {f"parameter.{name}": parameter.detach() for name, parameter in self.parameters.items()}
        state |= {f"average.{name}": average for name, average in self._averages.items()}
        for name, parameter in self.parameters.items():
            moments = self._optimiser.state[parameter]
            state |= {f"{moment}.{name}": moments[moment] for moment in ("exp_avg", "exp_avg_sq")}
        return state

    def _train_step(self, batches: BatchSource) -> StepMetrics:
        started = time.perf_counter()
        errors, levels = [], []
        for micro in range(self.config.accumulate):
            error, sigma = self._backward(batches.batch(self.step * self.config.accumulate + micro))
            errors.append(error)
            levels.append(sigma)
        error, sigma = torch.cat(errors), torch.cat(levels)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.config.clip_norm)
        if not math.isfinite(float(norm)) or not bool(error.isfinite().all()):
            self._optimiser.zero_grad()
            raise TrainingDiverged(
                f"Training diverged at step {self.step + 1}: the loss is no longer a finite number. The last save is "
                "good; go on from it with a lower learning rate."
            )
        lr = self._set_learning_rate()
        self._optimiser.step()
        self._optimiser.zero_grad()
        self._average()
        self.step += 1
        return self._metrics(error, sigma, lr, float(norm), time.perf_counter() - started)

    def _backward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Add a micro-batch's gradients; its samples' errors and noise levels, (B,) each, on the CPU."""
        config = self.config
        draws = [
            draw(
                config.seed,
                number,
                batch.pixels.shape[1:],
                levels=len(self._sigmas),
                dropout=config.caption_dropout,
                own_seed=own_seed if config.noise == "seeded" else None,
            )
            for number, own_seed in zip(batch.numbers, batch.seeds, strict=True)
        ]
        sigma = self._sigmas[[d.sigma_index for d in draws]]
        noise = torch.stack([d.noise for d in draws])
        captions = [
            self._empty_caption if d.drop_caption and self._empty_caption is not None else caption
            for d, caption in zip(draws, batch.captions, strict=True)
        ]
        with self._autocast():
            errors = flow.velocity_errors(
                self.model,
                batch.pixels.to(self.device, non_blocking=True),
                noise.to(self.device, non_blocking=True),
                sigma.to(self.device),
                [caption.to(self.device) for caption in captions],
            )
        (errors.mean() / config.accumulate).backward()
        return errors.detach().cpu(), sigma

    def _autocast(self) -> AbstractContextManager[object]:
        if self.config.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def _set_learning_rate(self) -> float:
        """Linear warm-up, then constant or cosine down to a tenth, for the step about to be made."""
        config = self.config
        factor = min(1.0, (self.step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
        if config.decay == "cosine" and self.step >= config.warmup_steps:
            done = (self.step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
            factor = COSINE_FLOOR + (1 - COSINE_FLOOR) * (1 + math.cos(math.pi * done)) / 2
        for group in self._optimiser.param_groups:
            group["lr"] = config.lr * factor * group["scale"]
        return config.lr * factor

    def _average(self) -> None:
        if not self._averages:
            return
        # A young average would otherwise be mostly the untrained initialisation.
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self._averages.values()), [p.detach() for p in self.parameters.values()], 1 - decay)

    def _metrics(self, error: Tensor, sigma: Tensor, lr: float, norm: float, seconds: float) -> StepMetrics:
        bins = torch.bucketize(sigma, torch.tensor(SIGMA_EDGES[1:-1]), right=False)
        count = len(SIGMA_EDGES) - 1
        high = error[sigma > HIGH_SIGMA]
        return StepMetrics(
            step=self.step,
            loss=float(error.mean()),
            high_sigma_loss=float(high.mean()) if len(high) else None,
            lr=lr,
            grad_norm=norm,
            images=len(error),
            seconds=seconds,
            sigma_loss=torch.zeros(count).index_add(0, bins, error).tolist(),
            sigma_count=torch.bincount(bins, minlength=count).tolist(),
        )
