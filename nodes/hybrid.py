"""Hand-over between spaces and growth between sizes in the host's terms: LATENT, SIGMAS, VAE and MODEL.

The host's flow samplers return x / (1 - sigma) for a sampling that stops at sigma, and multiply by 1 - sigma when they
start at it (`CONST` in comfy/model_sampling.py). After a change of space, the next sampler therefore needs only a clean
image and a noise level, and adds its own noise; a grown image is already noisy and is sampled without new noise.
"""

from __future__ import annotations

import math
from typing import Any

import comfy.model_management
import comfy.model_sampling
import comfy.sample
import torch
from torch import Tensor

from ..l2p_core import flow
from ..l2p_core.config import PIXEL_CHANNELS
from ..l2p_core.growth import STILL_GOOD, grow, safe_sigma
from ..l2p_core.hybrid import latent_sigma, pixel_sigma, resized
from .model.dual import works_on_pixels
from .model.limits import check_memory, check_pixels, image_bytes
from .pixels import image_to_pixels, pixels_to_image
from .sizes import check_sides

HostLatent = dict[str, Any]

_ROUNDING = 1e-4
"""Tolerance for noise levels that arrive as float32."""

_HELD = 4
"""Memory for growing on a device, in images of the new size: three, and some spare."""


def latent_to_pixels(
    denoised: HostLatent,
    vae: Any,
    sigmas: Tensor,
    model: Any,
    *,
    shift: float,
    steps: int,
    end: float,
    width: int,
    height: int,
) -> tuple[HostLatent, Tensor]:
    """Latents on their way to an image as the LATENT and SIGMAS of a pixel model's sampling to `end`.

    Args:
        denoised: the latent sampler's estimate of the clean image (`denoised_output`).
        sigmas: of the latent sampling; the last is the noise level at which it stopped.
        model: the pixel MODEL, whose schedule the SIGMAS follow.
        shift: m of `pixel_sigma`.
        width, height: of the image, 0 for that of the latents.

    Raises:
        ValueError: for pixels in place of latents, a VAE of other latents, a model that is not L2P, a side of a few
            pixels, or a noise level that cannot be handed over.
    """
    require_l2p(model)
    check_sides(width, height, "the size of the latents' image")
    channels = denoised["samples"].shape[1]
    if channels == PIXEL_CHANNELS != getattr(vae, "latent_channels", channels):
        raise ValueError("These are pixels already, not latents: continue with their model, or use Grow Pixels.")
    check_vae(vae, channels)
    start = pixel_sigma(stopped_at(sigmas), shift)
    clean = image_to_pixels(images(vae.decode(denoised["samples"])))
    return _sized(clean, width, height, denoised), schedule(model, start, end, steps)


def pixels_to_latent(
    denoised: HostLatent, vae: Any, sigmas: Tensor, model: Any, *, shift: float, steps: int, end: float
) -> tuple[HostLatent, Tensor]:
    """The other way: pixels on their way to an image as the LATENT and SIGMAS of a latent model's sampling.

    Raises:
        ValueError: for latents in place of pixels, a VAE of another model, or a noise level that cannot be handed over.
    """
    if works_on_pixels(model):
        raise ValueError("Pixels to Latent needs the latent model that samples next, and this is an L2P pixel model.")
    check_vae(vae, model.get_model_object("latent_format").latent_channels)
    start = latent_sigma(stopped_at(sigmas), shift)
    clean = {"samples": vae.encode(pixels_to_image(denoised)), **_mask_of(denoised)}
    return clean, schedule(model, start, end, steps)


