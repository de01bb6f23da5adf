"""A run's montage: its prompts as images, from fixed seeds."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import flow
from ..config import variant_row
from ..model import L2PModel
from ..pictures import enlarged, montage, picture, png
from .data import Features
from .recipe import WatchSection

COLUMNS = 6
_BATCH_PIXELS = 64 * 64 * 64
"""Images are sampled together up to this many pixels: 64 of the tiny model's, one by one of large ones."""
_LEAST_SIDE = 128  # pixels of an image in the file


def sample(model: L2PModel, features: Features, watch: WatchSection, side: int, device: torch.device) -> Tensor:
    """The images of the prompts, (B, 3, side, side) in [-1, 1] on the CPU.

    Args:
        model: in evaluation mode.
        features: of captions.
        watch: prompts, seeds and settings.
        side: pixels.
        device: of the model.
    """
    row = variant_row(str(model.config.variant))
    steps, cfg = watch.steps or row.steps, row.cfg if watch.cfg is None else watch.cfg
    empty = features("").to(device)
    together = max(1, _BATCH_PIXELS // side**2)
    images = []
    for start in range(0, len(watch.prompts), together):
        prompts = watch.prompts[start : start + together]
        # On the CPU, so that a seed means the same image on every machine.
        noise = [
            torch.randn(3, side, side, generator=torch.Generator().manual_seed(watch.seed + start + i))
            for i in range(len(prompts))
        ]
        pixels = flow.sample(
            model,
            torch.stack(noise).to(device),
            [features(prompt).to(device) for prompt in prompts],
            sigmas=flow.sigmas(steps, row.shift),
            cfg=cfg,
            negative=[empty] * len(prompts),
        )
        images.append(pixels.cpu())
    return torch.cat(images)


def file_content(pixels: Tensor, columns: int = COLUMNS) -> bytes:
    """A montage as a PNG file; tiny images are enlarged by repeating pixels."""
    scale = max(1, _LEAST_SIDE // pixels.shape[-1])
    return png(enlarged(picture(montage(pixels, columns)), scale))
