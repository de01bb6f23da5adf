"""Small random models and data for tests."""

from __future__ import annotations

import torch
from torch import Tensor

from comfyui_l2p.l2p_core.config import ModelConfig
from comfyui_l2p.l2p_core.model import L2PModel
from comfyui_l2p.l2p_core.training.batch import Batch

SOURCE = ModelConfig(
    dim=64,
    head_dim=32,
    n_layers=4,
    n_refiner_layers=1,
    caption_dim=24,
    ffn_dim=96,
    t_freq_dim=32,
    t_hidden_dim=48,
    t_dim=64,
)
"""A latent source with every part of the real one."""


def pixel_model(variant: str = "1k", head_width: float = 0.125, seed: int = 0) -> L2PModel:
    """A pixel model on that backbone, its pad tokens as random as the rest."""
    torch.manual_seed(seed)
    model = L2PModel(SOURCE.with_head(variant, head_width))
    for token in (model.x_pad_token, model.cap_pad_token):
        torch.nn.init.normal_(token)
    return model


def captions(*lengths: int, width: int = SOURCE.caption_dim, seed: int = 0) -> list[Tensor]:
    """Random caption features of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, width, generator=generator) for length in lengths]


class RandomBatches:
    """A batch source over a handful of fixed random images."""

    def __init__(self, batch_size: int = 2, size: int = 32, own_seeds: bool = False):
        generator = torch.Generator().manual_seed(7)
        self.images = torch.rand(6, 3, size, size, generator=generator) * 2 - 1
        self.captions = captions(3, 40, 5, 8, 33, 7)
        self.batch_size = batch_size
        self.own_seeds = own_seeds

    def batch(self, number: int) -> Batch:
        numbers = [number * self.batch_size + i for i in range(self.batch_size)]
        rows = [n % len(self.images) for n in numbers]
        seeds = [row if self.own_seeds else None for row in rows]
        return Batch(self.images[rows], [self.captions[row] for row in rows], numbers, seeds)
