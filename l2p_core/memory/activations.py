"""The memory of activations and gradients throughout a training step, computed from shapes alone.

A step is a sequence of parts: embedders, blocks, head stages, loss. Each part is traced once (see `live_memory`), and
equal blocks share one trace. The backward pass is then simulated: at each part, memory holds the outputs of the parts
before it (with checkpointing) or everything that they keep (without), and the gradients of the weights after it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backbone import Segment
from ..config import HEAD, PIXEL_CHANNELS, PixelConfig
from ..deltas import low_rank as lora
from ..freeze import freeze_all_but, trainable_names
from ..model import L2PModel
from ..ops.fused_decoder import Fusion
from ..ops.region import Region, stage_regions
from ..patch import patchify
from ..training_config import TrainingConfig
from .live_memory import Traced, computing_in, trace

_META = torch.device("meta")
_CAPTIONS = 16
"""The embedding is traced for this many captions and extrapolated for more."""


class Workload(NamedTuple):
    """A micro-batch: images, their (padded) height and width in pixels, and the tokens of the longest caption."""

    batch: int
    height: int
    width: int
    caption_tokens: int


@dataclass(frozen=True)
class StepPart:
    """A part of a training step.

    Attributes:
        names: prefixes of its parameters.
        traced: its memory.
        checkpointed: whether its activations can be recomputed.
        reaches_back: bytes of gradients that it computes for an earlier part other than the one before it.
        takes: bytes of such gradients that it receives.
        frozen: whether its linear layers can be stored in another form.
    """

    names: tuple[str, ...]
    traced: Traced
    checkpointed: bool
    reaches_back: int = 0
    takes: int = 0
    frozen: bool = False


class Peak(NamedTuple):
    """Bytes at the moment of a step that needs most."""

    activations: int
    gradients: int


def peak(
    parts: Sequence[StepPart],
    *,
    checkpointing: bool,
    gradients: Callable[[StepPart], int],
    all_along: bool,
    in_flight: int | None = None,
) -> Peak:
    """The moment of a step that needs most memory.

    Args:
        parts: of the step, in the order of the forward pass.
        checkpointing: whether parts are recomputed in the backward pass.
        gradients: bytes of weight gradients that a part leaves.
        all_along: whether all of these exist from the start, as they do while micro-batches accumulate.
        in_flight: the most bytes of gradients that exist at once if they are consumed during the backward pass; None
            keeps them to its end.
    """
    held = [part.traced.output if checkpointing and part.checkpointed else part.traced.retained for part in parts]
    total = sum(gradients(part) for part in parts)
    before, made, reaching = sum(held), 0, 0
    worst = Peak(0, total if in_flight is None else 0)  # the optimiser's step
    for part, own in zip(reversed(parts), reversed(held), strict=True):
        before -= own
        made += gradients(part)
        there = total if all_along else made
        if in_flight is not None:
            there = min(made, in_flight)
        moment = Peak(before + part.traced.peak + reaching, there)
        worst = max(worst, moment, key=sum)
        reaching += part.reaches_back - part.takes
    return worst


@lru_cache(maxsize=32)
def parts_of(
    config: PixelConfig, work: Workload, precision: str, policy: str, blocks: int, rank: int, offload: bool
) -> tuple[StepPart, ...]:
    """The parts of a training step; the arguments after `work` are those of the training's configuration."""
    return _Parts(config, work, precision, policy, blocks, rank, offload).all()


def parts_for(config: PixelConfig, training: TrainingConfig, work: Workload) -> tuple[StepPart, ...]:
    """`parts_of` a configuration."""
    return parts_of(
        config, work, training.precision, training.policy, training.blocks, training.lora_rank, training.offload
    )


