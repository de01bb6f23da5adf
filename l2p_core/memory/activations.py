"""The memory of activations and gradients throughout a training step, computed from shapes alone.

A step is a sequence of parts: embedders, blocks, head stages, loss. Each part is traced once (see `live_memory`), and
equal blocks share one trace. The backward pass is then simulated: at each part, memory holds the outputs of the parts
before it (with checkpointing) or everything that they keep (without), and the gradients of the weights after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backbone import Block, pad_tokens
from ..config import PIXEL_CHANNELS, TOKEN_MULTIPLE, ModelConfig
from ..deltas import low_rank as lora
from ..freeze import freeze_all_but, trainable_names
from ..model import L2PModel
from ..ops.fused_decoder import Fusion
from ..ops.region import Region, stage_regions
from ..ops.rope import caption_rope, image_rope, joint_rope
from ..patch import padded_size, patchify
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
class Part:
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
    parts: Sequence[Part],
    *,
    checkpointing: bool,
    gradients: Callable[[Part], int],
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
    config: ModelConfig, work: Workload, precision: str, policy: str, blocks: int, rank: int, offload: bool
) -> tuple[Part, ...]:
    """The parts of a training step; the arguments after `work` are those of the training's configuration."""
    return _Parts(config, work, precision, policy, blocks, rank, offload).all()


def parts_for(config: ModelConfig, training: TrainingConfig, work: Workload) -> tuple[Part, ...]:
    """`parts_of` a configuration."""
    return parts_of(
        config, work, training.precision, training.policy, training.blocks, training.lora_rank, training.offload
    )


