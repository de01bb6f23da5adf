"""The golden vectors: weights and inputs derive from names; outputs of the published code are stored."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from ...l2p_core.config import ModelConfig
from ...l2p_core.layouts import to_comfy
from ...l2p_core.model import L2PModel


def load(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The sizes and the stored outputs of a golden file."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["config"]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def array(name: str, shape: Sequence[int], seed: int, scale: float = 1.0) -> Tensor:
    """The float32 tensor determined by a name, a shape and a seed."""
    state = np.random.RandomState((zlib.crc32(name.encode()) ^ seed) & 0xFFFFFFFF)
    return torch.from_numpy((state.standard_normal(tuple(shape)) * scale).astype(np.float32))


def weight(name: str, shape: Sequence[int], seed: int) -> Tensor:
    """A parameter in diffusers layout."""
    if "norm" in name or name == "cap_embedder.0.weight":
        return 1 + array(name, shape, seed, 0.1)
    if "pad_token" in name:
        return array(name, shape, seed, 0.5)
    if len(shape) >= 2:
        return array(name, shape, seed, float(np.prod(shape[1:])) ** -0.5)
    return array(name, shape, seed, 0.1)


def model(keys: Mapping[str, Sequence[int]], seed: int) -> L2PModel:
    """The golden model of these keys (diffusers layout) and shapes, in float32."""
    weights = {key: weight(key, shape, seed) for key, shape in keys.items()}
    built = L2PModel(ModelConfig.from_shapes({key: tuple(value.shape) for key, value in weights.items()}))
    built.load_state_dict(to_comfy(weights))
    return built
