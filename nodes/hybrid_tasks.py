"""The stages of each Hybrid Sampler task: model, size, and the noise levels at which the stage starts and ends."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ..l2p_core.files.units import counted
from ..l2p_core.growth import SAFE, STILL_GOOD, Size, Space, grown_sigma, keeps_aspect, safe_sigma
from ..l2p_core.hybrid import pixel_sigma
from .options import HYBRID_TASKS

Start = Literal["noise", "image", "space", "growth", "on"]
"""What a stage starts from: noise alone, an image, the stage before it in the other space, smaller, or as it is."""

SWITCH = 0.65
RESTORED = 0.3
UPSCALED = 0.5
"""Noise levels at which latents hand over, and from which finished and enlarged images are sampled again. The first is
where images were nearer to clean renderings than those of pixels alone in both tiny worlds, see docs/which-space.md;
the others are those of common two-stage graphs. None was measured with real weights."""

UPSCALED_SIDE = 4096
_DECIMALS = 4
_GRID = 10**_DECIMALS
"""Levels of growth are those that can be typed into the parts, which then make the same image."""

LARGEST_GROWTH = 2.0
"""Growing to more than twice the side at once leaves a veil (SPEED)."""


@dataclass(frozen=True)
class PlannedStage:
    """A stage, see `hybrid.Stage`, before its model is known; sizes are (height, width) in pixels of the image.

    Attributes:
        large: whether the model for large images samples it.
    """

    space: Space
    size: Size
    begins: Start
    start: float
    end: float
    steps: int = 1
    large: bool = False


@dataclass(frozen=True)
class Asked:
    """The node's inputs; sizes are (height, width).

    Attributes:
        own: the side of the images that the pixel model was trained on, or that the latent model makes.
        large_own: of those that the model for large images was trained on, 0 without one.
        size: as typed; 0 stands for "not typed".
        image: size of the image to start from, None without.
        steps, latent_steps, large_steps: of each model for a whole image.
        switch: noise level, None for the task's own.
        shift: m of `pixel_sigma`.
    """

    task: str
    latent: bool
    pixels: bool
    own: int
    size: Size
    image: Size | None
    mask: bool
    steps: int
    latent_steps: int
    switch: float | None
    shift: float
    large_own: int = 0
    large_steps: int = 0


def stages(asked: Asked) -> list[PlannedStage]:
    """The stages in their order.

    Raises:
        ValueError: if a model, an image or a mask is missing or of no use to the task.
    """
    asked = replace(asked, size=_typed(asked))
    task = _automatic(asked) if asked.task == "auto" else asked.task
    _check(task, asked)
    return _with_steps(_PLANS[task](asked), asked)


def in_words(planned: Sequence[PlannedStage], cfgs: Sequence[float], evaluations: int | None = None) -> str:
    """Describe the stages for the node: their models, sizes, noise levels and evaluations.

    Args:
        evaluations: as counted; without it, one each step and two with guidance, as most samplers take.
    """
    said, total = [], 0
    for stage, cfg in zip(planned, cfgs, strict=True):
        total += stage.steps * (1 if cfg == 1.0 else 2)
        height, width = stage.size
        space = "latents" if stage.space == "latent" else "pixels"
        said.append(
            f"{space} {width} x {height}, noise {_written(stage.start)} to {_written(stage.end)}, "
            f"{counted(stage.steps, 'step')}"
        )
    return f"{'; '.join(said)}. {counted(total if evaluations is None else evaluations, 'evaluation')} in all."


def _written(level: float) -> str:
    """A noise level with two decimals, or all that the inputs of the parts take."""
    whole = f"{level:.{_DECIMALS}f}"
    return whole[:4] + whole[4:].rstrip("0")


def _automatic(asked: Asked) -> str:
    """The task that fits what is connected."""
    if asked.image:
        if asked.mask:
            return "edit"
        return "upscale" if _area(asked.size) > _area(asked.image) else "restore"
    if asked.pixels and _area(asked.size) > 2 * asked.own**2:
        return "large"
    return "fast" if asked.latent else "detail"


def _check(task: str, asked: Asked) -> None:
    if not (asked.latent or asked.pixels):
        raise ValueError("No model is connected: connect a latent model with its VAE, an L2P model, or both.")
    if task not in ("fast", "custom") and not asked.pixels:
        instead = "" if task in _OF_IMAGES else ", or choose fast"
        raise ValueError(f"The task {task} needs an L2P pixel model: connect one{instead}.")
    if task in _OF_IMAGES and not asked.image:
        raise ValueError(f"The task {task} needs an image: connect one.")
    if task not in _OF_IMAGES and asked.image:
        raise ValueError(
            f"The task {task} starts from noise: disconnect the image, or choose edit, restore or upscale."
        )
    if task == "edit" and not asked.mask:
        raise ValueError("The task edit needs a mask of what may change: connect one, or choose restore.")
    if asked.mask and not asked.image:
        raise ValueError("A mask needs the image to repaint: connect it, or disconnect the mask.")
    if task != "edit" and asked.mask:
        raise ValueError(
            f"The task {task} changes the whole image and cannot keep a mask's unpainted part: choose edit, or "
            "disconnect the mask."
        )
    if task == "custom" and not (asked.latent and asked.pixels):
        raise ValueError("The task custom switches from a latent model to a pixel model: connect both.")
    if task in ("edit", "restore") and asked.size not in ((0, 0), asked.image):
        assert asked.image
        raise ValueError(
            f"The task {task} keeps the image's size, {asked.image[1]} x {asked.image[0]}: leave width and height at "
            "0, or choose upscale."
        )


def _fast(asked: Asked) -> list[PlannedStage]:
    size = _size(asked)
    if not asked.pixels:
        return [PlannedStage("latent", size, "noise", 1.0, 0.0)]
    if not asked.latent:
        return [PlannedStage("pixels", size, "noise", 1.0, 0.0)]
    return _switched(asked, size)


def _switched(asked: Asked, size: Size) -> list[PlannedStage]:
    switch = SWITCH if asked.switch is None else asked.switch
    if not 0 < switch < 1:
        raise ValueError(f"switch is {switch:g}: use a noise level above 0 and below 1, or -1 for the task's own.")
    return [
        PlannedStage("latent", size, "noise", 1.0, switch),
        PlannedStage("pixels", size, "space", pixel_sigma(switch, asked.shift), 0.0),
    ]


def _detail(asked: Asked) -> list[PlannedStage]:
    height, width = _size(asked)
    # Below the size that it was trained at a model lays images out badly: in the tiny world a third came out wrong.
    factor = min(1.0, max(1 / LARGEST_GROWTH, asked.own / math.sqrt(height * width)))
    small = (math.ceil(height * factor), math.ceil(width * factor))
    return _grown([PlannedStage("pixels", small, "noise", 1.0, 0.0)], (height, width), asked)


def _large(asked: Asked) -> list[PlannedStage]:
    height, width = asked.size[0] or 2 * asked.own, asked.size[1] or 2 * asked.own
    shrunk = min(1.0, asked.own / math.sqrt(height * width))
    first = (round(height * shrunk), round(width * shrunk))
    return _grown(
        _switched(asked, first) if asked.latent else [PlannedStage("pixels", first, "noise", 1.0, 0.0)],
        (height, width),
        asked,
    )


def _grown(planned: list[PlannedStage], target: Size, asked: Asked) -> list[PlannedStage]:
    """The stages followed by growth to the target, by at most a factor of two at a time."""
    ratio = math.sqrt(_area(target) / _area(planned[-1].size))
    times = math.ceil(math.log(ratio, LARGEST_GROWTH) - 1e-6) if ratio > 1 else 0
    # Above its own size a model decides shapes badly: in the tiny world growth at the safe level lost a third of them.
    delta = SAFE if asked.large_own else STILL_GOOD
    for left in range(times - 1, -1, -1):
        before = planned[-1]
        size = target if left == 0 else _scaled(target, ratio ** (-left / times))
        safe = math.ceil(safe_sigma(before.size, size, delta=delta) * _GRID) / _GRID
        # Where the noise is below the safe level already, the image grows at once.
        leave = safe if safe < before.start else math.floor(before.start * 0.999 * _GRID) / _GRID or before.start / 2
        planned[-1] = replace(before, end=leave)
        level = grown_sigma(leave, before.size, size)
        planned.append(PlannedStage("pixels", size, "growth", level, 0.0, large=_suits_large(size, asked)))
    return planned


def _edit(asked: Asked) -> list[PlannedStage]:
    assert asked.image
    return [_from_image(asked.image, 1.0, asked)]


def _restore(asked: Asked) -> list[PlannedStage]:
    assert asked.image
    return [_from_image(asked.image, RESTORED, asked)]


def _upscale(asked: Asked) -> list[PlannedStage]:
    assert asked.image
    height, width = asked.image
    size = asked.size if any(asked.size) else _scaled(asked.image, UPSCALED_SIDE / max(height, width))
    if _area(size) < _area(asked.image):
        raise ValueError(
            f"{size[1]} x {size[0]} is smaller than the image's {width} x {height} pixels: type a larger size."
        )
    if not keeps_aspect(asked.image, size):
        raise ValueError(
            f"{size[1]} x {size[0]} would stretch the image of {width} x {height}: type width or height alone, and "
            "leave the other at 0."
        )
    return [_from_image(size, UPSCALED, asked)]


def _from_image(size: Size, level: float, asked: Asked) -> PlannedStage:
    start = level if asked.switch is None else asked.switch
    if not 0 < start <= 1:
        raise ValueError(f"switch is {start:g}: use a noise level above 0 and up to 1, or -1 for the task's own.")
    return PlannedStage("pixels", size, "image", start, 0.0, large=_suits_large(size, asked))


def _suits_large(size: Size, asked: Asked) -> bool:
    """Whether a size is nearer to what the model for large images was trained at."""
    return bool(asked.large_own) and _area(size) > asked.own * asked.large_own


_OF_IMAGES = ("edit", "restore", "upscale")
_PLANS: dict[str, Callable[[Asked], list[PlannedStage]]] = {
    "fast": _fast,
    "detail": _detail,
    "large": _large,
    "edit": _edit,
    "restore": _restore,
    "upscale": _upscale,
    "custom": _fast,
}
assert {"auto", *_PLANS} == set(HYBRID_TASKS)


def _with_steps(planned: list[PlannedStage], asked: Asked) -> list[PlannedStage]:
    """Each stage's share of its model's steps, by the share of the schedule's even steps that it takes."""
    return [
        replace(
            stage,
            steps=max(
                1,
                round(_whole_steps(stage, asked) * (_even(stage.start) - _even(stage.end))),
            ),
        )
        for stage in planned
    ]


def _whole_steps(stage: PlannedStage, asked: Asked) -> int:
    if stage.space == "latent":
        return asked.latent_steps
    return asked.large_steps if stage.large else asked.steps


def _even(sigma: float) -> float:
    """u of the published schedule (shift 3) at a noise level: sigma = 3 u / (1 + 2 u)."""
    return sigma / (3 - 2 * sigma)


def _typed(asked: Asked) -> Size:
    """The size as typed; a side that was not follows the image's aspect ratio, if there is one."""
    height, width = asked.size
    if asked.image is None or bool(height) == bool(width):
        return asked.size
    return _scaled(asked.image, height / asked.image[0] if height else width / asked.image[1])


def _size(asked: Asked) -> Size:
    return asked.size[0] or asked.own, asked.size[1] or asked.own


def _scaled(size: Size, factor: float) -> Size:
    return round(size[0] * factor), round(size[1] * factor)


def _area(size: Size) -> int:
    return size[0] * size[1]