class _Parts:
    def __init__(
        self, config: PixelConfig, work: Workload, precision: str, policy: str, blocks: int, rank: int, offload: bool
    ):
        self.config, self.work = config, work
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        with _META:
            self.model = L2PModel(config)
        self.source = self.model.source
        self.names = trainable_names(config, blocks, policy)
        adapted = lora.adapted_layers(config, self.names) if policy == "lora" else []
        # One adapted block of a stack represents all of them.
        first = {self._stack(layer): self.source.block_of(layer) for layer in reversed(adapted)}
        chosen = [layer for layer in adapted if self.source.block_of(layer) == first[self._stack(layer)]]
        added = lora.attach(self.model, chosen, rank=rank, alpha=1.0, seed=0, device=_META)
        freeze_all_but(self.model, self.names | added)
        trained = self.dtype if offload else torch.float32
        for name, parameter in self.model.named_parameters():
            parameter.data = parameter.data.to(trained if name in self.names | added else self.dtype)
        computing_in(self.model, self.dtype)
        self.grid = work.height // config.patch_size, work.width // config.patch_size

    def all(self) -> tuple[StepPart, ...]:
        return (*self._backbone(), *self._head())

    def _backbone(self) -> Iterator[StepPart]:
        segments = list(self.model.segments(self.work.batch, self.grid, self.work.caption_tokens, self._empty))
        named = tuple(name for segment in segments for name in segment.names)
        outside = [name for name in self.names if not name.startswith((f"{HEAD}.", *named))]
        yield self._part(tuple(outside), self._embed, [self._pixels()], checkpointed=False)
        last = [segment.names for segment in segments if segment.checkpointed][-1]
        features = self._tokens(self.grid[0] * self.grid[1]).untyped_storage().nbytes()
        traced: dict[Hashable, Traced] = {}
        for segment in segments:
            frozen = segment.checkpointed and not any(name.startswith(segment.names) for name in self.names)
            alike = segment.like, frozen
            if segment.like is None or alike not in traced:
                traced[alike] = self._traced(segment)
            takes = features if segment.names == last else 0
            yield StepPart(segment.names, traced[alike], segment.checkpointed, takes=takes, frozen=frozen)

    def _pixels(self) -> Tensor:
        work = self.work
        return self._empty(work.batch, PIXEL_CHANNELS, work.height, work.width, dtype=torch.float32)

    def _embed(self, pixels: Tensor) -> Tensor:
        patches = patchify(pixels.to(self.model.embedder_weight.dtype), self.config.patch_size)
        return self.model.embedded(patches)

    def _traced(self, segment: Segment) -> Traced:
        weights, images = list(self.model.parameters()), self.work.batch
        inputs = list(segment.inputs)
        if segment.run is None:
            size = sum(tensor.untyped_storage().nbytes() for tensor in inputs)
            return Traced(size, size, 2 * size)
        if segment.per_image:
            inputs = [torch.empty_like(inputs[0]) for _ in range(min(images, _CAPTIONS))]
        if not segment.per_image or images <= _CAPTIONS:
            return trace(segment.run, inputs, weights)
        # Images are embedded one by one, so memory and tracing time grow linearly with their number.
        some = trace(segment.run, inputs[: _CAPTIONS // 2], weights)
        more = trace(segment.run, inputs, weights)
        steps = (images - _CAPTIONS) / (_CAPTIONS - _CAPTIONS // 2)
        return Traced(*(round(b + steps * (b - a)) for a, b in zip(some, more, strict=True)))

    def _stack(self, layer: str) -> str:
        return self.source.block_of(layer).rpartition(".")[0]

    def _head(self) -> Iterable[StepPart]:
        head, work = self.model.local_decoder, self.work
        rows: list[tuple[Any, Any, Tensor]] = []
        image = (work.height, work.width)
        whole = Region(0, work.height, 0, work.width)
        regions, _ = stage_regions(whole, whole, len(head.stages))
        dtype = self.model.embedder_weight.dtype
        x = self._empty(work.batch, PIXEL_CHANNELS, *image, dtype=dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        for stage, at in zip(head.stages, regions, strict=True):
            inside = x.requires_grad_(bool(rows))
            part = self._part((f"local_decoder.enc{stage.name}.",), _Bound(head._encode, stage, at), [inside])
            skip = self._map(stage.enc, image)
            size = skip.untyped_storage().nbytes()
            rows.append((stage, at, skip))
            yield StepPart(part.names, part.traced, True, takes=size)
            image = image[0] // 2, image[1] // 2
            x = self._map(stage.enc, image)
        features = self._map(self.config.dim, self.grid)
        size = features.untyped_storage().nbytes()
        if self.grid != image:
            features = self._map(self.config.dim, image)
        part = self._part(("local_decoder.bottleneck.",), head._fuse, [x, features])
        yield StepPart(part.names, part.traced, True, reaches_back=size)
        x = self._map(self.config.head.bottleneck, image)
        for stage, at, skip in reversed(rows):
            names = (f"local_decoder.up{stage.name}.", f"local_decoder.dec{stage.name}.")
            part = self._part(names, _Bound(head._decode, stage, at, fusion=Fusion(wanted=False)), [x, skip])
            yield StepPart(names, part.traced, True, reaches_back=skip.untyped_storage().nbytes())
            image = image[0] * 2, image[1] * 2
            x = self._map(stage.dec, image)

        target = torch.empty(work.batch, PIXEL_CHANNELS, work.height, work.width, device=_META)

        def loss(x: Tensor) -> Tensor:
            predicted = -head.out_conv(x)
            return (predicted.to(target.dtype) - (target - target)).square().flatten(1).mean(1)

        yield self._part(("local_decoder.out_conv.",), loss, [x], checkpointed=False)

    def _part(
        self, names: tuple[str, ...], function: Callable[..., Any], inputs: list[Tensor], checkpointed: bool = True
    ) -> StepPart:
        return StepPart(names, trace(function, inputs, self.model.parameters()), checkpointed)

    def _tokens(self, count: int) -> Tensor:
        return self._empty(self.work.batch, count, self.config.dim).requires_grad_()

    def _map(self, channels: int, size: tuple[int, int]) -> Tensor:
        made = self._empty(self.work.batch, channels, *size).contiguous(memory_format=torch.channels_last)
        return made.requires_grad_()

    def _empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(*shape, dtype=dtype or self.dtype, device=_META)


class _Bound:
    """A function that takes further arguments before or after the traced tensors."""

    def __init__(self, function: Callable[..., Any], *first: Any, **named: Any):
        self._function, self._first, self._named = function, first, named

    def __call__(self, *tensors: Tensor) -> Any:
        return self._function(*self._first, *tensors, **self._named)
