"""Which settings of a training go together with several processes."""

from __future__ import annotations

from contextlib import suppress

import torch

from ..training_config import TrainingConfig
from .sharding import check_shards


def check_together(config: TrainingConfig, processes: int, device: torch.device) -> None:
    """Refuse what several processes cannot do.

    Args:
        config: of the training.
        processes: that train together.
        device: of a process.

    Raises:
        ValueError: if offloading or early steps are asked of them, or as `sharding.check_shards`.
    """
    if processes == 1:
        return
    if config.offload:
        raise ValueError(
            "offload = true keeps all trained weights in RAM, once for every process: with several processes leave it "
            'out, and choose parallel = "fsdp" to share the weights among them.'
        )
    if config.step_early:
        raise ValueError(
            "step_early = true steps a weight before several processes have averaged its gradient: leave it out, or "
            "train with one process."
        )
    if config.parallel == "fsdp":
        check_shards(config, device)


def go_together(config: TrainingConfig, processes: int, device: torch.device) -> bool:
    """Whether so many processes can do it; arguments as for `check_together`."""
    with suppress(ValueError):
        check_together(config, processes, device)
        return True
    return False
