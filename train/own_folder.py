"""Output folders whose results a command replaces: it marks them as its own and leaves all other files alone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..l2p_core.files.atomic import write_bytes
from ..l2p_core.files.lock import LOCK, held
from ..l2p_core.run.folder import LOCK as RUN_LOCK
from .console import note


@dataclass(frozen=True)
class OwnFolder:
    """The rule by which a command knows its output folder.

    Attributes:
        owner: the command, as worded in sentences.
        marker: name of the file that it leaves in its folder.
        earlier: whether an earlier version, which left no marker, created the folder.
        replaced: names of the files that the command replaces, in lower case; None for everything in the folder.
    """

    owner: str
    marker: str
    earlier: Callable[[Path], bool]
    replaced: Collection[str] | None = None

    def check(self, folder: Path) -> None:
        """Refuse a folder with files that the command did not write and would replace.

        Raises:
            ValueError: in that case.
        """
        if not folder.is_dir() or (folder / self.marker).exists() or self.earlier(folder):
            return
        foreign = sorted(path.name for path in folder.iterdir() if self._is_replaced(path.name))
        if foreign:
            raise ValueError(
                f"{folder} contains {foreign[0]} and was not created by {self.owner}, which replaces previous results: "
                "give another folder with --output."
            )

    @contextmanager
    def held(self, folder: Path) -> Iterator[None]:
        """Hold the folder within the block and mark it: a second process is refused and touches nothing.

        Raises:
            FolderInUse: if another process holds it.
            ValueError: as for `mark`, or if the folder cannot be created.
        """
        with held(folder, LOCK, f"runs {self.owner}", note):
            self.mark(folder)
            yield

    def mark(self, folder: Path) -> None:
        """Create the folder if it is missing, and leave the marker in it.

        Raises:
            CheckpointError: if the disk is full or the system refuses to write.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / self.marker).exists():
            text = f"This folder was created by {self.owner}, which replaces its results on its next run.\n"
            write_bytes(folder / self.marker, text.encode())

    def _is_replaced(self, name: str) -> bool:
        # Case is ignored, as file systems of Windows and macOS ignore it.
        return name not in (LOCK, RUN_LOCK) and (self.replaced is None or name.lower() in self.replaced)
