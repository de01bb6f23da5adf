"""Which blocks are computed again in the backward pass: memory that is left over buys back time.

With gradient checkpointing a block leaves its output behind, and is computed a second time for its gradients, a third
of all its computing. A block that keeps its activations instead takes some fifteen times as much memory until then.
"""

from __future__ import annotations

from ..config import ModelConfig
from ..freeze import trainable_names
from ..training_config import TrainingConfig


def kept_blocks(config: ModelConfig, training: TrainingConfig) -> frozenset[int]:
    """The joint blocks that keep their activations, as many as `keep_activations` says, none if that is negative.

    Frozen ones first, which keep less, as their linear layers' inputs are not needed; and of these the last ones, which
    are done with first in the backward pass.
    """
    names = trainable_names(config, training.blocks, training.policy)
    trained = {int(name.split(".")[1]) for name in names if name.startswith("layers.")}
    order = sorted(range(config.n_layers), key=lambda number: (number in trained, -number))
    return frozenset(order[: max(0, training.keep_activations)])


def kept_sentence(config: ModelConfig, training: TrainingConfig) -> str:
    """What a plan's sentence goes on with, nothing where every block is computed twice."""
    if not training.gradient_checkpointing:
        return " Nothing is computed twice."
    kept = len(kept_blocks(config, training))
    return f" {kept} of {config.n_layers} blocks keep their activations and are not computed twice." if kept else ""
