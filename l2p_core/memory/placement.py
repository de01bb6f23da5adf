"""Where each weight is kept and in which dtype: the one rule for loading, training, sampling and the plan."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from ..config import PixelConfig
from ..deltas import low_rank as lora
from ..freeze import trainable_names
from ..model import key_shapes
from ..ops.eight_bit import FACTOR_BYTES, FLOAT8
from ..sources import source_of
from ..training_config import TrainingConfig
from .block_stream import SLOTS, block_bytes


@dataclass(frozen=True)
class Form:
    """How a model's weights are kept.

    Attributes:
        dtype: of the computation, and of all frozen weights except those in float8.
        float8: whether the linear layers of frozen blocks are stored in float8 (`ops.eight_bit`).
        streamed: whether they are stored in RAM and copied to the device block by block; with `offload` also those of
            trained blocks.
        offload: whether trained weights are in RAM, in float32; computation uses copies in `dtype`.
    """

    dtype: torch.dtype
    float8: bool = False
    streamed: bool = False
    offload: bool = False

    def __post_init__(self) -> None:
        kept = self.float8 or self.streamed
        assert not kept or self.dtype in (torch.bfloat16, torch.float32), "blocks are stored in what training stores"


class Weight(NamedTuple):
    """How one weight is kept.

    Attributes:
        shape: of the weight.
        block: the name of its block; "" outside the blocks.
        trains: whether it trains.
        dtype: of the tensor that computation uses.
        replaced: whether a layer of `block_store` holds it in place of the model's own linear layer.
        streamed: whether it comes to the device with its block.
    """

    shape: tuple[int, ...]
    block: str
    trains: bool
    dtype: torch.dtype
    replaced: bool
    streamed: bool

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def loaded_as(self) -> torch.dtype:
        """Its dtype before anything is offloaded: trained weights are float32."""
        return torch.float32 if self.trains else self.dtype


Weights = Mapping[str, Weight]
"""All weights of a model, adapters included, by name in the model's order."""


@lru_cache(maxsize=64)
def of_run(config: PixelConfig, training: TrainingConfig) -> Weights:
    """The weights of a training run; `attach` adds those of adapters to the model."""
    trained = trainable_names(config, training.blocks, training.policy)
    adapters: dict[str, tuple[int, int]] = {}
    if training.policy == "lora":
        adapters = lora.adapter_shapes(config, lora.adapted_layers(config, trained), training.lora_rank)
    form = Form(training.compute_dtype, training.frozen == "fp8", training.stream, training.offload)
    return _placed(config, form, trained, adapters)


@lru_cache(maxsize=64)
def for_sampling(config: PixelConfig, form: Form) -> Weights:
    """The weights of a model that only samples."""
    return _placed(config, form, set(), {})


def _placed(config: PixelConfig, form: Form, trained: set[str], adapters: Mapping[str, tuple[int, int]]) -> Weights:
    source = source_of(config)
    trained_blocks = {source.block_of(name) for name in trained}

    def placed(name: str, shape: tuple[int, ...]) -> Weight:
        block, trains = source.block_of(name), name in trained or name in adapters
        frozen = block not in trained_blocks
        linear = bool(block) and len(shape) == 2 and name not in adapters
        streamed = linear and form.streamed and (frozen or form.offload)
        eight_bit = linear and form.float8 and frozen
        dtype = torch.float32 if trains and not form.offload else form.dtype
        if eight_bit:
            dtype = torch.bfloat16 if source.is_never_8_bit(name) else FLOAT8
        return Weight(shape, block, trains, dtype, streamed or eight_bit, streamed)

    return {name: placed(name, shape) for name, shape in {**key_shapes(config), **adapters}.items()}


def device_bytes(weights: Weights) -> dict[str, int]:
    """Device memory of the weights that computation uses, by kind."""
    kinds = {"frozen weights": 0, "trained weights": 0}
    for weight in weights.values():
        kind = "trained weights" if weight.trains else "frozen weights"
        if not weight.streamed:
            kinds[kind] += weight.elements * weight.dtype.itemsize
        if weight.dtype == FLOAT8:
            kinds[kind] += FACTOR_BYTES * weight.shape[0]  # never streamed
    homes = streamed_bytes(weights)
    return {**kinds, "streamed weights": SLOTS * max(homes)} if homes else kinds


def streamed_bytes(weights: Weights) -> list[int]:
    """The bytes of each streamed block, in RAM and in its place on the device."""
    blocks: dict[str, list[tuple[torch.dtype, torch.Size]]] = {}
    for weight in weights.values():
        if weight.streamed:
            blocks.setdefault(weight.block, []).append((weight.dtype, torch.Size(weight.shape)))
    return [block_bytes(tensors) for tensors in blocks.values()]
