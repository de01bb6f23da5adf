"""The tiny autoencoder: 64x64 RGB to an 8x8 latent of 16 channels and back, like large ones at 1024 pixels.

The encoder consists of the whitened principal components of 8x8 pixel blocks, one convolution fitted in closed form.
The decoder is their inverse plus a learned correction that sees neighbouring cells, sharpens what 16 components blur
and tolerates the errors of a diffusion model. Convolutions trained end to end from random weights were tried first and
still lost a fifth of the shapes after a minute, in which this fitted one has all of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ..files.metadata import KIND as KIND_KEY
from ..files.tensor_file import load_tensors, save

LATENT_CHANNELS = 16
DOWNSCALE = 8  # pixels to a latent cell

Loaded = TypeVar("Loaded", bound="Autoencoder")


class ResidualBlock(nn.Module):
    """x + conv(silu(conv(silu(x)))), 3x3 at constant width."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(F.silu(x))))


class Autoencoder(nn.Module):
    """Pixels in [-1, 1] to latents of zero mean and unit standard deviation per channel, and back.

    The latents are normalised, so a diffusion model needs no scale or shift of its own.
    """

    downscale = DOWNSCALE
    channels = LATENT_CHANNELS

    KIND = "autoencoder"
    """Names its files."""

    def __init__(self, width: int = 64, deep_width: int = 96):
        super().__init__()
        self.encoder = nn.Conv2d(3, self.channels, DOWNSCALE, stride=DOWNSCALE)
        self.inverse = nn.ConvTranspose2d(self.channels, 3, DOWNSCALE, stride=DOWNSCALE)
        self.correction = nn.Sequential(
            nn.Conv2d(self.channels, deep_width, 3, padding=1),
            ResidualBlock(deep_width),
            ResidualBlock(deep_width),
            nn.Conv2d(deep_width, width * 4, 1),
            nn.PixelShuffle(2),
            ResidualBlock(width),
            ResidualBlock(width),
            nn.SiLU(),
            nn.Conv2d(width, 48, 3, padding=1),
            nn.PixelShuffle(4),
        )

    @torch.no_grad()
    def fit_components(self, pixels: Tensor) -> None:
        """Set the encoder and its inverse to the principal components of example images (B, 3, H, W) in [-1, 1].

        The correction starts from zero. The encoder is not trained further.
        """
        blocks = rearrange(pixels, "b c (h i) (w j) -> (b h w) (c i j)", i=DOWNSCALE, j=DOWNSCALE).double()
        mean = blocks.mean(0)
        variances, directions = torch.linalg.eigh(torch.cov(blocks.T))  # ascending
        deviations = variances[-self.channels :].sqrt()
        components = directions[:, -self.channels :].T  # (channels, c i j)
        analysis, synthesis = components / deviations[:, None], components * deviations[:, None]
        assert self.encoder.bias is not None and self.inverse.bias is not None
        self.encoder.weight.copy_(analysis.reshape(self.encoder.weight.shape))
        self.encoder.bias.copy_(-analysis @ mean)
        self.encoder.requires_grad_(False)
        self.inverse.weight.copy_(synthesis.reshape(self.inverse.weight.shape))
        # One bias a colour cannot hold the mean of each pixel of a block, but blocks have no preferred pixel.
        self.inverse.bias.copy_(mean.reshape(3, -1).mean(1))
        set_zero(self.correction[-2])

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1], H and W multiples of 8 -> (B, channels, H/8, W/8)."""
        height, width = pixels.shape[-2:]
        if height % DOWNSCALE or width % DOWNSCALE:
            raise ValueError(
                f"The tiny autoencoder reads images whose sides are multiples of 8, not {width}x{height} pixels."
            )
        return self.encoder(_channels_last(pixels))

    def decode(self, latents: Tensor) -> Tensor:
        """(B, channels, h, w) -> (B, 3, 8h, 8w) in [-1, 1]."""
        return self.decode_unclamped(latents).clamp(-1, 1)

    def decode_unclamped(self, latents: Tensor) -> Tensor:
        """Decode without a clamp, for training: a clamp would stop the gradient of every pixel that overshoots."""
        if latents.shape[1] != self.channels:
            raise ValueError(
                f"The tiny VAE decodes latents of {self.channels} channels, not of {latents.shape[1]}. The pixels of "
                "an L2P model need no VAE: connect Pixels to Image in place of VAE Decode."
            )
        latents = _channels_last(latents)
        return self.inverse(latents) + self.correction(latents)

    def save(self, path: Path) -> None:
        """Write the weights in float16 as a safetensors file, replacing an existing one."""
        weights = {
            name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in self.state_dict().items()
        }
        save(weights, path, {KIND_KEY: self.KIND}, overwrite=True)

    @classmethod
    def load(cls: type[Loaded], path: Path) -> Loaded:
        """Read a file written by `save`, in float32.

        Raises:
            ValueError: if the file holds anything else.
        """
        tensors, metadata = load_tensors(path)
        if metadata.get(KIND_KEY) != cls.KIND:
            raise ValueError(f"{path} is not the tiny autoencoder: use the file that comes with this package.")
        model = cls()
        model.load_state_dict(tensors)
        return model.eval()


def reconstruction_loss(model: Autoencoder, pixels: Tensor, latent_noise: Tensor) -> Tensor:
    """Absolute and squared error of the images decoded from latents with noise (B, channels, h, w) added; a scalar.

    The noise makes the decoder tolerate the small errors of a diffusion model.
    """
    error = model.decode_unclamped(model.encode(pixels) + latent_noise).float() - pixels
    return error.abs().mean() + error.square().mean()


def set_zero(layer: nn.Module) -> None:
    """Let a layer return zeros until it is trained."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def _channels_last(x: Tensor) -> Tensor:
    """The memory format in which convolutions on a CPU are fastest."""
    return x.contiguous(memory_format=torch.channels_last)
