"""The methods of sampling that `l2p benchmark hybrid` compares, each as a list of stages."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

from ...l2p_core.flow import FlowModel
from ...l2p_core.growth import Size, Space, safe_sigma
from ...l2p_core.hybrid import Stage
from ...l2p_core.model import L2PModel, LatentModel
from .hybrid_worlds import World

CFG = 2.0
STEPS = 6
"""Steps of all methods that are compared at equal evaluations."""
SWITCHES, SHIFTS = (0.8, 0.65, 0.5, 0.35), (1.0, 3.0)
RESTORED = (0.2, 0.3, 0.4)
GROWN_AT = (0.35, 0.2)
"""Noise levels below `safe_sigma` at which growth is also tried."""


@dataclass(frozen=True)
class Method:
    """A way of sampling: its name, its stages, and the shift between the spaces."""

    name: str
    stages: list[Stage]
    shift: float = 1.0

    @property
    def evaluations(self) -> int:
        """The model's evaluations for one image, guidance included."""
        return sum(stage.steps * (1 if stage.cfg == 1 else 2) for stage in self.stages)

    @property
    def size(self) -> Size:
        """The size of the image in pixels."""
        return self.stages[-1].size

    def without_growth(self) -> Method | None:
        """The same stages at the size and with the model from which they grow; None if they do not grow."""
        grown = next((i for i, (one, two) in enumerate(pairwise(self.stages)) if _grows(one, two)), None)
        if grown is None:
            return None
        last = self.stages[grown]
        kept = [replace(stage, size=last.size, model=last.model) for stage in self.stages[grown + 1 :]]
        return replace(self, name=f"{self.name}, without growth", stages=[*self.stages[: grown + 1], *kept])


def methods_in(world: World) -> list[Method]:
    """One space alone, hand-over at several levels and maps, a finished image sampled again, and growth."""
    latent, pixels = world.latent, world.pixels
    own = (world.side, world.side)
    return [
        *_alone(latent, pixels, own),
        *_switched(latent, pixels, own),
        *_restored(latent, pixels, own),
        *_grown(world),
        *_to_large(world),
    ]


def _alone(latent: LatentModel, pixels: L2PModel, size: Size) -> list[Method]:
    spaces: list[tuple[str, FlowModel, Space]] = [("latents", latent, "latent"), ("pixels", pixels, "pixels")]
    return [
        Method(f"{name} only, {steps} steps", [Stage(model, space, size, steps, cfg=CFG)])
        for steps in (STEPS, 2 * STEPS)
        for name, model, space in spaces
    ]


def _switched(latent: LatentModel, pixels: L2PModel, size: Size) -> list[Method]:
    found = []
    for switch in SWITCHES:
        first = max(1, min(STEPS - 1, round(STEPS * (1 - _even(switch)))))
        stages = [
            Stage(latent, "latent", size, first, end=switch, cfg=CFG),
            Stage(pixels, "pixels", size, STEPS - first, cfg=CFG),
        ]
        found += [Method(f"latents to {switch:g}, then pixels, shift {shift:g}", stages, shift) for shift in SHIFTS]
    return found


def _restored(latent: LatentModel, pixels: L2PModel, size: Size) -> list[Method]:
    finished = Stage(latent, "latent", size, STEPS - 2, cfg=CFG)
    return [
        Method(
            f"finished latents, restored from {level:g}",
            [finished, Stage(pixels, "pixels", size, 2, start=level, cfg=CFG)],
        )
        for level in RESTORED
    ]


def _grown(world: World) -> list[Method]:
    """Growth of the pixel model alone: from below its own size, and to twice that."""
    latent, pixels = world.latent, world.pixels
    half, own, double = ((side, side) for side in (world.side // 2, world.side, 2 * world.side))
    safe = safe_sigma(own, double)
    chain = [
        Stage(latent, "latent", own, 2, end=0.65, cfg=CFG),
        Stage(pixels, "pixels", own, 2, end=GROWN_AT[0], cfg=CFG),
        Stage(pixels, "pixels", double, 2, cfg=CFG),
    ]
    return [
        Method(f"from half the size, growing at {safe_sigma(half, own):.2f}", _two(pixels, half, own)),
        Method("twice the size directly", [Stage(pixels, "pixels", double, STEPS, cfg=CFG)]),
        *(
            Method(f"to twice the size, growing at {level:.2f}", _two(pixels, own, double, level=level))
            for level in (safe, *GROWN_AT)
        ),
        Method("latents to 0.65, pixels, to twice the size at 0.35", chain),
    ]


def _to_large(world: World) -> list[Method]:
    """Growth from the pixel model into the one for large images, if there is one."""
    if world.large is None:
        return []
    own, size = (world.side, world.side), (world.large_side, world.large_side)
    return [
        Method("large model directly", [Stage(world.large, "pixels", size, STEPS, cfg=CFG)]),
        *(
            Method(f"into the large model, growing at {level:.2f}", _two(world.pixels, own, size, world.large, level))
            for level in (safe_sigma(own, size), *GROWN_AT)
        ),
    ]


def _two(
    first: L2PModel, small: Size, large: Size, second: L2PModel | None = None, level: float | None = None
) -> list[Stage]:
    end = safe_sigma(small, large) if level is None else level
    return [
        Stage(first, "pixels", small, STEPS - 2, end=end, cfg=CFG),
        Stage(second or first, "pixels", large, 2, cfg=CFG),
    ]


def _grows(before: Stage, stage: Stage) -> bool:
    return before.space == stage.space and before.size != stage.size


def _even(sigma: float, shift: float = 3.0) -> float:
    """u of the published schedule at a noise level."""
    return sigma / (shift - (shift - 1) * sigma)
