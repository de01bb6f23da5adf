"""Whether the device computes what the published code does: relative errors in every precision.

In a checkout the expected velocities are the published code's (tests/golden). An installed package does not contain
them; there a similar model is computed on the CPU in float32, which tests compare with the published code.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...l2p_core.config import VARIANTS
from ...l2p_core.layouts import to_diffusers
from ...l2p_core.model import L2PModel, key_shapes
from . import golden_vectors
from .gpu_measure import Bench, Figures, relative_error
from .gpu_scale import QUICK

GOLDEN = Path(__file__).parents[2] / "tests" / "golden"


@dataclass(frozen=True)
class Case:
    """One image: its inputs and every `stride`-th row and column of its velocity."""

    pixels: Tensor
    sigma: float
    caption: Tensor
    stride: int
    velocity: Tensor


@dataclass(frozen=True)
class Golden:
    """The scene of a variant: a model on the CPU, its cases, and their origin."""

    variant: str

    def make(self, bench: Bench) -> tuple[L2PModel, list[Case], str]:
        path = GOLDEN / f"dit_{VARIANTS[self.variant].patch_size}.safetensors"
        return published(path) if bench.scale.golden and path.exists() else own(self.variant)


def published(path: Path) -> tuple[L2PModel, list[Case], str]:
    """A golden file's model, cases and origin."""
    config, stored = golden_vectors.load(path)
    seed = config["seed"]
    cases = [
        Case(
            golden_vectors.array(f"case{i}.x", (3, case["height"], case["width"]), seed),
            case["sigma"],
            golden_vectors.array(f"case{i}.cap_feats", (case["caption_tokens"], config["cap_feat_dim"]), seed),
            config["output_stride"],
            stored[f"case{i}.velocity"],
        )
        for i, case in enumerate(config["cases"])
    ]
    return golden_vectors.model(config["keys"], seed), cases, "against the published code"


@torch.no_grad()
def own(variant: str) -> tuple[L2PModel, list[Case], str]:
    """The same for a small model that is computed here."""
    config, side, seed = QUICK.config(variant), QUICK.sides[variant], 0
    keys = to_diffusers({key: torch.empty(shape, device="meta") for key, shape in key_shapes(config).items()})
    model = golden_vectors.model({key: tuple(tensor.shape) for key, tensor in keys.items()}, seed)
    pixels = golden_vectors.array("x", (3, side, side), seed)
    caption = golden_vectors.array("cap_feats", (QUICK.caption, config.caption_dim), seed)
    velocity = model(pixels[None], torch.tensor([0.6]), [caption])[0]
    return model, [Case(pixels, 0.6, caption, 1, velocity)], "against this code on the CPU"


@dataclass(frozen=True)
class InPrecision:
    """Measures the largest error over a variant's cases.

    Attributes:
        dtype: of weights and computation.
        tf32: whether float32 products may be rounded to TF32; None keeps torch's setting.
    """

    dtype: torch.dtype
    tf32: bool | None = None

    @torch.no_grad()
    def __call__(self, bench: Bench, scene: tuple[L2PModel, list[Case], str]) -> Figures:
        model, cases, against = scene
        here = L2PModel(model.config).to(bench.device, self.dtype)
        here.load_state_dict(model.state_dict())
        with _tf32(self.tf32):
            errors = [self._error(bench, here, case) for case in cases]
        return {"error": max(errors), "note": against}

    def _error(self, bench: Bench, model: L2PModel, case: Case) -> float:
        sigma = torch.tensor([case.sigma], device=bench.device)
        velocity = model(case.pixels[None].to(bench.device), sigma, [case.caption.to(bench.device)])[0]
        return relative_error(velocity[:, :: case.stride, :: case.stride], case.velocity)


@contextmanager
def _tf32(allowed: bool | None) -> Iterator[None]:
    if allowed is None:
        yield
        return
    places: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn]
    before = [place.allow_tf32 for place in places]
    try:
        for place in places:
            place.allow_tf32 = allowed
        yield
    finally:
        for place, was in zip(places, before, strict=True):
            place.allow_tf32 = was
