"""`l2p benchmark depth`: whether levels are lost on the way from 16-bit files through a model to 16-bit files.

A small model is overfitted on a ramp of 4,096 levels, each in a 16-bit file, by an ordinary run: from a data folder,
with captions, in float32. Then every level is sampled from pure noise and written with 16 bits, and the mean of its
file is compared with the level.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ...l2p_core import delta, flow
from ...l2p_core.dataset.images import load_whole
from ...l2p_core.files import metadata
from ...l2p_core.files.paths import settled
from ...l2p_core.files.tensor_file import save
from ...l2p_core.initialise import FITTED
from ...l2p_core.model import L2PModel
from ...l2p_core.run import loop
from ...l2p_core.run.caption_source import CaptionSource
from ...l2p_core.run.folder import RunFolder
from ...l2p_core.run.metrics import read_metrics
from ...l2p_core.run.recipe import DataSection, ModelSection, Recipe, WatchSection
from ...l2p_core.sources.lumina2 import Lumina2Config
from ...l2p_core.training_config import TrainingConfig
from ..console import table
from ..own_folder import OwnFolder
from ..run import shown
from . import ramp

TOLERANCE = 0.25
"""The largest error that counts as right, in 8-bit levels."""
STEPS = 8000
SHIFT = 1000.0
"""Shift of the noise levels in training and sampling: most are near pure noise, where a level needs no amplifying."""
SAMPLING_STEPS = 4
_BATCH = 32
_AT_ONCE = 128
_SEED = 0

CONFIG = Lumina2Config(
    dim=96, head_dim=48, n_layers=1, n_refiner_layers=1, caption_dim=ramp.WIDTH, ffn_dim=192, t_freq_dim=32,
    t_hidden_dim=64, t_dim=64, n_kv_heads=2,
).with_head("1k", 0.1875)  # fmt: skip
"""The smallest of the architectures: Lumina-2 adds no padding to an image of one token and its caption."""


class Depth(NamedTuple):
    """Errors of the levels' means, in levels of 8 bits, and the share of them within TOLERANCE."""

    share: float
    median: float
    ninth_decile: float


FOLDER = OwnFolder("l2p benchmark depth", "depth.txt", lambda folder: False)


def benchmark_depth(output: Path, steps: int | None = None, quick: bool = False) -> Depth:
    """Do what is missing in the folder, print a table and return its content.

    Args:
        output: folder of the data, the run and the sampled files; a run is resumed from its last save.
        steps: of training.
        quick: few levels and steps, to see that it runs.

    Raises:
        ValueError: if the folder has results of something else or of other steps, or is in use by another process.
        KeyboardInterrupt: after Ctrl-C or a signal that ends the process, when everything is saved.
    """
    output = settled(output) / ("quick" if quick else "")
    FOLDER.check(output)
    with FOLDER.held(output):
        levels = range(0, ramp.LEVELS, 256 if quick else 1)
        steps = steps or (2 if quick else STEPS)
        ramp.write_folder(output / "ramp", levels)
        base = start(output / "start.safetensors", "random" if quick else FITTED)
        run = train(recipe(output, base, steps, min(_BATCH, len(levels) // 2)), output)
        model = delta.load_model(run.delta, base, dtype=torch.float32).eval()
        means = sampled(model, levels, output / "sampled")
        found = errors(means, levels)
        rows = [
            ("levels", str(len(levels))),
            ("training", f"{steps} steps, {_seconds(run):.0f} s"),
            ("means within a quarter of an 8-bit level", f"{found.share:.1%}"),
            ("median error, 8-bit levels", f"{found.median:.3f}"),
            ("error of nine in ten, 8-bit levels", f"{found.ninth_decile:.3f}"),
        ]
        print(table(("", "result"), rows))
        return found


def start(path: Path, init: str) -> Path:
    """The file of a small model with random weights; with the init "fitted", a run fits its head."""
    if path.exists():
        return path
    torch.manual_seed(_SEED)
    model = L2PModel(CONFIG)
    # The level comes from the caption, not from the noise in the patch. Training still moves the unused weights of the
    # noise at random; beside the bias, their share of the token stays small.
    torch.nn.init.zeros_(model.x_embedder.weight)
    torch.nn.init.normal_(model.x_embedder.bias)
    about = metadata.describe(metadata.PIXEL_INIT, CONFIG, init=init, seed=str(_SEED))
    save(model.state_dict(), path, about)
    return path


def recipe(output: Path, base: Path, steps: int, batch_size: int) -> Recipe:
    """How the model is overfitted: all layers, in float32, without weight decay."""
    training = TrainingConfig(
        steps=steps, lr=3e-4, policy="all", precision="fp32", gradient_checkpointing=False, decay="cosine",
        shift=SHIFT, weight_decay=0.0, ema_decay=0.995, seed=0,
    )  # fmt: skip
    return Recipe(
        model=ModelSection(base=str(base)),
        data=DataSection(kind="folder", path=str(output / "ramp"), size=ramp.SIDE, batch_size=batch_size),
        training=training,
        watch=WatchSection(save_every=1000, montage_every=steps, divergence_steps=0),
    )


def train(how: Recipe, output: Path) -> RunFolder:
    """The finished run of a recipe, resumed from its last save.

    Raises:
        KeyboardInterrupt: after Ctrl-C or a signal that ends the process, when everything is saved.
    """
    encoder = ramp.LevelEncoder()
    captions = CaptionSource(output / "captions", encoder.identity, ramp.LevelEncoder, max_tokens=ramp.TOKENS)
    with shown(how.training.steps) as hooks:
        result = loop.train(how, output / "run", captions=captions, hooks=hooks)
    if not result.finished or hooks.should_stop():
        raise KeyboardInterrupt
    return result.folder


@torch.no_grad()
def sampled(model: flow.FlowModel, levels: Sequence[int], folder: Path) -> Tensor:
    """Sample an image of each level into a file of 16 bits; returns the files' means in [0, 1], (N,)."""
    noise = torch.randn(len(levels), 3, ramp.SIDE, ramp.SIDE, generator=torch.Generator().manual_seed(_SEED))
    captions = ramp.LevelEncoder().encode([ramp.caption(level) for level in levels])
    for first in range(0, len(levels), _AT_ONCE):
        part = slice(first, first + _AT_ONCE)
        pixels = flow.sample(model, noise[part], captions[part], sigmas=flow.sigmas(SAMPLING_STEPS, SHIFT))
        ramp.write_images(folder, levels[part], pixels)
    return torch.stack([load_whole(folder / ramp.file_name(level))[0].double().mean() for level in levels])


def errors(means: Tensor, levels: Sequence[int]) -> Depth:
    """The errors of means (N,) in [0, 1] for these levels."""
    away = (means - ramp.values(levels)).abs() * 255
    within = float((away <= TOLERANCE).double().mean())
    return Depth(within, float(away.median()), float(away.quantile(0.9)))


def _seconds(run: RunFolder) -> float:
    return sum(step["seconds"] for step in read_metrics(run.metrics))
