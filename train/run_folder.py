"""A training run's folder: recipe, metrics, montages, state and delta, each at its place."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from ..l2p_core.trainer import SIGMA_EDGES, StepMetrics
from . import recipe as recipes
from .recipe import Recipe


class RunFolder:
    """The files of one run.

    Args:
        path: the folder, made where it is missing.
    """

    def __init__(self, path: Path):
        self.path = path
        self.recipe = path / "recipe.toml"
        self.init = path / "init.safetensors"
        self.images = path / "images"
        self.metrics = path / "metrics.jsonl"
        self.state = path / "state.safetensors"
        self.delta = path / "delta.safetensors"

    def begin(self, text: str, recipe: Recipe) -> None:
        """Make the folder and keep the recipe in it, as `text`.

        Raises:
            ValueError: if the folder holds a run with another model, other data or other training settings.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if self.recipe.exists():
            _check_same(recipes.load(self.recipe), recipe, self.path)
        self.recipe.write_text(text, encoding="utf-8")

    def clear(self) -> None:
        """Forget the run, keeping the images it trained on."""
        for path in (self.recipe, self.init, self.metrics, self.state, self.delta):
            path.unlink(missing_ok=True)
        for path in self.path.glob("montage-*.png"):
            path.unlink()

    def montage(self, step: int) -> Path:
        """Where the montage of a step goes."""
        return self.path / f"montage-{step:06d}.png"

    def rewind(self, step: int) -> None:
        """Drop the metrics of steps after `step`, which a run that goes on from there makes again."""
        if self.metrics.exists():
            lines = self.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
            # A kill may have cut the last line short.
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
            self.metrics.write_text("".join(kept), encoding="utf-8")

    def add_metrics(self, metrics: StepMetrics) -> None:
        """Append a step's metrics as a line of JSON."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(metrics)) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The steps of a metrics file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def loss_by_sigma(steps: list[dict[str, Any]], window: int) -> tuple[list[int], dict[str, list[float]]]:
    """Mean losses per range of sigma over windows of steps: the last step of each window, and a curve per range.

    A range without samples in a window is NaN there.
    """
    ends = list(range(window, len(steps) + 1, window))
    curves: dict[str, list[float]] = {}
    for i, (low, high) in enumerate(zip(SIGMA_EDGES, SIGMA_EDGES[1:], strict=False)):
        curve = []
        for end in ends:
            rows = steps[end - window : end]
            count = sum(row["sigma_count"][i] for row in rows)
            curve.append(sum(row["sigma_loss"][i] for row in rows) / count if count else math.nan)
        curves[f"{low:.1f} to {high:.1f}"] = curve
    return [steps[end - 1]["step"] for end in ends], curves


def _check_same(before: Recipe, now: Recipe, path: Path) -> None:
    """Hold a run to its model, data and training; how long it goes on and what it shows may change."""
    for section in ("model", "data", "training"):
        old, new = dataclasses.asdict(getattr(before, section)), dataclasses.asdict(getattr(now, section))
        for name in old:
            if old[name] != new[name] and (section, name) != ("training", "steps"):
                raise ValueError(
                    f"{path} holds a run with [{section}] {name} = {old[name]!r}, but the recipe says {new[name]!r}: "
                    "choose another --output, or --restart to begin anew."
                )
