"""The rows of `l2p benchmark gpu` as a table: the parts, what each measures, and its share of the time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...l2p_core.config import VARIANTS
from . import gpu_card
from .gpu_golden import Golden, InPrecision
from .gpu_head import Head, Pass
from .gpu_measure import Bench, Figures
from .gpu_sampling import SamplingScene, SamplingStep
from .gpu_training import Training


@dataclass(frozen=True)
class Measurement:
    """One measurement.

    Attributes:
        part: the part it belongs to.
        name: within its part.
        measure: takes the bench and the scene's result.
        scene: creates what is measured; neighbouring rows with equal scenes share it. None creates nothing.
    """

    part: str
    name: str
    measure: Callable[[Bench, Any], Figures]
    scene: Any = None

    @property
    def key(self) -> str:
        return f"{self.part}: {self.name}"


@dataclass(frozen=True)
class BenchmarkPart:
    """Rows that belong together.

    Attributes:
        name: to select it by.
        about: what it measures.
        share: of the time, relative to the other parts.
    """

    name: str
    about: str
    share: float
    measurements: tuple[Measurement, ...]


_PRECISIONS = {
    "fp32, TF32 off": InPrecision(torch.float32, tf32=False),
    "fp32, TF32 as set": InPrecision(torch.float32),
    "bf16": InPrecision(torch.bfloat16),
    "fp16": InPrecision(torch.float16),
}


_PASSES: list[tuple[str, str, bool | None]] = [
    ("whole plain", "whole", False),
    ("whole fused", "whole", True),
    ("auto", "auto", None),
    ("large tiles plain", "large", False),
    ("large tiles fused", "large", True),
    ("small tiles plain", "small", False),
    ("small tiles fused", "small", True),
]
"""Name, tiles and fusion of the head's rows; 1k is not larger than a tile."""


def _sampling() -> tuple[Measurement, ...]:
    scenes = [SamplingScene(weights, compiled) for weights in ("bf16", "fp8") for compiled in (False, True)]
    rows = []
    for scene in scenes:
        way = f"{scene.weights} {'compiled' if scene.compiled else 'eager'}"
        # The blocks, which fp8 concerns, are computed on as many tokens in all variants.
        for variant in VARIANTS if scene.weights == "bf16" else list(VARIANTS)[:2]:
            if way == "bf16 eager":
                rows.append(
                    Measurement(
                        "sampling", f"{variant} bf16 as published", SamplingStep(variant, published=True), scene
                    )
                )
            rows.append(Measurement("sampling", f"{variant} {way}", SamplingStep(variant), scene))
    return tuple(rows)


def _training() -> tuple[Measurement, ...]:
    settings = {
        "z-image-1k, 2 micro-batches": Training("z-image-1k", accumulate=2),
        "z-image-1k-16gb, 2 micro-batches": Training("z-image-1k-16gb", accumulate=2),
        "z-image-1k-16gb, streamed, 1 micro-batch": Training("z-image-1k-16gb", accumulate=1, stream=True),
        # Last, as compiling takes longest.
        "z-image-1k compiled, 2 micro-batches": Training("z-image-1k", accumulate=2, compiled=True),
    }
    return tuple(Measurement("training", name, measure) for name, measure in settings.items())


PARTS: tuple[BenchmarkPart, ...] = (
    BenchmarkPart(
        "card",
        "the device, its software, bandwidth from and to pinned memory, bf16 products and attention",
        1,
        (
            Measurement("card", "device", gpu_card.name),
            Measurement("card", "software", gpu_card.software),
            Measurement("card", "pinned memory to device", gpu_card.to_device),
            Measurement("card", "device to pinned memory", gpu_card.from_device),
            Measurement("card", "bf16 product", gpu_card.matmul),
            *(
                Measurement("card", f"{name} of a block", gpu_card.ProductSpeed(*sides))
                for name, sides in gpu_card.PRODUCTS.items()
            ),
            *(Measurement("card", f"attention, {name}", gpu_card.AttentionSpeed(name)) for name in gpu_card.ATTENTION),
        ),
    ),
    BenchmarkPart(
        "golden",
        "relative errors against the published code, in float32, bfloat16 and float16",
        1,
        tuple(
            Measurement("golden", f"{variant} {name}", measure, Golden(variant))
            for variant in VARIANTS
            for name, measure in _PRECISIONS.items()
        ),
    ),
    BenchmarkPart(
        "sampling", "a step of each variant, eager and compiled, and as published; of two also in fp8", 8, _sampling()
    ),
    BenchmarkPart(
        "head",
        "the Detailer Head alone: whole, in tiles, its decoder fused and not",
        2,
        tuple(
            Measurement("head", f"{variant} {name}", Pass(variant, tiles, fused), Head(variant))
            for variant in VARIANTS
            for name, tiles, fused in (_PASSES[:3] if variant == "1k" else _PASSES)
        ),
    ),
    BenchmarkPart(
        "training", "a step at 1024 pixels with three of the recipes' memory settings, and compiled", 9, _training()
    ),
)


def chosen(names: Sequence[str] | None) -> tuple[BenchmarkPart, ...]:
    """The parts of these names, in the table's order; None selects all.

    Raises:
        ValueError: for an unknown name.
    """
    known = [part.name for part in PARTS]
    for name in names or ():
        if name not in known:
            raise ValueError(f"There is no part {name!r}: choose from {', '.join(known)}.")
    return tuple(part for part in PARTS if names is None or part.name in names)
