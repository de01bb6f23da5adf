"""Both spaces in one sampling: hand-over between latents and pixels, and lists of stages.

A latent model is cheap where only the layout is decided; a pixel model keeps what a VAE loses. Both work on the same
flow x_sigma = (1 - sigma) x0 + sigma noise, so either can continue from the other's noisy image at any noise level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from .backbone import Caption
from .flow import FlowModel, StepCallback, add_noise, integrate, sigmas_between
from .growth import STILL_GOOD, Size, Space, grow, grown_sigma, safe_sigma
from .ops.finite import cause, check_finite, weights_of


class Codec(Protocol):
    """The VAE of a latent source; `downscale` is the side in pixels of a latent cell."""

    downscale: int
    channels: int

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, channels, H / downscale, W / downscale), as the source model reads them."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """The inverse of `encode`."""
        ...


def pixel_sigma(latent_sigma: float, shift: float = 1.0) -> float:
    """The noise level at which pixels continue from latents: m s / (1 + (m - 1) s) for the shift m.

    Pixels carry more energy in low frequencies than latents, so the same noise hides less of them: a shift above 1
    starts the pixel model at more noise, where it redraws more of the image.

    Raises:
        ValueError: for a noise level outside [0, 1) or a shift that is not above 0.
    """
    if not 0 <= latent_sigma < 1:
        raise ValueError(
            f"The space must change at a noise level from 0 to below 1, not {latent_sigma}: at 1 there is only noise."
        )
    _check_shift(shift)
    return shift * latent_sigma / (1 + (shift - 1) * latent_sigma)


def latent_sigma(pixel_sigma_: float, shift: float = 1.0) -> float:
    """The inverse of `pixel_sigma`: the noise level at which latents continue from pixels."""
    _check_shift(shift)
    return pixel_sigma(pixel_sigma_, 1 / shift)


def _check_shift(shift: float) -> None:
    if not 0 < shift < math.inf:
        raise ValueError(f"The shift between the spaces must be above 0, not {shift}; 1 keeps the noise level.")


def latents_to_pixels(latents: Tensor, sigma: float, noise: Tensor, codec: Codec) -> Tensor:
    """Clean latents to noisy pixels: decoded, resized to the noise's size, and noised to `sigma`.

    Args:
        latents: (B, C, h, w) the latent model's estimate of the clean image, z - sigma v.
        sigma: the pixel noise level, see `pixel_sigma`.
        noise: (B, 3, H, W) standard normal; its size is the result's.

    Returns:
        (B, 3, H, W) float32.
    """
    return renoise(codec.decode(latents), sigma, noise)


def pixels_to_latents(pixels: Tensor, sigma: float, noise: Tensor, codec: Codec) -> Tensor:
    """The other way: clean pixels (B, 3, H, W) in [-1, 1] to noisy latents (B, C, h, w) of the noise's size."""
    side = codec.downscale
    size = (noise.shape[-2] * side, noise.shape[-1] * side)
    return add_noise(codec.encode(resized(pixels, size)), noise, _level(sigma, noise))


def renoise(pixels: Tensor, sigma: float, noise: Tensor) -> Tensor:
    """Clean pixels (B, 3, h, w) at the noise's size and noise level: (B, 3, H, W) float32."""
    return add_noise(resized(pixels, (noise.shape[-2], noise.shape[-1])), noise, _level(sigma, noise))


def resized(pixels: Tensor, size: Size) -> Tensor:
    """Clean pixels (B, 3, h, w) in [-1, 1] at another size, bicubic; as they are at their own."""
    if tuple(pixels.shape[-2:]) == size:
        return pixels
    # Antialiasing matters where the image becomes smaller.
    return F.interpolate(pixels.float(), size, mode="bicubic", antialias=True).clamp(-1, 1)


def _level(sigma: float, like: Tensor) -> Tensor:
    return torch.full((len(like),), sigma, dtype=torch.float32, device=like.device)


