"""The bundled tiny source: a text-to-image latent model of coloured shapes, small enough to live in the repository.

`load_source`, `load_autoencoder` and `load_words` read the weights beside this file, which were created by
`comfyui_l2p.train.make_tiny_source`; `generate` generates images with them.
"""

from __future__ import annotations

from pathlib import Path

import torch

from ..checkpoint import load_latent
from ..model import LatentModel
from .autoencoder import Autoencoder
from .generate import generate
from .words import Words

__all__ = [
    "AUTOENCODER_PATH",
    "DELTA_PATH",
    "SOURCE_PATH",
    "WORDS_PATH",
    "generate",
    "load_autoencoder",
    "load_source",
    "load_words",
]

_FOLDER = Path(__file__).parent
SOURCE_PATH = _FOLDER / "source.safetensors"
AUTOENCODER_PATH = _FOLDER / "autoencoder.safetensors"
WORDS_PATH = _FOLDER / "words.safetensors"
DELTA_PATH = _FOLDER / "delta.safetensors"
"""The result of the benchmark's full run: the pixel model as a delta on the source."""


def load_source(path: Path = SOURCE_PATH) -> LatentModel:
    """The latent model in float32, ready to sample from; errors as for `checkpoint.load_latent`."""
    return load_latent(path, dtype=torch.float32).eval()


def load_autoencoder() -> Autoencoder:
    """The autoencoder in float32; errors as for `Autoencoder.load`."""
    return Autoencoder.load(AUTOENCODER_PATH)


def load_words() -> Words:
    """The caption encoder; errors as for `Words.load`."""
    return Words.load(WORDS_PATH)
