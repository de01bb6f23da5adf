"""The methods of sampling that `l2p benchmark hybrid` compares, each as a list of stages."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

from ...l2p_core.growth import Size, safe_sigma
from ...l2p_core.hybrid import Stage
from ...l2p_core.model import L2PModel
from .hybrid_worlds import World

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
    return [*_alone(world), *_switched(world), *_restored(world), *_grown(world), *_to_large(world)]


def _latent(world: World, steps: int, end: float = 0.0) -> Stage:
    return Stage(world.latent, "latent", (world.side, world.side), steps, end=end, cfg=world.cfg)


def _pixels(
    world: World,
    steps: int,
    side: int | None = None,
    *,
    model: L2PModel | None = None,
    start: float | None = None,
    end: float = 0.0,
) -> Stage:
    size = (side or world.side,) * 2
    return Stage(model or world.pixels, "pixels", size, steps, start=start, end=end, cfg=world.cfg)


def _alone(world: World) -> list[Method]:
    return [
        Method(f"{name} only, {steps} steps", [stage(world, steps)])
        for steps in (STEPS, 2 * STEPS)
        for name, stage in (("latents", _latent), ("pixels", _pixels))
    ]


def _switched(world: World) -> list[Method]:
    found = []
    for switch in SWITCHES:
        first = max(1, min(STEPS - 1, round(STEPS * (1 - _even(switch)))))
        stages = [_latent(world, first, end=switch), _pixels(world, STEPS - first)]
        found += [Method(f"latents to {switch:g}, then pixels, shift {shift:g}", stages, shift) for shift in SHIFTS]
    return found


def _restored(world: World) -> list[Method]:
    return [
        Method(
            f"finished latents, restored from {level:g}", [_latent(world, STEPS - 2), _pixels(world, 2, start=level)]
        )
        for level in RESTORED
    ]


def _grown(world: World) -> list[Method]:
    """Growth of the pixel model alone: from below its own size, and to twice that."""
    half, own, double = world.side // 2, world.side, 2 * world.side
    chain = [_latent(world, 2, end=0.65), _pixels(world, 2, end=GROWN_AT[0]), _pixels(world, 2, double)]
    return [
        Method(f"from half the size, growing at {_safe(half, own):.2f}", _two(world, half, own, _safe(half, own))),
        Method("twice the size directly", [_pixels(world, STEPS, double)]),
        *(
            Method(f"to twice the size, growing at {level:.2f}", _two(world, own, double, level))
            for level in (_safe(own, double), *GROWN_AT)
        ),
        Method("latents to 0.65, pixels, to twice the size at 0.35", chain),
    ]


def _to_large(world: World) -> list[Method]:
    """Growth from the pixel model into the one for large images, if there is one."""
    if world.large is None:
        return []
    own, large = world.side, world.large_side
    return [
        Method("large model directly", [_pixels(world, STEPS, large, model=world.large)]),
        *(
            Method(f"into the large model, growing at {level:.2f}", _two(world, own, large, level, world.large))
            for level in (_safe(own, large), *GROWN_AT)
        ),
    ]


def _two(world: World, small: int, large: int, level: float, second: L2PModel | None = None) -> list[Stage]:
    return [_pixels(world, STEPS - 2, small, end=level), _pixels(world, 2, large, model=second)]


def _safe(small: int, large: int) -> float:
    return safe_sigma((small, small), (large, large))


def _grows(before: Stage, stage: Stage) -> bool:
    return before.space == stage.space and before.size != stage.size


def _even(sigma: float, shift: float = 3.0) -> float:
    """u of the published schedule at a noise level."""
    return sigma / (shift - (shift - 1) * sigma)
