"""The golden vectors: weights and inputs follow from names, outputs are stored in tests/golden."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from comfyui_l2p.l2p_core.config import ModelConfig
from comfyui_l2p.l2p_core.layouts import to_comfy
from comfyui_l2p.l2p_core.model import L2PModel

GOLDEN = Path(__file__).parent / "golden"


def load(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The sizes and the stored outputs of one golden file."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        return json.loads(file.metadata()["config"]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def array(name: str, shape: tuple[int, ...] | list[int], seed: int, scale: float = 1.0) -> Tensor:
    """The tensor that a name, a shape and a seed stand for."""
    state = np.random.RandomState((zlib.crc32(name.encode()) ^ seed) & 0xFFFFFFFF)
    return torch.from_numpy((state.standard_normal(shape) * scale).astype(np.float32))


def weight(name: str, shape: list[int], seed: int) -> Tensor:
    """A parameter in diffusers layout."""
    if "norm" in name or name == "cap_embedder.0.weight":
        return 1 + array(name, shape, seed, 0.1)
    if "pad_token" in name:
        return array(name, shape, seed, 0.5)
    if len(shape) >= 2:
        return array(name, shape, seed, float(np.prod(shape[1:])) ** -0.5)
    return array(name, shape, seed, 0.1)


def diffusers_weights(name: str = "dit_16", seed: int | None = None) -> dict[str, Tensor]:
    """All weights of a golden model, in diffusers layout; only `dit_*` files list their keys."""
    config, _ = load(name)
    seed = config["seed"] if seed is None else seed
    return {key: weight(key, shape, seed) for key, shape in config["keys"].items()}


def model(name: str = "dit_16", seed: int | None = None) -> L2PModel:
    """A golden model in float32."""
    weights = diffusers_weights(name, seed)
    built = L2PModel(ModelConfig.from_shapes({key: tuple(value.shape) for key, value in weights.items()}))
    built.load_state_dict(to_comfy(weights))
    return built


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what was expected."""
    return float((value.double() - expected.double()).norm() / expected.double().norm())
