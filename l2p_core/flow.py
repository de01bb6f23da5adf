"""Flow matching: schedule, noising, loss and Euler sampling (arXiv 2605.12013 section 3.3).

x_sigma = (1 - sigma) x0 + sigma noise; the model predicts the velocity noise - x0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .backbone import Caption, Captions
from .ops.finite import cause, check_finite, weights_of

FlowModel = Callable[[Tensor, Tensor, Any], Tensor]
"""(noisy, sigma (B,), captions) -> velocity, such as L2PModel and LatentModel."""

StepCallback = Callable[[int, int, Tensor], None]
"""Called after every step with (steps done, total steps, predicted x0); may raise to interrupt."""

TRAINING_GRID_STEPS = 500


def sigmas(steps: int, shift: float = 3.0, denoise: float = 1.0) -> Tensor:
    """The shifted schedule: u falls linearly from `denoise` to 0, sigma = shift u / (1 + (shift - 1) u).

    Args:
        steps: evaluations of the model, 1 or more.
        shift: above 1 spends more steps at high noise; above 0.
        denoise: where u starts, in (0, 1]; 1 starts from pure noise.

    Returns:
        (steps + 1,) float32, decreasing to 0.

    Raises:
        ValueError: for values outside these ranges.
    """
    _check_schedule(steps, shift)
    if not 0 < denoise <= 1:
        raise ValueError(f"Denoise must be above 0 and at most 1, not {denoise}.")
    u = torch.linspace(denoise, 0, steps + 1, dtype=torch.float64)
    return (shift * u / (1 + (shift - 1) * u)).float()


def _check_schedule(steps: int, shift: float) -> None:
    if steps < 1:
        raise ValueError(f"Sampling needs at least 1 step, not {steps}.")
    if not 0 < shift < math.inf:
        raise ValueError(f"The shift must be above 0, not {shift}; 3 is the published value.")


def sigmas_between(start: float, end: float, steps: int, shift: float = 3.0) -> Tensor:
    """The part of the shifted schedule from noise level `start` down to `end`; u falls linearly between them.

    Returns:
        (steps + 1,) float32.

    Raises:
        ValueError: unless 0 <= end < start <= 1, for steps below 1 and for a shift that is not above 0.
    """
    if not 0 <= end < start <= 1:
        raise ValueError(f"Noise levels must fall between 1 and 0, not from {start} to {end}.")
    _check_schedule(steps, shift)
    first, last = (sigma / (shift - (shift - 1) * sigma) for sigma in (start, end))
    u = torch.linspace(first, last, steps + 1, dtype=torch.float64)
    schedule = shift * u / (1 + (shift - 1) * u)
    schedule[0], schedule[-1] = start, end
    return schedule.float()


def training_sigmas(shift: float = 3.0) -> Tensor:
    """The grid (500,) of noise levels that training samples uniformly, without the final 0."""
    return sigmas(TRAINING_GRID_STEPS, shift)[:-1]


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """(1 - sigma) x0 + sigma noise, for x0 and noise (B, C, H, W) and sigma (B,); float32."""
    sigma = sigma.float()[:, None, None, None]
    return (1 - sigma) * x0.float() + sigma * noise.float()


def velocity_errors(model: FlowModel, x0: Tensor, noise: Tensor, sigma: Tensor, captions: Captions) -> Tensor:
    """Each sample's mean squared velocity error, (B,) float32; arguments as for `velocity_loss`."""
    predicted = model(add_noise(x0, noise, sigma), sigma, captions)
    return (predicted.float() - (noise.float() - x0.float())).square().flatten(1).mean(1)


def velocity_loss(model: FlowModel, x0: Tensor, noise: Tensor, sigma: Tensor, captions: Captions) -> Tensor:
    """The training objective: mean squared error of the predicted velocity, unweighted.

    Args:
        model: L2PModel for pixels, LatentModel for latents.
        x0: (B, C, H, W) clean images in [-1, 1] (or latents).
        noise: (B, C, H, W) standard normal.
        sigma: (B,) noise levels in [0, 1].
        captions: B tensors (L_i, caption_dim), or what `refined` made of them.

    Returns:
        A float32 scalar.
    """
    return velocity_errors(model, x0, noise, sigma, captions).mean()


