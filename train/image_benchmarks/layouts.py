"""The folders that the scorers of GenEval and DPG-Bench read, filled image by image.

GenEval: `00000/metadata.jsonl` and `00000/samples/0000.png` to `0003.png`. DPG-Bench: one PNG of a prompt's name, its
four images in a square of two by two, and nothing else in the folder. What is ours (the settings, single images that
wait for their square, the report) is in a folder beside, so that the scorers see only their own layout. A kill at any
moment leaves complete images, and the next start makes the missing ones.
"""

from __future__ import annotations

import abc
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ...l2p_core.dataset.images import opened
from ...l2p_core.dataset.pictures import png
from ...l2p_core.dataset.synthesis import TEXT_KEY, FolderSettings, is_whole
from ...l2p_core.files.atomic import make_folder, remove, write_bytes
from .benchmarks import PER_PROMPT, Benchmark, Prompt, Shot

_SUFFIX = "-run"
_SINGLE = "single"
"""In it, the images of DPG-Bench that wait for their square."""


def beside(folder: Path) -> Path:
    """The folder of settings and report beside a benchmark's images."""
    return folder.with_name(folder.name + _SUFFIX)


class BenchmarkFolder(abc.ABC):
    """A benchmark's images.

    Args:
        folder: that the scorer will read, created if missing.
        benchmark: whose layout it has.
        wanted: the images.
        settings: what they depend on besides prompt and seed.

    Attributes:
        beside: the folder of settings and report.

    Raises:
        ValueError: if the folder holds images of other settings or prompts, or cannot be created.
    """

    def __init__(self, folder: Path, benchmark: Benchmark, wanted: Sequence[Shot], settings: FolderSettings):
        self.folder, self.benchmark, self.wanted = folder, benchmark, list(wanted)
        self.settings = {name: str(value) for name, value in settings.items()}
        self.beside = beside(folder)
        self._record = self.beside / "settings.json"
        make_folder(folder)
        self._begin()
        self._done = {shot.name for shot in self.wanted if self._is_there(shot)}

    @property
    def todo(self) -> list[Shot]:
        """The images still to be generated, in order."""
        return [shot for shot in self.wanted if shot.name not in self._done]

    @property
    def done(self) -> list[Shot]:
        """The images that exist."""
        return [shot for shot in self.wanted if shot.name in self._done]

    def write(self, shot: Shot, image: Image.Image) -> None:
        """Add an image.

        Raises:
            ValueError: if it is not square, the disk is full or the system refuses to write.
        """
        if image.width != image.height:
            raise ValueError(
                f"The images are {image.width} x {image.height} pixels, but {self.benchmark.title} is scored on "
                "squares: set width and height to the same number."
            )
        self._write(shot, png(image.convert("RGB"), {TEXT_KEY: self._text(shot)}))
        self._done.add(shot.name)

    def _text(self, shot: Shot) -> str:
        about = {"prompt": shot.prompt, "benchmark": self.benchmark.title, "number": shot.number}
        return json.dumps({**about, **self.settings})

    def _begin(self) -> None:
        """Record the settings, or compare them with those of the images that are there."""
        lines = "\n".join(f"{shot.of.name} {shot.prompt}" for shot in self.wanted)
        prompts = hashlib.sha256(lines.encode()).hexdigest()[:16]
        record = {"benchmark": self.benchmark.title, "prompts": prompts, **self.settings}
        there = any(self.folder.iterdir()) or any((self.beside / _SINGLE).glob("*.png"))
        if there and not self._record.exists():
            raise ValueError(f"{self.folder} holds other files: give a new folder, because the scorer reads all of it.")
        if not there:
            make_folder(self.beside)
            write_bytes(self._record, json.dumps(record, indent=1).encode())
            return
        try:
            before = dict(json.loads(self._record.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self._record} is damaged: give a new folder.") from error
        for name in dict.fromkeys([*before, *record]):
            if before.get(name) != record.get(name):
                was, now = (str(found.get(name) or "none")[:80] for found in (before, record))
                raise ValueError(
                    f"The images in {self.folder} were made with {name} {was}, not {now}: use the same to resume, or "
                    "another folder."
                )

    @abc.abstractmethod
    def finished(self, shot: Shot) -> Path:
        """The file that the scorer reads for an image, which is there once its prompt is finished."""

    @abc.abstractmethod
    def _is_there(self, shot: Shot) -> bool:
        """Whether an image exists and is complete."""

    @abc.abstractmethod
    def _write(self, shot: Shot, content: bytes) -> None:
        """Store an image, a PNG file's content, in its place."""


class GenEvalFolder(BenchmarkFolder):
    """GenEval's layout."""

    def finished(self, shot: Shot) -> Path:
        return self.folder / shot.name

    def _is_there(self, shot: Shot) -> bool:
        if not is_whole(self.finished(shot)):
            return False
        self._describe(shot.of)
        return True

    def _write(self, shot: Shot, content: bytes) -> None:
        path = self.finished(shot)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._describe(shot.of)
        write_bytes(path, content)

    def _describe(self, prompt: Prompt) -> None:
        """Write the prompt's line, without which the scorer stops, if it is not there."""
        line = self.folder / prompt.name / "metadata.jsonl"
        if not line.exists():
            write_bytes(line, f"{prompt.line}\n".encode())


class DpgFolder(BenchmarkFolder):
    """DPG-Bench's layout: images wait beside until their prompt's four are there."""

    def finished(self, shot: Shot) -> Path:
        return self.folder / f"{shot.of.name}.png"

    def _is_there(self, shot: Shot) -> bool:
        if is_whole(self.finished(shot)):
            return True
        whole = is_whole(self._single(shot.of, shot.number))
        if whole and shot.number == PER_PROMPT - 1:
            self._join(shot)  # a kill may have come between the last image and its square
        return whole

    def _write(self, shot: Shot, content: bytes) -> None:
        single = self._single(shot.of, shot.number)
        single.parent.mkdir(exist_ok=True)
        write_bytes(single, content)
        self._join(shot)

    def _single(self, prompt: Prompt, number: int) -> Path:
        return self.beside / _SINGLE / f"{prompt.name}-{number}.png"

    def _join(self, shot: Shot) -> None:
        """Write a prompt's square, if its four images are there: in reading order, two by two."""
        singles = [self._single(shot.of, number) for number in range(PER_PROMPT)]
        if not all(is_whole(single) for single in singles):
            return
        sheet = None
        for number, single in enumerate(singles):
            with opened(single, ("PNG",)) as image:
                sheet = sheet or Image.new("RGB", (2 * image.width, 2 * image.height))
                sheet.paste(image, (number % 2 * image.width, number // 2 * image.height))
        assert sheet is not None
        write_bytes(self.finished(shot), png(sheet, {TEXT_KEY: self._text(shot)}))
        for single in singles:
            remove(single)


FOLDERS: dict[str, type[GenEvalFolder | DpgFolder]] = {"geneval": GenEvalFolder, "dpg": DpgFolder}
"""{key of the benchmark: its layout}"""
