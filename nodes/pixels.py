"""Conversion between images and the LATENT of a pixel model: the same values in another range and order, exact."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..l2p_core.files.units import counted
from ..l2p_core.hybrid import resized
from ..l2p_core.ops.finite import check_finite
from .model.limits import check_canvas


def empty_pixels(width: int, height: int, batch: int) -> dict[str, Any]:
    """A LATENT of mid-grey pixels, (batch, 3, height, width), for a sampler to fill.

    Raises:
        ValueError: if RAM cannot hold it.
    """
    check_canvas(batch, height, width)
    # The ratio tells the host that these are pixels, not latents of an eighth of the size.
    return {"samples": torch.zeros(batch, 3, height, width), "downscale_ratio_spacial": 1}


def image_to_pixels(image: Tensor, mask: Tensor | None = None, width: int = 0, height: int = 0) -> dict[str, Any]:
    """An IMAGE (B, H, W, 3 or more) in [0, 1] as a LATENT (B, 3, H, W) in [-1, 1]; an alpha channel is dropped.

    A mask (H, W) or (B, H, W) becomes the latent's noise mask: 1 is repainted, 0 is kept. Samplers fit it to the
    latent. A width or height of 0 is the image's own.

    Raises:
        ValueError: if the mask has another size than the image, or is empty.
    """
    samples = image[..., :3].movedim(-1, 1).float() * 2.0 - 1.0
    size = (height or samples.shape[-2], width or samples.shape[-1])
    if size != samples.shape[-2:]:
        check_canvas(len(samples), *size)
    latent: dict[str, Any] = {"samples": resized(samples, size).contiguous(), "downscale_ratio_spacial": 1}
    if mask is not None:
        check_mask(mask, image)
        latent["noise_mask"] = mask.reshape(-1, 1, *mask.shape[-2:])
    return latent


def pixels_to_image(latent: dict[str, Any], clamp: bool = True) -> Tensor:
    """The LATENT of a pixel model as an IMAGE (B, H, W, 3), clamped to [0, 1] unless values beyond are to be kept.

    Raises:
        ValueError: if the latent is not one of pixels, or not finite.
    """
    samples = latent["samples"]
    if samples.ndim != 4 or samples.shape[1] != 3:
        raise ValueError(
            f"This latent has the shape {tuple(samples.shape)}, but pixels have 3 channels: it belongs to a latent "
            "model and needs VAE Decode."
        )
    check_finite(samples)
    image = (samples.float() + 1.0) / 2.0
    return (image.clamp(0.0, 1.0) if clamp else image).movedim(1, -1).contiguous()


def range_of(image: Tensor) -> str:
    """The range of an IMAGE's values as a sentence, and how many lie beyond black and white."""
    lowest, highest = (float(value) for value in image.aminmax())
    beyond = float(((image < 0) | (image > 1)).sum()) / image.numel()
    return f"Values from {lowest:.4f} to {highest:.4f}; {beyond:.2%} lie beyond black (0) and white (1)."


def keep_unmasked(image: Tensor, original: Tensor, mask: Tensor) -> Tensor:
    """`image` with every pixel whose mask is 0 taken from `original`, bit for bit.

    The sampler already composites the original at every step, but its last sum still rounds.
    """
    painted = mask.reshape(-1, *mask.shape[-2:], 1) > 0
    return torch.where(painted.to(image.device), image, original[..., :3].to(image))


def check_mask(mask: Tensor, image: Tensor) -> None:
    """Raises ValueError unless the mask has the image's height and width, there is one mask or one for each image, and
    something is painted: Load Image returns an empty mask if nobody has painted one."""
    height, width = image.shape[1:3]
    if not mask.any():
        raise ValueError(
            "Nothing is painted on the image: right-click it, choose Open in Mask Editor and paint what is to change, "
            "or remove the mask's link to change all of it."
        )
    if mask.shape[-2:] != (height, width):
        raise ValueError(
            f"The mask is {mask.shape[-1]}x{mask.shape[-2]}, but the image is {width}x{height}: "
            "resize one of them to match the other."
        )
    if mask.ndim > 2 and mask.shape[0] not in (1, image.shape[0]):
        raise ValueError(
            f"There are {mask.shape[0]} masks for {counted(image.shape[0], 'image')}: give one mask, or one for each "
            "image."
        )
