"""The second tiny world: 128-pixel images of two objects, of which captions fix only a part.

The first world's captions nearly fix their images, so every model of it scores alike. Here positions, sizes, rotations,
textures' phases and backgrounds are free, a caption may leave out colours and textures, and the images have detail that
their autoencoder loses. `comfyui_l2p.train.scenes` makes the weights beside this file; images of 64, 128 and 256 pixels
are rendered and judged.
"""

from __future__ import annotations

from pathlib import Path

import torch

from ...checkpoint import load_latent
from ...model import LatentModel
from .autoencoder import TrainedAutoencoder
from .words import PhraseWords

__all__ = [
    "AUTOENCODER_PATH",
    "SOURCE_PATH",
    "WORDS_PATH",
    "load_autoencoder",
    "load_source",
    "load_words",
]

_FOLDER = Path(__file__).parent
SOURCE_PATH = _FOLDER / "source.safetensors"
AUTOENCODER_PATH = _FOLDER / "autoencoder.safetensors"
WORDS_PATH = _FOLDER / "words.safetensors"


def load_source(path: Path = SOURCE_PATH) -> LatentModel:
    """The latent model in float32, ready to sample from; errors as for `checkpoint.load_latent`."""
    return load_latent(path, dtype=torch.float32).eval()


def load_autoencoder(path: Path = AUTOENCODER_PATH) -> TrainedAutoencoder:
    """The autoencoder in float32; errors as for `Autoencoder.load`."""
    return TrainedAutoencoder.load(path)


def load_words(path: Path = WORDS_PATH) -> PhraseWords:
    """The caption encoder; errors as for `Words.load`."""
    return PhraseWords.load(path)
