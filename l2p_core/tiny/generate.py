"""Images made by the tiny source: what transfer trains on, and the score it is measured against."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import flow
from ..model import LatentModel
from ..ops.finite import check_finite
from .autoencoder import DOWNSCALE, LATENT_CHANNELS, Autoencoder
from .shapes import IMAGE_SIZE
from .words import Words

STEPS = 20
CFG = 2.0


@torch.no_grad()
def generate(
    source: LatentModel,
    autoencoder: Autoencoder,
    words: Words,
    captions: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int = STEPS,
    cfg: float = CFG,
    batch: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Sample latents from seeded noise and decode them.

    Args:
        source: the tiny latent model, with its `autoencoder` and `words`.
        captions: B texts of words the model knows.
        seeds: B seeds, one an image; an image depends on its own seed and caption alone.
        steps: Euler steps of the shift-3 schedule.
        cfg: guidance against the empty caption; 1 is none, in half the time.
        batch: images at a time.
        progress: called with (images done, images in all) after every batch.

    Returns:
        (B, 3, 64, 64) in [-1, 1].

    Raises:
        ValueError: if there are not as many seeds as captions, a caption has an unknown word, or an image is not
            finite.
    """
    if len(captions) != len(seeds):
        raise ValueError(f"{len(captions)} captions came with {len(seeds)} seeds; give one seed for each caption.")
    features = [words.encode(text) for text in captions]
    empty = words.encode("")
    images = torch.empty(len(captions), 3, IMAGE_SIZE, IMAGE_SIZE)
    for start in range(0, len(captions), batch):
        rows = slice(start, min(start + batch, len(captions)))
        noise = torch.stack([seeded_noise(seed) for seed in seeds[rows]])
        latents = flow.euler(
            source, noise, features[rows], sigmas=flow.sigmas(steps), cfg=cfg, negative=[empty] * len(noise)
        )
        images[rows] = autoencoder.decode(latents)
        check_finite(images[rows])
        if progress:
            progress(rows.stop, len(captions))
    return images


def seeded_noise(seed: int) -> Tensor:
    """The standard normal latent noise of one image, (16, 8, 8)."""
    side = IMAGE_SIZE // DOWNSCALE
    return torch.randn(LATENT_CHANNELS, side, side, generator=torch.Generator().manual_seed(seed))
