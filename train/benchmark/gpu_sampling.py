"""Sampling steps of the whole model: each variant at its size, eager and compiled, beside the published code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...l2p_core import checkpoint
from ...l2p_core.memory import block_store
from ...l2p_core.memory.compiled import compile_blocks
from ...l2p_core.memory.placement import Form, for_sampling
from ...l2p_core.memory.room import free_memory
from ...l2p_core.memory.sampling_memory import choose_tile, step_bytes
from ...l2p_core.model import L2PModel
from ...l2p_core.ops.fused_decoder import fused_from
from .gpu_measure import Bench, Figures, counted, relative_error, timed
from .gpu_weights import random_input, random_model, with_variant
from .published import published_velocity

_EVERY = 8
"""Stride in rows and columns of the outputs that are kept for comparison."""

_COUNTED = "1k"
"""The variant whose kernels are counted; the backbone's are the same in all variants."""


@dataclass(frozen=True)
class SamplingScene:
    """The scene: a model whose blocks all variants share.

    Attributes:
        weights: storage of the blocks' linear layers, "bf16" or "fp8".
        compiled: whether the blocks are compiled, and the head of 1k; those of larger images are fused instead.
    """

    weights: str
    compiled: bool

    def make(self, bench: Bench) -> L2PModel:
        form = Form(torch.bfloat16, float8=self.weights == "fp8")
        if bench.model is None:
            config = bench.scale.config("1k")
            model = random_model(config, bench.device, for_sampling(config, form))
        else:
            model = checkpoint.load_model(bench.model, torch.bfloat16)
            block_store.store_loaded(model, for_sampling(model.config, form), bench.device)
            model.to(bench.device)
        model.eval().requires_grad_(False)
        if self.compiled:
            compile_blocks(model, backend=bench.scale.backend, dynamic=False)
        return model


@dataclass(frozen=True)
class SamplingStep:
    """Measures a step of a variant.

    Attributes:
        variant: at its own size.
        published: whether it is computed as published.
    """

    variant: str
    published: bool = False

    @torch.no_grad()
    def __call__(self, bench: Bench, base: L2PModel) -> Figures:
        side, caption = bench.scale.sides[self.variant], bench.scale.caption
        model = base
        if base.config.variant != self.variant:
            config = base.config.with_head(self.variant, bench.scale.head_width)
            model = with_variant(base, config, bench.device).eval().requires_grad_(False)
        bench.clean()
        fused = fused_from(bench.device)
        free = free_memory(bench.device) if bench.gpu else None
        model.tile = choose_tile(model.config, side, side, caption, itemsize=2, free=free, fused_from=fused)
        pixels = random_input("pixels", (1, 3, side, side), torch.float32, bench.device)
        features = random_input("caption", (caption, model.config.caption_dim), torch.bfloat16, bench.device)
        sigma = torch.tensor([0.6], device=bench.device)
        captions = model.refined([features])  # once per sampling
        step: Callable[[], Tensor] = (
            (lambda: published_velocity(model, pixels, sigma, features))
            if self.published
            else (lambda: model(pixels, sigma, captions))
        )
        figures = timed(bench, step, together=bench.scale.together)
        if not self.published:
            sizes = side, side, caption
            figures["predicted"] = step_bytes(model.config, *sizes, itemsize=2, tile=model.tile, fused_from=fused)
            figures["note"] = f"head in tiles of {model.tile}" if model.tile else "head whole"
        figures |= self._compared(bench, step()[..., ::_EVERY, ::_EVERY].float().cpu())
        return figures | (counted(bench, step) if self.variant == _COUNTED else {})

    def _compared(self, bench: Bench, output: Tensor) -> Figures:
        """The difference from the published code's output, which is kept for comparison."""
        key = f"sampling {self.variant}"
        if self.published:
            bench.outputs[key] = output
        return {"error": relative_error(output, bench.outputs[key])} if key in bench.outputs else {}
