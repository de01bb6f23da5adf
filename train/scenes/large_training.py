"""A pixel model for images of 256 pixels: the variant 4k, from a pixel model of the second tiny world's own size.

Its 16 tokens are of 64 x 64 pixels. It trains on clean renderings, as the source makes no images of this size, and on
evenly spread noise levels (shift 1), as it finishes images that grow into it.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

from ...l2p_core import delta
from ...l2p_core.checkpoint import open_checkpoint
from ...l2p_core.run.recipe import Recipe
from ...l2p_core.tiny.worlds import TinyWorld, rendered_scenes
from ..benchmark.transfer import Stages
from ..benchmark.transfer_arms import FULL, Arm, world_recipe

SIDE = 256
VARIANT = "4k"
STEPS, IMAGES, BATCH, LR, SHIFT = 1800, 2048, 4, 3e-3, 1.0
HEAD_WIDTH = 1.0  # with half of the 16 channels at full resolution, it learns to tell noise from detail far more slowly


def train_large(pixels: Path, world: TinyWorld, out: Path, steps: int) -> Path:
    """Train, resuming from the last save in `out`; returns the whole model's file.

    Args:
        pixels: a pixel model of the world: a delta on its source, or a whole L2P model.
        world: the second one.
        out: the folder of everything that is written, created if missing.
        steps: of training.

    Raises:
        ValueError: for a file that is not such a model, or a folder in which another run lies.
    """
    out.mkdir(parents=True, exist_ok=True)
    target = out / "large.safetensors"
    recipe = _recipe(world, steps)
    stages = Stages(out, _enlarged(world, _whole(pixels, world, out)))
    folder = stages.train(Arm(FULL, f"{VARIANT} model", recipe), recipe)
    delta.merge(folder.delta, folder.init, target, overwrite=True)
    return target


def _whole(pixels: Path, world: TinyWorld, out: Path) -> Path:
    """The model as one file, which a larger variant can be made from."""
    if not open_checkpoint(pixels).is_delta:
        return pixels
    whole = out / "pixels.safetensors"
    delta.merge(pixels, world.source, whole, overwrite=True)
    return whole


def _enlarged(world: TinyWorld, pixels: Path) -> TinyWorld:
    """The world at `SIDE` pixels, with a pixel model in the place of the source."""
    files = (pixels, *world.files[1:])
    return dataclasses.replace(world, side=SIDE, files=files, rendered=partial(rendered_scenes, side=SIDE))


def _recipe(world: TinyWorld, steps: int) -> Recipe:
    plain = world_recipe(world, "tiny")
    return dataclasses.replace(
        plain,
        model=dataclasses.replace(plain.model, variant=VARIANT, head_width=HEAD_WIDTH, init="scaled"),
        data=dataclasses.replace(plain.data, kind="renderings", images=IMAGES, batch_size=BATCH),
        training=dataclasses.replace(plain.training, steps=steps, lr=LR, shift=SHIFT),
    )
