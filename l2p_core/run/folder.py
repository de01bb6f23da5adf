"""A training run's folder: recipe, metrics, montages, state, delta and report.

No file in it contains its own location, so the folder may be moved, even to another machine.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from ..dataset.headers import is_foreign
from ..files import lock
from ..files.atomic import move, remove, write_bytes
from ..files.safetensors_header import CheckpointError
from ..training import state as training_state
from . import recipe as recipes
from .metrics import RunMetrics
from .recipe import Recipe

_MAY_CHANGE = {
    "model": ("base",),  # checked by the identity instead, because files move
    "data": ("path", "workers", "max_bad_share"),
    "training": training_state.MAY_CHANGE,
}
_WHERE = {"base": "[model] base", "source": "[model] base", "data": "[data] path"}

LOCK = "run.lock"
ASIDE = "earlier"
"""A replaced run is moved to a folder with this name and a number."""
EVENT_FILES = "events.out.tfevents.*"
_MONTAGE = re.compile(r"montage-\d{6,}\.png")


class RunFolder:
    """The files of one run.

    Args:
        path: the folder, created if missing. Files in it that no run wrote are moved aside before a run begins.
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
        self.source_images = path / "source-images.png"
        self.about_source = path / "source-images.json"
        self.card = path / "delta.md"
        self.card_picture = path / "delta-montage.png"
        self.events = path / "events"
        self.state = path / "state.safetensors"
        self.delta = path / "delta.safetensors"
        self.report = path / "report.html"

    def held(self, note: Callable[[str], object], does: str = "trains") -> AbstractContextManager[None]:
        """Keep other processes out within the block; arguments and errors as for `lock.held`."""
        return lock.held(self.path, LOCK, does, note)

    def continues(self, recipe: Recipe) -> bool:
        """Whether the folder belongs to a run of this recipe, even without a save.

        Raises:
            ValueError: if the folder holds a save of a run with another model, other data or other training settings.
        """
        if not self.recipe.exists():
            return self.state.exists() or not self._present()
        try:
            _check_same(self._kept(), recipe, self.path)
        except ValueError:
            if self.state.exists():
                raise
            return False
        return self.state.exists() or self._is_of_run() or not self._present()

    def begin(self, recipe: Recipe, anew: bool = False) -> Path | None:
        """Create the folder and store the recipe in it; a previous run that is not resumed is moved away.

        Args:
            recipe: of the run.
            anew: do not resume the existing run.

        Returns:
            The folder that a previous run, or other files with the names of a run's, were moved to. A run
            without any save is deleted.

        Raises:
            ValueError: if the folder holds another run and `anew` is not set, or cannot be written.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        same = not anew and self.continues(recipe)
        aside = None
        # A delta without a state is the end of a run whose user has freed disk space.
        if (self.state.exists() and not same) or (self.delta.exists() and not (same and self.state.exists())):
            aside = self.set_aside()
        elif not same and self._is_of_run():
            self.clear()
        elif not same and self._present():
            aside = self.set_aside()
        self._keep(recipe)
        return aside

    def _keep(self, recipe: Recipe) -> None:
        """Store the recipe; a file that its user wrote stays if it says the same, and is renamed if it does not."""
        if self.recipe.exists() and not self._is_written_by_run():
            with suppress(ValueError):
                if self._kept() == recipe:
                    return
            move(self.recipe, _unused(self.path, "recipe-", ".toml"))
        write_bytes(self.recipe, recipes.to_toml(recipe).encode())

    def _kept(self) -> Recipe:
        """The stored recipe; its user may have written relative paths."""
        return recipes.with_paths(recipes.load(self.recipe), self.path)

    def _is_of_run(self) -> bool:
        """Whether a run has written here, so that files with a run's names are that run's."""
        return self._is_written_by_run() or (self.recipe.exists() and self.identity.exists())

    def _is_written_by_run(self) -> bool:
        """Whether the recipe holds nothing but what a run writes, of this version or, with fewer keys, of another."""
        if not self.recipe.exists():
            return False
        try:
            lines = self.recipe.read_text(encoding="utf-8").splitlines()
            return set(lines) <= set(recipes.to_toml(recipes.load(self.recipe)).splitlines())
        except ValueError:
            return False

    def _present(self) -> list[Path]:
        """What is here with the name of a run's file, other than a recipe."""
        return [path for path in (*self._files(), self.events) if path != self.recipe and path.exists()]

    def set_aside(self) -> Path:
        """Move the run into a subfolder, from which it can be resumed.

        Raises:
            CheckpointError: if a file cannot be moved, for example because Windows has it open; nothing has changed
                then.
        """
        target = _unused(self.path, f"{ASIDE}-")
        target.mkdir()
        moved: list[Path] = []
        files = self._present()
        if self._is_written_by_run():
            files.append(self.recipe)
        elif self._is_of_run():
            # What a user wrote stays in its place, where its relative paths start.
            write_bytes(target / self.recipe.name, recipes.to_toml(self._kept()).encode())
        try:
            # The state goes first, so that after a kill no other run starts from it.
            for path in files:
                move(path, target / path.name)
                moved.append(path)
        except CheckpointError:
            for path in reversed(moved):
                move(target / path.name, path)
            remove(target / self.recipe.name)
            target.rmdir()
            raise
        return target

    def is_made_from(self, source: str) -> bool:
        """Whether the initialisation here was made from this source, by its fingerprint."""
        return self.init.exists() and self._identity().get("source") == source

    def identify(self, identity: dict[str, str]) -> None:
        """Check that the run has its original model and data, at any location.

        Args:
            identity: one fingerprint each of "base" and "data"; of an initialisation also of its "source".

        Raises:
            ValueError: if they differ from those that the folder's run began with.
        """
        self.check(identity)
        write_bytes(self.identity, json.dumps(self._identity() | identity, indent=1).encode())

    def check(self, identity: Mapping[str, str]) -> None:
        """Check that a resumed run has its original model and data; arguments and errors as for `identify`."""
        before = self._identity() if self.state.exists() else {}
        for what, now in identity.items():
            # Version 0.1 did not record sources.
            if before.get(what, now) != now:
                raise ValueError(
                    f"{self.path} holds a run with other content of {_WHERE[what]}: restore what it began with, "
                    "begin anew, or start a run under another name."
                )

    def _identity(self) -> dict[str, str]:
        """What the run here began with; empty if it has not come that far."""
        return json.loads(self.identity.read_text(encoding="utf-8")) if self.identity.exists() else {}

    def clear(self) -> None:
        """Delete the run, keeping the images it trained on and a recipe that its user wrote.

        Raises:
            CheckpointError: if a file cannot be removed, for example because Windows has it open. The state goes first,
                so that no other run starts from it.
        """
        files = self._files() if self._is_written_by_run() else self._present()
        index = [] if is_foreign(self.index) else [self.index]
        for path in (*(path for path in files if path != self.events), *index, *self.events.glob(EVENT_FILES)):
            remove(path)
        if self.events.is_dir():
            with suppress(OSError):  # other files keep the folder
                self.events.rmdir()

    def _files(self) -> list[Path]:
        """The files of this run alone, existing or not, the state first."""
        files = (self.state, self.delta, self.recipe, self.identity, self.plan, self.init, self.metrics, self.problems)
        shown = (self.source_images, self.about_source, self.card, self.card_picture)
        return [*files, self.report, *shown, *self.montages()]

    def montage(self, step: int) -> Path:
        """The path of a step's montage."""
        return self.path / f"montage-{step:06d}.png"

    def montages(self) -> list[Path]:
        """The existing montages in order."""
        found = (path for path in self.path.glob("montage-*.png") if _MONTAGE.fullmatch(path.name))
        return sorted(found, key=lambda path: (len(path.name), path.name))

    def rewind(self, step: int) -> None:
        """Drop the metrics of steps after `step`, which a resumed run computes again."""
        if self.metrics.exists():
            lines = self.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
            # A kill may have truncated the last line.
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
                f"{self.metrics} could not be written ({error.strerror or error}): free some space, then start again "
                "to resume from the last save."
            ) from error


def montage_step(montage: Path) -> int:
    """The step of a montage, from its name."""
    return int(montage.stem.removeprefix("montage-"))


def _unused(folder: Path, beginning: str, end: str = "") -> Path:
    """The first of numbered names in a folder that is free."""
    names = (folder / f"{beginning}{number}{end}" for number in itertools.count(1))
    return next(path for path in names if not path.exists())


def _check_same(before: Recipe, now: Recipe, path: Path) -> None:
    """Check that model, data and training are unchanged; the run's length and output may change."""
    for section, free in _MAY_CHANGE.items():
        old, new = dataclasses.asdict(getattr(before, section)), dataclasses.asdict(getattr(now, section))
        for name in old:
            if old[name] != new[name] and name not in free:
                raise ValueError(
                    f"{path} holds a run with [{section}] {name} = {old[name]!r}, but the recipe says {new[name]!r}: "
                    "restore the old value, begin anew, or start a run under another name."
                )
