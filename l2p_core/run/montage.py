"""A run's montage: its prompts as images, from fixed seeds."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import flow
from ..config import variant_row
from ..model import L2PModel
from ..pictures import enlarged, montage, picture, png
from ..tensor_io import ProgressCallback
from .data import Features
from .recipe import WatchSection

COLUMNS = 6
_BATCH_PIXELS = 64 * 64 * 64
"""Images are sampled together up to this many pixels: 64 of the tiny model's, one by one of large ones."""
_LEAST_SIDE = 128  # pixels of an image in the file


def sample(
    model: L2PModel,
    features: Features,
    watch: WatchSection,
    side: int,
    device: torch.device,
    progress: ProgressCallback | None = None,
) -> Tensor:
    """The images of the prompts, (B, 3, side, side) in [-1, 1] on the CPU.

    Args:
        model: in evaluation mode.
        features: of captions.
        watch: prompts, seeds and settings.
        side: pixels.
        device: of the model.
        progress: called with (sampling steps done, steps in all), each of all images that are made together; may raise
            to interrupt.
    """
    row = variant_row(str(model.config.variant))
    steps, cfg = watch.steps or row.steps, row.cfg if watch.cfg is None else watch.cfg
    empty = features("").to(device)
    together = max(1, _BATCH_PIXELS // side**2)
    starts = range(0, len(watch.prompts), together)
    done = 0

    def step(*_: object) -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, steps * len(starts))

    images = []
    for start in starts:
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
            progress=step,
        )
        images.append(pixels.cpu())
    return torch.cat(images)


def file_content(pixels: Tensor, columns: int = COLUMNS) -> bytes:
    """A montage as a PNG file; tiny images are enlarged by repeating pixels."""
    scale = max(1, _LEAST_SIDE // pixels.shape[-1])
    return png(enlarged(picture(montage(pixels, columns)), scale))
