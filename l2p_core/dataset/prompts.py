"""Lists of prompts for image generation: a text, a text file, or a table."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

from . import tables

SUFFIXES = (".txt", *tables.SUFFIXES)
_SHOWN = 3


def read(path: Path) -> list[str]:
    """The prompts of a file, each once, in order.

    A text file has one prompt per line, and comments in lines that begin with #; a CSV, TSV or JSON-lines file has them
    in a column named prompt, text or caption.

    Raises:
        ValueError: if the file does not exist, has another suffix, has an unreadable row, or contains no prompt.
    """
    return list(dict.fromkeys(read_all(path)))


def read_all(path: Path) -> list[str]:
    """The prompts of a file in order, with repeated ones; otherwise like `read`."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path} is not a list of prompts: give a file of the kind {', '.join(SUFFIXES)}.")
    if path.suffix.lower() == ".txt":
        found = _prompts(tables.decoded(path))
    else:
        table = tables.read_captions(path)
        if table.problems:
            named = "; ".join(str(problem) for problem in table.problems[:_SHOWN])
            raise ValueError(f"{len(table.problems)} rows of {path} cannot be read: {named}.")
        found = [row.caption for row in table.rows if row.caption]
    if not found:
        raise ValueError(f"{path} contains no prompt: write one per line.")
    return found


def from_text(text: str) -> list[str]:
    """The prompts of a text, one per line, each once; empty lines and comments (`comments`) are skipped.

    Raises:
        ValueError: if the text contains half a character, which no file can hold.
    """
    if not tables.is_text(text):
        raise ValueError("The prompts contain half a character (a lone surrogate): type them again.")
    return list(dict.fromkeys(_prompts(text)))


def comments(text: str) -> list[str]:
    """The comment lines of a text: they begin with #, as in the lists of other trainers."""
    return [line.strip() for line in _lines(text) if _is_comment(line)]


def skipped(path: Path) -> str | None:
    """A sentence about the comments in a text file of prompts; None without any."""
    found = comments(tables.decoded(path)) if path.suffix.lower() == ".txt" else []
    if not found:
        return None
    if len(found) == 1:
        return f"1 line that begins with # is skipped as a comment in {path.name}: {found[0][:80]!r}."
    return f"{len(found)} lines that begin with # are skipped as comments in {path.name}, the first: {found[0][:80]!r}."


def _lines(text: str) -> Iterable[str]:
    return io.StringIO(text, newline=None)


def _is_comment(line: str) -> bool:
    return line.lstrip().startswith("#")


def _prompts(text: str) -> list[str]:
    return [line.strip() for line in _lines(text) if line.strip() and not _is_comment(line)]
