"""The golden vectors: weights and inputs follow from names, outputs are stored in tests/golden."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from comfyui_l2p.l2p_core.model import L2PModel
from comfyui_l2p.train.benchmark import golden_vectors
from comfyui_l2p.train.benchmark.golden_vectors import array as array
from comfyui_l2p.train.benchmark.golden_vectors import weight as weight

GOLDEN = Path(__file__).parent / "golden"


def load(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The sizes and the stored outputs of one golden file."""
    return golden_vectors.load(GOLDEN / f"{name}.safetensors")


def diffusers_weights(name: str = "dit_16", seed: int | None = None) -> dict[str, Tensor]:
    """All weights of a golden model, in diffusers layout; only `dit_*` files list their keys."""
    config, _ = load(name)
    seed = config["seed"] if seed is None else seed
    return {key: weight(key, shape, seed) for key, shape in config["keys"].items()}


def model(name: str = "dit_16", seed: int | None = None) -> L2PModel:
    """A golden model in float32."""
    config, _ = load(name)
    return golden_vectors.model(config["keys"], config["seed"] if seed is None else seed)


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what was expected."""
    return float((value.double() - expected.double()).norm() / expected.double().norm())
