"""Scores of a tiny model: judged images of a fixed list of captions."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import NamedTuple, Protocol

from torch import Tensor

from ..l2p_core.config import VARIANTS
from ..l2p_core.files.tensor_io import ProgressCallback
from ..l2p_core.tiny.worlds import SHAPES, TinyWorld
from .console import count_progress, table
from .patch_grid import patch_grid_ratio

PATCH = VARIANTS["1k"].patch_size
"""Pixels. The source's patches, 2 x 2 latent cells of 8 pixels, have the same size."""


class ImageGenerator(Protocol):
    """Generates images (B, 3, H, H) in [-1, 1] of B captions and seeds."""

    def __call__(
        self, captions: Sequence[str], seeds: Sequence[int], *, progress: ProgressCallback | None = None
    ) -> Tensor: ...


class Scored(NamedTuple):
    """Images of the evaluation captions, and their scores: those of the world's judge, the mean of its attributes as
    `attributes`, and `patch_grid` (about 1 without a grid)."""

    images: Tensor
    scores: dict[str, float]


def evaluate(name: str, sampler: ImageGenerator, count: int, world: TinyWorld = SHAPES) -> Scored:
    """Judge the model `name` on the first `count` evaluation captions, caption i with the noise of seed i."""
    captions = world.captions(count)
    with count_progress(name, "image") as progress:
        images = sampler(captions, range(count), progress=progress)
    scores = world.score(images, captions)
    scores["attributes"] = mean(scores[attribute] for attribute in world.attributes)
    scores["patch_grid"] = patch_grid_ratio(images, PATCH)
    return Scored(images, scores)


def score_table(scores: dict[str, dict[str, float]], source: str, world: TinyWorld = SHAPES) -> str:
    """Scores of models as a Markdown table, with their shares of the scores of the model `source`."""
    rows = []
    for name, values in scores.items():
        kept = (f"{values[column] / scores[source][column]:.1%}" for column in ("whole", "attributes"))
        each = (f"{values[column]:.1%}" for column in ("whole", *world.attributes))
        rows.append([name, *each, *kept, f"{values['patch_grid']:.2f}"])
    return table(
        ["model", "whole caption", *world.attributes, "kept of whole", "kept of attributes", "patch grid"], rows
    )
