"""Which blocks are recomputed in the backward pass: spare memory saves time.

With gradient checkpointing a block keeps only its output and is recomputed for its gradients, a third of all its
computing. A block that keeps its activations instead takes some fifteen times as much memory until then.
"""

from __future__ import annotations

from ..config import ModelConfig
from ..freeze import trainable_names
from ..training_config import TrainingConfig


def kept_blocks(config: ModelConfig, training: TrainingConfig) -> frozenset[int]:
    """The joint blocks that keep their activations, as many as `keep_activations` says; none if it is negative.

    Frozen blocks come first because they keep less: the inputs of their linear layers are not needed. Among these the
    last come first, because the backward pass finishes them first.
    """
    names = trainable_names(config, training.blocks, training.policy)
    trained = {int(name.split(".")[1]) for name in names if name.startswith("layers.")}
    order = sorted(range(config.n_layers), key=lambda number: (number in trained, -number))
    return frozenset(order[: max(0, training.keep_activations)])


def kept_sentence(config: ModelConfig, training: TrainingConfig) -> str:
    """The end of a plan's sentence; empty if every block is checkpointed."""
    if not training.gradient_checkpointing:
        return " Nothing is checkpointed."
    kept = len(kept_blocks(config, training))
    return f" {kept} of {config.n_layers} blocks keep their activations and are not recomputed." if kept else ""