class _Parts:
    def __init__(
        self, config: ModelConfig, work: Workload, precision: str, policy: str, blocks: int, rank: int, offload: bool
    ):
        self.config, self.work = config, work
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        with _META:
            self.model = L2PModel(config)
        self.names = trainable_names(config, blocks, policy)
        adapted = lora.adapted_layers(config, self.names) if policy == "lora" else []
        # One adapted block represents all of them.
        first = [layer for layer in adapted if layer.split(".")[:2] == adapted[0].split(".")[:2]]
        added = lora.attach(self.model, first, rank=rank, alpha=1.0, seed=0, device=_META)
        freeze_all_but(self.model, self.names | added)
        trained = self.dtype if offload else torch.float32
        for name, parameter in self.model.named_parameters():
            parameter.data = parameter.data.to(trained if name in self.names | added else self.dtype)
        computing_in(self.model, self.dtype)
        self.grid = work.height // config.patch_size, work.width // config.patch_size
        self.image_tokens = padded_size(self.grid[0] * self.grid[1], TOKEN_MULTIPLE)
        self.caption_tokens = padded_size(work.caption_tokens, TOKEN_MULTIPLE)

    def all(self) -> tuple[Part, ...]:
        return (*self._embedders(), *self._refiners(), *self._layers(), *self._head())

    def _embedders(self) -> Iterable[Part]:
        model, config, work = self.model, self.config, self.work
        pixels = self._empty(work.batch, PIXEL_CHANNELS, work.height, work.width, dtype=torch.float32)

        def embed(pixels: Tensor) -> Tensor:
            patches = patchify(pixels.to(model.x_embedder.weight.dtype), config.patch_size)
            return pad_tokens(model.x_embedder(patches), model.x_pad_token, self.image_tokens)

        yield self._part(("x_embedder", "x_pad_token", "t_embedder"), embed, [pixels], checkpointed=False)
        names = ("cap_embedder", "cap_pad_token")
        if work.batch <= _CAPTIONS:
            yield Part(names, self._captions(work.batch), False)
        else:
            # Captions are embedded one by one, so memory and tracing time grow linearly with their number.
            some, more = self._captions(_CAPTIONS // 2), self._captions(_CAPTIONS)
            steps = (work.batch - _CAPTIONS) / (_CAPTIONS - _CAPTIONS // 2)
            yield Part(names, Traced(*(round(b + steps * (b - a)) for a, b in zip(some, more, strict=True))), False)

    def _captions(self, count: int) -> Traced:
        captions = [self._empty(self.work.caption_tokens, self.config.caption_dim) for _ in range(count)]
        lengths = [self.caption_tokens] * count

        def embed(*captions: Tensor) -> Tensor:
            return self.model._embed_captions(captions, lengths)

        return trace(embed, captions, self.model.parameters())

    def _refiners(self) -> Iterable[Part]:
        axes = self.config.rope_dims
        for name, count, rope in (
            ("noise_refiner", self.image_tokens, image_rope(axes, self.grid, self.caption_tokens, _META)),
            ("context_refiner", self.caption_tokens, caption_rope(axes, self.caption_tokens, _META)),
        ):
            block = self.model.get_submodule(name)[0]  # type: ignore[index]
            part = self._block(block, count, rope, ())
            for number in range(self.config.n_refiner_layers):
                yield Part((f"{name}.{number}.",), part.traced, True)

    def _layers(self) -> Iterable[Part]:
        tokens = self.image_tokens + self.caption_tokens
        joined = self._tokens(tokens)
        # Both kinds of tokens as one sequence, beside the refiners' outputs.
        size = joined.untyped_storage().nbytes()
        yield Part((), Traced(size, size, 2 * size), False)
        rope = joint_rope(self.config.rope_dims, self.grid, (self.caption_tokens,), _META)
        traced: dict[bool, Traced] = {}
        for number, block in enumerate(self.model.layers):
            frozen = f"layers.{number}.attention.qkv.weight" not in self.names
            if frozen not in traced:
                traced[frozen] = self._block(block, tokens, rope, ()).traced
            features = self._tokens(self.grid[0] * self.grid[1]).untyped_storage().nbytes()
            last = number == self.config.n_layers - 1
            yield Part((f"layers.{number}.",), traced[frozen], True, takes=features if last else 0, frozen=frozen)

    def _head(self) -> Iterable[Part]:
        head, work = self.model.local_decoder, self.work
        rows: list[tuple[Any, Any, Tensor]] = []
        head_config = self.config.head
        assert head_config is not None
        image = (work.height, work.width)
        whole = Region(0, work.height, 0, work.width)
        regions, _ = stage_regions(whole, whole, len(head.stages))
        dtype = self.model.x_embedder.weight.dtype
        x = self._empty(work.batch, PIXEL_CHANNELS, *image, dtype=dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        for stage, at in zip(head.stages, regions, strict=True):
            inside = x.requires_grad_(bool(rows))
            part = self._part((f"local_decoder.enc{stage.name}.",), _Bound(head._encode, stage, at), [inside])
            skip = self._map(stage.enc, image)
            size = skip.untyped_storage().nbytes()
            rows.append((stage, at, skip))
            yield Part(part.names, part.traced, True, takes=size)
            image = image[0] // 2, image[1] // 2
            x = self._map(stage.enc, image)
        features = self._map(self.config.dim, self.grid)
        size = features.untyped_storage().nbytes()
        if self.grid != image:
            features = self._map(self.config.dim, image)
        part = self._part(("local_decoder.bottleneck.",), head._fuse, [x, features])
        yield Part(part.names, part.traced, True, reaches_back=size)
        x = self._map(head_config.bottleneck, image)
        for stage, at, skip in reversed(rows):
            names = (f"local_decoder.up{stage.name}.", f"local_decoder.dec{stage.name}.")
            part = self._part(names, _Bound(head._decode, stage, at, fusion=Fusion(wanted=False)), [x, skip])
            yield Part(names, part.traced, True, reaches_back=skip.untyped_storage().nbytes())
            image = image[0] * 2, image[1] * 2
            x = self._map(stage.dec, image)

        target = torch.empty(work.batch, PIXEL_CHANNELS, work.height, work.width, device=_META)

        def loss(x: Tensor) -> Tensor:
            predicted = -head.out_conv(x)
            return (predicted.to(target.dtype) - (target - target)).square().flatten(1).mean(1)

        yield self._part(("local_decoder.out_conv.",), loss, [x], checkpointed=False)

    def _block(self, block: Any, tokens: int, rope: Any, names: tuple[str, ...]) -> Part:
        assert isinstance(block, Block)
        t = self._empty(self.work.batch, self.config.t_dim).requires_grad_()
        modulated = block.adaLN_modulation is not None
        run = _Bound(block, rope=rope, runs=None, t=t if modulated else None)
        return self._part(names, run, [self._tokens(tokens)])

    def _part(
        self, names: tuple[str, ...], function: Callable[..., Any], inputs: list[Tensor], checkpointed: bool = True
    ) -> Part:
        return Part(names, trace(function, inputs, self.model.parameters()), checkpointed)

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