@torch.no_grad()
def integrate(
    model: FlowModel,
    x: Tensor,
    captions: Sequence[Caption],
    *,
    sigmas: Tensor,
    cfg: float = 1.0,
    negative: Sequence[Caption] | None = None,
    known: tuple[Tensor, Tensor] | None = None,
    progress: StepCallback | None = None,
) -> tuple[Tensor, Tensor]:
    """Euler steps from x at sigmas[0], (B, C, H, W) float32, to sigmas[-1], which need not be 0.

    `known` is a velocity that leads back to the original image, and a mask that is 0 where it applies.

    Returns:
        x there, and the velocity of the last step: x - sigmas[-1] velocity is its estimate of the clean image.

    Raises:
        ValueError: if guidance is requested without negative captions.
    """
    if not math.isfinite(cfg):
        raise ValueError(f"Guidance (cfg) must be a finite number, not {cfg}.")
    if cfg != 1.0 and negative is None:
        raise ValueError("Guidance (cfg other than 1) needs a negative caption for each image; it may be empty text.")
    # What the model reads in every step, if it can compute that in advance.
    refined = getattr(model, "refined", lambda captions: captions)
    captions, negative = refined(captions), None if cfg == 1.0 else refined(negative)
    steps = sigmas.tolist()
    velocity = x  # until the first step
    for i, (sigma, following) in enumerate(zip(steps, steps[1:], strict=False)):
        level = torch.full((len(x),), sigma, dtype=torch.float32, device=x.device)
        velocity = model(x, level, captions).float()
        if negative is not None:
            # Two passes rather than one doubled batch: half the memory, and no masked attention.
            unguided = model(x, level, negative).float()
            velocity = unguided + cfg * (velocity - unguided)
        if known is not None:
            velocity = torch.lerp(known[0], velocity, known[1])
        if progress:
            progress(i + 1, len(steps) - 1, x - sigma * velocity)
        x = x + (following - sigma) * velocity
    return x, velocity


@torch.no_grad()
def sample(
    model: FlowModel,
    noise: Tensor,
    captions: Sequence[Caption],
    *,
    sigmas: Tensor,
    cfg: float = 1.0,
    negative: Sequence[Caption] | None = None,
    init: Tensor | None = None,
    mask: Tensor | None = None,
    progress: StepCallback | None = None,
) -> Tensor:
    """Generate images with Euler steps and classifier-free guidance.

    Args:
        model: an L2PModel.
        noise: (B, 3, H, W) standard normal.
        captions: B captions, see `L2PModel.forward`.
        sigmas: (steps + 1,) decreasing noise levels, see `sigmas`.
        cfg: guidance, v = v_negative + cfg (v - v_negative); 1 disables guidance and skips the second pass.
        negative: B captions, required unless cfg is 1.
        init: (B, 3, H, W) images in [-1, 1] to start from (image-to-image), noised to sigmas[0].
        mask: with `init`: (B or 1, 1, H, W) in [0, 1], 1 where it is repainted. Where it is 0, the result is `init`,
            bit for bit and unclamped.
        progress: called after every step.

    Returns:
        Pixels (B, 3, H, W) in [-1, 1], float32.

    Raises:
        ValueError: if guidance is requested without negative captions, a mask is given without an image, or an image is
            not finite.
    """
    if mask is not None and init is None:
        raise ValueError("A mask needs an image to repaint: give it as init.")
    x = noise.float() if init is None else add_noise(init, noise, sigmas[:1].to(noise.device).expand(len(noise)))
    known = None if mask is None or init is None else (noise.float() - init.float(), mask)
    end, _ = integrate(model, x, captions, sigmas=sigmas, cfg=cfg, negative=negative, known=known, progress=progress)
    check_finite(end, lambda: cause(weights_of(model), _inputs(captions, negative, init)))
    end = end.clamp(-1, 1)
    return end if mask is None or init is None else torch.where(mask > 0, end, init.float())


def _inputs(
    captions: Sequence[Any], negative: Sequence[Any] | None, init: Tensor | None
) -> Iterator[tuple[str, Tensor]]:
    """The inputs of a model, named as in error messages."""
    for caption in (*captions, *(negative or ())):
        features = getattr(caption, "features", caption)
        if isinstance(features, Tensor):
            yield "the caption's text encoding", features
    if init is not None:
        yield "the image to start from", init


def to_image(pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1] to an image in [0, 1]."""
    return ((pixels + 1) / 2).clamp(0, 1)
