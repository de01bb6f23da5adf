"""Low-rank adapters on the linear layers of frozen blocks (LoRA, arXiv 2106.09685): W x + alpha / rank * up(down(x)).

The policy "lora" trains them beside the full shallow layers, so that the middle blocks can adapt at the cost of a few
million parameters. `up` starts at zero: before the first step the model equals its base, bit for bit.

In memory an adapter is two linear layers inside the layer it adapts, and extends the key of that layer's weight; in
files its keys carry the prefix that ComfyUI's own LoRA loader expects (comfy/lora.py, model_lora_keys_unet).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..model import key_shapes
from ..ops.sample_randomness import mixed
from ..sources import source_of

FILE_PREFIX = "diffusion_model."
UP, DOWN, ALPHA = ".lora_up.weight", ".lora_down.weight", ".alpha"


class LowRank(NamedTuple):
    """An adapter: up (out, rank), down (rank, in), and alpha; the product is scaled by alpha / rank."""

    up: Tensor
    down: Tensor
    alpha: float

    def added_to(self, weight: Tensor) -> Tensor:
        """A weight (out, in) plus the adapter, computed in float32, in the weight's dtype and on its device."""
        up, down = (part.to(weight.device, torch.float32) for part in (self.up, self.down))
        return torch.addmm(weight.float(), up, down, alpha=self.alpha / len(down)).to(weight.dtype)


def with_adapters(
    adapters: Mapping[str, LowRank], weights: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """Weights by name, with the adapters of their layers added."""
    for name, weight in weights:
        adapter = adapters.get(name.removesuffix(".weight"))
        yield name, adapter.added_to(weight) if adapter else weight


def adapted_layers(config: ModelConfig, trained: Collection[str]) -> list[str]:
    """The linear layers of the trunk's blocks whose weights are not trained in full."""
    blocks = source_of(config).blocks(config, trunk=True)
    layers = [f"{block}.{linear}" for block, stack in blocks.items() for linear in stack.linears]
    return [layer for layer in layers if f"{layer}.weight" not in trained]


def adapter_shapes(config: ModelConfig, layers: Iterable[str], rank: int) -> dict[str, tuple[int, int]]:
    """The parameters that `attach` adds, with their shapes."""
    shapes: dict[str, tuple[int, int]] = {}
    of_weights = key_shapes(config)
    for layer in layers:
        rows, columns = of_weights[f"{layer}.weight"]
        shapes |= {f"{layer}{DOWN}": (rank, columns), f"{layer}{UP}": (rows, rank)}
    return shapes


def attach(
    model: nn.Module, layers: Iterable[str], *, rank: int, alpha: float, seed: int, device: torch.device | None = None
) -> None:
    """Add a float32 adapter to each of these layers, linear ones or `frozen_store.FrozenLinear`.

    `down` is initialised like a linear layer of its size (uniform within 1 / sqrt(in)), from the seed and the layer's
    name alone.

    Raises:
        ValueError: if the rank is not below the size of a layer.
    """
    for layer in layers:
        linear: Any = model.get_submodule(layer)
        if rank >= min(linear.in_features, linear.out_features):
            raise ValueError(
                f"lora_rank is {rank}, but {layer} has only {min(linear.in_features, linear.out_features)} "
                "dimensions: choose a lower rank."
            )
        linear.lora_down = nn.Linear(linear.in_features, rank, bias=False, device=device)
        linear.lora_up = nn.Linear(rank, linear.out_features, bias=False, device=device)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(mixed(seed, zlib.crc32(layer.encode())))
            start = torch.empty(rank, linear.in_features)
            bound = 1 / math.sqrt(linear.in_features)
            linear.lora_down.weight.copy_(start.uniform_(-bound, bound, generator=generator))
            linear.lora_up.weight.zero_()
        # A hook rather than another kind of layer: it works with any storage of the frozen weight.
        linear.register_forward_hook(partial(_add_adapter, alpha / rank))


def _add_adapter(scale: float, linear: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output + scale * linear.lora_up(linear.lora_down(inputs[0]))


def is_adapter(name: str) -> bool:
    """Whether a name, of a parameter or in a file, belongs to an adapter."""
    return name.endswith((UP, DOWN, ALPHA))


def layers_of(names: Iterable[str]) -> list[str]:
    """The layers of these adapter parameters, each once."""
    return list(dict.fromkeys(_layer(name) for name in names))


def with_alphas(parameters: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """The given parameters, and an alpha for every adapter among them."""
    layers = layers_of(filter(is_adapter, parameters))
    return {**parameters, **{f"{layer}{ALPHA}": torch.tensor(alpha, dtype=torch.float32) for layer in layers}}


def in_files(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by their keys in files: those of adapters get the prefix that ComfyUI expects."""
    return {FILE_PREFIX + name if is_adapter(name) else name: tensor for name, tensor in tensors.items()}


def paired(tensors: Mapping[str, Tensor]) -> dict[str, LowRank]:
    """The adapters in tensors named as in files, by the layer that each adapts.

    Raises:
        ValueError: if a part is missing or the parts do not fit each other.
    """
    adapters: dict[str, LowRank] = {}
    for layer in layers_of(tensors):
        parts = [tensors.get(f"{FILE_PREFIX}{layer}{part}") for part in (UP, DOWN, ALPHA)]
        if any(part is None for part in parts):
            raise ValueError(f"the low-rank adapter of '{layer}' is incomplete")
        up, down, alpha = (part for part in parts if part is not None)
        if up.ndim != 2 or down.ndim != 2 or up.shape[1] != len(down) or not len(down) or alpha.numel() != 1:
            raise ValueError(f"the parts of the low-rank adapter of '{layer}' do not fit each other")
        adapters[layer] = LowRank(up, down, float(alpha))
    return adapters


def _layer(name: str) -> str:
    for part in (UP, DOWN, ALPHA):
        name = name.removesuffix(part)
    return name.removeprefix(FILE_PREFIX)
