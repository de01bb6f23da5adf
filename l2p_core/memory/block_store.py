"""Puts the linear layers of a model's blocks into the form that a training keeps them in.

Frozen ones become `FrozenLinear`, in few bits or streamed; trained ones `TrainedLinear` where RAM keeps them
anyway, because they are offloaded, and blocks are streamed. All share one stream, in the order in which they
are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..backbone import Backbone, Block
from ..training_config import TrainingConfig
from .block_stream import BlockStream, StreamedTensor
from .frozen_store import FLOAT8, FrozenLinear, Resident, Streamed
from .trained_linear import TrainedLinear

NEVER_FLOAT8 = "adaLN_modulation"
"""A layer that stays bfloat16: a fiftieth of a block's numbers, and its errors would scale whole tokens."""

Put = Callable[[Tensor], None]
"""Takes the numbers of a weight or bias, of any float dtype, from any device."""


def wanted(config: TrainingConfig) -> bool:
    """Whether a run keeps its blocks in another way than as a model's own layers."""
    return config.frozen == "fp8" or config.stream


def streams(config: TrainingConfig, trained: bool) -> bool:
    """Whether blocks that train, or those that do not, come to the device one by one."""
    return config.stream and (config.offload or not trained)


class Layer(NamedTuple):
    """A linear layer that will be kept otherwise: the block it is in, its name there, and the dtype to keep it in."""

    block: str
    name: str
    linear: nn.Linear
    trained: bool
    dtype: torch.dtype

    @property
    def key(self) -> str:
        return f"{self.block}.{self.name}"


def store(model: Backbone, trained: Collection[str], config: TrainingConfig, device: torch.device) -> dict[str, Put]:
    """Put another layer into the place of every linear one that the training keeps otherwise.

    Args:
        model: on any device, even "meta".
        trained: names of the parameters that train. A block with none of them is frozen.
        config: `frozen` and `precision` say what weights are kept in; `stream`, whether in CPU memory, pinned where
            the device is a GPU.
        device: to compute on.

    Returns:
        By the keys that the model's state dict has lost, those of frozen layers, what takes the numbers of each.
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
    """The linear layers that `store` replaces, by their blocks in the order in which they are computed."""
    # Of a model whose layers are stored already, see `training_model`, none is left.
    return [layers for layers in _blocks(model, trained, config) if layers]


def store_loaded(model: Backbone, trained: Collection[str], config: TrainingConfig, device: torch.device) -> None:
    """`store` of a model that has its weights, each of which is let go of as soon as it is stored."""
    weights = model.state_dict()
    for key, put in store(model, trained, config, device).items():
        put(weights.pop(key))


def trained_linears(model: nn.Module) -> dict[str, TrainedLinear]:
    """By the names of their weights."""
    modules = model.named_modules()
    return {f"{name}.weight": module for name, module in modules if isinstance(module, TrainedLinear)}


def bytes_in_computer(model: nn.Module) -> int:
    """What a model's streamed weights take of RAM rather than of the device's memory."""
    frozen = sum(module.bytes_in_computer for module in model.modules() if isinstance(module, FrozenLinear))
    return frozen + sum(layer.working.nbytes for layer in trained_linears(model).values())


def _blocks(model: Backbone, trained: Collection[str], config: TrainingConfig) -> Iterator[list[Layer]]:
    """The layers of each block that are kept otherwise, in the order in which they are computed."""
    for block, module in list(model.named_modules()):
        if not isinstance(module, Block):
            continue
        trains = any(own.startswith(f"{block}.") for own in trained)
        if trains and not streams(config, trained=True):
            continue
        yield [
            Layer(block, name, linear, trains, _dtype(name, trains, config))
            for name, linear in module.named_modules()
            if isinstance(linear, nn.Linear)
        ]


def _dtype(name: str, trains: bool, config: TrainingConfig) -> torch.dtype:
    if config.frozen == "fp8" and not trains:
        return torch.bfloat16 if NEVER_FLOAT8 in name else FLOAT8
    return torch.bfloat16 if config.precision == "bf16" else torch.float32


def _streamed(blocks: list[list[Layer]], config: TrainingConfig, device: torch.device) -> dict[str, StreamedTensor]:
    """The places of streamed weights, by their layers' names."""
    if not config.stream or not blocks:
        return {}
    stream = BlockStream([[(layer.dtype, layer.linear.weight.shape) for layer in layers] for layers in blocks], device)
    return {
        layer.key: stream.tensor(number, position)
        for number, layers in enumerate(blocks)
        for position, layer in enumerate(layers)
    }
