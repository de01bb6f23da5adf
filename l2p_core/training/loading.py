"""Loading a model for training: each weight is read directly into its final form and place.

No process ever holds more of the model than the weights that stay there and one block: frozen weights are stored one by
one as they are read, replicas are read directly onto their devices, and a model to be sharded is read block by block,
just before each process cuts its shard (see `distributed.sharding`).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import nn

from ..checkpoint import Checkpoint, empty_model, open_checkpoint, read_weights
from ..distributed.ranks import Ranks
from ..files.tensor_io import DTYPE_NAMES, ByteCounter, ProgressCallback
from ..memory import block_store, placement
from ..model import L2PModel
from ..training_config import TrainingConfig


def load(
    path: str | Path | Checkpoint, config: TrainingConfig, ranks: Ranks, progress: ProgressCallback | None = None
) -> L2PModel:
    """Load an L2P model for `Trainer`.

    Args:
        path: a file, folder or opened checkpoint, in either key layout.
        config: of the training.
        ranks: the processes that will train it. If they shard it, each gets a model whose weights are on the device
            "meta", and `Backbone.read_part` to read them with.
        progress: called with (bytes read, total bytes), also while parts are read.

    Raises:
        CheckpointError: if it is not a complete L2P model, or is quantised.
    """
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
    model = empty_model(checkpoint)
    weights = placement.of_run(model.config, config)
    keys = list(model.state_dict())
    puts = block_store.store(model, weights, ranks.device)
    names = block_store.read_as(checkpoint, weights, keys, puts)
    counter = ByteCounter(sum(checkpoint.tensors[key].nbytes for key in names), progress)
    shared = ranks.count > 1 and config.parallel == "fsdp"
    if shared:
        model.read_part = partial(_read_part, checkpoint, ranks.device, counter)
        names = {key: names[key] for key in puts}
    of_trained = torch.device("cpu") if config.offload else ranks.device
    read = read_weights(checkpoint, names, counter)
    block_store.fill(model, read, puts, lambda key: of_trained if weights[key].trains else ranks.device, not shared)
    return model


def _read_part(
    checkpoint: Checkpoint, device: torch.device, counter: ByteCounter, module: nn.Module, name: str
) -> None:
    """Read the weights of a module that are on the device "meta", in the dtypes of its parameters.

    Args:
        checkpoint: to read from.
        device: on which they are sharded.
        counter: of the bytes read.
        module: a part of the model, or all of it.
        name: the module's name in the model; "" is the model itself.
    """
    within = f"{name}." if name else ""
    waiting = {f"{within}{key}": weight for key, weight in module.named_parameters() if weight.is_meta}
    dtypes = {key: DTYPE_NAMES[weight.dtype] for key, weight in waiting.items()}
    for key, read in read_weights(checkpoint, dtypes, counter):
        layer, _, leaf = key.removeprefix(within).rpartition(".")
        weight = nn.Parameter(read.to(device), requires_grad=waiting[key].requires_grad)
        setattr(module.get_submodule(layer), leaf, weight)
