"""A training run's folder: recipe, metrics, montages, state, delta and report, each at its place.

Nothing in it names its own place, so that it may be moved, to another machine too.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

from .. import training_state
from ..atomic import remove, write_bytes
from . import recipe as recipes
from .metrics import RunMetrics
from .recipe import Recipe

_MAY_CHANGE = {
    "model": ("base",),  # held by the identity instead, for files move
    "data": ("path", "workers", "max_bad_share"),
    "training": training_state.MAY_CHANGE,
}


class RunFolder:
    """The files of one run.

    Args:
        path: the folder, made where it is missing.
    """

    def __init__(self, path: Path):
        self.path = path
        self.recipe = path / "recipe.toml"
        self.identity = path / "identity.json"
        self.plan = path / "plan.txt"
        self.init = path / "init.safetensors"
        self.images = path / "images"
        self.index = path / "sizes.json"
        self.metrics = path / "metrics.jsonl"
        self.problems = path / "left-out.txt"
        self.events = path / "events"
        self.state = path / "state.safetensors"
        self.delta = path / "delta.safetensors"
        self.report = path / "report.html"

    def begin(self, recipe: Recipe) -> None:
        """Make the folder and keep the recipe in it. A run that has saved nothing yet gives way to another.

        Raises:
            ValueError: if the folder holds a run with another model, other data or other training settings, or
                cannot be written.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if self.recipe.exists():
            try:
                _check_same(recipes.load(self.recipe), recipe, self.path)
            except ValueError:
                if self.state.exists():
                    raise
                self.clear()
        write_bytes(self.recipe, recipes.to_toml(recipe).encode())

    def identify(self, identity: dict[str, str]) -> None:
        """Hold the run to the model and data that it began with, wherever they lie now.

        Args:
            identity: a fingerprint each of "base" and "data".

        Raises:
            ValueError: if they are others than the folder's run began with.
        """
        if self.identity.exists() and self.state.exists():
            before = json.loads(self.identity.read_text(encoding="utf-8"))
            for what, where in (("base", "[model] base"), ("data", "[data] path")):
                if before.get(what) != identity[what]:
                    raise ValueError(
                        f"{self.path} holds a run on another content of {where}: put back what it began with, or begin "
                        "anew in another folder."
                    )
        write_bytes(self.identity, json.dumps(identity, indent=1).encode())

    def clear(self) -> None:
        """Forget the run, keeping the images it trained on.

        Raises:
            CheckpointError: if a file cannot be removed, as when somebody reads it on Windows. What would be gone on
                from goes first, so that no other run begins with it.
        """
        files = (self.state, self.recipe, self.identity, self.plan, self.init, self.index, self.metrics, self.problems)
        events = [path for path in self.events.glob("*") if path.is_file()]
        for path in (*files, self.delta, self.report, *self.montages(), *events):
            remove(path)
        if self.events.is_dir():
            shutil.rmtree(self.events)

    def montage(self, step: int) -> Path:
        """Where the montage of a step goes."""
        return self.path / f"montage-{step:06d}.png"

    def montages(self) -> list[Path]:
        """The montages there are, the first first."""
        return sorted(self.path.glob("montage-*.png"), key=lambda path: (len(path.name), path.name))

    def rewind(self, step: int) -> None:
        """Drop the metrics of steps after `step`, which a run that goes on from there makes again."""
        if self.metrics.exists():
            lines = self.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
            # A kill may have cut the last line short.
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
            if len(kept) != len(lines):
                write_bytes(self.metrics, "".join(kept).encode())

    def add_metrics(self, metrics: RunMetrics) -> None:
        """Append a step's metrics as a line of JSON.

        Raises:
            ValueError: if the disk is full or refuses.
        """
        try:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(dataclasses.asdict(metrics)) + "\n")
        except OSError as error:
            raise ValueError(
                f"{self.metrics} could not be written ({error.strerror or error}): make room, then start again to go "
                "on from the last save."
            ) from error


def _check_same(before: Recipe, now: Recipe, path: Path) -> None:
    """Hold a run to its model, data and training; how long it goes on and what it shows may change."""
    for section, free in _MAY_CHANGE.items():
        old, new = dataclasses.asdict(getattr(before, section)), dataclasses.asdict(getattr(now, section))
        for name in old:
            if old[name] != new[name] and name not in free:
                raise ValueError(
                    f"{path} holds a run with [{section}] {name} = {old[name]!r}, but the recipe says {new[name]!r}: "
                    "keep to what it began with, choose another folder or begin anew."
                )
