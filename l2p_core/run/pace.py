"""How long a run takes, from measured steps: its own, or those of a neighbouring run that computes the same.

Every line of metrics.jsonl names the device and carries a key of everything that a step's time depends on, so no
estimate uses another card's steps or those of other settings.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ..config import PixelConfig
from ..device.accelerator import name_of
from ..training.state import saved_step
from .data import image_side
from .folder import RunFolder
from .metrics import duration
from .recipe import Recipe

_STEPS = 100
"""The number of a run's last steps that are used."""
_TAIL_BYTES = 1 << 17
_NO_MATTER = {
    "steps", "lr", "backbone_lr_scale", "weight_decay", "warmup_steps", "decay", "clip_norm", "caption_dropout",
    "shift", "lora_alpha", "noise", "seed",
}  # fmt: skip
"""Training settings that do not affect the time of a step."""


@dataclass(frozen=True)
class Pace:
    """A measurement.

    Attributes:
        seconds: median time of a step, without saves and montages.
        steps: number of measured steps.
        device: its name.
        folder: of the measured run.
    """

    seconds: float
    steps: int
    device: str
    folder: Path


def key_of(config: PixelConfig, recipe: Recipe, device: torch.device, processes: int = 1) -> str:
    """A key of everything that the time of a step depends on.

    Args:
        config: of the L2P model.
        recipe: as requested, with "auto" and -1 undecided.
        device: to train on.
        processes: number of processes that train together.
    """
    training = {name: value for name, value in dataclasses.asdict(recipe.training).items() if name not in _NO_MATTER}
    data = recipe.data.kind, image_side(recipe, config), recipe.data.batch_size
    known = [dataclasses.asdict(config), training, data, name_of(device), processes]
    return hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()[:16]


def measured(folder: Path, key: str) -> Pace | None:
    """The pace of the run in the folder, otherwise of the latest neighbouring run that computes the same, or None.

    Args:
        folder: of the run; need not exist.
        key: see `key_of`.
    """
    own = _of_run(folder, key)
    if own or not folder.resolve().parent.is_dir():
        return own
    beside = folder.resolve().parent.glob(f"*/{RunFolder(folder).metrics.name}")
    latest_first = sorted(beside, key=lambda path: path.stat().st_mtime, reverse=True)
    return next(filter(None, (_of_run(path.parent, key) for path in latest_first)), None)


def expected(recipe: Recipe, folder: RunFolder, key: str, fresh: bool = False) -> str:
    """The run's expected duration as a sentence; arguments as for `measured`, and whether it starts from step 0.

    Raises:
        CheckpointError: if the folder's save is not valid.
    """
    done = 0 if fresh else saved_step(folder.state)
    return sentence(measured(folder.path, key), max(0, recipe.training.steps - done), folder.path)


def sentence(pace: Pace | None, left: int, folder: Path) -> str:
    """The duration of the remaining steps as a sentence; "" if there are none.

    Args:
        pace: see `measured`.
        left: steps.
        folder: of the run.
    """
    if not left:
        return ""
    if pace is None:
        return "The training time is known after the first steps."
    there = "this run" if pace.folder.resolve() == folder.resolve() else f"the run {pace.folder.name}"
    return (
        f"The remaining {left} steps take about {duration(left * pace.seconds)}, without saves and montages: a step "
        f"took {pace.seconds:.3g} seconds in {there} (median of {pace.steps}, {pace.device})."
    )


def _of_run(folder: Path, key: str) -> Pace | None:
    metrics = RunFolder(folder).metrics
    if not metrics.is_file():
        return None
    # The first step of a run loads libraries and compiles.
    steady = [line for line in _last_lines(metrics) if line.get("pace") == key and line["step"] > 1]
    if not steady:
        return None
    return Pace(median(line["seconds"] for line in steady), len(steady), steady[-1]["device"], folder)


def _last_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The last steps in a metrics file of any length; nothing for another program's file of that name."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        start = file.seek(max(0, size - _TAIL_BYTES))
        text = file.read().decode("utf-8", "replace")
    whole = [line for line in text.splitlines(keepends=True)[bool(start) :] if line.endswith("\n")]
    for line in whole[-_STEPS:]:
        try:
            values = json.loads(line)
        except ValueError:
            return
        if isinstance(values, dict):
            yield values
