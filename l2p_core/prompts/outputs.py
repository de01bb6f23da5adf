"""The results for users: the list of prompts as a table, and the report (`report`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..dataset.tables import csv_bytes
from ..files.atomic import write_bytes
from .journal import JournalEntry

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
