"""The second tiny world: 128-pixel images of two objects, of which captions fix only a part.

The first world's captions nearly fix their images, so every model of it scores alike. Here positions, sizes, rotations,
textures' phases and backgrounds are free, a caption may leave out colours and textures, and the images have detail that
their autoencoder loses. `comfyui_l2p.train.scenes` makes the weights beside this file; images of 64, 128 and 256 pixels
are rendered and judged.
"""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).parent
SOURCE_PATH = _FOLDER / "source.safetensors"
AUTOENCODER_PATH = _FOLDER / "autoencoder.safetensors"
WORDS_PATH = _FOLDER / "words.safetensors"