@dataclass(frozen=True)
class Stage:
    """One model's part of a sampling.

    Attributes:
        model: LatentModel or L2PModel, or anything called like them.
        space: what the model works on.
        size: of the image, in pixels.
        steps: evaluations, twice as many with guidance.
        start: noise level to start at; None for the level that the previous stage ends at (1 for a first stage without
            an image).
        end: noise level to hand over at; 0 for the last stage.
        cfg: guidance; 1 disables it.
        shift: of the schedule between start and end.
    """

    model: FlowModel
    space: Space
    size: Size
    steps: int
    start: float | None = None
    end: float = 0.0
    cfg: float = 1.0
    shift: float = 3.0


def levels(stages: Sequence[Stage], *, image: bool = False, space_shift: float = 1.0) -> list[tuple[float, float]]:
    """The noise levels at which each stage starts and ends, checked without running anything.

    Args:
        stages: in their order.
        image: whether the first stage starts from an image; its `start` must then be given.
        space_shift: m of `pixel_sigma` wherever the space changes and the next stage states no start.

    Raises:
        ValueError: naming the stage that cannot follow the one before it.
    """
    if not stages:
        raise ValueError("Hybrid sampling needs at least one stage.")
    found: list[tuple[float, float]] = []
    for number, stage in enumerate(stages, 1):
        before = stages[number - 2] if number > 1 else None
        start = _handed_over(number, before, stage, space_shift) if before else _first_level(stage, image)
        if not 0 <= stage.end < start <= 1:
            raise ValueError(
                f"Stage {number} starts at noise level {start:.3g} and cannot end at {stage.end:.3g}:"
                " levels fall from 1 to 0."
            )
        found.append((start, stage.end))
    if stages[-1].end:
        raise ValueError(f"The last stage ends at noise level {stages[-1].end}: end it at 0, without noise.")
    return found


def _first_level(stage: Stage, image: bool) -> float:
    if not image:
        if stage.start not in (None, 1.0):
            raise ValueError(f"Without an image the first stage starts at noise level 1, not {stage.start}.")
        return 1.0
    if stage.start is None:
        raise ValueError("The first stage must state its noise level when it starts from an image.")
    return stage.start


def _handed_over(number: int, before: Stage, stage: Stage, space_shift: float) -> float:
    if stage.space != before.space:
        if stage.start is not None:
            return stage.start
        return (pixel_sigma if stage.space == "pixels" else latent_sigma)(before.end, space_shift)
    handed = before.end if stage.size == before.size else grown_sigma(before.end, before.size, stage.size)
    if stage.start is not None and not math.isclose(stage.start, handed, rel_tol=1e-4):
        raise ValueError(
            f"Stage {number} cannot start at noise level {stage.start}: the stage before it hands over at {handed:.4g}."
        )
    return handed


def cautions(stages: Sequence[Stage], codec: Codec | None = None) -> list[str]:
    """Sentences on growth that comes too late for the new size's detail (see `safe_sigma`)."""
    said = []
    for number, (before, stage) in enumerate(zip(stages, stages[1:], strict=False), 2):
        if before.space != stage.space or before.size == stage.size:
            continue
        safe = safe_sigma(_cells(before, codec), _cells(stage, codec), stage.space, STILL_GOOD)
        if before.end < safe:
            said.append(
                f"Stage {number} grows at noise level {before.end:.2f}; below {safe:.2f} the larger image may lack fine"
                " detail."
            )
    return said


def _cells(stage: Stage, codec: Codec | None) -> Size:
    """The size of the tensors that the stage's model works on."""
    if stage.space == "pixels":
        return stage.size
    if codec is None:
        raise ValueError("A stage in latent space needs the VAE of its model.")
    height, width = stage.size
    if height % codec.downscale or width % codec.downscale:
        raise ValueError(
            f"This VAE makes images whose sides are multiples of {codec.downscale}, not {width} x {height}."
        )
    return height // codec.downscale, width // codec.downscale