def grow_pixels(
    pixels: HostLatent, sigmas: Tensor, model: Any, *, width: int, height: int, steps: int, end: float, seed: int
) -> tuple[HostLatent, Tensor, str]:
    """Half-finished pixels at a larger size, for a sampler that adds no noise, with a sentence if it is too late.

    Args:
        pixels: the sampler's `output`, which stopped at the last of `sigmas`.
        model: the pixel MODEL that samples next, of the same or a larger variant.
        width, height: of the larger image, 0 for twice the side.

    Raises:
        ValueError: for a model that is not L2P, a mask, another aspect ratio, a smaller size, or a finished image.
    """
    require_l2p(model)
    check_pixels(pixels["samples"].shape)
    mask = pixels.get("noise_mask")
    if mask is not None and (mask < 1).any():
        # The sampler would keep the noise that the half-finished image has there.
        raise ValueError(
            "A growing image cannot keep what its mask leaves unpainted, which exists at its own size alone: sample "
            "without the mask, or to the end at this size."
        )
    sigma = stopped_at(sigmas)
    samples = pixels["samples"]
    batch, _, old_height, old_width = samples.shape
    height, width = height or 2 * old_height, width or 2 * old_width
    check_memory(model, batch, height, width)
    noise = comfy.sample.prepare_noise(torch.zeros(1).expand(batch, 3, height, width), seed)
    device = _device_for(batch, height, width)
    grown, level = grow(samples.to(device, torch.float32) * (1.0 - sigma), sigma, noise.to(device))
    del noise
    latent: HostLatent = {"samples": grown.div_(1.0 - level).cpu(), "downscale_ratio_spacial": 1}
    safe = safe_sigma((old_height, old_width), (height, width), delta=STILL_GOOD)
    late = (
        f"Growing to {width} x {height} at noise level {sigma:.2f}: below {safe:.2f} the image may lack fine detail."
        if sigma < safe - _ROUNDING
        else ""
    )
    return latent, schedule(model, level, end, steps), late


def schedule(model: Any, start: float, end: float, steps: int) -> Tensor:
    """The noise levels (steps + 1,) of a MODEL's own schedule from `start` down to `end`.

    Raises:
        ValueError: for a model that is not one of flow matching, or levels that do not fall.
    """
    if not end < start:
        raise ValueError(
            f"This part starts at noise level {start:.4g} and cannot stop at {end:.4g}: type a lower stop_at."
        )
    return flow.sigmas_between(start, end, steps, _shift(model))


def _shift(model: Any) -> float:
    sampling = model.get_model_object("model_sampling")
    if not isinstance(sampling, comfy.model_sampling.CONST):
        raise ValueError(
            f"{type(model.model).__name__} is not a flow matching model, and only those can hand over between latents "
            "and pixels: use Z-Image, Lumina-2 or another source of L2P."
        )
    # ModelSamplingFlux keeps the logarithm.
    is_flux = isinstance(sampling, comfy.model_sampling.ModelSamplingFlux)
    return float(math.exp(sampling.shift) if is_flux else sampling.shift)


def stopped_at(sigmas: Tensor) -> float:
    """The noise level at which the sampling of these SIGMAS stopped.

    Raises:
        ValueError: if there are none, or it went to its end.
    """
    if not len(sigmas):
        raise ValueError(
            "The SIGMAS are empty: connect those of the sampling that stopped half-way, from Split Sigmas."
        )
    if sigmas[-1] <= 0:
        raise ValueError(
            "That sampling ran to its end, so no noise is left: stop it half-way with Sigmas of a Part, or "
            "use Hybrid Sampler's restore or upscale for a finished image."
        )
    return float(sigmas[-1])


def check_vae(vae: Any, channels: int) -> None:
    """Refuse a VAE of other latents.

    Raises:
        ValueError: naming the channels of both.
    """
    of_vae = getattr(vae, "latent_channels", channels)
    if of_vae != channels:
        raise ValueError(
            f"This VAE's latents have {of_vae} channels and the model's {channels}: load the VAE that belongs to the "
            "latent model."
        )


def require_l2p(model: Any) -> None:
    """Raises ValueError unless the MODEL works on pixels."""
    if not works_on_pixels(model):
        raise ValueError(
            "This model works on latents, not on pixels: connect an L2P model, from L2P Loader or L2P Demo."
        )


def images(decoded: Tensor) -> Tensor:
    """What a VAE decoded as an IMAGE (B, H, W, 3): one for videos adds frames."""
    return decoded.reshape(-1, *decoded.shape[-3:])


def _sized(clean: HostLatent, width: int, height: int, of: HostLatent) -> HostLatent:
    samples = clean["samples"]
    size = (height or samples.shape[-2], width or samples.shape[-1])
    return {**clean, "samples": resized(samples, size), **_mask_of(of)}


def _mask_of(latent: HostLatent) -> HostLatent:
    """The noise mask is passed on: the host fits it to any size."""
    return {"noise_mask": latent["noise_mask"]} if "noise_mask" in latent else {}


def _device_for(batch: int, height: int, width: int) -> torch.device:
    device = comfy.model_management.get_torch_device()
    # Complex arithmetic is not there on every other kind of device.
    if device.type != "cuda":
        return torch.device("cpu")
    fits = comfy.model_management.get_free_memory(device) > _HELD * image_bytes(batch, height, width)
    return device if fits else torch.device("cpu")
