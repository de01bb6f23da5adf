"""Which blocks are recomputed in the backward pass: spare memory saves time.

With gradient checkpointing a block keeps only its output and is recomputed for its gradients, a third of all its
computing. A block that keeps its activations instead takes some fifteen times as much memory until then.
"""

from __future__ import annotations

from ..config import PixelConfig
from ..freeze import trainable_names
from ..sources import source_of
from ..training_config import TrainingConfig


def kept_blocks(config: PixelConfig, training: TrainingConfig) -> frozenset[int]:
    """The trunk's blocks that keep their activations, by their numbers in it: as many as `keep_activations` says.


    Frozen blocks come first because they keep less: the inputs of their linear layers are not needed. Among these the
    last come first, because the backward pass finishes them first.
    """
    source = source_of(config)
    trained = {source.block_of(name) for name in trainable_names(config, training.blocks, training.policy)}
    trunk = list(source.blocks(config, trunk=True))
    order = sorted(range(len(trunk)), key=lambda number: (trunk[number] in trained, -number))
    return frozenset(order[: max(0, training.keep_activations)])


def kept_sentence(config: PixelConfig, training: TrainingConfig) -> str:
    """The end of a plan's sentence; empty if every block is checkpointed."""
    if not training.gradient_checkpointing:
        return " Nothing is checkpointed."
    kept = len(kept_blocks(config, training))
    total = len(source_of(config).blocks(config, trunk=True))
    return f" {kept} of {total} blocks keep their activations and are not recomputed." if kept else ""
