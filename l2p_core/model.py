"""The two models on a source's backbone: L2PModel works on pixels, LatentModel is the latent source."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor

from .backbone import Backbone, Captions
from .config import ModelConfig, PixelConfig
from .detailer import DetailerHead, velocity_of
from .patch import pad_to_multiple, patchify, unpatchify
from .sources import source_of


class _OnBackbone(Backbone):
    """A model whose backbone is that of its configuration's source: making one makes it a subclass of both."""

    if not TYPE_CHECKING:  # to type checkers a model is made as every object is

        def __new__(cls, config: ModelConfig | None = None, *_: Any) -> _OnBackbone:
            # A copy comes as what it was, without a configuration.
            return super().__new__(cls if config is None else _combined(cls, source_of(config).backbone))

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.source = source_of(config)

    @property
    def embedder_weight(self) -> Tensor:
        """The weight of the patch embedder, whose dtype and device are those of the model's inputs."""
        return self.get_parameter(self.source.embedder_weight)

    def _patches(self, image: Tensor, order: str) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """An image (B, C, H, W) padded, its patches, and their grid as (rows, columns)."""
        patch_size = self.config.patch_size
        x = pad_to_multiple(image, self.config.size_multiple).to(self.embedder_weight.dtype)
        return x, patchify(x, patch_size, order), (x.shape[-2] // patch_size, x.shape[-1] // patch_size)


@cache
def _combined(model: type, backbone: type) -> type:
    return model if issubclass(model, backbone) else type(model.__name__, (model, backbone), {})


class L2PModel(_OnBackbone):
    """A pixel-space flow model: noisy pixels, noise level and captions to velocity (arXiv 2605.12013 section 3).

    Parameter names are the ComfyUI layout. `tile` is the side in pixels of the squares in which the Detailer Head
    is evaluated, None for whole.

    Raises:
        ValueError: if the configuration has no head.
    """

    config: PixelConfig

    def __init__(self, config: ModelConfig):
        if not isinstance(config, PixelConfig):
            raise ValueError("This is a latent model, which has no Detailer Head: convert it to L2P first.")
        super().__init__(config)
        self.tile: int | None = None
        self.local_decoder = DetailerHead(config.head, config.dim)

    def forward(self, pixels: Tensor, sigma: Tensor, captions: Captions) -> Tensor:
        """Predict the velocity noise - x0.

        Args:
            pixels: (B, 3, H, W) noisy pixels, (1 - sigma) x0 + sigma noise with x0 in [-1, 1]; any H and W.
            sigma: (B,) noise levels in [0, 1].
            captions: B tensors (L_i, caption_dim) of any lengths, or B `Conditioning` where the source reads a pooled
                vector, or what `refined` made of them; each sample equals running it alone.

        Returns:
            (B, 3, H, W) in the dtype of `pixels`.
        """
        height, width = pixels.shape[-2:]
        x, features = self.features(pixels, sigma, captions)
        self.local_decoder.gradient_checkpointing = self.gradient_checkpointing
        velocity = velocity_of(self.local_decoder(x, features, self.tile))[..., :height, :width]
        del x  # at 10K this copy is 0.6 GB, and the velocity in float32 1.3 GB
        return velocity.to(pixels.dtype)

    def features(self, pixels: Tensor, sigma: Tensor, captions: Captions) -> tuple[Tensor, Tensor]:
        """What the Detailer Head reads; arguments as for `forward`.

        Returns:
            The padded pixels in the model's dtype, and the backbone's map (B, dim, rows, columns) of their patches.
        """
        x, patches, grid = self._patches(pixels, PIXEL_ORDER)
        hidden, _ = self.hidden_states(patches, grid, sigma, captions)
        return x, rearrange(hidden, "b (h w) d -> b d h w", h=grid[0])


PIXEL_ORDER = "p q c"
"""Order of a pixel patch's elements in every pixel model, whatever its source's order, as published."""


class LatentModel(_OnBackbone):
    """The source: the same backbone on latents, with a linear output projection.

    Raises:
        ValueError: if the configuration is that of a pixel model.
    """

    def __init__(self, config: ModelConfig):
        if isinstance(config, PixelConfig):
            raise ValueError("This is an L2P pixel model, not a latent source: load it as a pixel model.")
        super().__init__(config)
        self.add_module(self.source.output, self.source.projection(config))

    def forward(self, latents: Tensor, sigma: Tensor, captions: Captions) -> Tensor:
        """Predict the velocity noise - x0 of latents (B, C, H, W); arguments as for L2PModel."""
        height, width = latents.shape[-2:]
        latent = self.source.latent
        _, patches, grid = self._patches(latents, latent.order)
        hidden, t = self.hidden_states(patches, grid, sigma, captions)
        projected = self.get_submodule(self.source.output)(hidden, t)
        velocity = latent.sign * unpatchify(projected, self.config.patch_size, grid, latent.order)
        return velocity[..., :height, :width].to(latents.dtype)


@lru_cache(maxsize=16)
def key_shapes(config: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """Every key of the model's state dict (ComfyUI layout) with its shape, without allocating any weight."""
    with torch.device("meta"):
        model = L2PModel(config) if isinstance(config, PixelConfig) else LatentModel(config)
    return MappingProxyType({key: tuple(tensor.shape) for key, tensor in model.state_dict().items()})