@torch.no_grad()
def sample(
    stages: Sequence[Stage],
    captions: Sequence[Caption],
    *,
    seed: int = 0,
    negative: Sequence[Caption] | None = None,
    codec: Codec | None = None,
    init: Tensor | None = None,
    space_shift: float = 1.0,
    device: torch.device | str = "cpu",
    progress: StepCallback | None = None,
) -> Tensor:
    """Run a list of stages to its end.

    Args:
        stages: checked by `levels` before the first evaluation.
        captions: B captions that all models read, see `L2PModel.forward`.
        seed: stage i, counted from 0, draws its noise with seed + i, see `stage_seed`.
        negative: B captions for guidance.
        codec: the VAE, needed where a stage is latent.
        init: (B, 3, H, W) images in [-1, 1] to start from.
        space_shift: see `levels`.
        device: of models and noise.
        progress: called after every step of all stages; may raise to interrupt.

    Returns:
        Pixels (B, 3, H, W) in [-1, 1] float32, of the last stage's size.

    Raises:
        ValueError: for stages that do not follow each other, a missing VAE, sizes that latents do not divide, or an
            image that is not finite.
    """
    plan = levels(stages, image=init is not None, space_shift=space_shift)
    for stage in stages:
        _cells(stage, codec)
    total, done = sum(stage.steps for stage in stages), 0
    state = _State(None, 0.0, init, "pixels")
    for index, (stage, (start, end)) in enumerate(zip(stages, plan, strict=True)):
        noise = stage_noise(stage_seed(seed, index), len(captions), stage, codec).to(device)
        x, velocity = integrate(
            stage.model,
            _entered(stage, start, noise, state, codec),
            captions,
            sigmas=sigmas_between(start, end, stage.steps, stage.shift),
            cfg=stage.cfg,
            negative=negative,
            progress=progress and _counted(progress, done, total),
        )
        done += stage.steps
        leaves = index + 1 < len(stages) and stages[index + 1].space != stage.space
        state = _State(x, end, velocity.mul_(-end).add_(x) if leaves else None, stage.space)
    assert state.noisy is not None
    x = state.noisy
    if state.space == "latent" and codec:
        x = codec.decode(x)
    check_finite(x, lambda: cause([item for stage in stages for item in weights_of(stage.model)]))
    return x.clamp(-1, 1)


def stage_seed(seed: int, index: int) -> int:
    """The seed of a stage's noise; after the largest that torch takes comes 0."""
    return (seed + index) % 2**64


def stage_noise(seed: int, batch: int, stage: Stage, codec: Codec | None = None) -> Tensor:
    """Standard normal noise (batch, C, h, w) of a stage's size, on the CPU and the same on every machine."""
    channels = codec.channels if codec and stage.space == "latent" else 3
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, *_cells(stage, codec), generator=generator)


@dataclass(frozen=True)
class _State:
    """The state between two stages: the noisy image at its level, and the clean estimate if the next stage needs it."""

    noisy: Tensor | None
    sigma: float
    clean: Tensor | None
    space: Space


def _entered(stage: Stage, start: float, noise: Tensor, state: _State, codec: Codec | None) -> Tensor:
    """The tensor that a stage starts from, with the noise's size and at the level `start`."""
    if state.clean is not None:
        if state.space == stage.space:
            return renoise(state.clean, start, noise)
        assert codec is not None  # or the stages' sizes were refused
        return (latents_to_pixels if stage.space == "pixels" else pixels_to_latents)(state.clean, start, noise, codec)
    if state.noisy is None:
        return noise
    return state.noisy if state.noisy.shape == noise.shape else grow(state.noisy, state.sigma, noise)[0]


def _counted(progress: StepCallback, done: int, total: int) -> StepCallback:
    return lambda step, _, clean: progress(done + step, total, clean)
