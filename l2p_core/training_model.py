"""Loading a model to train it, each weight straight into the form and the place that training keeps it in.

On no device is ever more of the model than what stays there: frozen weights are stored one by one as they are read, and
of what several processes will share, each cuts its shard on the way from the CPU.
"""

from __future__ import annotations

from pathlib import Path

import torch

from . import block_store
from .checkpoint import Checkpoint, empty_model, open_checkpoint, read_weights
from .freeze import trainable_names
from .model import L2PModel
from .parallel import Ranks
from .tensor_io import DTYPE_NAMES, ProgressCallback
from .training_config import TrainingConfig


def load(
    path: str | Path | Checkpoint, config: TrainingConfig, ranks: Ranks, progress: ProgressCallback | None = None
) -> L2PModel:
    """An L2P model for `Trainer`.

    Args:
        path: a file, folder or opened checkpoint, in either key layout.
        config: of the training.
        ranks: the processes that will train it.
        progress: called with (bytes read, bytes in all).

    Raises:
        CheckpointError: if it is not a complete L2P model, or is quantised.
    """
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
    checkpoint.pixel_config()
    model = empty_model(checkpoint)
    assert isinstance(model, L2PModel)
    trained = trainable_names(model.config, config.blocks, config.policy)
    frozen_dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    names = {key: DTYPE_NAMES[torch.float32 if key in trained else frozen_dtype] for key in model.state_dict()}
    puts = {}
    if block_store.wanted(config):
        puts = block_store.store(model, trained, config, ranks.device)
        # Rounded once, from what the file has.
        names |= {key: checkpoint.tensors[key].dtype for key in puts}
    cpu = torch.device("cpu")
    # Replicas go straight to their devices too: of several processes none holds the whole model in RAM then. What will
    # be cut into shards is whole in the RAM of each first.
    place = ranks.device if ranks.count == 1 or config.parallel == "ddp" else cpu
    of_trained = cpu if config.offload else place
    state = {}
    for key, weight in read_weights(checkpoint, names, progress):
        if key in puts:
            puts[key](weight)
        else:
            state[key] = weight.to(of_trained if key in trained else place)
    model.load_state_dict(state, assign=True)
    return model
