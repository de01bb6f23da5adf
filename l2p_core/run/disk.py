"""A run's disk usage, planned before anything is loaded, and what to change if the disk is too small.

A save is written beside the previous one, which is removed when the new one is complete, so the plan includes two
states, the larger of the saved files. Caption features are added once the data has been read. Sizes are in bytes; in
sentences 1 GB is 10^9.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..config import PixelConfig
from ..memory.plan import gigabytes, listed, saved_sizes
from ..training_config import TrainingConfig
from . import base, extras
from .folder import RunFolder
from .recipe import Recipe

CAPTIONS = "caption features to encode"


@dataclass(frozen=True)
class DiskPlan:
    """Bytes that a run needs on the disk at its peak.

    Attributes:
        folder: of the run.
        initialisation: its bytes.
        others: bytes of what is not saved at intervals, by purpose, on the run folder's disk.
        copied: whether a copy of the delta goes to that disk as well.
        present: bytes of all these that exist already.
        published: where a copy of the delta goes; None if it is not copied.
        config: of the L2P model.
        training: how it is trained; fixed for a resumed run.
        resumed: whether the run is resumed.
    """

    folder: Path
    initialisation: int
    others: dict[str, int]
    copied: bool
    present: int
    published: Path | None
    config: PixelConfig
    training: TrainingConfig
    resumed: bool

    @cached_property
    def parts(self) -> dict[str, int]:
        """Bytes on the run folder's disk, by purpose."""
        return self.parts_of(self.training)

    @property
    def bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def missing(self) -> int:
        """Free bytes that the run folder's disk must have."""
        return max(0, self.bytes - self.present)

    def sentence(self) -> str:
        """The needs as a sentence."""
        there = f", of which {gigabytes(self.present)} exist already" if self.present else ""
        return f"Needs about {gigabytes(self.bytes)} GB of disk space: {listed(self.parts)}{there}."

    def with_captions(self, folder: Path, size: int) -> DiskPlan:
        """The plan including caption features still to be encoded into a folder, if it is on the same disk.

        Raises:
            ValueError: if it is on another disk, which has too little space.
        """
        if _disk(folder) == _disk(self.folder):
            return dataclasses.replace(self, others={**self.others, CAPTIONS: size})
        if complaint := captions_complaint(folder, size):
            raise ValueError(f"{self.sentence()} {complaint}")
        return self

    def refuse_if_too_much(self, processes: int = 1) -> None:
        """Check the plan against the free space.

        Raises:
            ValueError: if a disk has too little space, with the smallest change that would make the run fit.
        """
        complaint = self.complaint(processes)
        if complaint:
            raise ValueError(f"{self.sentence()} {complaint}")

    def complaint(self, processes: int = 1) -> str:
        """The problem with the disks and what to do, as a sentence; empty if there is enough space."""
        free = _free(self.folder)
        if self.published and not self.copied:
            copy = self.published.parent
            there = _free(copy)
            size = self.parts_of(self.training)["delta"]
            if size > there:
                return (
                    f"The disk of {copy}, where the delta is copied after training, has only {gigabytes(there)} GB "
                    f"free, and {gigabytes(size)} GB are needed: make room there."
                )
        if self.missing <= free:
            return ""
        fitting = ((words, size) for words, size in self._smaller(processes) if size - self.present <= free)
        words, size = next(fitting, ("", 0))
        if words:
            advice = f"It would fit with {words}: then about {gigabytes(size)} GB. Or make"
        elif self.missing - self.others[extras.MONTAGES] <= free:
            advice = "It would fit with fewer or smaller montages ([watch] montage_every, size). Or make"
        else:
            advice = "Make"
        return (
            f"The disk of {self.folder} has only {gigabytes(free)} GB free. {advice} room, or choose a folder on "
            "another disk."
        )

    def parts_of(self, training: TrainingConfig) -> dict[str, int]:
        """`parts` with the saves of another training configuration."""
        state, delta = saved_sizes(self.config, training)
        saves = {"state": state, "the state before it, until a save succeeds": state, "delta": delta}
        copy = {"its published copy": delta} if self.copied else {}
        return {"initialisation": self.initialisation, **saves, **copy, **self.others}  # the largest come first

    def _smaller(self, processes: int) -> Iterator[tuple[str, int]]:
        """Changes that need less space, the smallest first: their description, and the bytes needed then."""
        if self.resumed:
            return
        eight, none = ("optimiser_bits", 8), ("ema_decay", 0.0)
        sharded = processes > 1 and self.training.parallel == "fsdp"
        possible = [
            change
            for change in ([none] if sharded else [eight, none])
            if getattr(self.training, change[0]) != change[1]
        ]
        sets = [*([change] for change in possible), *([possible] if len(possible) > 1 else [])]
        if self.training.policy != "all":
            sets += [[*possible, ("blocks", count)] for count in reversed(range(self.training.blocks))]
        for changes in sets:
            changed = dataclasses.replace(self.training, **dict(changes))  # type: ignore[arg-type]
            words = " and ".join(f"{name} = {value:g}" for name, value in changes)
            yield words, sum(self.parts_of(changed).values())


def planned(
    recipe: Recipe,
    config: PixelConfig,
    training: TrainingConfig,
    folder: RunFolder,
    fresh: bool = False,
    published: Path | None = None,
    initialisation: int | None = None,
) -> DiskPlan:
    """Plan a run's disk usage.

    Args:
        recipe: of the run, with absolute paths.
        config: of the L2P model.
        training: how it is trained.
        folder: of the run; need not exist.
        fresh: whether the folder's content belongs to another run, and stays.
        published: the file that the finished delta is copied to; None if it is not copied.
        initialisation: its bytes, if its source is not available; None determines them from the source.
    """
    extra, extra_there = extras.sizes(recipe, config, folder, fresh)
    there = [] if fresh else [path for path in (folder.state, folder.delta, folder.init) if path.exists()]
    if folder.init in there:
        init = folder.init.stat().st_size
    else:
        init = base.bytes_to_convert(recipe.model) if initialisation is None else initialisation
    copied = published is not None and _disk(published) == _disk(folder.path)
    present = sum(path.stat().st_size for path in there) + extra_there
    resumed = folder.state in there
    return DiskPlan(folder.path, init, extra, copied, present, published, config, training, resumed)


def captions_complaint(folder: Path, size: int) -> str:
    """The problem with the disk of the caption features and what to do, as a sentence; empty if there is enough
    space."""
    free = _free(folder)
    if size <= free:
        return ""
    return (
        f"The caption features still to be encoded need about {gigabytes(size)} GB, but the disk of {folder} has only "
        f"{gigabytes(free)} GB free: make room there, or name a folder on another disk under [captions] cache."
    )


def _existing(path: Path) -> Path:
    """The path, or the nearest existing folder above it."""
    path = path.resolve()
    return next(found for found in (path, *path.parents) if found.exists())


def _disk(path: Path) -> int:
    return os.stat(_existing(path)).st_dev


def _free(path: Path) -> int:
    return shutil.disk_usage(_existing(path)).free
