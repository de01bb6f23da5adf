"""The second tiny world's autoencoder: convolutions trained from end to end, 8 x 8 pixels to a cell of 8 channels.

It starts from the first world's, whose encoder consists of principal components, and trains both halves. Its latents
are normalised over the batch, as in FLUX.2, and carry noise in training: channels therefore share what is worth
keeping, and what is not worth its noise, such as the background's weave, is lost.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from ..autoencoder import DOWNSCALE, Autoencoder, ResidualBlock, set_zero

CHANNELS = 8
"""Half the first world's: a small source learns fewer values a token from fewer images."""


class TrainedAutoencoder(Autoencoder):
    """Pixels in [-1, 1] to latents of zero mean and unit standard deviation per channel, and back."""

    channels = CHANNELS

    KIND = "scenes autoencoder"

    def __init__(self, width: int = 64, deep_width: int = 96, encoder_width: int = 96):
        super().__init__(width, deep_width)
        self.refinement = nn.Sequential(
            nn.PixelUnshuffle(DOWNSCALE),
            nn.Conv2d(3 * DOWNSCALE**2, encoder_width, 3, padding=1),
            ResidualBlock(encoder_width),
            nn.SiLU(),
            nn.Conv2d(encoder_width, CHANNELS, 3, padding=1),
        )
        self.norm = nn.BatchNorm2d(CHANNELS, affine=False, momentum=0.02)

    @torch.no_grad()
    def fit_components(self, pixels: Tensor) -> None:
        """As for the first world, but the encoder is trained on, and corrected from zero like the decoder."""
        super().fit_components(pixels)
        self.encoder.requires_grad_(True)
        set_zero(self.refinement[-1])

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1], H and W multiples of 8 -> (B, 8, H/8, W/8)."""
        return self.norm(super().encode(pixels) + self.refinement(pixels))

    def encoder_identity(self) -> str:
        """A name for what `encode` does, as kept in files: a source trained on other latents has another one."""
        digest = hashlib.sha256()
        for part in (self.encoder, self.refinement, self.norm):
            for tensor in part.state_dict().values():
                digest.update(tensor.detach().cpu().half().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]
