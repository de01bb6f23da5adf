"""Tables of captioned images: CSV, JSON lines and kohya's metadata.json, as users' tools write them."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .problems import Problem

SUFFIXES = (".csv", ".tsv", ".jsonl")
JSON_SUFFIX = ".json"
"""File names of kohya's metadata; other tools use such files for other data, so only these names are read."""
IMAGE_COLUMNS = ("image", "file_name", "filename", "image_path", "path")
CAPTION_COLUMNS = ("prompt", "text", "caption")
SEED_COLUMN = "seed"
DELIMITERS = ",;\t"
MAX_SEED = (1 << 64) - 1


@dataclass(frozen=True)
class TableRow:
    """A row's values, stripped: `line` counts from 1 (in JSON, its entries), `image` is a path beside or below
    the table."""

    line: int
    image: str
    caption: str
    seed: int | None


@dataclass
class Table:
    """The rows of a table, its invalid lines, whether it has the required columns, and why it is not text."""

    rows: list[TableRow] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    known: bool = False
    unreadable: str | None = None

    @property
    def fault(self) -> str | None:
        """What is wrong with a table that is not text or of which no line is valid JSON; None for others."""
        wrong = self.problems and not self.known and all(p.reason.startswith(_NOT_JSON) for p in self.problems)
        return str(self.problems[0]) if wrong else self.unreadable


def read(path: Path, required: bool) -> Table:
    """Read a table of images; one that is not `known` is of another kind, which a required one must not be.

    Raises:
        ValueError: if a required table has no columns for images and captions, or is not text.
    """
    try:
        text = decoded(path)
    except ValueError as error:
        if required:
            raise
        return Table(unreadable="it " + str(error).removeprefix(f"{path} ").rstrip("."))
    table = _READERS.get(path.suffix.lower(), _read_csv)(text, _OF_IMAGES)
    if required:
        images, captions = ", ".join(IMAGE_COLUMNS), ", ".join(CAPTION_COLUMNS)
        _complain(path, table, f"no column for images ({images}) or none for captions ({captions})")
    return table


def read_captions(path: Path) -> Table:
    """Read a table's captions, whether it names images or not: CSV, TSV or JSON lines with one of CAPTION_COLUMNS.

    Raises:
        ValueError: if it has no such column, or is not text.
    """
    text = decoded(path)
    table = _READERS.get(path.suffix.lower(), _read_csv)(text, {"caption": CAPTION_COLUMNS})
    _complain(path, table, f"no column named {' or '.join(CAPTION_COLUMNS)}")
    return table


def _complain(path: Path, table: Table, lacks: str) -> None:
    """Refuse a file that is not a table of the required kind, with the reason."""
    if table.known:
        return
    if table.fault:
        raise ValueError(f"{path} cannot be read: {table.fault}.")
    where = "its first line" if path.suffix.lower() in (".csv", ".tsv") else "every line"
    raise ValueError(f"{path} has {lacks}: name them in {where}.")


def csv_bytes(rows: Iterable[Sequence[str]]) -> bytes:
    """Rows as the content of a CSV file."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def decoded(path: Path) -> str:
    """A text file's content: UTF-8 with or without a byte order mark, or UTF-16, which is also detected without one.

    Raises:
        ValueError: if it is neither, or cannot be read.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
    try:
        text = raw.decode(_encoding(raw))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: save it as UTF-8.") from error
    if "\0" in text:
        raise ValueError(f"{path} is not UTF-8 text, it holds NUL characters: save it as UTF-8.")
    return text


