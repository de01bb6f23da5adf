"""The same prompts and seeds drawn by a source and by its pixel model: the work of Compare L2P."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import comfy.model_management
import comfy.utils
import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..l2p_core.files.units import counted
from .sampling import SamplerSettings, sample_image
from .sizes import chosen_size, l2p_config
from .synthesis import TextToImage

PREFIX = "l2p_compare"
SEEDS = 1 << 64
Say = Callable[[str], None]


class Compared(NamedTuple):
    """Images (B, H, W, 3) in [0, 1] of B prompts: the source's, the pixel model's, and their absolute difference."""

    source: Tensor
    pixel: Tensor
    difference: Tensor


def size_of(pixel: Any, width: int, height: int) -> tuple[int, int]:
    """(width, height) of both models' images; 0 takes the pixel model's own.

    Raises:
        ValueError: if the model is not L2P, or for a side between 0 and the smallest.
    """
    config = l2p_config(pixel)
    if config is None:
        raise ValueError(
            "The input pixel is not an L2P model: connect one from L2P Loader, and its latent source as source."
        )
    return chosen_size(config, width, height)


def compare(
    source: TextToImage, pixel: Any, prompts: Sequence[str], settings: SamplerSettings, say: Say, tell: Say
) -> Compared:
    """Draw every prompt with both models: prompt i from the seed `settings.seed` + i.

    All prompts are encoded first, then one model draws all images, then the other, so that each is loaded once.

    Args:
        source: of the source, with the size of the images.
        pixel: the pixel model.
        prompts: one or more.
        settings: of the pixel model.
        say: shows the progress.
        tell: leaves a sentence on the result.

    Raises:
        ValueError: for an incomplete source, no prompts, and what the samplers refuse.
    """
    if not prompts:
        raise ValueError("There are no prompts: type some, one per line.")
    source.check()
    encoded = [source.conditioning(prompt) for prompt in prompts]
    negative = source.conditioning(source.negative)
    bar = comfy.utils.ProgressBar(2 * len(prompts))

    def of_source(number: int) -> Tensor:
        return source.images([_seed(settings, number)], encoded[number], negative, lambda *_: None)

    def of_pixel(number: int) -> Tensor:
        own = replace(settings, seed=_seed(settings, number))
        return sample_image(
            pixel, encoded[number], negative, own, width=source.width, height=source.height, batch=1, tell=tell
        )

    sides: list[Tensor] = []
    for name, draw in (("the source", of_source), ("the pixel model", of_pixel)):
        images = []
        for number in range(len(prompts)):
            comfy.model_management.throw_exception_if_processing_interrupted()
            say(f"{name}: image {number + 1} of {len(prompts)}")
            images.append(draw(number).float().cpu().clamp(0, 1))
            bar.update(1)
        sides.append(torch.cat(images))
    say(counted(len(prompts), "pair"))
    return Compared(sides[0], sides[1], (sides[0] - sides[1]).abs())


def shown(compared: Compared, prompts: Sequence[str], seed: int, node: type[io.ComfyNode]) -> dict[str, Any]:
    """What the frontend draws: files of the images in the host's temporary folder, the prompts and the seeds."""
    files = {
        side: ui.ImageSaveHelper.save_images(images, f"{PREFIX}_{side}", io.FolderType.temp, node, compress_level=1)
        for side, images in compared._asdict().items()
    }
    pairs = [
        {"prompt": prompt, "seed": str((seed + number) % SEEDS), **{side: dict(files[side][number]) for side in files}}
        for number, prompt in enumerate(prompts)
    ]
    return {"l2p_pairs": pairs}


def _seed(settings: SamplerSettings, number: int) -> int:
    return (settings.seed + number) % SEEDS
