"""L2P models with random weights, created on the compute device in their storage form.

A weight depends only on its name and the device, so models of one size agree in every storage form.
"""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor

from ...l2p_core.config import HEAD, PixelConfig
from ...l2p_core.memory import block_store
from ...l2p_core.memory.placement import Weights
from ...l2p_core.model import L2PModel


def random_model(
    config: PixelConfig, device: torch.device, weights: Weights, trained_on: torch.device | None = None
) -> L2PModel:
    """A model with random weights.

    Args:
        config: its sizes.
        device: to compute on.
        weights: how each is stored.
        trained_on: the device of those that train, if another.
    """
    with torch.device("meta"):
        model = L2PModel(config)
    for key, put in block_store.store(model, weights, device).items():
        put(random_weight(key, weights[key].shape, torch.bfloat16, device))
    state = {}
    for key in model.state_dict():
        weight = random_weight(key, weights[key].shape, weights[key].loaded_as, device)
        state[key] = weight.to(trained_on) if trained_on and weights[key].trains else weight
    model.load_state_dict(state, assign=True)
    return model


def with_variant(base: L2PModel, config: PixelConfig, device: torch.device) -> L2PModel:
    """A model of another variant around the same blocks, its patch embedder and head random."""
    with torch.device("meta"):
        model = L2PModel(config)
    new = (base.source.embedder, HEAD)
    for name, part in [*base.named_children(), *base.named_parameters(recurse=False)]:
        if name not in new:
            setattr(model, name, part)
    for name in new:
        part = model.get_submodule(name)
        weights = {
            key: random_weight(f"{name}.{key}", tuple(weight.shape), base.embedder_weight.dtype, device)
            for key, weight in part.state_dict().items()
        }
        part.load_state_dict(weights, assign=True)
    return model


def random_weight(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Values that preserve the scale of activations."""
    numbers = random_input(name, shape, dtype, device)
    if "norm" in name or name == "cap_embedder.0.weight":
        return numbers.mul_(0.1).add_(1)
    return numbers.mul_(1 / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 0.1)


def random_input(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Standard normal values."""
    torch.manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, dtype=dtype, device=device)
