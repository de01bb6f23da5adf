"""The journal of written texts: JSON lines that are only ever appended to, each on disk before the next is written.

Everything else follows from it: the missing prompts, the list, the report. A kill at any moment costs the text that was
being written.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..dataset.synthesis import FolderSettings
from ..files.atomic import append, write_bytes

NAME = "journal.jsonl"
FORMAT = 1
_KIND = "l2p_prompts"
"""The key that marks the first line."""

_START = f'{{"{_KIND}"'.encode()


@dataclass(frozen=True)
class JournalEntry:
    """A text that the model wrote.

    Attributes:
        slot: the key of the slot that it was written for.
        attempt: counts from 0 in each slot.
        text: cleaned.
        reason: why it was rejected, of `reasons`; "" for a prompt that was kept.
        of, kind: class and sub-class; "" for a rewritten prompt.
        short: the prompt that was rewritten; "" for a new one.
        corrects: whether it is a correction of the attempt before.
        like: the earlier prompt of which it is a duplicate; "" otherwise.
    """

    slot: str
    attempt: int
    text: str
    reason: str
    of: str = ""
    kind: str = ""
    short: str = ""
    corrects: bool = False
    like: str = ""


class Journal:
    """The journal in a folder.

    Args:
        folder: exists.
        settings: of the work. A journal of other settings is not continued.

    Attributes:
        entries: all texts, in order.

    Raises:
        ValueError: if the journal is not one, is damaged, was written with other settings, or cannot be written.
    """

    def __init__(self, folder: Path, settings: FolderSettings):
        self.path = folder / NAME
        self.entries: list[JournalEntry] = []
        lines = self._lines() if self.path.exists() else []
        if not lines:
            append(self.path, _line({_KIND: FORMAT, **settings}))
        for number, line in enumerate(lines, start=1):
            try:
                values = dict(json.loads(line))
                if number > 1:
                    self.entries.append(JournalEntry(**values))
            except (ValueError, TypeError, RecursionError) as error:
                raise ValueError(
                    f"Line {number} of {self.path} is damaged: repair or remove it, or choose another folder."
                ) from error
            if number == 1:
                _check_settings(self.path, values, settings)

    def add(self, entry: JournalEntry) -> None:
        """Append a text, and wait until it is on disk.

        Raises:
            ValueError: if the disk is full or the system refuses to write; nothing of it is then in the file.
        """
        append(self.path, _line(dataclasses.asdict(entry)))
        self.entries.append(entry)

    def _lines(self) -> list[bytes]:
        """The file's complete lines; the rest of a last one is removed."""
        content = _content(self.path)
        whole, _, cut = content.rpartition(b"\n")
        if not whole and cut[: len(_START)] != _START[: len(cut)]:
            raise ValueError(f"{self.path} is not a journal of prompts: choose another folder.")
        if cut:  # a power failure within the last line
            write_bytes(self.path, content.removesuffix(cut))
        return whole.split(b"\n") if whole else []


def written(folder: Path) -> set[str]:
    """All prompts that the journal in a folder has ever kept; empty without a journal that can be read."""
    path = folder / NAME
    found = set()
    for line in _content(path).splitlines() if path.is_file() else ():
        try:
            values = json.loads(line)
        except ValueError:
            continue  # `Journal` says what is wrong with it
        if isinstance(values, dict) and values.get("reason") == "":
            found.add(str(values.get("text")))
    return found


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error


def _check_settings(path: Path, there: Mapping[str, Any], wanted: FolderSettings) -> None:
    if there.get(_KIND) != FORMAT:
        raise ValueError(f"{path} is not a journal of prompts of this version: choose another folder.")
    for name, value in wanted.items():
        if there.get(name) != value:
            raise ValueError(
                f"The prompts in {path.parent} were written with {name} {there.get(name)}, not {value}: use the "
                "same to resume, or choose another folder."
            )


def _line(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"


def kept(entries: Sequence[JournalEntry]) -> dict[str, JournalEntry]:
    """The prompts, by slot."""
    return {entry.slot: entry for entry in entries if not entry.reason}
