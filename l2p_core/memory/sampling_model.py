"""Loads a model for sampling in a form that fits into memory.

The whole 6B model takes 12.5 GB in bfloat16, more than most GPUs have. Its blocks may be stored like frozen blocks in
training (`block_store`): in float8, which takes half of it, or in RAM, from which each block is copied to the device
when it is computed. Weights are read from the file one by one into their form and place; neither RAM nor the device
ever holds more than the weights that stay there and the one being read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..checkpoint import Checkpoint, empty_model, read_weights
from ..config import ModelConfig
from ..deltas.low_rank import LowRank
from ..files.tensor_io import DTYPE_NAMES, ProgressCallback
from ..model import L2PModel, key_shapes
from ..ops.eight_bit import FACTOR_BYTES, FLOAT8, ROUNDING_BYTES
from ..training_config import TrainingConfig
from . import block_store
from .block_stream import block_bytes, pinned_bytes


@dataclass(frozen=True)
class Form:
    """How weights are stored.

    Attributes:
        dtype: of all weights except those in float8, and of the computation.
        float8: whether the blocks' linear layers are stored in float8, with one factor per row.
        streamed: whether they are stored in RAM and copied to the device block by block.
    """

    dtype: torch.dtype
    float8: bool = False
    streamed: bool = False

    @property
    def storage(self) -> TrainingConfig:
        """The training configuration that stores frozen weights in this form."""
        precision = "bf16" if self.dtype == torch.bfloat16 else "fp32"
        return TrainingConfig(precision=precision, frozen="fp8" if self.float8 else "full", stream=self.streamed)

    def __post_init__(self) -> None:
        kept = self.float8 or self.streamed
        assert not kept or self.dtype in (torch.bfloat16, torch.float32), "blocks are stored in what training stores"


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


def weight_memory(config: ModelConfig, form: Form) -> WeightMemory:
    """The memory of a model's weights in a form, from shapes alone."""
    sizes = {key: math.prod(shape) for key, shape in key_shapes(config).items()}
    largest = max(sizes.values())
    blocks = _stored(config, form)
    stored = [layer for block in blocks for layer in block]
    plain = sum(sizes.values()) - sum(sizes[f"{layer.key}.weight"] for layer in stored)
    device = plain * form.dtype.itemsize
    device += sum(FACTOR_BYTES * layer.linear.out_features for layer in stored if layer.dtype == FLOAT8)
    ram = 0
    if form.streamed:
        homes = [block_bytes([(layer.dtype, layer.linear.weight.shape) for layer in block]) for block in blocks]
        device, ram = device + 2 * max(homes), pinned_bytes(homes)
    else:
        device += sum(layer.dtype.itemsize * sizes[f"{layer.key}.weight"] for layer in stored)
    loading = largest * (form.dtype.itemsize + (ROUNDING_BYTES if form.float8 else 0)) if stored else 0
    return WeightMemory(device, ram, loading, largest * form.dtype.itemsize if form.float8 else 0)


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
        CheckpointError: if it is not a complete L2P model, or is quantised.
    """
    checkpoint.pixel_config()
    model = empty_model(checkpoint)
    assert isinstance(model, L2PModel)
    names = dict.fromkeys(model.state_dict(), DTYPE_NAMES[form.dtype])
    puts = block_store.store(model, (), form.storage, device) if form.float8 or form.streamed else {}
    # The file's own dtype, so that weights are rounded only once.
    names |= {key: checkpoint.tensors[key].dtype for key in puts}
    state = {}
    for key, weight in read_weights(checkpoint, names, progress):
        adapter = (adapters or {}).get(key.removesuffix(".weight"))
        weight = weight if adapter is None else adapter.added_to(weight)
        if key in puts:
            puts[key](weight)
        else:
            state[key] = weight.to(device)
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).eval()


def _stored(config: ModelConfig, form: Form) -> list[list[block_store.Layer]]:
    """The layers that a form stores other than the model does, by block."""
    if not form.float8 and not form.streamed:
        return []
    with torch.device("meta"):
        model = L2PModel(config)
    return block_store.layers_of(model, (), form.storage)
