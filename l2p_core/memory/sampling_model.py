"""Loads a model for sampling in a form that fits into memory.

The whole 6B model takes 12.5 GB in bfloat16, more than most GPUs have. Its blocks may be stored like frozen blocks in
training (`block_store`): in float8, which takes half of it, or in RAM, from which each block is copied to the device
when it is computed. Weights are read from the file one by one into their form and place; neither RAM nor the device
ever holds more than the weights that stay there and the one being read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..checkpoint import Checkpoint, empty_model, read_weights
from ..config import PixelConfig
from ..deltas.low_rank import LowRank, with_adapters
from ..files.tensor_io import ProgressCallback
from ..model import L2PModel
from ..ops.eight_bit import ROUNDING_BYTES
from . import block_store
from .block_stream import pinned_bytes
from .placement import Form, device_bytes, for_sampling, streamed_bytes


@dataclass(frozen=True)
class WeightMemory:
    """Memory of the weights, in bytes.

    Attributes:
        device: device memory while the model is loaded.
        ram: pinned RAM beside it.
        loading: device memory beyond `device` while a weight is converted to its form.
        computing: device memory beyond `device` while a layer is computed.
    """

    device: int
    ram: int
    loading: int
    computing: int


def weight_memory(config: PixelConfig, form: Form) -> WeightMemory:
    """The memory of a model's weights in a form, from shapes alone."""
    weights = for_sampling(config, form)
    homes = streamed_bytes(weights)
    largest = max(weight.elements for weight in weights.values()) * form.dtype.itemsize
    rounding = largest // form.dtype.itemsize * ROUNDING_BYTES if form.float8 else 0
    loading = largest + rounding if form.float8 or form.streamed else 0
    device, ram = sum(device_bytes(weights).values()), pinned_bytes(homes)
    return WeightMemory(device, ram, loading, largest if form.float8 else 0)


def load(
    checkpoint: Checkpoint,
    form: Form,
    device: torch.device,
    progress: ProgressCallback | None = None,
    adapters: Mapping[str, LowRank] | None = None,
) -> L2PModel:
    """Load an L2P model for sampling.

    Args:
        checkpoint: to load, such as a delta on its base (`deltas.delta_on_base`).
        form: how its weights are stored.
        device: to compute on.
        progress: called with (bytes read, total bytes).
        adapters: added to the weights of the layers that are their keys.

    Raises:
        CheckpointError: if it is not a complete L2P model, or is quantised in a format that is not read here.
    """
    model = empty_model(checkpoint)
    weights, keys = for_sampling(model.config, form), list(model.state_dict())
    puts = block_store.store(model, weights, device)
    names = block_store.read_as(checkpoint, weights, keys, puts)
    read = read_weights(checkpoint, names, progress)
    block_store.fill(model, with_adapters(adapters or {}, read), puts, lambda key: device)
    return model.requires_grad_(False).eval()
