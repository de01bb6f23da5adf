"""`l2p benchmark depth`: whether a pixel model can hold more than 8 bits.

A small model is overfitted on a ramp of 4,096 steps, an image of 16 x 16 pixels each, whose caption says which step it
is; then every step is sampled from noise, and the mean of its pixels compared with the step. There is only the model
and its sampling in between, in float32 from end to end.
"""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import torch
from torch import Tensor

from ...l2p_core import flow
from ...l2p_core.config import ModelConfig
from ...l2p_core.model import L2PModel
from ...l2p_core.training.batch import Batch
from ...l2p_core.training.trainer import Trainer
from ...l2p_core.training_config import TrainingConfig
from ..console import bar, table

LEVELS = 4096
SIDE = 16
TOLERANCE = 0.25
"""Of one of 256 levels."""
STEPS = 6000
SAMPLING_STEPS = 30
_BATCH = 48
_AT_ONCE = 128
_OCTAVES = 8

CONFIG = ModelConfig(
    dim=64, head_dim=32, n_layers=2, n_refiner_layers=1, caption_dim=2 * _OCTAVES, ffn_dim=128, t_freq_dim=32,
    t_hidden_dim=48, t_dim=64,
)  # fmt: skip


class Depth(NamedTuple):
    """Errors of the steps' means, in levels of 8 bits, and the share of them within TOLERANCE."""

    share: float
    median: float
    ninth_decile: float


def benchmark_depth(steps: int = STEPS, seed: int = 0) -> Depth:
    """Train, sample every step of the ramp, print a table and return its content."""
    begun = time.perf_counter()
    model = trained(steps, seed)
    seconds = time.perf_counter() - begun
    numbers = list(range(LEVELS))
    found = errors(sampled(model, numbers, seed), numbers)
    rows = [
        ("steps of the ramp", str(len(numbers))),
        ("training", f"{steps} steps, {seconds:.0f} s"),
        ("means within a quarter of an 8-bit level", f"{found.share:.1%}"),
        ("median error, 8-bit levels", f"{found.median:.3f}"),
        ("error of nine in ten, 8-bit levels", f"{found.ninth_decile:.3f}"),
    ]
    print(table(("", "result"), rows))
    return found


def trained(steps: int, seed: int) -> L2PModel:
    """A small model from random weights, trained on the ramp in float32."""
    torch.manual_seed(seed)
    model = L2PModel(CONFIG.with_head("1k", 0.125))
    for token in (model.x_pad_token, model.cap_pad_token):
        torch.nn.init.normal_(token)
    config = TrainingConfig(
        steps=steps, lr=3e-3, policy="all", precision="fp32", gradient_checkpointing=False, decay="cosine",
        warmup_steps=50, shift=1.0, noise="fresh", weight_decay=0.0, seed=seed,
    )  # fmt: skip
    with bar("training", unit="step", total=steps) as shown:
        for _ in Trainer(model, config).run(_Ramp(seed)):
            shown.update()
    return model.eval()


@torch.no_grad()
def sampled(model: L2PModel, numbers: list[int], seed: int) -> Tensor:
    """The means of the sampled images of these steps, (N,) in [0, 1]."""
    noise = torch.randn(len(numbers), 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    means = []
    for start in range(0, len(numbers), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        pixels = flow.sample(model, noise[part], captions(numbers[part]), sigmas=flow.sigmas(SAMPLING_STEPS))
        means.append(pixels.double().mean((1, 2, 3)))
    return (torch.cat(means) + 1) / 2


def errors(means: Tensor, numbers: list[int]) -> Depth:
    """The errors of means (N,) in [0, 1] for the steps of these numbers."""
    away = (means - values(numbers)).abs() * 255
    within = float((away <= TOLERANCE).double().mean())
    return Depth(within, float(away.median()), float(away.quantile(0.9)))


def values(numbers: list[int]) -> Tensor:
    """The steps' values, (N,) from 0 to 1."""
    return torch.tensor(numbers, dtype=torch.float64) / (LEVELS - 1)


def images(numbers: list[int]) -> Tensor:
    """The steps as images, (N, 3, SIDE, SIDE) in [-1, 1]."""
    return (values(numbers) * 2 - 1).float()[:, None, None, None].expand(-1, 3, SIDE, SIDE).contiguous()


def captions(numbers: list[int]) -> list[Tensor]:
    """A caption of one token for each step: sines and cosines of its value, of equal length for all."""
    angles = values(numbers)[:, None] * math.pi * 0.5 * 2 ** torch.arange(_OCTAVES, dtype=torch.float64)
    return list(torch.cat([angles.sin(), angles.cos()], 1).float()[:, None])


class _Ramp:
    """Random steps of the ramp; a batch is a function of its number."""

    def __init__(self, seed: int):
        self.seed = seed

    def batch(self, number: int) -> Batch:
        generator = torch.Generator().manual_seed(self.seed << 32 | number)
        numbers = torch.randperm(LEVELS, generator=generator)[:_BATCH].tolist()
        samples = list(range(number * _BATCH, (number + 1) * _BATCH))
        return Batch(images(numbers), captions(numbers), samples, [None] * _BATCH)
