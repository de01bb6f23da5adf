"""The tiny model that comes with the package: its files, and how commands refer to it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, cached_property, partial
from pathlib import Path

from torch import Tensor

from .. import flow, tiny
from ..checkpoint import open_checkpoint
from ..config import PIXEL_CHANNELS, ModelConfig
from ..files.tensor_io import ProgressCallback
from ..model import L2PModel, LatentModel
from .autoencoder import Autoencoder
from .generate import CFG, STEPS, in_batches
from .shapes import IMAGE_SIZE
from .words import Words
from .worlds import SHAPES, TinyWorld

NAME = "tiny"
SOURCE = tiny.SOURCE_PATH
DELTA = SOURCE.with_name("delta.safetensors")
HEAD_WIDTH = 0.25
"""The factor on the Detailer Head's widths that suits the tiny model."""


def resolve(path: Path | str) -> Path:
    """The path itself; the bundled source for the word "tiny", even if the current folder contains a file of that name,
    because recipes and commands should mean the same everywhere."""
    return SOURCE if str(path) == NAME else Path(path)


def is_tiny(config: ModelConfig) -> bool:
    """Whether a model, latent or pixel, is of the bundled source's kind, whose captions `Words` encodes: not larger,
    and with captions of the same width. A larger model with captions of that width has its own encoder."""
    source = _source_config()
    sizes = ("dim", "n_layers", "n_refiner_layers", "ffn_dim")
    return (config.source, config.caption_dim) == (source.source, source.caption_dim) and all(
        getattr(config, size) <= getattr(source, size) for size in sizes
    )


@cache
def _source_config() -> ModelConfig:
    return open_checkpoint(SOURCE).config()


class TinySource:
    """A bundled latent model with everything needed to generate images, loaded on first use."""

    def __init__(self, world: TinyWorld = SHAPES):
        self.world = world

    @cached_property
    def model(self) -> LatentModel:
        return self.world.load_source()

    @cached_property
    def autoencoder(self) -> Autoencoder:
        return self.world.load_autoencoder()

    @cached_property
    def words(self) -> Words:
        return self.world.load_words()

    def images(
        self,
        captions: Sequence[str],
        seeds: Sequence[int],
        steps: int = STEPS,
        cfg: float = CFG,
        progress: ProgressCallback | None = None,
    ) -> Tensor:
        """Images (B, 3, side, side) in [-1, 1] of B captions and seeds, of the world's side."""
        return tiny.generate(
            self.model,
            self.autoencoder,
            self.words,
            captions,
            seeds,
            steps=steps,
            cfg=cfg,
            size=self.world.side,
            progress=progress,
        )

    def name(self, steps: int = STEPS, cfg: float = CFG) -> str:
        """A name for the images generated with these settings; it changes when the weights do."""
        return f"source-{self.world.identity()}-steps{steps}-cfg{cfg:g}"


def pixel_images(
    model: L2PModel,
    encoder: Words,
    captions: Sequence[str],
    seeds: Sequence[int],
    steps: int = STEPS,
    side: int = IMAGE_SIZE,
    cfg: float = CFG,
    progress: ProgressCallback | None = None,
) -> Tensor:
    """Images of a tiny pixel model, by default with the bundled source's settings: (B, 3, side, side) in [-1, 1], on
    the CPU."""
    draw = partial(flow.sample, model, sigmas=flow.sigmas(steps), cfg=cfg)
    shape = PIXEL_CHANNELS, side, side
    return in_batches(draw, model.embedder_weight.device, encoder, captions, seeds, shape, progress)
