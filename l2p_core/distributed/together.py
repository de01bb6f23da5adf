"""The training settings that work with several processes."""

from __future__ import annotations

from contextlib import suppress

import torch

from ..training_config import TrainingConfig
from .sharding import check_shards


def check_together(config: TrainingConfig, processes: int, device: torch.device) -> None:
    """Refuse settings that do not work with several processes.

    Args:
        config: of the training.
        processes: number of processes that train together.
        device: of a process.

    Raises:
        ValueError: if offloading or early steps are requested, or as for `sharding.check_shards`.
    """
    if processes == 1:
        return
    if config.offload:
        raise ValueError(
            "offload = true keeps all trained weights in RAM, for every process: with several processes remove it, "
            'and choose parallel = "fsdp" to shard the weights among them.'
        )
    if config.step_early:
        raise ValueError(
            "step_early = true steps a weight before several processes have averaged its gradient: remove it, or "
            "train with one process."
        )
    if config.parallel == "fsdp":
        check_shards(config, device)


def go_together(config: TrainingConfig, processes: int, device: torch.device) -> bool:
    """Whether this number of processes works; arguments as for `check_together`."""
    with suppress(ValueError):
        check_together(config, processes, device)
        return True
    return False