def _encoding(raw: bytes) -> str:
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    # UTF-16 without a mark: text has no NUL characters, and the high byte of common letters is zero. In Chinese only
    # spaces and line ends have one, but its bytes are not UTF-8; a stray NUL in a damaged UTF-8 text is not a letter.
    sample = raw[:_SAMPLE]
    if len(raw) % 2 == 0 and b"\0" in sample:
        even, odd = sample[::2].count(0), sample[1::2].count(0)
        if (even == 0 or odd == 0) and (4 * (even + odd) >= len(sample) or not _is_utf8(raw)):
            return "utf-16-le" if odd else "utf-16-be"
    return "utf-8-sig"


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def is_text(text: str) -> bool:
    """Whether a text can be written as UTF-8; escapes in JSON and file names on Linux may contain text that cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


_OF_IMAGES = {"image": IMAGE_COLUMNS, "caption": CAPTION_COLUMNS}
"""The required columns of a table of images, each with its possible names."""
_NOT_JSON = "it is not valid JSON"
_MARK = "\ufeff"
_SAMPLE = 1 << 16  # bytes for detecting a text's encoding


def _read_csv(text: str, needed: Mapping[str, Sequence[str]]) -> Table:
    header, _, _ = text.lstrip().partition("\n")
    for delimiter in DELIMITERS:
        try:
            names = next(csv.reader([header.strip()], delimiter=delimiter), [])
        except csv.Error:
            continue
        columns = _columns(names, needed)
        if columns:
            return _csv_rows(text, delimiter, columns)
    return Table()


def _csv_rows(text: str, delimiter: str, columns: Mapping[str, int]) -> Table:
    table = Table(known=True)
    # Strict: a stray quote would otherwise silently swallow the rows up to the next quote.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    width = 0
    while True:
        before = reader.line_num
        try:
            cells = next(reader)
        except StopIteration:
            return table
        except csv.Error as error:
            _malformed(table, before + 1, reader.line_num, str(error))
            continue
        if not any(cell.strip() for cell in cells):
            continue
        if not width:
            width = len(cells)
            continue
        if any(cell.strip() for cell in cells[width:]):
            reason = f"it has more cells than there are columns: quote a text that has {delimiter!r} in it"
            table.problems.append(Problem(f"line {before + 1}", reason))
            continue
        values = {kind: cells[column] if column < len(cells) else "" for kind, column in columns.items()}
        _add(table, before + 1, values)


def _malformed(table: Table, first: int, last: int, error: str) -> None:
    """One problem for the lines of a broken row; a quote that swallows lines costs that many samples."""
    lines = f"line {first}" if last <= first else f"lines {first} to {last}"
    table.problems.append(Problem(lines, f"the quotes do not match ({error})", max(1, last - first + 1)))


def _read_lines(text: str, needed: Mapping[str, Sequence[str]]) -> Table:
    table = Table()
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.strip().strip(_MARK)  # concatenated files have one in the middle
        if not line:
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            advice = "remove the comma at its end" if line.endswith(",") else "write one object in braces per line"
            table.problems.append(Problem(f"line {number}", f"{_NOT_JSON}: {advice}"))
            continue
        _add_object(table, number, values, needed)
    return table


def _read_json(text: str, needed: Mapping[str, Sequence[str]]) -> Table:
    """kohya's metadata, {image: {"caption": ..., "tags": ...}}, or a list of objects like those of JSON lines."""
    table = Table()
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        table.problems.append(Problem("line 1", f"{_NOT_JSON}: export it again"))
        return table
    if isinstance(values, list):
        for number, entry in enumerate(values, start=1):
            _add_object(table, number, entry, needed)
    elif isinstance(values, dict):
        for number, (image, entry) in enumerate(values.items(), start=1):
            if isinstance(entry, dict) and (caption := _kohya_caption(entry)):
                table.known = True
                _add(table, number, {"image": image, "caption": caption})
    return table


def _kohya_caption(entry: Mapping[str, Any]) -> str:
    """A caption followed by its tags, joined as in kohya's trainers."""
    texts = [entry.get("caption"), entry.get("tags")]
    return ", ".join(text for text in texts if isinstance(text, str) and text.strip())


def _add_object(table: Table, number: int, values: Any, needed: Mapping[str, Sequence[str]]) -> None:
    if not isinstance(values, dict):
        table.problems.append(Problem(f"line {number}", "it is not a JSON object"))
        return
    columns = _columns(list(values), needed)
    if columns is None:
        table.problems.append(Problem(f"line {number}", f"it has no {' or no '.join(needed)}"))
        return
    table.known = True
    cells = list(values.values())
    _add(table, number, {kind: cells[column] for kind, column in columns.items()})


_READERS = {".jsonl": _read_lines, JSON_SUFFIX: _read_json}
"""The readers of tables by suffix; all other tables are CSV."""


def _columns(names: Sequence[str], needed: Mapping[str, Sequence[str]]) -> dict[str, int] | None:
    """The columns that hold the required values, and seeds; None unless all required ones exist."""
    plain = [name.strip().lower() for name in names]
    columns = {}
    for kind, accepted in needed.items():
        found = next((plain.index(name) for name in accepted if name in plain), None)
        if found is None:
            return None
        columns[kind] = found
    if SEED_COLUMN in plain:
        columns["seed"] = plain.index(SEED_COLUMN)
    return columns


def _add(table: Table, line: int, values: Mapping[str, Any]) -> None:
    image, caption = values.get("image", ""), values["caption"]
    if not isinstance(image, str) or not isinstance(caption, str | None):
        table.problems.append(Problem(f"line {line}", "image and caption must be texts"))
        return
    if not is_text(image) or not is_text(caption or ""):
        table.problems.append(Problem(f"line {line}", "it contains half a character (a lone surrogate)"))
        return
    try:
        seed = _seed(values.get("seed"))
    except ValueError:
        shown = str(values["seed"])[:40]
        table.problems.append(Problem(f"line {line}", f"the seed {shown!r} is not a whole number from 0 to 2**64 - 1"))
        return
    table.rows.append(TableRow(line, image.strip(), (caption or "").strip(), seed))


def _seed(value: Any) -> int | None:
    """A seed as tables contain it: empty, 17, "17", or 17.0 if a program converted a column with gaps to numbers."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError
    text = str(value).strip()
    seed = int(text.removesuffix(".0"))
    if not 0 <= seed <= MAX_SEED:
        raise ValueError
    return seed
