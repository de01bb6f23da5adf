"""Sampling pixels with the host's samplers: the Pixel Sampler's work as plain functions."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.sample
import comfy.samplers
import comfy.utils
from torch import Tensor

from ..l2p_core import flow
from ..l2p_core.config import Sampling
from ..l2p_core.ops.finite import check_finite
from ..l2p_core.sources import sampling_of
from .model.dual import works_on_pixels
from .model.limits import check_memory
from .options import AS_TYPED, FROM_MODEL, PUBLISHED, UNTRAINED, cfg_problem, steps_problem
from .pixels import empty_pixels, image_to_pixels, keep_unmasked, pixels_to_image
from .previews import StepPreviews
from .sizes import OWN_SIZE, chosen_size, far_from_trained


@dataclass(frozen=True)
class SamplerSettings:
    """How to sample; `steps` and `cfg` may be FROM_MODEL."""

    seed: int
    steps: int
    cfg: float
    sampler: str
    scheduler: str
    denoise: float = 1.0


def sample_image(
    model: Any,
    positive: Any,
    negative: Any,
    settings: SamplerSettings,
    *,
    width: int,
    height: int,
    batch: int,
    aspect: str = AS_TYPED,
    image: Tensor | None = None,
    mask: Tensor | None = None,
    tell: Callable[[str], None] = logging.info,
) -> Tensor:
    """Text to image, image to image, or inpainting: an IMAGE (B, H, W, 3) in [0, 1].

    A width or height of 0 means the model's own, and an aspect takes precedence over both, see `sizes.chosen_size`. An
    image determines the size, and a single image is repeated to `batch`. With a mask, every pixel where it is 0 is
    returned exactly unchanged.

    Raises:
        ValueError: for a model that is not L2P, no steps, a negative cfg, a mask without an image or of another size, a
            denoise below 1 without an image, or a size that the device's memory cannot hold.
    """
    published = published_settings(model)
    problem = steps_problem(settings.steps) or cfg_problem(settings.cfg)
    if problem:
        raise ValueError(problem)
    if image is None:
        if mask is not None:
            raise ValueError("A mask needs an image to inpaint: connect one, or disconnect the mask.")
        if settings.denoise < 1.0:
            raise ValueError(
                f"denoise is {settings.denoise}, which needs an image to start from: connect one, or set denoise to 1."
            )
        width, height = chosen_size(model.model.l2p, width, height, aspect)
        check_memory(model, batch, height, width)
        latent = empty_pixels(width, height, batch)
    else:
        if image.shape[0] == 1:
            image = image.expand(batch, -1, -1, -1)
        check_memory(model, *image.shape[:3])
        latent = image_to_pixels(image, mask)

    samples = latent["samples"]
    tell(" ".join(filter(None, warnings_of(model, *samples.shape[:-3:-1]))))
    noise = comfy.sample.prepare_noise(samples, settings.seed)
    samples = denoise_pixels(model, positive, negative, noise, latent, settings, published)
    result = pixels_to_image({"samples": samples})
    return result if image is None or mask is None else keep_unmasked(result, image, mask)


def warnings_of(model: Any, width: int, height: int) -> list[str]:
    """Sentences that the user should read before sampling an image that may come out wrong; usually empty."""
    untrained = UNTRAINED if getattr(model.model, "untrained", False) else ""
    far = far_from_trained(model.model.l2p, width, height)
    return [untrained, far and f"{far} {OWN_SIZE}"]


def denoise_pixels(
    model: Any,
    positive: Any,
    negative: Any,
    noise: Tensor,
    latent: dict[str, Any],
    settings: SamplerSettings,
    published: Sampling,
) -> Tensor:
    """Run the host's sampler from `noise` and `latent`, both (B, 3, H, W), with live previews."""
    schedule = schedule_of(model, settings, published)
    previews = StepPreviews(model, len(schedule) - 1)
    samples: Tensor = comfy.sample.sample_custom(
        model,
        noise,
        published.cfg if settings.cfg == FROM_MODEL else settings.cfg,
        comfy.samplers.sampler_object(settings.sampler),
        schedule,
        positive,
        negative,
        latent["samples"],
        noise_mask=latent.get("noise_mask"),
        callback=previews,
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=settings.seed,
    )
    check_finite(samples)
    previews.finish(samples)
    return samples


def schedule_of(model: Any, settings: SamplerSettings, published: Sampling) -> Tensor:
    """The noise levels: L2P's own with the model's shift, or those that KSampler would use."""
    steps = published.steps if settings.steps == FROM_MODEL else settings.steps
    if settings.scheduler == PUBLISHED:
        # The model's current shift: ModelSamplingAuraFlow may have changed it.
        shift = model.get_model_object("model_sampling").shift
        return flow.sigmas(steps, shift, settings.denoise)
    return comfy.samplers.KSampler(
        model,
        steps=steps,
        device=model.load_device,
        sampler=settings.sampler,
        scheduler=settings.scheduler,
        denoise=settings.denoise,
        model_options=model.model_options,
    ).sigmas


def published_settings(model: Any) -> Sampling:
    """The published settings of an L2P MODEL.

    Raises:
        ValueError: for any other MODEL.
    """
    if not works_on_pixels(model):
        raise ValueError(
            "This model works on latents, not on pixels: connect an L2P model, from L2P Loader or L2P Demo, or sample "
            "this one with KSampler."
        )
    return sampling_of(model.model.l2p)
