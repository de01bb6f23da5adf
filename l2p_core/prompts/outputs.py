"""The results for users: the list of prompts as a table, and the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..dataset.synthesis import FolderSettings
from ..dataset.tables import csv_bytes
from ..files.atomic import write_bytes
from . import report
from .journal import JournalEntry
from .scheme import Slot

TABLE, REPORT = "prompts.csv", "report.html"
HEADER = ("prompt", "class", "sub_class", "short")
"""Synthesis reads the first column; `short` is the prompt that was rewritten."""


def write_table(folder: Path, prompts: Sequence[JournalEntry]) -> None:
    """Replace the folder's table; without any prompt, remove it.

    Raises:
        ValueError: if it cannot be written.
    """
    if prompts:
        write_bytes(folder / TABLE, table([(entry.text, entry.of, entry.kind, entry.short) for entry in prompts]))
    else:
        (folder / TABLE).unlink(missing_ok=True)


def table(rows: Sequence[Sequence[str]]) -> bytes:
    """The content of a table with HEADER and these rows."""
    return csv_bytes([HEADER, *rows])


def write_report(
    folder: Path, slots: Sequence[Slot], entries: Sequence[JournalEntry], settings: FolderSettings
) -> None:
    """Replace the folder's report.

    Raises:
        ValueError: if it cannot be written.
    """
    write_bytes(folder / REPORT, report.of_work(folder.resolve().name, slots, entries, settings))
