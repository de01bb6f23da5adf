"""What one optimiser step reports."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

SIGMA_EDGES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Losses are reported by range of sigma, because their mean hides failure: at low sigma the head's skips copy the
input."""
HIGH_SIGMA = 0.6

SIGMA_RANGES = {f"{low:.1f} to {high:.1f}": low for low, high in pairwise(SIGMA_EDGES)}
"""The name of each range, and where it begins."""


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


def step_metrics(step: int, error: Tensor, sigma: Tensor, lr: float, norm: float, seconds: float) -> StepMetrics:
    """The metrics of a step whose samples have these errors and noise levels, (N,) each, on the CPU."""
    bins = torch.bucketize(sigma, torch.tensor(SIGMA_EDGES[1:-1]), right=False)
    count = len(SIGMA_EDGES) - 1
    high = error[sigma > HIGH_SIGMA]
    return StepMetrics(
        step=step,
        loss=float(error.mean()),
        high_sigma_loss=float(high.mean()) if len(high) else None,
        lr=lr,
        grad_norm=norm,
        images=len(error),
        seconds=seconds,
        sigma_loss=torch.zeros(count).index_add(0, bins, error).tolist(),
        sigma_count=torch.bincount(bins, minlength=count).tolist(),
    )
