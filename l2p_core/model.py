"""The two models on one backbone: L2PModel works on pixels, LatentModel is the source it came from."""

from __future__ import annotations

from functools import lru_cache

import torch
from einops import rearrange
from torch import Tensor, nn

from .backbone import Backbone, Captions
from .config import ModelConfig
from .detailer import DetailerHead, velocity_of
from .patch import pad_to_multiple, patchify, unpatchify


class L2PModel(Backbone):
    """A pixel-space flow model: noisy pixels, noise level and captions to velocity (arXiv 2605.12013 section 3).

    Parameter names are the ComfyUI layout. `tile` is the side in pixels of the squares in which the Detailer Head
    is evaluated, None for whole.

    Raises:
        ValueError: if the configuration has no head.
    """

    def __init__(self, config: ModelConfig):
        if config.head is None:
            raise ValueError("This is a latent model, which has no Detailer Head: convert it to L2P first.")
        super().__init__(config)
        self.tile: int | None = None
        self.local_decoder = DetailerHead(config.head, config.dim)

    def forward(self, pixels: Tensor, sigma: Tensor, captions: Captions) -> Tensor:
        """Predict the velocity noise - x0.

        Args:
            pixels: (B, 3, H, W) noisy pixels, (1 - sigma) x0 + sigma noise with x0 in [-1, 1]; any H and W.
            sigma: (B,) noise levels in [0, 1].
            captions: B tensors (L_i, caption_dim) of any lengths, or what `refined` made of them; each sample equals
                running it alone.

        Returns:
            (B, 3, H, W) in the dtype of `pixels`.
        """
        height, width = pixels.shape[-2:]
        x = pad_to_multiple(pixels, self.config.size_multiple).to(self.x_embedder.weight.dtype)
        grid = x.shape[-2] // self.config.patch_size, x.shape[-1] // self.config.patch_size
        hidden, _ = self.hidden_states(patchify(x, self.config.patch_size), grid, sigma, captions)
        features = rearrange(hidden, "b (h w) d -> b d h w", h=grid[0])
        self.local_decoder.gradient_checkpointing = self.gradient_checkpointing
        velocity = velocity_of(self.local_decoder(x, features, self.tile))[..., :height, :width]
        del x  # at 10K this copy is 0.6 GB, and the velocity in float32 1.3 GB
        return velocity.to(pixels.dtype)


class FinalLayer(nn.Module):
    """The source's output projection: hidden states to latent patches."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.norm_final = nn.LayerNorm(config.dim, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(config.dim, config.patch_size**2 * config.in_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.t_dim, config.dim))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """(B, N, D) and (B, t_dim) -> (B, N, P*P*C)."""
        scale = 1 + self.adaLN_modulation(t)[:, None]
        return self.linear(self.norm_final(x) * scale)


class LatentModel(Backbone):
    """The source: the same backbone on latents, with a linear output projection.

    Raises:
        ValueError: if the configuration is that of a pixel model.
    """

    def __init__(self, config: ModelConfig):
        if config.head is not None:
            raise ValueError("This is an L2P pixel model, not a latent source: load it as one.")
        super().__init__(config)
        self.final_layer = FinalLayer(config)

    def forward(self, latents: Tensor, sigma: Tensor, captions: Captions) -> Tensor:
        """Predict the velocity noise - x0 of latents (B, C, H, W); arguments as for L2PModel."""
        height, width = latents.shape[-2:]
        x = pad_to_multiple(latents, self.config.size_multiple).to(self.x_embedder.weight.dtype)
        grid = x.shape[-2] // self.config.patch_size, x.shape[-1] // self.config.patch_size
        hidden, t = self.hidden_states(patchify(x, self.config.patch_size), grid, sigma, captions)
        # The published projection, like the head, returns x0 - noise.
        velocity = -unpatchify(self.final_layer(hidden, t), self.config.patch_size, grid)
        return velocity[..., :height, :width].to(latents.dtype)


def build(config: ModelConfig) -> L2PModel | LatentModel:
    """The model that a configuration describes."""
    return L2PModel(config) if config.head else LatentModel(config)


def key_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every key of the model's state dict (ComfyUI layout) with its shape, without allocating any weight."""
    return dict(_key_shapes(config))


@lru_cache(maxsize=16)
def _key_shapes(config: ModelConfig) -> tuple[tuple[str, tuple[int, ...]], ...]:
    with torch.device("meta"):
        model = build(config)
    return tuple((key, tuple(tensor.shape)) for key, tensor in model.state_dict().items())
