"""Stores the linear layers of a model's blocks in the form that a training configuration asks for.

Frozen layers become `FrozenLinear`, in fewer bits or streamed. Trained layers become `TrainedLinear` if they are
offloaded to RAM anyway and blocks are streamed. All share one stream, in the order in which blocks are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..backbone import Backbone
from ..ops.eight_bit import FLOAT8
from ..sources import source_of
from ..sources.source import Source
from ..training_config import TrainingConfig
from .block_stream import BlockStream, StreamedTensor
from .frozen_store import FrozenLinear, Resident, Streamed
from .trained_linear import TrainedLinear

Put = Callable[[Tensor], None]
"""Sets a weight or bias from a tensor of any float dtype, on any device."""


def wanted(config: TrainingConfig) -> bool:
    """Whether a run stores its blocks other than as the model's own layers."""
    return config.frozen == "fp8" or config.stream


def streams(config: TrainingConfig, trained: bool) -> bool:
    """Whether blocks that train, or frozen ones, are copied to the device one by one."""
    return config.stream and (config.offload or not trained)


class Layer(NamedTuple):
    """A linear layer to be replaced: its block, its name there, and the dtype to store it in."""

    block: str
    name: str
    linear: nn.Linear
    trained: bool
    dtype: torch.dtype

    @property
    def key(self) -> str:
        return f"{self.block}.{self.name}"


def store(model: Backbone, trained: Collection[str], config: TrainingConfig, device: torch.device) -> dict[str, Put]:
    """Replace every linear layer that the training stores in another form.

    Args:
        model: on any device, even "meta".
        trained: names of the parameters that train. A block with none of them is frozen.
        config: `frozen` and `precision` choose the dtype of weights; `stream` puts them into RAM, pinned if the device
            is a GPU.
        device: to compute on.

    Returns:
        For each key of a frozen layer, which the model's state dict no longer has, the function that sets its weight.
    """
    blocks = layers_of(model, trained, config)
    streamed = _streamed(blocks, config, device)
    puts: dict[str, Put] = {}
    for layer in (layer for layers in blocks for layer in layers):
        key = layer.key
        if layer.trained:
            new: nn.Module = TrainedLinear(layer.linear, streamed[key])
        else:
            here = key in streamed
            weight = Streamed(layer.dtype, device, streamed[key]) if here else Resident(layer.dtype, device)
            new = FrozenLinear(layer.linear, weight, device)
            puts[f"{key}.weight"] = weight.put
            if layer.linear.bias is not None:
                puts[f"{key}.bias"] = new.put_bias
        parent, _, child = key.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
    return puts


def layers_of(model: Backbone, trained: Collection[str], config: TrainingConfig) -> list[list[Layer]]:
    """The linear layers that `store` replaces, by block in the order in which blocks are computed."""
    # Empty for a model whose layers are already stored, see `training.loading`.
    return [layers for layers in _blocks(model, trained, config) if layers]


def store_loaded(model: Backbone, trained: Collection[str], config: TrainingConfig, device: torch.device) -> None:
    """`store` for a model that has its weights; each is released as soon as it is stored."""
    weights = model.state_dict()
    for key, put in store(model, trained, config, device).items():
        put(weights.pop(key))


def trained_linears(model: nn.Module) -> dict[str, TrainedLinear]:
    """The `TrainedLinear` layers by the names of their weights."""
    modules = model.named_modules()
    return {f"{name}.weight": module for name, module in modules if isinstance(module, TrainedLinear)}


def bytes_in_computer(model: nn.Module) -> int:
    """Bytes of RAM that a model's streamed weights take instead of the device's memory."""
    frozen = sum(module.bytes_in_computer for module in model.modules() if isinstance(module, FrozenLinear))
    return frozen + sum(layer.working.nbytes for layer in trained_linears(model).values())


def _blocks(model: Backbone, trained: Collection[str], config: TrainingConfig) -> Iterator[list[Layer]]:
    """The layers of each block that are stored in another form, in the order in which blocks are computed."""
    source = source_of(model.config)
    for block, module in list(model.blocks()):
        trains = any(own.startswith(f"{block}.") for own in trained)
        if trains and not streams(config, trained=True):
            continue
        yield [
            Layer(block, name, linear, trains, _dtype(name, trains, config, source))
            for name, linear in module.named_modules()
            if isinstance(linear, nn.Linear)
        ]


def _dtype(name: str, trains: bool, config: TrainingConfig, source: Source) -> torch.dtype:
    if config.frozen == "fp8" and not trains:
        return torch.bfloat16 if source.is_never_8_bit(name) else FLOAT8
    return torch.bfloat16 if config.precision == "bf16" else torch.float32


def _streamed(blocks: list[list[Layer]], config: TrainingConfig, device: torch.device) -> dict[str, StreamedTensor]:
    """The positions of streamed weights, by their layers' names."""
    if not config.stream or not blocks:
        return {}
    stream = BlockStream([[(layer.dtype, layer.linear.weight.shape) for layer in layers] for layers in blocks], device)
    return {
        layer.key: stream.tensor(number, position)
        for number, layers in enumerate(blocks)
        for position, layer in enumerate(layers)
    }
