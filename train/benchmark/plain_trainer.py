"""Training the way the published trainer does: the baseline of `l2p benchmark train`.

Every block is checkpointed, trained weights are updated in the compute precision, AdamW runs tensor by tensor, and the
text encoder stays in memory to encode the captions of each step.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...l2p_core import flow
from ...l2p_core.freeze import freeze_all_but, trainable_names
from ...l2p_core.model import L2PModel
from ...l2p_core.ops.sample_randomness import draw
from ...l2p_core.training.batch import BatchSource
from ...l2p_core.training_config import TrainingConfig

VOCABULARY = 4096
SHARE = 4.02 / 6.17
"""Parameters of Qwen3-4B per parameter of Z-Image."""
PADDED = 50
"""Tokens that a caption is padded to: an eighth of a 320-pixel image's, like 512 for a 1024-pixel image."""


def tokens(caption: str) -> Tensor:
    """A caption's words as numbers, (words,) int64."""
    return torch.tensor([zlib.crc32(word.encode()) % VOCABULARY for word in caption.split()])


class StandIn(nn.Module):
    """A text encoder of random weights, as large relative to the trained model as Z-Image's.

    Args:
        width: of its features.
        parameters: approximate number of its parameters.
    """

    def __init__(self, width: int, parameters: int):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, width)
        layer = nn.TransformerEncoderLayer(width, width // 64, 4 * width, dropout=0.0, batch_first=True)
        of_layer = sum(parameter.numel() for parameter in layer.parameters())
        count = max(1, round((parameters - self.embedding.weight.numel()) / of_layer))
        self.layers = nn.TransformerEncoder(layer, count, enable_nested_tensor=False)
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, tokens: Tensor) -> Tensor:
        """(words,) -> (words, width), in the dtype of the weights."""
        padded = F.pad(tokens, (0, max(0, PADDED - len(tokens))))
        return self.layers(self.embedding(padded[None]))[0, : len(tokens)]


def train_plainly(model: L2PModel, encoder: StandIn, batches: BatchSource, config: TrainingConfig) -> Iterator[float]:
    """Train in place, with the samples and noise that `Trainer` would use; yields the loss of each step.

    Args:
        model: in the precision to compute in, on the device to compute on.
        encoder: of the captions, in the same precision and on the same device.
        batches: one micro-batch per step, with captions as `tokens`.
        config: steps, lr, weight_decay, blocks, shift and seed are used.
    """
    names = trainable_names(model.config, config.blocks)
    freeze_all_but(model, names)
    model.train()
    model.gradient_checkpointing = True
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=config.lr, weight_decay=config.weight_decay, foreach=False, fused=False)
    levels = flow.training_sigmas(config.shift)
    device = model.embedder_weight.device
    for step in range(config.steps):
        batch = batches.batch(step)
        draws = [
            draw(config.seed, number, batch.pixels.shape[1:], levels=len(levels), dropout=0.0, own_seed=None)
            for number in batch.numbers
        ]
        features = [encoder(caption.to(device)) for caption in batch.captions]
        sigma, noise = levels[[d.sigma_index for d in draws]], torch.stack([d.noise for d in draws])
        loss = flow.velocity_loss(model, batch.pixels.to(device), noise.to(device), sigma.to(device), features)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        yield float(loss.detach())
