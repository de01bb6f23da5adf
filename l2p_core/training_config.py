"""The settings of a training run; the defaults are the published 1k recipe (arXiv 2605.12013 section 4.1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import ranges
from .freeze import POLICIES

_CHOICES: dict[str, tuple[object, ...]] = {
    "decay": ("constant", "cosine"),
    "policy": POLICIES,
    "precision": ("bf16", "fp32"),
    "frozen": ("full", "fp8"),
    "optimiser_bits": (32, 8),
    "noise": ("seeded", "fresh"),
    "parallel": ("auto", "ddp", "fsdp"),
}

RANGES = {
    "steps": ranges.STEPS,
    "lr": ranges.LEARNING_RATE,
    "backbone_lr_scale": ranges.FACTOR,
    "weight_decay": ranges.DECAY,
    "warmup_steps": ranges.COUNT_OR_NONE,
    "clip_norm": ranges.NORM,
    "accumulate": ranges.BATCH,
    "ema_decay": ranges.PART,
    "caption_dropout": ranges.PART,
    "shift": ranges.SHIFT,
    "blocks": ranges.BLOCKS,
    "lora_rank": ranges.RANK,
    "lora_alpha": ranges.FACTOR,
    "keep_activations": ranges.ACTIVATIONS,
    "seed": ranges.SEED,
}
"""The range of each numeric setting that is not in `_CHOICES`."""


@dataclass(frozen=True)
class TrainingConfig:
    """How to train.

    Attributes:
        steps: optimiser steps of the whole run, over which the learning-rate schedule extends.
        lr: peak learning rate.
        backbone_lr_scale: factor on `lr` for the layers that the source already trained (all but patch embedder and
            head).
        weight_decay: of AdamW.
        warmup_steps: steps of linear warm-up.
        decay: "constant" or "cosine" (down to a tenth) after the warm-up.
        clip_norm: gradients are scaled down to this total norm.
        accumulate: micro-batches per step.
        ema_decay: decay of the averaged weights, ramped up over the first steps; 0 disables averaging.
        caption_dropout: share of samples trained with the empty caption, for guidance.
        shift: of the 500-step grid that noise levels are drawn from.
        policy: "shallow", "lora" (shallow layers in full, low-rank adapters on all other blocks) or "all".
        blocks: backbone blocks trained in full at each end with "shallow" and "lora".
        lora_rank: rank of the adapters with "lora".
        lora_alpha: adapters are scaled by lora_alpha / lora_rank.
        precision: "bf16" computes in bfloat16 with float32 trained weights and bfloat16 frozen ones; or "fp32".
        frozen: storage of the linear weights of frozen blocks: "full", in the dtype that `precision` computes in; or
            "fp8", float8 with one factor per row, which takes half of bfloat16's memory.
        stream: keep these weights in RAM and copy them to the device block by block; with `offload` also those of
            trained blocks.
        optimiser_bits: of AdamW's two moments of every trained element: 32, or 8, which needs the library bitsandbytes.
        step_early: step each weight as soon as its gradient is complete, so that gradients never accumulate; see
            `training.in_backward`.
        offload: keep trained weights (float32), moments and averages in RAM and step them there; see
            `training.offload`.
        gradient_checkpointing: recompute blocks and head stages in the backward pass to save memory.
        keep_activations: number of joint blocks that are not checkpointed, see `memory.checkpointing`; -1 means as many
            as fit into memory, and no checkpointing at all if everything fits.
        compile: compile the blocks with torch.compile, see `memory.compiled`: the first steps take minutes, later ones
            less.
        deterministic: compute the same bits each time on a GPU too, see `device.determinism`; slower.
        parallel: how several processes (torchrun) train together: "ddp", each with the whole model; "fsdp", with the
            model sharded among them; or "auto", which chooses by memory.
        noise: "seeded" draws an image's noise from its own seed if it has one; "fresh" never does.
        seed: seed of all random choices about the samples.

    Raises:
        ValueError: for values outside their range.
    """

    steps: int = 10_000
    lr: float = 5e-5
    backbone_lr_scale: float = 1.0
    weight_decay: float = 0.01
    warmup_steps: int = 0
    decay: str = "constant"
    clip_norm: float = 1.0
    accumulate: int = 1
    ema_decay: float = 0.0
    caption_dropout: float = 0.0
    shift: float = 3.0
    policy: str = "shallow"
    blocks: int = 5
    lora_rank: int = 16
    lora_alpha: float = 16.0
    precision: str = "bf16"
    frozen: str = "full"
    stream: bool = False
    optimiser_bits: int = 32
    step_early: bool = False
    offload: bool = False
    gradient_checkpointing: bool = True
    keep_activations: int = 0
    compile: bool = False
    deterministic: bool = False
    parallel: str = "auto"
    noise: str = "seeded"
    seed: int = 0

    @property
    def compute_dtype(self) -> torch.dtype:
        """What `precision` computes in."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    @property
    def steps_in_backward(self) -> bool:
        """Whether weights are stepped during the backward pass."""
        return self.step_early or (self.offload and self.accumulate == 1)

    def __post_init__(self) -> None:
        ranges.check_choices(self, _CHOICES)
        ranges.check(self, RANGES)
        if self.policy == "all" and self.frozen != "full":
            raise ValueError('frozen concerns blocks that do not train, but policy "all" trains everything: remove it.')
        if self.policy == "all" and self.stream and not self.offload:
            raise ValueError('With policy "all" everything trains, so stream = true needs offload = true as well.')
        if self.step_early and self.accumulate > 1:
            raise ValueError(
                f"step_early = true steps after every micro-batch, so it does not work with accumulate = "
                f"{self.accumulate}: remove one of them."
            )
