"""A training run's folder: recipe, metrics, montages, state, delta and report, each at its place.

Nothing in it names its own place, so that it may be moved, to another machine too.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ..files.atomic import move, remove, write_bytes
from ..files.safetensors_header import CheckpointError
from ..training import state as training_state
from . import lock
from . import recipe as recipes
from .metrics import RunMetrics
from .recipe import Recipe

_MAY_CHANGE = {
    "model": ("base",),  # held by the identity instead, for files move
    "data": ("path", "workers", "max_bad_share"),
    "training": training_state.MAY_CHANGE,
}
_WHERE = {"base": "[model] base", "data": "[data] path"}

LOCK = "run.lock"
ASIDE = "earlier"
"""A run that another one takes the place of goes to a folder of this name and a number."""


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

    @contextmanager
    def held(self) -> Iterator[bool]:
        """Keep other processes out for the length of the block; False where the file system knows no locks.

        Raises:
            FolderInUse: if another process trains here.
        """
        with lock.held(self.path, LOCK) as is_held:
            yield is_held

    def continues(self, recipe: Recipe) -> bool:
        """Whether what lies here is of a run by this recipe, be it only a beginning.

        Raises:
            ValueError: if the folder holds a save of a run with another model, other data or other training settings.
        """
        if self.recipe.exists():
            try:
                _check_same(recipes.load(self.recipe), recipe, self.path)
            except ValueError:
                if self.state.exists():
                    raise
                return False
        return True

    def begin(self, recipe: Recipe, anew: bool = False) -> Path | None:
        """Make the folder and keep the recipe in it; what a run before has left makes way if it is not resumed.

        Args:
            recipe: of the run.
            anew: do not resume the run that is there.

        Returns:
            The folder that a run before was moved to. Of one that never saved anything, nothing is kept.

        Raises:
            ValueError: if the folder holds another run and it is not begun anew, or cannot be written.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        same = not anew and self.continues(recipe)
        aside = None
        # A delta without a state is the end of a run whose user has made room.
        if (self.state.exists() and not same) or (self.delta.exists() and not (same and self.state.exists())):
            aside = self.set_aside()
        elif not same:
            self.clear()
        write_bytes(self.recipe, recipes.to_toml(recipe).encode())
        return aside

    def set_aside(self) -> Path:
        """Move the run into a folder of its own in this one, from which it can be resumed.

        Raises:
            CheckpointError: if a file cannot be moved, as when somebody reads it on Windows; all is as before then.
        """
        numbers = itertools.count(1)
        target = next(path for path in (self.path / f"{ASIDE}-{number}" for number in numbers) if not path.exists())
        target.mkdir()
        moved: list[Path] = []
        try:
            # What is resumed from goes first, so that after a kill no other run begins with it.
            for path in (path for path in (*self._files(), self.events) if path.exists()):
                move(path, target / path.name)
                moved.append(path)
        except CheckpointError:
            for path in reversed(moved):
                move(target / path.name, path)
            target.rmdir()
            raise
        return target

    def check_data(self, fingerprint: str) -> None:
        """Hold a run that is resumed to the data that it began with, wherever they lie now; errors as `identify`."""
        self._check_identity({"data": fingerprint})

    def identify(self, identity: dict[str, str]) -> None:
        """Hold the run to the model and data that it began with, wherever they lie now.

        Args:
            identity: a fingerprint each of "base" and "data".

        Raises:
            ValueError: if they are others than the folder's run began with.
        """
        self._check_identity(identity)
        write_bytes(self.identity, json.dumps(identity, indent=1).encode())

    def _check_identity(self, identity: Mapping[str, str]) -> None:
        if not (self.identity.exists() and self.state.exists()):
            return
        before = json.loads(self.identity.read_text(encoding="utf-8"))
        for what, now in identity.items():
            if before.get(what) != now:
                raise ValueError(
                    f"{self.path} holds a run on another content of {_WHERE[what]}: put back what it began with, or "
                    "begin anew in another folder."
                )

    def clear(self) -> None:
        """Delete the run, keeping the images it trained on.

        Raises:
            CheckpointError: if a file cannot be removed, as when somebody reads it on Windows. What would be resumed
                from goes first, so that no other run begins with it.
        """
        for path in (*self._files(), self.index, *(path for path in self.events.glob("*") if path.is_file())):
            remove(path)
        if self.events.is_dir():
            shutil.rmtree(self.events)

    def _files(self) -> list[Path]:
        """What is of this run alone, there or not, the state first."""
        files = (self.state, self.delta, self.recipe, self.identity, self.plan, self.init, self.metrics, self.problems)
        return [*files, self.report, *self.montages()]

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
