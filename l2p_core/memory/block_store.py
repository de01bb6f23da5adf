"""Replaces the linear layers that `placement` keeps in fewer bits or in RAM.

Frozen layers become `FrozenLinear`, in fewer bits or streamed. Trained layers become `TrainedLinear` if they are
offloaded to RAM anyway and blocks are streamed. All share one stream, in the order in which blocks are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..backbone import Backbone
from ..checkpoint import Checkpoint
from ..files.quantised import FLOAT_DTYPES
from ..files.tensor_io import DTYPE_NAMES
from .block_stream import BlockStream, StreamedTensor
from .frozen_store import DeviceTensor, FrozenLinear
from .placement import Weight, Weights
from .trained_linear import TrainedLinear

Put = Callable[[Tensor], None]
"""Sets a weight or bias from a tensor of any float dtype, on any device."""


class _Layer(NamedTuple):
    """A linear layer to be replaced, with its name in the model and how its weight is kept."""

    name: str
    linear: nn.Linear
    weight: Weight


def store(model: Backbone, weights: Weights, device: torch.device) -> dict[str, Put]:
    """Replace every linear layer that the model's own layers do not keep.

    Args:
        model: on any device, even "meta".
        weights: how each is kept. Streamed ones are in RAM, pinned if the device is a GPU.
        device: to compute on.

    Returns:
        For each key of a frozen layer, which the model's state dict no longer has, the function that sets its weight.
    """
    layers = list(_layers(model, weights))
    homes = _homes(layers, device)
    puts: dict[str, Put] = {}
    for name, linear, kept in layers:
        if kept.trains:
            new: nn.Module = TrainedLinear(linear, homes[name])
        else:
            new = FrozenLinear(linear, kept.dtype, homes[name] if kept.streamed else DeviceTensor(), device)
            puts[f"{name}.weight"] = new.put_weight
            if linear.bias is not None:
                puts[f"{name}.bias"] = new.put_bias
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
    return puts


def store_loaded(model: Backbone, weights: Weights, device: torch.device) -> None:
    """`store` for a model that has its weights; each is released as soon as it is stored."""
    state = model.state_dict()
    for key, put in store(model, weights, device).items():
        put(state.pop(key))


def read_as(checkpoint: Checkpoint, weights: Weights, keys: Iterable[str], puts: Collection[str]) -> dict[str, str]:
    """The dtypes to read these weights in: for the weights that `store` replaced, the file's own, so that they are
    rounded only once."""
    # What 8 bits stand for has no dtype of its own: float32 holds it exactly.
    own = {key: dtype if (dtype := checkpoint.tensors[key].dtype) in FLOAT_DTYPES else "F32" for key in puts}
    return {key: own[key] if key in puts else DTYPE_NAMES[weights[key].loaded_as] for key in keys}


def fill(
    model: Backbone,
    read: Iterable[tuple[str, Tensor]],
    puts: Mapping[str, Put],
    home: Callable[[str], torch.device],
    complete: bool = True,
) -> None:
    """Put weights into a model one by one, as they are read.

    Args:
        model: as `store` has prepared it.
        read: weights by name, on the CPU.
        puts: of `store`.
        home: the device of each weight that is not among them.
        complete: whether these are all weights of the model.
    """
    state = {}
    for key, weight in read:
        if key in puts:
            puts[key](weight)
        else:
            state[key] = weight.to(home(key))
    model.load_state_dict(state, strict=complete, assign=True)


def trained_linears(model: nn.Module) -> dict[str, TrainedLinear]:
    """The `TrainedLinear` layers by the names of their weights."""
    modules = model.named_modules()
    return {f"{name}.weight": module for name, module in modules if isinstance(module, TrainedLinear)}


def stored_tensors(model: nn.Module) -> list[Tensor]:
    """The tensors of a model's frozen layers, which are neither parameters nor buffers."""
    frozen = [module for module in model.modules() if isinstance(module, FrozenLinear)]
    return [tensor for layer in frozen for tensor in layer.tensors() if tensor is not None]


def bytes_in_ram(model: nn.Module) -> int:
    """Bytes of RAM that a model's streamed weights take instead of the device's memory."""
    frozen = sum(module.place.nbytes for module in model.modules() if isinstance(module, FrozenLinear))
    return frozen + sum(layer.working.nbytes for layer in trained_linears(model).values())


def _layers(model: Backbone, weights: Weights) -> Iterator[_Layer]:
    """The layers to be replaced, in the order in which blocks are computed."""
    for block, module in model.blocks():
        for inside, linear in list(module.named_modules()):
            kept = weights.get(f"{block}.{inside}.weight")
            # A model whose layers are already stored (`training.loading`) has no such linear layers.
            if isinstance(linear, nn.Linear) and kept is not None and kept.replaced:
                yield _Layer(f"{block}.{inside}", linear, kept)


def _homes(layers: list[_Layer], device: torch.device) -> dict[str, StreamedTensor]:
    """The positions of streamed weights, by their layers' names."""
    streamed = [layer for layer in layers if layer.weight.streamed]
    if not streamed:
        return {}
    blocks = [list(block) for _, block in groupby(streamed, lambda layer: layer.weight.block)]
    stream = BlockStream([[(kept.dtype, linear.weight.shape) for _, linear, kept in block] for block in blocks], device)
    return {
        layer.name: stream.tensor(number, position)
        for number, block in enumerate(blocks)
        for position, layer in enumerate(block)
    }
