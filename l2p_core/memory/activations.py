"""The memory of activations and gradients throughout a training step, found by running the step without data.

Blocks and head stages, the parts that can be recomputed in the backward pass, are each traced once (see `live_memory`);
equal ones share a trace. Then the whole step runs on the device "meta" with stand-ins for the parts, which allocate
their outputs, keep their inputs and record what else is allocated when the backward pass reaches them. These records
give the peak for every choice of what is recomputed and of when gradients are consumed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .. import flow
from ..backbone import Conditioning
from ..config import PIXEL_CHANNELS, PixelConfig
from ..deltas import low_rank as lora
from ..freeze import freeze_all_but
from ..model import L2PModel
from ..training_config import TrainingConfig
from . import block_store, placement
from .live_memory import LiveMemory, Traced, computing_in, consumed, storage_bytes, trace

META = torch.device("meta")
_IMAGES = 16
"""A step is run for this many images and extrapolated for more."""


class Workload(NamedTuple):
    """A micro-batch: images, their (padded) height and width in pixels, and the tokens of the longest caption."""

    batch: int
    height: int
    width: int
    caption_tokens: int


class Moment(NamedTuple):
    """A moment of the backward pass.

    Attributes:
        bytes: of activations, if every part is recomputed.
        waiting: how many parts, the first ones, the backward pass has yet to reach.
        gradients: elements of weights whose gradients are complete.
    """

    bytes: int
    waiting: int
    gradients: int


class Step(NamedTuple):
    """A training step.

    Attributes:
        blocks: the name of each part's block, in the order of the forward pass; "" for stages of the head.
        kept: bytes that each part keeps beyond its outputs if it is not recomputed.
        moments: of the backward pass, in order.
    """

    blocks: tuple[str, ...]
    kept: tuple[int, ...]
    moments: tuple[Moment, ...]


class Peak(NamedTuple):
    """Bytes of activations, and elements of gradients, at the moment of a step that needs most memory."""

    activations: int
    gradients: int


def peak(step: Step, recomputed: Callable[[str], bool], gradients: Callable[[int, int], int]) -> Peak:
    """The moment of a step that needs most memory.

    Args:
        step: to look at.
        recomputed: whether a part is, given its block.
        gradients: bytes of gradients, given the elements complete so far and in the whole step.
    """
    kept = [0 if recomputed(block) else size for block, size in zip(step.blocks, step.kept, strict=True)]
    total = step.moments[-1].gradients
    return max(
        (Peak(size + sum(kept[:waiting]), gradients(made, total)) for size, waiting, made in step.moments), key=sum
    )


def step_of(config: PixelConfig, training: TrainingConfig, work: Workload) -> Step:
    """The step of a run."""
    names = ("precision", "policy", "blocks", "lora_rank", "frozen", "offload")
    choices = {name: getattr(training, name) for name in names}
    return _step(config, TrainingConfig(**choices), work)


@lru_cache(maxsize=32)
def _step(config: PixelConfig, training: TrainingConfig, work: Workload) -> Step:
    if work.batch <= _IMAGES:
        return _Tracer(config, training, work).step()
    # Memory grows linearly with the number of images.
    some, more = (_step(config, training, work._replace(batch=batch)) for batch in (_IMAGES // 2, _IMAGES))
    times = (work.batch - _IMAGES) / (_IMAGES - _IMAGES // 2)

    def beyond(few: int, many: int) -> int:
        return round(many + times * (many - few))

    return Step(
        more.blocks,
        tuple(map(beyond, some.kept, more.kept)),
        tuple(b._replace(bytes=beyond(a.bytes, b.bytes)) for a, b in zip(some.moments, more.moments, strict=True)),
    )


class _Tracer:
    """Runs the step of a model without data."""

    def __init__(self, config: PixelConfig, training: TrainingConfig, work: Workload):
        self._work, self._dtype = work, training.compute_dtype
        with META:
            self._model = L2PModel(config)
        weights = placement.of_run(config, training)
        for key, put in block_store.store(self._model, weights, META).items():
            put(torch.empty(weights[key].shape, dtype=self._dtype, device=META))
        adapted = lora.layers_of(filter(lora.is_adapter, weights))
        lora.attach(self._model, adapted, rank=training.lora_rank, alpha=1.0, seed=0, device=META)
        freeze_all_but(self._model, {name for name, weight in weights.items() if weight.trains})
        for name, parameter in self._model.named_parameters():
            parameter.data = parameter.data.to(weights[name].dtype)
        computing_in(self._model, self._dtype)
        # Very large batches are evaluated in tiles, which takes less.
        self._model.local_decoder.forward = self._whole_head  # type: ignore[method-assign]
        self._weights = [*self._model.parameters(), *block_store.stored_tensors(self._model)]
        self._blocks: dict[Any, str] = {module: name for name, module in self._model.blocks()}
        self._traces: dict[Hashable, Traced] = {}
        self._parts: list[tuple[str, Traced]] = []
        self._moments: list[Moment] = []
        self._gradients = 0

    def step(self) -> Step:
        """Run it."""
        self._errors(self._measured)
        self._live = LiveMemory(self._weights)
        numbers = iter(range(len(self._parts)))
        anchor = torch.empty(0, device=META, requires_grad=True)
        with consumed(self._weights, self._complete), self._live:
            self._errors(lambda _, *inputs: _StandIn.apply(self, next(numbers), anchor, *inputs)).mean().backward()
            self._note(0, self._live.peak)
            self._note(0, self._live.now)
        kept = (traced.retained - traced.output for _, traced in self._parts)
        return Step(tuple(block for block, _ in self._parts), tuple(kept), tuple(self._moments))

    def _whole_head(self, pixels: Tensor, features: Tensor, tile: int | None = None) -> Tensor:
        return self._model.local_decoder.whole(pixels, features)

    def _errors(self, run: Callable[..., Any]) -> Tensor:
        """The forward pass of the step, whose parts are given to `run`."""
        work, config = self._work, self._model.config
        self._model._run = self._model.local_decoder._run = run  # type: ignore[method-assign]
        pixels, noise = (
            torch.empty(work.batch, PIXEL_CHANNELS, work.height, work.width, device=META) for _ in range(2)
        )
        features = torch.empty(work.caption_tokens, config.caption_dim, dtype=self._dtype, device=META)
        pooled = torch.empty(config.pooled_dim, dtype=self._dtype, device=META) if config.pooled_dim else None
        sigma = torch.empty(work.batch, device=META)
        return flow.velocity_errors(self._model, pixels, noise, sigma, [Conditioning(features, pooled)] * work.batch)

    def _measured(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """Trace a part, unless an equal one has been; returns outputs without data."""
        key: Hashable = object()
        if isinstance(function, nn.Module):
            weights = tuple((weight.shape, weight.dtype, weight.requires_grad) for weight in function.parameters())
            key = type(function), tuple(map(type, function.modules())), weights, tuple(map(_described, inputs))
        if key not in self._traces:
            self._traces[key] = trace(function, inputs, self._weights)
        self._parts.append((self._blocks.get(function, ""), self._traces[key]))
        return tree_map(torch.Tensor.requires_grad_, self._traces[key].outputs())

    def stand_in(self, number: int) -> Any:
        """Outputs of a part without data."""
        return self._parts[number][1].outputs()

    def passed(self, number: int, gradients: Sequence[Tensor]) -> None:
        """Record what is allocated when the backward pass reaches a part."""
        traced = self._parts[number][1]
        self._note(number + 1, self._live.peak)
        self._gradients += traced.gradients
        # The trace counts the gradients of the outputs as well.
        self._note(number, self._live.now - storage_bytes(gradients) + traced.peak)
        self._live.peak = self._live.now

    def _note(self, waiting: int, size: int) -> None:
        self._moments.append(Moment(size, waiting, self._gradients))

    def _complete(self, elements: int) -> None:
        self._gradients += elements


class _StandIn(torch.autograd.Function):
    """Takes the place of a part: keeps its inputs, as `torch.utils.checkpoint` does, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, tracer: _Tracer, number: int, anchor: Tensor, *inputs: Any) -> Any:
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs))
        ctx.tracer, ctx.number = tracer, number
        return tracer.stand_in(number)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        ctx.tracer.passed(ctx.number, gradients)
        needed = zip(ctx.saved_tensors, ctx.needs_input_grad[3:], strict=True)
        return None, None, None, *(torch.empty_like(x) if of_x else None for x, of_x in needed)


def _described(x: Any) -> Hashable:
    return (x.shape, x.dtype, x.stride(), x.requires_grad) if isinstance(x, Tensor) else x
